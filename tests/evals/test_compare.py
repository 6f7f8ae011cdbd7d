"""Comparing runs: planted flips, several samples, several runs, groups, and the command."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from resa_lens import stats
from resa_lens.artifacts.workspace import Manifest, Workspace, write_json
from resa_lens.cli import app
from resa_lens.errors import BadInputError
from resa_lens.evals import compare as module
from resa_lens.evals.compare import (
    RunScores,
    best_of,
    compare_groups,
    compare_many,
    compare_runs,
    on_dev,
    run_scores,
    summarise,
)
from resa_lens.evals.run import EvalResult, write_samples

HOSTILE = "<b>[bold]What is 2+3?</b>"


def rows(correct: Sequence[Sequence[int]], **changes: Any) -> list[dict[str, Any]]:
    """Samples as an evaluation keeps them: answers [questions][samples]."""
    return [
        {
            "id": f"q{i:04}", "sample": k, "question": f"What is {i}+1?", "gold": str(i + 1),
            "prompt": "", "generation": "", "answer": str(i + 1) if right else "0",
            "correct": bool(right), "family": ("sum", "product")[i % 2], "level": 1 + i % 3,
            "tokens": 5, "finished": True, "task": None, "timed_out": False, **changes,
        }
        for i, answers in enumerate(correct)
        for k, right in enumerate(answers)
    ]  # fmt: skip


def run(name: str, correct: Any) -> RunScores:
    table = np.asarray(correct, dtype=int)
    return run_scores(name, rows((table[:, None] if table.ndim == 1 else table).tolist()))


def flipped(gained: int, lost: int, n: int) -> tuple[RunScores, RunScores]:
    base = np.arange(n) < n // 2
    other = base.copy()
    other[:lost] = False
    other[n // 2 : n // 2 + gained] = True
    return run("a", base), run("b", other)


# One run


def test_summary_of_one_answer_a_question() -> None:
    made = summarise(run("a", [1, 0, 1, 1, 0, 0, 1, 1]), [1])
    assert (made.accuracy, made.n, made.samples) == (5 / 8, 8, 1)
    assert made.ci == stats.wilson_interval(5, 8)
    assert made.by_task["sum"].value == 3 / 4
    assert made.by_task["product"].value == 2 / 4
    assert {level: share.n for level, share in made.by_level.items()} == {1: 3, 2: 3, 3: 2}
    assert made.macro is not None
    assert (made.macro.value, made.macro.n) == (5 / 8, 2)
    assert made.pass_at[1].value == made.accuracy


def test_summary_of_several_samples() -> None:
    made = summarise(run("a", [[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]] * 20), [1, 2, 4])
    assert made.accuracy == pytest.approx(5 / 12)
    assert made.pass_at[1].value == pytest.approx(5 / 12)
    assert made.pass_at[2].value == pytest.approx((0.5 + 1 + 0) / 3)
    assert made.pass_at[4].value == pytest.approx(2 / 3)
    with pytest.raises(BadInputError, match="pass@5 of 4 samples"):
        summarise(run("a", [[1, 0, 0, 0]] * 3), [5])


def test_several_tasks_take_the_place_of_families() -> None:
    samples = rows([[1], [0]], task="aime24") + [
        {**row, "id": "m" + row["id"]} for row in rows([[1], [1]], task="math")
    ]
    made = summarise(run_scores("a", samples))
    assert {name: share.value for name, share in made.by_task.items()} == {"aime24": 0.5, "math": 1}
    assert made.macro is not None
    assert made.macro.value == 0.75


# Two runs


def test_paired_table_of_planted_flips() -> None:
    base, other = flipped(30, 10, 600)
    made = compare_runs(base, other, draws=1000)
    assert (made.paired.gained, made.paired.lost, made.paired.n) == (30, 10, 600)
    assert made.paired.difference == pytest.approx(20 / 600)
    assert made.paired.p_value == pytest.approx(stats.mcnemar_exact(30, 10))
    assert made.equivalence.p_noninferior == pytest.approx(
        stats.noninferiority_p(30, 10, 600, 0.02)
    )
    assert made.power.questions == stats.mcnemar_questions(40 / 600, 0.02)
    values = made.to_dict()
    assert set(values) >= {"difference", "ci", "p_value", "n", "changed", "base", "other", "flips"}
    json.dumps(values, allow_nan=False)


def test_flips_hold_the_question_and_both_answers() -> None:
    made = compare_runs(*flipped(2, 1, 60))
    assert [(f.id, f.before, f.after) for f in made.flips] == [
        ("q0030", 0, 1), ("q0031", 0, 1), ("q0000", 1, 0),
    ]  # fmt: skip
    first = made.flips[0]
    assert (first.question, first.gold) == ("What is 30+1?", "31")
    assert (first.answers_before, first.answers_after) == (("0",), ("31",))
    assert (first.task, first.level) == ("sum", 1)


def test_groups_are_corrected_and_add_up() -> None:
    base = np.zeros(400, dtype=int)
    other = base.copy()
    other[0:40:2] = 1  # only sums change
    made = compare_runs(run("a", base), run("b", other), draws=500)
    by = {row.group: row for row in made.by_task}
    assert (by["sum"].paired.gained, by["product"].paired.changed) == (20, 0)
    assert by["sum"].holm_p == pytest.approx(2 * by["sum"].paired.p_value)
    assert by["product"].holm_p == 1.0
    assert sum(row.paired.changed for row in made.by_level) == made.paired.changed


def test_runs_that_agree_say_so_everywhere() -> None:
    base, other = flipped(0, 0, 2000)
    made = compare_runs(base, other)
    bound = stats.clopper_pearson(0, 2000)[1]
    assert (made.paired.note, made.paired.p_value) == ("changed no answer", 1.0)
    assert made.paired.ci == (-bound, bound)
    assert made.equivalence.equivalent
    assert made.flips == ()
    assert (made.power.questions, made.power.discordance_ci[0]) == (None, 0.0)
    # A few questions that agree show nothing.
    assert not compare_runs(*flipped(0, 0, 50)).equivalence.equivalent


def test_several_samples_are_resampled_by_question() -> None:
    rng = np.random.default_rng(0)
    ability = rng.beta(0.5, 0.5, size=(200, 1))
    base, other = rng.random((2, 200, 8)) < ability
    made = compare_runs(run("a", base), run("b", other), draws=1000)
    assert "sign-flip" in made.paired.note
    assert made.paired.difference == pytest.approx(other.mean() - base.mean())
    assert made.equivalence.method == "bootstrap-t over questions"
    # Runs may differ in their number of samples.
    fewer = compare_runs(run("a", base), run("b", other[:, :2]), draws=200)
    assert fewer.paired.difference == pytest.approx(other[:, :2].mean() - base.mean())


# Several runs


def planted(good: Sequence[float], n: int, seed: int) -> list[RunScores]:
    """Runs that share half of their luck, with these accuracies."""
    rng = np.random.default_rng(seed)
    shared, own = rng.random(n), rng.random((len(good), n))
    luck = np.where(rng.random(n) < 0.5, shared, own)
    return [run(f"r{i}", row < p) for i, (row, p) in enumerate(zip(luck, good, strict=True))]


def test_several_runs_against_the_first() -> None:
    base, *others = planted([0.5, 0.5, 0.51, 0.7], 600, 1)
    made = compare_many(base, others, draws=1000)
    raw = [found.paired.p_value for found in made.runs]
    assert [found.holm_p for found in made.runs] == pytest.approx(stats.holm(raw))
    for found in made.runs:
        low, high = found.simultaneous_ci
        assert low < found.paired.ci[0] < found.paired.ci[1] < high
    assert made.omnibus_p < 0.01
    assert made.best.chosen == made.best.naive_chosen == "r3"
    json.dumps(made.to_dict(), allow_nan=False)


def test_level_of_simultaneous_intervals() -> None:
    """Runs with noise of their own need Sidak's level, runs with the same noise none."""
    noise = np.random.default_rng(2).choice([-1.0, 0.0, 1.0], size=(5, 4000))
    assert module._family_level(noise, 0.95, 40_000, 0) == pytest.approx(0.95**0.2, abs=0.002)
    same = np.tile(noise[:1], (5, 1))
    assert module._family_level(same, 0.95, 40_000, 0) == pytest.approx(0.95, abs=0.004)


