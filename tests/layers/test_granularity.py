from __future__ import annotations

import itertools
from decimal import Decimal

import numpy as np
import pytest

from resa_lens.layers.checkpoints import read_checkpoints
from resa_lens.layers.granularity import (
    AMBIGUOUS,
    AS_LABELLED,
    EXCHANGED,
    NEITHER,
    GranularityTest,
    chance,
    chance_of_print,
    granularity_test,
    printed_counts,
)
from resa_lens.resources import data_path

NS = (30, 30, 40, 500, 198, 272)
GPQA, MINERVA = 4, 5


def paper(name: str) -> tuple[list[str], GranularityTest]:
    table = read_checkpoints(data_path(f"paper/{name}.csv"))
    assert table.questions == NS
    return list(table.row_names), granularity_test(table.cells, table.questions)


def row(*cells: str) -> list[Decimal | None]:
    return [Decimal(cell) if cell else None for cell in cells]


def drawn(rows: int, ns: tuple[int, ...], seed: int) -> list[list[Decimal | None]]:
    """Rows of k/n, printed with two decimals."""
    rng = np.random.default_rng(seed)
    return [
        [Decimal(f"{100 * rng.binomial(n, rng.uniform(0.1, 0.9)) / n:.2f}") for n in ns]
        for _ in range(rows)
    ]


# The paper's tables


@pytest.mark.parametrize(
    ("name", "labelled", "exchanged", "neither"),
    [
        ("tables36_61_layer_checkpoints", 0, 104, 0),
        ("table6_hookpoints", 0, 26, 0),
        ("tables3_4_5_models", 10, 33, 2),
        ("tables8_61_checkpoints", 0, 234, 6),
    ],
)
def test_the_papers_columns(name: str, labelled: int, exchanged: int, neither: int) -> None:
    test = paper(name)[1]
    assert test.counts == {
        AS_LABELLED: labelled, EXCHANGED: exchanged, AMBIGUOUS: 0, NEITHER: neither,
    }  # fmt: skip
    (exchange,) = test.exchanges
    assert exchange.columns == (GPQA, MINERVA)
    assert exchange.reading == (0, 1, 2, 3, 5, 4)
    assert len(exchange.rows) == exchanged
    assert test.untestable == ((0, 1),)


def test_the_ten_rows_copied_from_elsewhere_and_the_two_misprints() -> None:
    names, test = paper("tables3_4_5_models")
    copied = {names[i].split(",")[0] for i, v in enumerate(test.rows) if v.verdict == AS_LABELLED}
    assert copied == {
        "DeepSeek-R1-Distilled-Qwen-1.5B", "STILL-3-1.5B-preview", "Tina-STILL (CoT-free RL)",
        "Tina-STILL", "DeepScaleR-1.5B-Preview", "Tina-DeepScaleR (CoT-free RL)",
        "Tina-DeepScaleR", "Tina-II-Thought",
    }  # fmt: skip
    odd = {names[i].split(",")[0]: v for i, v in enumerate(test.rows) if v.verdict == NEITHER}
    assert set(odd) == {"STILL-CoT-free-SFT", "II-Thought-1.5B-Preview"}
    for verdict in odd.values():
        assert verdict.misfits == (GPQA, MINERVA)
        # One cell alone stands in the way of the exchange.
        assert (verdict.nearest, verdict.nearest_misfits) == ((0, 1, 2, 3, 5, 4), (MINERVA,))


# Rounding


@pytest.mark.parametrize(
    ("value", "n", "decimals", "counts"),
    [
        ("26.67", 30, 2, [8]),
        ("26.66", 30, 2, []),
        ("0.12", 800, 2, [1]),  # 0.125: the half goes down ...
        ("0.13", 800, 2, [1]),  # ... or up
        ("0.14", 800, 2, []),
        ("13", 8, 0, [1]),
        ("12", 8, 0, [1]),
        ("12.5", 8, 1, [1]),
        ("0", 272, 2, [0]),
        ("100", 272, 2, [272]),
        ("50", 500, 0, [248, 249, 250, 251, 252]),  # 49.6 to 50.4
        ("0", 500, 0, [0, 1, 2]),
        ("33.333333", 30, 6, [10]),
    ],
)
def test_counts_of_a_print(value: str, n: int, decimals: int, counts: list[int]) -> None:
    assert list(printed_counts(Decimal(value), n, decimals)) == counts


