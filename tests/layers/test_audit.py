from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats as distributions
from typer.testing import CliRunner

from resa_lens import stats
from resa_lens.cli import app
from resa_lens.errors import BadInputError
from resa_lens.layers.audit import Audit, audit, group_variance, selection_bias
from resa_lens.layers.checkpoints import read_checkpoints
from resa_lens.resources import data_path

LAYERS = str(data_path("paper/tables36_61_layer_checkpoints.csv"))
NS = {"aime24": 30, "gpqa": 198, "minerva": 272}


def of_paper(name: str, **options: Any) -> Audit:
    return audit(read_checkpoints(data_path(f"paper/{name}.csv")), draws=2000, **options)


@pytest.fixture(scope="module")
def layers() -> Audit:
    return of_paper("tables36_61_layer_checkpoints")


def write(folder: Path, rows: list[tuple[Any, ...]], header: str) -> Path:
    path = folder / "table.csv"
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def planted(
    folder: Path, effect: float, exchanged: tuple[int, ...] = (), groups: int = 8, seed: int = 0
) -> Path:
    """Eight groups of four rows whose accuracy rises by `effect` from group to group."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(4 * groups):
        shares = [0.3 + effect * (i // 4) for _ in NS]
        a, g, m = (
            f"{100 * rng.binomial(n, p) / n:.2f}" for n, p in zip(NS.values(), shares, strict=True)
        )
        rows.append((f"m{i // 4}", i, a, *((m, g) if i in exchanged else (g, m))))
    return write(folder, rows, "model,step,aime24,gpqa,minerva")


# The paper's layer checkpoints


def test_the_papers_layers(layers: Audit) -> None:
    whole = layers.variance[0]
    assert whole.anova is not None
    assert whole.anova.f_statistic is not None
    assert whole.anova.p_value is not None
    assert (whole.anova.df_between, whole.anova.df_within) == (25, 78)
    assert round(whole.anova.f_statistic, 3) == 1.148
    assert round(whole.anova.p_value, 3) == 0.314
    assert whole.sd_within is not None
    assert whole.sd_between is not None
    assert (round(whole.sd_within, 2), round(whole.sd_between, 2)) == (1.54, 0.83)
    assert whole.permutation_p == pytest.approx(whole.anova.p_value, abs=0.04)
    assert layers.bias is not None
    assert round(layers.bias.bias, 2) == 1.64
    # The gain of the best of four is what noise gives: 1.029 sd.
    assert layers.bias.noise == pytest.approx(1.0293754 * whole.sd_within)
    assert layers.bias.noise_interval[0] < layers.bias.bias < layers.bias.noise_interval[1]
    assert layers.bias.ci[0] < 1.64 < layers.bias.ci[1]
    assert round(layers.errors[-1].standard_error, 1) == 2.4
    assert layers.average.wrong == ()


def test_no_benchmark_differs_between_the_papers_layers(layers: Audit) -> None:
    parts = layers.variance[1:]
    raw = [v.anova.p_value for v in parts if v.anova and v.anova.p_value is not None]
    assert [v.holm_p for v in parts] == pytest.approx(stats.holm(raw).tolist())
    assert min(raw) < 0.05  # minerva, one of six
    assert all(v.holm_p is not None and v.holm_p > 0.2 for v in parts)


def test_columns_are_put_right_before_any_benchmark(layers: Audit) -> None:
    means = {v.score: v.mean for v in layers.variance}
    column = layers.table.benchmarks.index("minerva")
    printed = [float(row[column] or 0) for row in layers.table.cells]
    # What stands under minerva is gpqa's.
    assert means["gpqa_diamond"] == pytest.approx(np.mean(printed))
    error = next(e for e in layers.errors if e.score == "gpqa_diamond")
    assert (error.questions, error.mean) == (198, pytest.approx(np.mean(printed)))


def test_the_baseline_before_and_after() -> None:
    base = ("gpqa_diamond=31.82", "Minerva=30.15")
    gpqa, minerva = of_paper("tables36_61_layer_checkpoints", baseline=base).baseline
    assert (round(gpqa.as_printed, 2), round(gpqa.corrected, 2)) == (-2.38, 3.09)
    assert (round(minerva.as_printed, 2), round(minerva.corrected, 2)) == (4.76, -0.71)
    assert gpqa.ci[0] < 0 < gpqa.ci[1]
    layer = of_paper("tables36_61_layer_checkpoints", baseline=("layer 12",)).baseline
    assert [gap.score for gap in layer][-1] == "minerva"
    for wrong in (("layer 40",), ("mmlu=3",), ("minerva=130",), ("minerva=much",)):
        with pytest.raises(BadInputError, match="--baseline"):
            of_paper("table6_hookpoints", baseline=wrong)


def test_one_row_a_group_has_no_f() -> None:
    made = of_paper("table6_hookpoints")
    assert {v.note for v in made.variance} == {"F is not defined: every group has one row"}
    assert made.bias is None
    values = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    assert (values["f_statistic"], values["p_value"], values["best_of_bias"]) == (None, None, None)
    assert (values["models"], values["checkpoints"]) == (26, 26)
    assert values["exchanged_columns"][0]["rows"] == 26


def test_rows_that_fit_nothing_lose_the_two_cells_only() -> None:
    made = of_paper("tables8_61_checkpoints")
    assert made.withheld == 12
    rows = {v.score: v.rows for v in made.variance}
    assert rows == {
        "average": 240, "aime24": 240, "aime25": 240, "amc23": 240, "math500": 240,
        "gpqa_diamond": 234, "minerva": 234,
    }  # fmt: skip
    odd = [r for r in made.to_dict()["granularity"]["rows"] if r["nearest"]]
    assert len(odd) == 6
    assert odd[0]["row"] == "STILL-CoT-free-SFT, step 500"
    assert "minerva 26.36 is no k/198 (nearest 26.26)" in odd[0]["nearest"]


# Planted tables


def test_a_planted_effect_is_found(tmp_path: Path) -> None:
    strong = audit(read_checkpoints(planted(tmp_path, 0.05)), draws=500)
    found = strong.variance[0].anova
    assert found is not None
    assert found.f_statistic is not None
    assert found.eta_squared_ci is not None
    assert found.icc_ci is not None
    assert found.f_statistic > 10
    assert found.eta_squared_ci[0] > 0.5
    assert found.icc_ci[0] > 0.3
    assert strong.variance[0].permutation_p == pytest.approx(1 / 501)
    assert all(v.holm_p is not None and v.holm_p < 0.05 for v in strong.variance[1:])


def test_a_planted_exchange_changes_no_benchmark(tmp_path: Path) -> None:
    plain = audit(read_checkpoints(planted(tmp_path, 0.01)), draws=100)
    mixed = audit(read_checkpoints(planted(tmp_path, 0.01, (1, 5, 6, 30))), draws=100)
    assert plain.test.exchanges == ()
    assert [e.rows for e in mixed.test.exchanges] == [(1, 5, 6, 30)]
    assert mixed.withheld == 0
    assert [v.mean for v in mixed.variance] == pytest.approx([v.mean for v in plain.variance])


def test_unbalanced_with_missing_cells_as_scipy_has_it(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        [("a", 1, 20, "50.0"), ("a", 2, 30, ""), ("a", 3, 40, "60.0"), ("b", 1, 10, "55.0"),
         ("b", 2, 20, "52.5"), ("c", 1, 60, "70.0")],
        "model,step,aime24,amc23",
    )  # fmt: skip
    whole, aime, amc = audit(read_checkpoints(path), draws=100).variance
    assert (whole.rows, aime.rows, amc.rows) == (5, 6, 5)
    assert aime.anova is not None
    assert amc.anova is not None
    for made, groups in (
        (aime.anova, [[20, 30, 40], [10, 20], [60]]),
        (amc.anova, [[50, 60], [55, 52.5], [70]]),
    ):
        expected = distributions.f_oneway(*groups)
        assert made.f_statistic == pytest.approx(expected.statistic)
        assert made.p_value == pytest.approx(expected.pvalue)


def test_an_average_that_is_none_is_found_and_not_used(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        [("a", 1, 20, "50.0", 35), ("a", 2, 30, "60.0", 54), ("b", 1, 10, "", 10),
         ("b", 2, 20, "52.5", 36.3), ("b", 3, 20, "57.5", 38.8)],
        "model,step,aime24,amc23,average",
    )  # fmt: skip
    made = audit(read_checkpoints(path), draws=100)
    assert (made.average.checked, made.average.unchecked) == (4, 1)
    # 36.25 may print as 36.3, and 38.75 as 38.8.
    assert made.average.wrong == ({"row": "a, step 2", "printed": 54.0, "mean": 45.0},)
    assert made.variance[0].mean == pytest.approx((35 + 45 + 36.3 + 38.8) / 4)


def test_scores_that_do_not_vary_within_groups(tmp_path: Path) -> None:
    path = write(tmp_path, [("a", 1, 20), ("a", 2, 20), ("b", 1, 30), ("b", 2, 30)],
                 "model,step,aime24")  # fmt: skip
    whole = audit(read_checkpoints(path), draws=50).variance[0]
    assert whole.anova is not None
    assert whole.anova.f_statistic is None
    assert whole.note == "F is not defined: within groups the score does not vary"
    assert (whole.sd_within, whole.permutation_p) == (0.0, None)


# The statistics


def test_intraclass_correlation_of_shrout_and_fleiss() -> None:
    # Psychological Bulletin 86 (1979), table 2: six targets, four judges.
    ratings = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]
    made = stats.one_way(np.ravel(ratings), np.repeat(np.arange(6), 4))
    assert made.ms_between == pytest.approx(11.24, abs=0.005)
    assert made.ms_within == pytest.approx(6.26, abs=0.005)
    assert made.icc == pytest.approx(0.17, abs=0.005)
    assert made.icc_ci == pytest.approx((-0.133, 0.723), abs=0.001)


def test_the_interval_of_the_share_between_inverts_the_noncentral_f() -> None:
    groups = np.repeat(np.arange(6), 5)
    values = np.random.default_rng(2).normal(size=30) + groups
    made = stats.one_way(values, groups)
    assert made.eta_squared_ci is not None
    for share, below in zip(made.eta_squared_ci, (0.975, 0.025), strict=True):
        noncentrality = 30 * share / (1 - share)
        assert distributions.ncf.cdf(made.f_statistic, 5, 24, noncentrality) == pytest.approx(below)
    flat = stats.one_way([1, 2, 3, 1, 2, 3], [0, 0, 0, 1, 1, 1])
    assert flat.f_statistic == pytest.approx(0.0)
    assert flat.eta_squared_ci == (0.0, 0.0)
    assert flat.omega_squared == pytest.approx(-1 / 5)  # (0 - 1) / (4 + 1)


def test_f_is_calibrated_under_the_null() -> None:
    groups = np.repeat(np.arange(26), 4)
    tables = np.random.default_rng(3).normal(45, 1.5, size=(400, 104))
    f = stats.one_way_f(tables, groups)
    p_values = distributions.f.sf(f, 25, 78)
    assert distributions.kstest(p_values, "uniform").pvalue > 0.01
    assert stats.one_way(tables[7], groups).f_statistic == pytest.approx(f[7])
    assert 0.02 < np.mean(p_values < 0.05) < 0.09


def test_permutation_agrees_with_f() -> None:
    groups = np.repeat(np.arange(10), 4)
    values = np.random.default_rng(5).normal(size=40) + 0.3 * groups
    p_value = stats.one_way(values, groups).p_value
    assert 0.001 < (p_value or 0) < 0.5
    assert stats.one_way_permutation(values, groups, 20_000) == pytest.approx(p_value, abs=0.012)
    assert stats.one_way_permutation([3, 3, 3, 3], [0, 0, 1, 1], 50) == 1.0


def test_expected_maximum_of_normals() -> None:
    root = math.sqrt(math.pi)
    known = [0, 1 / root, 1.5 / root, 1.0293753730]
    assert [stats.expected_maximum(n) for n in (1, 2, 3, 4)] == pytest.approx(known, abs=1e-9)
    assert stats.best_of_noise([4, 4, 2], 40_000).mean() == pytest.approx(
        (2 * known[3] + known[1]) / 3, abs=0.01
    )
    with pytest.raises(BadInputError):
        stats.expected_maximum(0)


def test_best_of_noise_is_noise() -> None:
    rng = np.random.default_rng(6)
    groups = np.repeat([f"g{i}" for i in range(60)], 5)
    made = selection_bias(rng.normal(50, 2, 300), groups, 500)
    assert made is not None
    assert made.noise_interval[0] < made.bias < made.noise_interval[1]
    assert (made.groups, made.sizes) == (60, (5, 5))
    # One row in five far above the rest is more than noise of the same sd would give.
    outlier = np.tile([0.0, 0.1, -0.1, 0.05, 9.0], 60) + rng.normal(0, 0.1, 300)
    spiked = selection_bias(outlier, groups, 500)
    assert spiked is not None
    assert spiked.bias > spiked.noise_interval[1]


def test_groups_of_different_sizes() -> None:
    values = np.array([1.0, 3.0, 2.0, 2.0, 8.0, np.nan, 5.0])
    groups = np.array(["a", "a", "b", "b", "b", "b", "c"])
    made = selection_bias(values, groups, 100)
    assert made is not None
    assert made.bias == pytest.approx((1 + 4) / 2)
    assert (made.groups, made.sizes) == (2, (2, 3))
    part = group_variance("x", values, groups, 50, 0)
    assert (part.rows, part.groups) == (6, 3)


def test_detectable_differences_by_hand(tmp_path: Path) -> None:
    path = write(tmp_path, [("a", 1, 50), ("a", 2, 50), ("b", 1, 50.2), ("b", 2, 49.8)],
                 "model,step,math500")  # fmt: skip
    table = read_checkpoints(path)
    one, average = audit(table, draws=50).errors
    both = 1.959964 + 0.841621
    assert one.standard_error == pytest.approx(100 * math.sqrt(0.25 / 500))
    assert one.detectable_unpaired == pytest.approx(100 * both * math.sqrt(0.5 / 500), rel=1e-5)
    assert one.detectable_paired == pytest.approx(100 * both * math.sqrt(0.2 / 500), rel=1e-5)
    assert one.target_questions_unpaired == math.ceil((both / 0.02) ** 2 * 0.5)
    assert one.target_questions_paired == math.ceil((both / 0.02) ** 2 * 0.2)
    # One benchmark is its own average.
    assert average.standard_error == pytest.approx(one.standard_error)
    assert average.target_questions_paired == one.target_questions_paired
    # 1 % of the answers cannot make a difference of 2 points.
    rare = audit(table, draws=50, discordance=0.01).errors[0]
    assert (rare.detectable_paired, rare.target_questions_paired) == (None, None)


def test_a_score_of_zero_still_has_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, [("a", 0, 50), ("b", 0, 60)], "model,aime24,amc23")
    assert audit(read_checkpoints(path), draws=50).errors[0].standard_error > 1


@pytest.mark.parametrize("discordance", [0.0, -0.1, 1.5, math.nan])
def test_discordance_is_a_share(discordance: float) -> None:
    with pytest.raises(BadInputError, match="discordance"):
        of_paper("table6_hookpoints", discordance=discordance)


# The command


def invoke(*args: str) -> Any:
    return CliRunner().invoke(app, ["audit", *args])


def test_command_prints_one_object() -> None:
    before = Path(LAYERS).read_bytes()
    result = invoke(LAYERS, "--draws", "200", "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    made = json.loads(result.stdout)
    assert (round(made["f_statistic"], 3), round(made["p_value"], 2)) == (1.148, 0.31)
    assert (made["df_between"], made["df_within"]) == (25, 78)
    assert round(made["best_of_bias"], 2) == 1.64
    assert (made["models"], made["checkpoints"]) == (26, 104)
    (exchanged,) = made["exchanged_columns"]
    assert exchanged["columns"] == ["gpqa_diamond", "minerva"]
    assert (exchanged["rows"], exchanged["of"], len(exchanged["row_names"])) == (104, 104, 104)
    assert exchanged["holds"] == {"gpqa_diamond": "minerva", "minerva": "gpqa_diamond"}
    assert made["benchmarks"]["minerva"] == 272
    assert any("not independent" in sentence for sentence in made["summary"])
    assert Path(LAYERS).read_bytes() == before
    assert invoke(LAYERS, "--draws", "200", "--json").stdout == result.stdout


def test_command_for_people() -> None:
    result = invoke(LAYERS, "--draws", "50", "--baseline", "minerva=30.15")
    assert result.exit_code == 0, result.stderr
    for said in (
        "all 104", "F(25,78)=1.148, p=0.314", "best of 4 rows lies +1.64 points",
        "standard error of 2.4 points", "not independent", "the file is unchanged", "-0.71",
        "aime24/aime25",
    ):  # fmt: skip
        assert said in result.stdout, said
    models = invoke(str(data_path("paper/tables3_4_5_models.csv")), "--draws", "50").stdout
    assert "exchanged in 33 of 45 rows" in models
    assert "and 27 more" in models
    assert "no clear case: 2 (a cell is no k/n under any reading)" in models
    single = invoke(str(data_path("paper/table6_hookpoints.csv")), "--draws", "50").stdout
    assert "F is not defined: every group has one row" in single


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("absent.csv",), "absent.csv"),
        ((LAYERS, "--group-column", "seed"), '"seed"'),
        ((LAYERS, "--questions", "mmlu=14042"), '"mmlu"'),
        ((LAYERS, "--questions", "aime24"), '--questions "aime24"'),
        ((LAYERS, "--questions", "aime24=-3"), '--questions "aime24=-3"'),
        ((LAYERS, "--questions", "aime24=0"), "aime24=0"),
        ((LAYERS, "--baseline", "Base"), '"Base"'),
        ((LAYERS, "--discordance", "2"), "discordance 2"),
        ((LAYERS, "--draws", "2"), "--draws"),
        ((), "table"),
    ],
)
def test_command_refuses(args: tuple[str, ...], named: str) -> None:
    result = invoke(*args)
    assert result.exit_code == 2, result.stdout
    assert named in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.strip()]) <= 3
    assert result.stdout == ""


def test_brackets_in_names_are_no_markup(tmp_path: Path) -> None:
    path = write(tmp_path, [("[red]a", 1, 20), ("[red]a", 2, "26.67"), ("[/b]", 1, 26.99)],
                 "model,step,aime24")  # fmt: skip
    result = invoke(str(path), "--draws", "50")
    assert result.exit_code == 0, result.exception
    assert "[/b], step 1: as labelled, but aime24 26.99 is no k/30" in result.stdout
    assert "[red]a, step 1; [red]a, step 2" in result.stdout


def test_questions_of_ones_own(tmp_path: Path) -> None:
    path = write(tmp_path, [("x", 1, "25.00"), ("x", 2, "50.00"), ("y", 1, "33.33")],
                 "recipe,seed,bench")  # fmt: skip
    result = invoke(str(path), "--group-column", "recipe", "--questions", "bench=4", "--json")
    assert result.exit_code == 0, result.stderr
    made = json.loads(result.stdout)
    assert made["granularity"]["verdicts"]["fits neither"] == 1
    assert made["granularity"]["rows"][2]["misfits"] == ["bench"]
    assert made["exchanged_columns"] == []