@pytest.mark.slow
def test_error_rates_of_several_equal_runs() -> None:
    holm = together = omnibus = 0
    for seed in range(100):
        base, *others = planted([0.6] * 5, 250, seed)
        made = compare_many(base, others, draws=2000, seed=seed)
        holm += min(found.holm_p for found in made.runs) <= 0.05
        together += all(low <= 0 <= high for low, high in (r.simultaneous_ci for r in made.runs))
        omnibus += made.omnibus_p <= 0.05
    assert stats.clopper_pearson(holm, 100, 0.998)[0] <= 0.05
    for hits, rate in ((omnibus, 0.05), (together, 0.95)):
        low, high = stats.clopper_pearson(hits, 100, 0.998)
        assert low <= rate <= high


def test_runs_that_changed_nothing_among_several() -> None:
    base, same = flipped(0, 0, 300)
    other = flipped(25, 5, 300)[1]
    made = compare_many(base, [same, other], draws=500)
    low, high = made.runs[0].simultaneous_ci
    assert low < -stats.clopper_pearson(0, 300)[1]
    assert high > stats.clopper_pearson(0, 300)[1]
    still = compare_many(base, [same, same], draws=500)
    assert still.omnibus_p == 1.0
    assert still.runs[0].simultaneous_ci[1] == pytest.approx(
        stats.clopper_pearson(0, 300, 1 - 0.05 / 2)[1]
    )


