"""The page of scores: pairing, statistics, and the answers themselves, through AppTest."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import kind_examples
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from app_driver import HOSTILE, charts, edit, marked_up, reseal, state, texts

from resa_lens import stats
from resa_lens.app import answers, data
from resa_lens.artifacts.kinds.adapter import Adapter
from resa_lens.artifacts.kinds.eval import Eval
from resa_lens.errors import BadInputError
from resa_lens.evals.answers import GAINED, LOST, PART, RIGHT, WRONG, Filter
from resa_lens.evals.run import SAMPLE_SCHEMA
from resa_lens.figures import plots
from resa_lens.resources import data_path
from resa_lens.stages.scored_runs import runs_of

SHIPPED = data_path("workspace")
SWEEP = "sweeps/tiny-reasoner-459a3904-paper-mlp_out-ac2ea40e"


def write_run(
    root: Path,
    name: str,
    correct: Sequence[Sequence[int]],
    *,
    model: str = "tiny",
    questions: str = "q1",
    row_groups: int = 1_000_000,
    **texts: Callable[[int, int], Any],
) -> Path:
    """An evaluation with so many answers to each question, as `pipeline.scores` writes it."""
    folder = root / "evals" / name
    folder.mkdir(parents=True)
    made = {
        "question": lambda q, s: f"What is {q}?",
        "gold": lambda q, s: str(q),
        "prompt": lambda q, s: f"Problem: What is {q}? <think>",
        "generation": lambda q, s: f" step {q} of {name} </think> <answer> {q} </answer>",
        "answer": lambda q, s: str(q),
        **texts,
    }
    rows = [
        {
            "id": f"test-{q:06d}",
            "sample": s,
            "correct": bool(right),
            "family": ("sum", "count")[q % 2],
            "level": 1 + q % 3,
            "tokens": 10 + s,
            "finished": s == 0,
            "task": "tiny",
            "timed_out": False,
            **{key: make(q, s) for key, make in made.items()},
        }
        for q, answers in enumerate(correct)
        for s, right in enumerate(answers)
    ]
    table = pa.Table.from_pylist(rows, schema=SAMPLE_SCHEMA)
    pq.write_table(table, folder / "samples.parquet", row_group_size=row_groups)
    samples = len(correct[0])
    manifest = kind_examples.manifest(
        "eval",
        # Without an identity: what is changed by a test is read as it is.
        schema_version=1,
        identity="",
        config={
            "eval": {
                "samples": samples,
                "generation": {"temperature": 0.0 if samples == 1 else 0.7},
                "prompt_style": "reason",
            },
            "questions": questions,
        },
        results={"model": model, "slug": model},
        hashes={"weights": f"hash of {model}"},
    )
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    return folder


@pytest.fixture
def open_page(open_page):
    """Everything on one page; that views leave parts out has a test of its own."""
    return lambda root, page, **query: open_page(
        root, page, **{"scores_view": "Everything", **query}
    )


@pytest.fixture
def two(tmp_path) -> Path:
    """Twelve questions: four gained, two lost, three both right, three both wrong."""
    write_run(tmp_path, "a-base", [[int(k in "lr")] for k in "ggggllrrrwww"])
    write_run(tmp_path, "b-other", [[int(k in "gr")] for k in "ggggllrrrwww"], model="other")
    return tmp_path


def view(app: Any) -> dict[tuple[str, ...], Any]:
    return {tuple(frame.value.columns): frame.value for frame in app.dataframe}


def shown_ids(app: Any) -> list[str]:
    return [t.value.split(" · ")[0] for t in app.text if t.value.startswith("test-")]


# Figures -------------------------------------------------------------------------------------


def test_demo_says_what_the_command_said_and_never_writes(demo, open_page):
    before = state(demo.workspace)
    app = open_page(demo.workspace, "scores")
    shown, paired = texts(app), demo.result["tune"]["paired"]
    assert f"B minus A: {100 * paired['difference']:+.1f} points" in shown
    assert f"{paired['gained']} gained, {paired['lost']} lost; n = {paired['n']}" in shown
    assert "B: Tuned through the SAE of layer" in shown
    assert charts(app) == 2
    runs = next(v for k, v in view(app).items() if "answers each" in k)
    for row, name in zip(runs.itertuples(), ("base", "tuned"), strict=True):
        made = demo.result["tune"][name]
        assert row[2] == pytest.approx(100 * made["accuracy"])
        assert [row[3], row[4]] == pytest.approx([100 * end for end in made["ci"]])
    assert state(demo.workspace) == before


def test_figures_are_those_of_the_statistics(tmp_path, open_page):
    rng = np.random.default_rng(0)
    base = rng.random((60, 4)) < 0.5
    other = base ^ (rng.random((60, 4)) < 0.3)
    write_run(tmp_path, "a", base.astype(int).tolist())
    write_run(tmp_path, "b", other.astype(int).tolist())
    # The newest is A where neither is an adapter: name both.
    app = open_page(tmp_path, "scores", left="evals/a", right="evals/b", margin="5")
    means = base.mean(axis=1), other.mean(axis=1)
    paired = stats.compare_paired(*means)
    assert (
        f"B minus A: {100 * paired.difference:+.1f} points (95 % {100 * paired.ci[0]:+.1f} to "
        f"{100 * paired.ci[1]:+.1f}); {paired.gained} gained, {paired.lost} lost; n = 60"
    ) in texts(app)
    assert f"p = {paired.p_value:.3g} (sign-flip" in texts(app)
    same = stats.equivalence_test(*means, 0.05)
    assert f"(p = {same.p_equivalent:.2g}; {same.method})" in texts(app)
    tables = view(app)
    runs = next(v for k, v in tables.items() if "answers each" in k)
    assert list(runs["answers each"]) == [4, 4]
    assert list(runs["tokens an answer"]) == [11.5, 11.5]
    assert list(runs["cut off"]) == [180, 180]
    low, high = stats.mean_interval(means[1])
    assert list(runs.iloc[1])[1:4] == pytest.approx([100 * means[1].mean(), 100 * low, 100 * high])
    groups = next(v for k, v in tables.items() if "p, Holm" in k)
    assert list(groups["group"]) == ["level 1", "level 2", "level 3", "count", "sum"]
    by_level = [
        stats.compare_paired(means[0][k::3], means[1][k::3]) for k in range(3)
    ]  # level 1 + q % 3
    corrected = stats.holm([row.p_value for row in by_level])
    assert list(groups["p, Holm"])[:3] == pytest.approx(list(corrected))
    assert list(groups["difference, points"])[:3] == pytest.approx(
        [100 * row.difference for row in by_level]
    )
    assert list(groups["low, points"])[:3] == pytest.approx([100 * row.ci[0] for row in by_level])


def test_several_runs_are_corrected_for_their_number(tmp_path, open_page):
    rng = np.random.default_rng(1)
    for name in "abcd":
        write_run(tmp_path, name, (rng.random((40, 1)) < 0.5).astype(int).tolist())
    asked = {"left": "evals/a", "right": "evals/b", "also": "evals/c"}
    app = open_page(tmp_path, "scores", **asked)
    app.multiselect(key="also").set_value(["evals/c", "evals/d"]).run()
    table = next(v for k, v in view(app).items() if "p, equally good" in k)
    assert list(table[""]) == ["B", "C", "D"]
    assert list(table["p, Holm"]) == pytest.approx(list(stats.holm(list(table["p"]))))
    assert "omnibus: p = " in texts(app)
    alone = open_page(tmp_path, "scores", left="evals/a", right="evals/b")
    groups = next(v for k, v in view(alone).items() if "p, Holm" in k)
    assert "omnibus" not in texts(alone)
    assert len(groups)


def test_runs_of_a_sweep_are_compared_without_texts(open_page):
    asked = {"left": f"{SWEEP}:base", "right": f"{SWEEP}:L08-s0"}
    app = open_page(SHIPPED, "scores", **asked)
    held = pq.read_table(SHIPPED / SWEEP / "answers.parquet", columns=["base", "L08-s0"])
    paired = stats.compare_paired(held["base"].to_numpy(), held["L08-s0"].to_numpy())
    assert f"B minus A: {100 * paired.difference:+.1f} points" in texts(app)
    assert f"{paired.gained} gained, {paired.lost} lost; n = 2000" in texts(app)
    assert "tuned through the SAE, layer 8 (0-based; 9th of 12), seed 0" in texts(app)
    table = view(open_page(SHIPPED, "scores", **asked, flips=LOST))
    listed = table[("question", "A", "B", "kind")]
    assert len(listed) == paired.lost
    assert set(listed["kind"]) == {LOST}


def test_seven_runs_have_seven_styles():
    figure = plots.scores_figure({f"{n}": {"all": (0.5, (0.4, 0.6), 9)} for n in range(7)})
    traces: list[Any] = [*figure.data]
    assert len({(trace.marker.color, trace.marker.symbol) for trace in traces}) == 7


# Which runs ----------------------------------------------------------------------------------


def test_only_the_same_questions_are_paired(two, open_page):
    write_run(two, "c-elsewhere", [[1], [0]], questions="q2")
    app = open_page(two, "scores", left="evals/a-base", right="evals/c-elsewhere")
    said = "evals/c-elsewhere answered other questions than evals/a-base: they cannot be paired."
    assert said in texts(app)
    assert app.selectbox(key="right").value == "evals/b-other"
    assert len(app.selectbox(key="right").options) == 1
    app = open_page(two, "scores", left="evals/c-elsewhere")
    texts(app)
    assert charts(app) == 1  # alone, its accuracy
    assert "minus" not in texts(app)
    assert "1 right, 1 wrong; n = 2" in texts(app)
    assert shown_ids(app) == ["test-000000", "test-000001"]


def test_base_and_the_newest_tuned_run_come_first(open_page):
    app = open_page(SHIPPED, "scores")
    base, tuned = app.selectbox(key="left").value, app.selectbox(key="right").value
    listing = data.scan(str(SHIPPED))
    models = {a.relative: Path(a.results.model).name for a in listing.of(Eval)}
    assert models[base] == "tiny-reasoner"
    made = next(a for a in listing.of(Adapter) if a.path.name == models[tuned])
    assert made.settings.control is None


def test_without_scores_the_command_that_makes_them(tmp_path, open_page):
    app = open_page(tmp_path, "scores")
    assert f"{tmp_path} is empty" in texts(app)
    assert any(code.value.startswith("resa-lens demo") for code in app.code)
    shutil.copytree(SHIPPED / "counts", tmp_path / "counts")
    app = open_page(tmp_path, "scores")
    assert f"No scores in {tmp_path} yet; it holds: counts" in texts(app)
    assert any(code.value.startswith("resa-lens eval") for code in app.code)
    assert f"There is no workspace at {tmp_path / 'x'}" in texts(
        open_page(tmp_path / "x", "scores")
    )


# The answers ---------------------------------------------------------------------------------


def test_flips_are_filtered(two, open_page):
    counted = "4 gained, 2 lost, 3 both right, 3 both wrong; n = 12"
    expected = {GAINED: range(4), LOST: range(4, 6), RIGHT: range(6, 9), WRONG: range(9, 12)}
    asked = {"left": "evals/a-base", "right": "evals/b-other"}
    for kind, places in expected.items():
        app = open_page(two, "scores", **asked, flips=kind)
        assert counted in texts(app)
        assert shown_ids(app) == [f"test-{place:06d}" for place in places]
    app = open_page(two, "scores", **asked, flips=GAINED)
    badges = [b.value for b in app.markdown if "-badge" in b.value]
    assert sum("A: wrong" in b for b in badges) == sum("B: right" in b for b in badges) == 4


def test_families_levels_text_and_pages(tmp_path, open_page):
    write_run(tmp_path, "a", [[1]] * 30)
    write_run(tmp_path, "b", [[1]] * 30)
    asked = {"left": "evals/a", "right": "evals/b"}
    app = open_page(tmp_path, "scores", **asked)
    assert shown_ids(app) == [f"test-{q:06d}" for q in range(10)]
    third = open_page(tmp_path, "scores", **asked, sample_page="3")
    assert shown_ids(third) == [f"test-{q:06d}" for q in range(20, 30)]
    third.multiselect(key="family").set_value(["sum"]).run()
    assert shown_ids(third)[0] == "test-000000"  # what a filter leaves is read from its start
    third.session_state["sample_page"] = 2
    assert len(shown_ids(third.run())) == 5
    third.multiselect(key="family").set_value([]).run()
    assert len(shown_ids(third)) == 10
    third.text_input(key="search").set_value("STEP 7 OF B").run()
    assert shown_ids(third) == ["test-000007"]
    assert "1 of 30 questions" in texts(third)
    found = open_page(tmp_path, "scores", **asked, family="count", level="2")
    assert shown_ids(found) == [f"test-{q:06d}" for q in range(30) if q % 2 and q % 3 == 1]
    none = open_page(tmp_path, "scores", **asked, search="nowhere at all")
    assert "No question fits these filters." in texts(none)
    # What is typed is text, not a pattern.
    assert "No question fits" in texts(open_page(tmp_path, "scores", **asked, search="s.ep"))


def test_several_answers_to_a_question(tmp_path, open_page):
    write_run(tmp_path, "a", [[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    write_run(tmp_path, "b", [[0, 1, 0, 1], [1, 1, 1, 0], [0, 0, 1, 0]])
    asked = {"left": "evals/a", "right": "evals/b"}
    app = open_page(tmp_path, "scores", **asked)
    assert "1 gained, 1 lost, 0 both right, 0 both wrong, 1 both in part; n = 3" in texts(app)
    app = open_page(tmp_path, "scores", **asked, flips=PART)
    assert shown_ids(app) == ["test-000000"]
    badges = [b.value for b in app.markdown if "-badge" in b.value]
    assert sum("2 of 4 right" in b for b in badges) == 2
    assert sum(e.label == "The other 3" for e in app.expander) == 2
    # Another number of answers pairs too.
    write_run(tmp_path, "c", [[1], [0], [1]])
    app = open_page(tmp_path, "scores", left="evals/a", right="evals/c")
    paired = stats.compare_paired([0.5, 1, 0], [1, 0, 1])
    assert f"B minus A: {100 * paired.difference:+.1f} points" in texts(app)


def test_text_from_files_is_shown_as_text(tmp_path, open_page):
    said = HOSTILE + "</code></pre><script>alert(2)</script> $x$ `y`"
    hostile = dict.fromkeys(("question", "gold", "generation", "answer"), lambda q, s: said)
    write_run(tmp_path, "a", [[1], [0]], model=HOSTILE, **hostile)
    folder = write_run(tmp_path, "b", [[0], [1]], model=HOSTILE, **hostile)
    table = pq.read_table(folder / "samples.parquet")
    for file in tmp_path.rglob("samples.parquet"):
        table = pq.read_table(file)
        for name in ("family", "task"):
            at = table.schema.get_field_index(name)
            table = table.set_column(at, name, pa.array([said, said], pa.string()))
        pq.write_table(table, file)
    app = open_page(tmp_path, "scores")
    assert said in texts(app)
    assert [code.value for code in app.code].count(said) == 6
    assert all(code.language in ("", None, "plaintext") for code in app.code)
    assert "onerror" not in marked_up(app)
    specs = "".join(chart.proto.spec for chart in app.get("plotly_chart"))
    assert "<img" not in specs
    assert not app.get("html")


def test_a_question_goes_to_the_prompt_lab(two, open_page):
    app = open_page(two, "scores", left="evals/a-base", right="evals/b-other", flips=LOST)
    (first, _) = (link.proto for link in app.get("page_link"))
    assert first.page == "lab"
    assert parse_qs(first.query_string) == {"prompt": ["What is 4?"]}
    # Another prompt than the lab would make of the question goes there as it is.
    write_run(two, "c", [[1]], questions="q3", prompt=lambda q, s: "System.\nWhat? <think>")
    app = open_page(two, "scores", left="evals/c")
    (link,) = (link.proto for link in app.get("page_link"))
    assert parse_qs(link.query_string) == {"prompt": ["System.\nWhat? <think>"], "raw": ["true"]}


# Damage --------------------------------------------------------------------------------------


def test_a_damaged_run_leaves_the_other(two, open_page):
    asked = {"left": "evals/a-base", "right": "evals/b-other"}
    file = two / "evals/b-other/samples.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:200])
    app = open_page(two, "scores", **asked)
    assert f"B: {file} is damaged or of another version" in texts(app)
    assert "6 right" not in texts(app)
    assert "5 right, 7 wrong; n = 12" in texts(app)
    file.unlink()
    assert f"B: {file} is missing" in texts(open_page(two, "scores", **asked))
    pq.write_table(pa.table({"id": ["x"], "correct": [True]}), file)
    assert "is damaged or of another version" in texts(open_page(two, "scores", **asked))
    file.write_bytes(whole)
    table = pq.read_table(file)
    for column in ("question", "prompt"):
        pq.write_table(table.drop_columns([column]), file)
        assert f"has no column {column}" in texts(open_page(two, "scores", **asked))
    pq.write_table(table.slice(0, 0), file)
    assert "holds no answers; score again" in texts(open_page(two, "scores", **asked))
    repeated = pa.concat_tables([table, table.slice(0, 1)])
    pq.write_table(repeated, file)
    assert "11 of 12 questions have fewer than 2 answers" in texts(
        open_page(two, "scores", **asked)
    )
    pq.write_table(table.slice(0, 11), file)
    app = open_page(two, "scores", **asked)
    assert "the runs answer different questions: 11 in common of 12" in texts(app)
    assert not shown_ids(app)


def test_foreign_manifests_and_tables(two, open_page):
    manifest = two / "evals/b-other/manifest.json"
    edit(manifest, lambda m: m["config"].update(eval=[1, 2]))
    app = open_page(two, "scores")
    assert "is damaged or of another version, at eval" in texts(app)
    assert "A: tiny, as it is" in texts(app)
    edit(manifest, lambda m: m.update(schema_version=99))
    assert "has schema 99" in texts(open_page(two, "scores"))
    manifest.write_text("{")
    assert f"{manifest} is damaged" in texts(open_page(two, "scores"))
    sweep = two / SWEEP
    shutil.copytree(SHIPPED / SWEEP, sweep)
    file = sweep / "answers.parquet"
    table = pq.read_table(file)
    file.write_bytes(b"PAR1")
    reseal(file)
    app = open_page(two, "scores")
    assert f"{SWEEP}: its runs cannot be compared" in texts(app)
    wrong = pa.array([7.0] * len(table))
    pq.write_table(table.set_column(1, "base", wrong), file)
    reseal(file)
    app = open_page(two, "scores", left=f"{SWEEP}:base")
    assert f"A: {file} holds a score outside 0 to 1" in texts(app)
    edit(sweep / "manifest.json", lambda m: m["config"].update(jobs=[3]))
    assert "at jobs.0" in texts(open_page(two, "scores"))


# Size ----------------------------------------------------------------------------------------


def _large(root: Path, name: str, seed: int) -> None:
    """100,000 answers to 25,000 questions, with long texts, in one row group."""
    folder = write_run(root, name, [[1], [0]])
    n = 100_000
    rng = np.random.default_rng(seed)
    same = np.random.default_rng(0).random(n) < 0.6
    numbers = np.arange(n)
    text = pa.array([f"{'so ' * 60}{k} </think> {k}" for k in range(n)])
    table = pa.table(
        {
            "id": [f"test-{k // 4:06d}" for k in numbers],
            "sample": pa.array((numbers % 4).astype(np.int32)),
            "question": text,
            "gold": text,
            "prompt": text,
            "generation": text,
            "answer": text,
            "correct": pa.array(same ^ (rng.random(n) < 0.1)),
            "family": np.array(["sum", "count"])[numbers // 4 % 2].tolist(),
            "level": pa.array((1 + numbers // 4 % 3).astype(np.int32)),
            "tokens": pa.array(np.full(n, 9, dtype=np.int32)),
            "finished": pa.array(np.ones(n, dtype=bool)),
        }
    )
    pq.write_table(table, folder / "samples.parquet")


def test_100_000_answers_stay_quick(tmp_path, open_page, monkeypatch):
    _large(tmp_path, "a", 1)
    _large(tmp_path, "b", 2)
    read: list[Any] = []
    plain = pq.read_table

    def watched(file, columns=None, **how):
        read.append(columns)
        return plain(file, columns=columns, **how)

    monkeypatch.setattr(pq, "read_table", watched)
    app = open_page(tmp_path, "scores", left="evals/a", right="evals/b")
    assert "n = 25000" in texts(app)
    assert read
    assert not any({"generation", "question", "prompt"} & set(columns) for columns in read)
    # A click once the runs are read: a second of this process; one more allows for slow machines.
    began = time.process_time()
    app.button_group(key="flips").set_value(GAINED).run()
    assert time.process_time() - began < 2
    assert len(shown_ids(app)) == 10
    began = time.process_time()
    app.text_input(key="search").set_value("99999 </think>").run()
    assert time.process_time() - began < 2
    texts(app)


def test_texts_are_read_from_their_row_groups_alone(tmp_path, monkeypatch):
    folder = write_run(tmp_path, "a", [[1]] * 40, row_groups=10)
    (run,), _ = runs_of(data.scan(str(tmp_path)))
    opened: list[Any] = []
    plain = pq.ParquetFile.iter_batches

    def watched(self, size, row_groups, columns):
        opened.append(row_groups)
        return plain(self, size, row_groups, columns)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watched)
    texts_by_row = answers.texts(run.key, (25, 3, 27))
    assert {row: values["question"] for row, values in texts_by_row.items()} == {
        3: "What is 3?", 25: "What is 25?", 27: "What is 27?",
    }  # fmt: skip
    assert opened == [[0], [2]]
    (folder / "samples.parquet").write_bytes(b"PAR1 and no more")
    (run,), _ = runs_of(data.scan(str(tmp_path)))
    with pytest.raises(BadInputError, match="damaged"):
        answers.texts(run.key, (1,))


def test_rows_find_their_texts_in_any_order(tmp_path):
    """Files need not be sorted: rows of a question are found wherever they stand."""
    folder = write_run(tmp_path, "a", [[1, 0], [0, 0], [1, 1]])
    file = folder / "samples.parquet"
    table = pq.read_table(file)
    pq.write_table(table.take([5, 0, 3, 2, 4, 1]), file)
    (run,), _ = runs_of(data.scan(str(tmp_path)))
    held = answers.answers(run.key)
    assert held.scores.correct.tolist() == [[1, 0], [0, 0], [1, 1]]
    assert held.rows is not None
    assert held.rows.tolist() == [[1, 5], [3, 2], [4, 0]]
    texts_by_row = answers.texts(run.key, tuple(held.rows.ravel().tolist()))
    assert [texts_by_row[row]["gold"] for row in held.rows[:, 0].tolist()] == ["0", "1", "2"]
    assert answers.matching(run, None, Filter(text="what is 2")).tolist() == [2]


def test_fewer_draws_where_each_costs_more():
    assert answers.draws_for(500) == stats.DRAWS
    assert answers.draws_for(100_000) == 1000
    assert answers.draws_for(10**9) == 1000


def test_a_view_draws_its_own_parts_and_flips_come_first(two, open_page) -> None:
    asked = {"left": "evals/a-base", "right": "evals/b-other"}
    shown = {
        view: marked_up(open_page(two, "scores", **asked, scores_view=view))
        for view in ("Answers", "Accuracy", "Difference by group", "Everything")
    }
    for view, part in (("Answers", "Answers"), ("Accuracy", "low and high: 95 %")):
        assert [name for name in shown if part in shown[name]] == [view, "Everything"]
    # The difference itself stands above every view.
    assert all("B minus A" in text for text in shown.values())
    badges = [
        badge.value
        for badge in open_page(two, "scores", **asked, scores_view="Answers").markdown
        if "right" in badge.value or "wrong" in badge.value
    ]
    first = badges[:2]
    assert any("right" in text for text in first)
    assert any("wrong" in text for text in first)