@pytest.mark.parametrize("n", [7, 16, 30, 198, 272, 800])
@pytest.mark.parametrize("decimals", [0, 1, 2, 3])
def test_every_count_passes_however_it_was_rounded(n: int, decimals: int) -> None:
    unit = Decimal(1).scaleb(-decimals)
    for k in range(n + 1):
        exact = Decimal(100 * k) / n
        for rounding in ("ROUND_HALF_UP", "ROUND_HALF_EVEN", "ROUND_HALF_DOWN"):
            assert k in printed_counts(exact.quantize(unit, rounding=rounding), n, decimals)


def test_zeros_that_a_spreadsheet_dropped_and_coarse_rows() -> None:
    # 82.4 in a column of two decimals is 82.40; a row that is coarse throughout is taken as such.
    test = granularity_test([row("82.4", "31.82"), row("83", "31.8"), row("83.20", "31.31")],
                            (500, 198))  # fmt: skip
    assert [v.verdict for v in test.rows] == [AS_LABELLED] * 3
    assert granularity_test([row("82.41", "31.82")], (500, 198)).rows[0].misfits == (0,)


def test_chance_by_hand_and_by_draws() -> None:
    # k/4 and k/6 at two decimals share 0, 50 and 100 %.
    assert chance(4, 6, 2) == 3 / 5
    assert chance(6, 4, 2) == 3 / 7
    assert chance(4, 8, 2) == 1.0
    assert chance_of_print(4, 0) == 5 / 101
    assert chance_of_print(8, 0) == 13 / 101  # 12.5, 37.5, 62.5 and 87.5 print as two each
    rng = np.random.default_rng(0)
    values = [Decimal(f"{100 * k / 198:.2f}") for k in rng.integers(0, 199, 4000)]
    share = np.mean([bool(printed_counts(v, 272, 2)) for v in values])
    assert share == pytest.approx(chance(198, 272, 2), abs=0.012)


# Verdicts


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_exchange_is_found_and_no_other_row_accused(seed: int) -> None:
    cells = drawn(60, NS, seed)
    planted = set(range(0, 60, 4))
    for i in planted:
        cells[i][GPQA], cells[i][MINERVA] = cells[i][MINERVA], cells[i][GPQA]
    test = granularity_test(cells, NS)
    (exchange,) = test.exchanges
    assert exchange.columns == (GPQA, MINERVA)
    # A row may fit both by chance; then it is ambiguous, never called by the wrong name.
    unclear = {i for i, v in enumerate(test.rows) if v.verdict == AMBIGUOUS}
    assert len(unclear) <= 1
    assert set(exchange.rows) == planted - unclear
    assert test.counts[NEITHER] == 0


def test_tables_as_labelled_stay_untouched() -> None:
    test = granularity_test(drawn(2000, NS, 9), NS)
    assert test.counts == {AS_LABELLED: 2000, EXCHANGED: 0, AMBIGUOUS: 0, NEITHER: 0}
    assert test.exchanges == ()
    # How often the pair of AIME and AMC cannot be told apart, against the stated chance.
    power = next(p for p in test.power if p.columns == (0, 2))
    assert 0.02 < power.undecided / 2000 < 0.2


def test_three_columns_in_a_circle() -> None:
    ns = (198, 272, 500)
    cells = drawn(12, ns, 1)
    cells[3] = [cells[3][1], cells[3][2], cells[3][0]]
    test = granularity_test(cells, ns)
    (exchange,) = test.exchanges
    assert exchange.rows == (3,)
    # The first column holds what belongs to the second, and so on.
    assert exchange.reading == (1, 2, 0)