def test_the_test_part_is_not_flattered_by_the_choice() -> None:
    """Eight equal runs: what is chosen on dev has no advantage on test, the naive best has."""
    test, naive, noise = [], [], []
    for seed in range(60):
        made = best_of(planted([0.6] * 8, 200, seed), seed=seed, draws=100)
        test.append(made.test.value - 0.6)
        naive.append(made.naive.value - 0.6)
        noise.append(made.noise)
        assert made.dev.n + made.test.n == 200
    assert np.mean(test) == pytest.approx(0.0, abs=0.02)
    assert np.mean(naive) > 0.02
    # Half of the luck is shared: the bootstrap over questions knows.
    assert np.mean(naive) == pytest.approx(np.mean(noise), abs=0.015)


def test_parts_depend_on_the_id_alone() -> None:
    ids = [f"q{i:04}" for i in range(2000)]
    part = [on_dev(name) for name in ids]
    assert part == [on_dev(name) for name in ids]
    assert 900 < sum(part) < 1100
    assert not any(on_dev(name, 0.2) and not on_dev(name, 0.5) for name in ids)
    with pytest.raises(BadInputError, match="leave none"):
        best_of([run("a", [1]), run("b", [0])])


# Bad input


def test_runs_on_other_questions_are_refused() -> None:
    with pytest.raises(BadInputError, match=r"questions: 3 in common of 3 \(a\) and 5 \(b\)"):
        compare_runs(run("a", [1, 0, 1]), run("b", [1, 0, 1, 1, 0]))
    other = run_scores("b", rows([[1], [0]], question="of the same id"))
    with pytest.raises(BadInputError, match="different questions: 0 in common"):
        compare_runs(run("a", [1, 0]), other)
    # Another family of the same question is no other question.
    assert compare_runs(run("a", [1, 0]), run_scores("b", rows([[1], [0]], family=None)))


def test_missing_samples_are_named() -> None:
    samples = rows([[1, 0], [1, 1], [0, 0]])
    del samples[3]
    with pytest.raises(BadInputError, match="1 of 3 questions have fewer than 2, question q0001"):
        run_scores("a", samples)
    with pytest.raises(BadInputError, match="no samples"):
        run_scores("a", [])


@pytest.mark.parametrize(
    "call",
    [
        lambda: compare_runs(*flipped(1, 0, 40), margin=0.0),
        lambda: compare_many(run("a", [1]), [run("b", [1])]),
        lambda: best_of([run("a", [1, 0])]),
        lambda: compare_groups([], [run("a", [1, 0])]),
        lambda: compare_groups([run("a", [1, 0])], [run("b", [1, 0, 1])]),
    ],
)
def test_bad_input(call: Any) -> None:
    with pytest.raises(BadInputError):
        call()


# The command


def keep(
    workspace: Path,
    name: str,
    samples: list[dict[str, Any]],
    config: dict[str, Any] | None = None,
    **results: str,
) -> str:
    """Put an evaluation into a workspace as `eval` does."""
    made = summarise(run_scores(name, samples))
    result = EvalResult(
        accuracy=made.accuracy, n=made.n, ci=made.ci, by_task={}, by_level={},
        samples=samples, seconds=1.0, tokens=5,
    )  # fmt: skip
    place = Workspace(workspace)
    with place.artifact(
        place.path("evals", name), Manifest(kind="eval", config=config or {}, results=results)
    ) as target:
        write_json(target / "results.json", result.to_dict())
        write_samples(result, target / "samples.parquet")
    return name


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six runs of one base over two settings, one with more samples, one on other questions."""
    folder, rng = tmp_path_factory.mktemp("compare") / "workspace", np.random.default_rng(5)
    base = rng.random(300) < 0.6
    keep(folder, "base", rows(base[:, None].tolist()))
    keep(folder, "twin", rows(base[:, None].tolist()))
    for name, gain in (("plain", 0.02), ("tuned", 0.2)):
        for seed in range(3):
            other = np.where(rng.random(300) < gain, True, base)
            keep(folder, f"{name}-{seed}", rows(other[:, None].tolist()))
    several = rng.random((300, 4)) < 0.6
    keep(folder, "several", rows(several.tolist()))
    keep(folder, "short", rows(base[:40, None].tolist()))
    keep(folder, "hostile", rows(base[:40, None].tolist(), question=HOSTILE))
    changed = base[:40].copy()
    changed[:3] = ~changed[:3]
    keep(folder, "hostile-2", rows(changed[:, None].tolist(), question=HOSTILE))
    return folder


def invoke(work: Path, *args: object, code: int = 0) -> Result:
    done = CliRunner().invoke(app, ["compare", *map(str, args), "--workspace", str(work)])
    assert done.exit_code == code, done.stderr or done.exception
    return done


def read(done: Result) -> dict[str, Any]:
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


def test_command_on_two_runs(work: Path) -> None:
    made = read(invoke(work, "base", work / "evals" / "tuned-0", "--json"))
    assert set(made) >= {"difference", "ci", "p_value", "n", "changed", "equivalence", "power"}
    assert (made["n"], made["base"], made["other"]) == (300, "base", "tuned-0")
    assert len(made["flips"]) == made["changed"] == made["gained"]
    assert [score["name"] for score in made["scores"]] == ["base", "tuned-0"]
    shown = invoke(work, "base", "tuned-0", "--flips", "4").stdout
    for text in ("B minus A", "all questions", "level 2", "Holm", "power", "4 of", "What is"):
        assert text in shown
    same = invoke(work, "base", "twin").stdout
    assert "changed no answer" in same
    assert "-1.2 to +1.2" in same


def test_command_on_several_runs(work: Path) -> None:
    names = ["base", *(f"tuned-{seed}" for seed in range(3))]
    made = read(invoke(work, *names, "--json"))
    assert [row["name"] for row in made["runs"]] == names[1:]
    assert set(made["runs"][0]) >= {"difference", "ci", "p_value", "holm_p", "simultaneous_ci"}
    assert made["best"]["runs"] == 4
    shown = invoke(work, *names, "--margin", "5").stdout
    for text in ("omnibus", "too high by", "best of 4", "within 5 points"):
        assert text in shown


def test_command_on_groups_of_seeds(work: Path) -> None:
    groups = [f"{name}={','.join(f'{name}-{s}' for s in range(3))}" for name in ("plain", "tuned")]
    args = [arg for value in groups for arg in ("--group", value)]
    made = read(invoke(work, *args, "--json"))
    assert set(made) >= {"difference", "ci", "p_value", "n", "changed"}
    assert (made["seeds"], made["n"], made["name"]) == ([3, 3], 300, "tuned")
    assert made["difference"] > 0.03
    assert made["p_value"] < 0.05
    shown = invoke(work, *args).stdout
    assert "3 runs of plain, 3 of tuned" in shown
    three = read(invoke(work, *args, "--group", "alone=base", "--json"))
    assert [row["name"] for row in three["groups"]] == ["tuned", "alone"]
    assert three["groups"][0]["single_run_alarms"] is None
    assert three["groups"][1]["single_run_alarms"] == pytest.approx(0.164, abs=0.001)
    alone = invoke(work, *args, "--group", "alone=base").stdout
    assert "alone with one run is taken as that run, its seed fixed" in alone
    assert "up to 16 % of such comparisons find a difference" in alone
    paired = read(invoke(work, *args, "--paired-seeds", "--json"))
    assert paired["paired_seeds"]
    assert len(paired["seed_sd"]) == 1


def test_command_prints_pass_at_k(work: Path) -> None:
    made = read(invoke(work, "several", "base", "--pass-at", "1", "--json"))
    assert made["scores"][0]["pass_at"]["1"]["value"] == made["scores"][0]["accuracy"]
    keep(work, "several-2", rows((np.random.default_rng(8).random((300, 4)) < 0.5).tolist()))
    shown = invoke(work, "several", "several-2", "--pass-at", "1,4").stdout
    for text in ("avg@4", "pass@4", "sign-flip"):
        assert text in shown


@pytest.mark.parametrize("names", [("base", "tuned-0"), ("base", "tuned-0", "tuned-1")])
def test_command_keeps_a_page_and_a_table(
    work: Path, tmp_path: Path, names: tuple[str, ...]
) -> None:
    page, table = tmp_path / "made" / "page.html", tmp_path / "table.csv"
    assert read(invoke(work, *names, "--save", page, "--json"))["saved"] == str(page)
    text = page.read_text()
    for part in ("Differences", "points", "tuned-0", "plotly"):
        assert part in text
    made = read(invoke(work, *names, "--save", table, "--json"))
    lines = list(csv.DictReader(table.open()))
    first = made if len(names) == 2 else made["runs"][0]
    assert float(lines[0]["difference"]) == first["difference"]
    assert int(lines[0]["changed"]) == first["changed"]


def test_questions_are_shown_as_text(work: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = invoke(work, "hostile", "hostile-2", "--flips", "3", "--save", page)
    assert "[bold]" in done.stdout
    text = page.read_text()
    assert HOSTILE not in text
    assert "&lt;b&gt;[bold]" in text


@pytest.mark.parametrize(
    ("args", "names"),
    [
        ((), "0 run given"),
        (("base",), "1 run given"),
        (("base", "base"), "same run"),
        (("base", "evals/../evals/base/."), "is not an evaluation"),
        (("base", "short"), "300 (base) and 40 (short)"),
        (("base", "absent"), "absent"),
        (("base", "twin", "--margin", "0"), "--margin 0"),
        (("base", "twin", "--pass-at", "2"), "pass@2 of 1 samples"),
        (("base", "twin", "--pass-at", "two"), "two"),
        (("base", "twin", "--save", "page.pdf"), "page.pdf"),
        (("base", "twin", "tuned-0", "--flips", "2"), "--flips"),
        (("--group", "a=base"), "1 group"),
        (("--group", "base", "--group", "b=twin"), '"base"'),
        (("--group", "a=base", "--group", "a=twin"), "twice"),
        (("--group", "a=base", "--group", "b=base"), "same run"),
        (("--group", "a=base,twin", "--group", "b=short"), "different questions"),
        (("base", "--group", "a=base", "--group", "b=twin"), "--group"),
        (
            ("--group", "a=base,twin", "--group", "b=tuned-0", "--paired-seeds"),
            "paired seeds need as many",
        ),
    ],
)
def test_command_refuses(work: Path, args: tuple[str, ...], names: str) -> None:
    done = invoke(work, *args, code=2)
    assert names in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error")]) == 1


def test_runs_that_were_asked_in_different_ways_are_told(work: Path) -> None:
    def config(engine: str, **generation: Any) -> dict[str, Any]:
        return {"engine": engine, "dtype": "float32", "eval": {"limit": 4, "samples": 1,
                "generation": {"temperature": 0.0, "seed": len(engine), **generation}}}  # fmt: skip

    answers = rows([[True], [False], [True], [True]])
    keep(work, "by-hf", answers, config("hf", max_new_tokens=160))
    keep(work, "by-vllm", answers, config("vllm", max_new_tokens=320))
    keep(work, "again", answers, config("hf", max_new_tokens=160))
    said = [line for line in invoke(work, "by-hf", "by-vllm").stderr.splitlines() if "warn" in line]
    assert [line.partition(":")[2].partition(":")[0] for line in said] == [
        " the runs differ in engine (hf / vllm)",
        " the runs differ in max_new_tokens (160 / 320)",
    ]
    assert "differ" not in invoke(work, "by-hf", "again").stderr
    # Runs from before it was kept do not say what generated them.
    for name, batch in (("of-8", 8), ("of-64", 64)):
        by = f"transformers 5.19.0, batches of {batch}"
        keep(work, name, answers, config("hf", max_new_tokens=160), generated_by=by)
    assert "differ" not in invoke(work, "by-hf", "of-8").stderr
    assert (
        "the runs differ in generated by (transformers 5.19.0, batches of 8 /"
        in invoke(work, "of-8", "of-64").stderr
    )


def test_a_folder_that_is_no_evaluation_is_named(work: Path, tmp_path: Path) -> None:
    done = invoke(work, "base", tmp_path, code=2)
    assert f"{tmp_path} is not an evaluation" in done.stderr