def test_two_pairs_at_once() -> None:
    ns = (198, 272, 500, 1319)
    (cells,) = drawn(1, ns, 3)
    test = granularity_test([[cells[1], cells[0], cells[3], cells[2]]], ns)
    assert test.rows[0].reading == (1, 0, 3, 2)


def test_ambiguous_only_where_other_rows_show_the_exchange() -> None:
    both = row("50.00", "25.00")  # 25.00 is 68/272, and 50.00 both
    alone = granularity_test([both], (198, 272))
    assert alone.rows[0].verdict == AS_LABELLED
    assert alone.rows[0].undecided == ()
    half = row("50.00", "50.00")
    assert granularity_test([half], (198, 272)).rows[0].undecided == ((0, 1),)
    exchanged = row("29.41", "33.33")
    test = granularity_test([half, exchanged, both], (198, 272))
    assert [v.verdict for v in test.rows] == [AMBIGUOUS, EXCHANGED, AS_LABELLED]
    assert test.rows[0].rivals == ((0, 1), (1, 0))


def test_ambiguous_between_two_exchanges() -> None:
    # 10.00 is no k/8; 25.00 and 50.00 are k/8 and k/40: either may be what belongs there.
    test = granularity_test([row("10.00", "25.00", "50.00")], (8, 40, 20))
    assert test.rows[0].verdict == AMBIGUOUS
    assert test.rows[0].rivals == ((1, 0, 2), (2, 1, 0))
    assert test.exchanges == ()


def test_one_misprint_in_a_coarse_column_is_no_exchange() -> None:
    # 27.50 is 11/40 and no k/30; 70.00 fits both: an exchange, or one misprint (26.67)?
    misprint = row("27.50", "30.00", "70.00", "80.00", "31.82", "30.15")
    test = granularity_test([*drawn(50, NS, 2), misprint], NS)
    assert test.counts == {AS_LABELLED: 50, EXCHANGED: 0, AMBIGUOUS: 1, NEITHER: 0}
    assert test.rows[50].rivals == ((2, 1, 0, 3, 4, 5),)
    # Three such rows are no chance any more, and make rows that fit both ambiguous.
    more = [row("27.50", "30.00", v, "80.00", "31.82", "30.15") for v in ("70.00", "66.67", "60")]
    test = granularity_test([*drawn(50, NS, 2), *more], NS)
    (exchange,) = test.exchanges
    assert (exchange.columns, exchange.rows) == ((0, 2), (50, 51, 52))
    assert test.counts[AMBIGUOUS] == sum((0, 2) in v.undecided for v in test.rows) > 0


def test_missing_cells_are_neither_accused_nor_moved() -> None:
    test = granularity_test([row("29.41", ""), row("", ""), row("31.82", "")], (198, 272))
    assert [v.verdict for v in test.rows] == [NEITHER, AS_LABELLED, AS_LABELLED]


def test_bounds_on_chance_over_all_rows() -> None:
    exchange = paper("tables36_61_layer_checkpoints")[1].exchanges[0]
    assert exchange.chance == chance(198, 272, 2) * chance(272, 198, 2)
    # 14 pairs were tried; all rows are exchanged, so there is one way to choose them.
    assert exchange.log10_all == pytest.approx(np.log10(14) + 104 * np.log10(exchange.chance))
    assert exchange.log10_all < -300
    # Only rows that contradict their labels can be chosen: 33 of 35 of them here.
    exchange = paper("tables3_4_5_models")[1].exchanges[0]
    ways = np.log10(14 * 35 * 34 / 2)
    assert exchange.log10_all == pytest.approx(ways + 33 * np.log10(exchange.chance))


def test_every_permutation_of_distinct_columns_is_undone() -> None:
    ns = (198, 272, 499, 1319)
    cells = drawn(1, ns, 5)[0]
    for order in itertools.permutations(range(4)):
        found = granularity_test([[cells[j] for j in order]], ns).rows[0]
        assert found.reading == order
