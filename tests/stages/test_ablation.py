"""Dose and response: known answers from planted samples, and runs that go on where they stopped."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from identities import changed_byte, identity_of, moved
from typer.testing import CliRunner

from resa_lens.artifacts.stage import Context
from resa_lens.artifacts.workspace import Workspace
from resa_lens.cli import app
from resa_lens.errors import BadInputError
from resa_lens.evals.engines import GenerationConfig
from resa_lens.evals.run import EvalConfig
from resa_lens.evals.tasks import load_questions
from resa_lens.features.exclusive import RULES, FeatureCounts, LayerCount, TaggedPrompt
from resa_lens.figures.plots import dose_response_figure
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.progress import SILENT, Reporter
from resa_lens.saes.coder import new_coder
from resa_lens.saes.formats import save_coder
from resa_lens.stages import ablation as module
from resa_lens.stages.ablation import (
    AblationConfig,
    ablate_run,
    counted_features,
)
from resa_lens.stages.counts import CountRun
from resa_lens.stages.dose_response import POWER, detectable, dose_response
from resa_lens.stages.saes import SaeRun

POINT = Hookpoint(5)
N = 40


# Statistics of planted samples


def samples(
    correct: list[float], tokens: float = 10, longer: int = 0, samples: int = 1
) -> list[dict[str, Any]]:
    """A row an answer; the first `longer` questions take five tokens more and do not finish."""
    return [
        {
            "id": f"q{question:03}",
            "sample": sample,
            "correct": bool(value) if samples == 1 else sample < value * samples,
            "tokens": int(tokens) + 5 * (question < longer),
            "finished": question >= longer,
        }
        for question, value in enumerate(correct)
        for sample in range(samples)
    ]


def wrong_at(count: int, start: int = 0) -> list[float]:
    return [0.0 if start <= q < start + count else 1.0 for q in range(N)]


def test_a_planted_effect_comes_out() -> None:
    base = samples(wrong_at(0))
    target = {1.0: samples(wrong_at(10), longer=4)}
    controls = {1.0: [samples(wrong_at(1, start=20 + i)) for i in range(5)]}
    (row,) = dose_response(base, target, controls)
    effect, beside = row["effect"], row["control"]
    assert (row["n"], row["accuracy"]) == (N, 0.75)
    assert (effect["difference"], effect["lost"], effect["gained"]) == (-0.25, 10, 0)
    assert effect["p_value"] == pytest.approx(2 * 0.5**10)  # McNemar: ten of ten one way
    assert effect["ci"][0] < -0.25 < effect["ci"][1] < 0
    assert beside["sets"] == 5
    assert beside["each"] == pytest.approx([-1 / 40] * 5)
    assert beside["effect"]["difference"] == pytest.approx(-1 / 40)
    # Question by question: ten fall by 1, five rise by 1/5.
    assert beside["beyond"]["difference"] == pytest.approx((-10 + 5 / 5) / 40)
    assert (beside["beyond"]["lost"], beside["beyond"]["gained"]) == (10, 5)
    assert beside["beyond"]["p_value"] < 0.01
    assert beside["rank_p"] == pytest.approx(1 / 6)
    assert row["tokens"]["mean"] == 10.5
    assert row["tokens"]["difference"] == 0.5
    assert row["tokens"]["changed"] == 4
    assert row["tokens"]["p_value"] == pytest.approx(1 / 8, abs=0.02)  # 2 x (1/2)^4
    assert row["finished"]["difference"] == -0.1
    assert beside["beyond_tokens"]["difference"] == 0.5
    assert beside["rank_p_tokens"] == pytest.approx(1 / 6)


def test_random_sets_that_differ_from_each_other_widen_the_interval() -> None:
    """Taken as fixed, their mean would make one more such set look beyond them."""
    base = samples(wrong_at(0))
    sizes = (0, 4, 8, 12)
    controls = {1.0: [samples(wrong_at(size)) for size in sizes]}
    (row,) = dose_response(base, {1.0: samples(wrong_at(14))}, controls)
    beyond = row["control"]["beyond"]
    after = np.array(wrong_at(14))
    drawn = np.array([wrong_at(size) for size in sizes])
    fixed = after - drawn.mean(0)
    by_units = float(fixed.std(ddof=1)) / math.sqrt(N)
    assert abs(float(fixed.mean())) > 3 * by_units
    error = math.sqrt(by_units**2 + float(drawn.mean(1).var(ddof=1)) * (1 + 1 / 4))
    low, high = beyond["ci"]
    assert (low + high) / 2 == pytest.approx(float(fixed.mean()))
    assert high - low > 2 * 1.96 * error
    assert beyond["p_value"] > 0.05
    assert beyond["note"] == "t over questions and random sets"


def test_as_much_as_random_features_is_nothing() -> None:
    """The effect is clear and its controls have it too: only the comparison says so."""
    target = {1.0: samples(wrong_at(10))}
    controls = {1.0: [samples(wrong_at(10)) for _ in range(4)]}
    (row,) = dose_response(samples(wrong_at(0)), target, controls)
    assert row["effect"]["p_value"] < 0.01
    assert row["control"]["beyond"]["difference"] == 0.0
    assert row["control"]["beyond"]["p_value"] == 1.0
    assert row["control"]["beyond"]["note"] == "changed no answer"
    assert row["control"]["rank_p"] == 1.0


def test_where_no_answer_changes_the_interval_has_a_width() -> None:
    base = samples(wrong_at(5))
    (row,) = dose_response(base, {0.5: base}, {})
    effect = row["effect"]
    bound = 1 - 0.025 ** (1 / N)  # Clopper and Pearson at 0 of n
    assert (effect["difference"], effect["p_value"]) == (0.0, 1.0)
    assert effect["note"] == "changed no answer"
    assert effect["ci"] == pytest.approx([-bound, bound])
    assert effect["detectable"] == pytest.approx(POWER * math.sqrt(bound / N))
    assert row["control"] is None
    assert (row["tokens"]["difference"], row["tokens"]["ci"]) == (0.0, None)
    assert row["tokens"]["p_value"] == 1.0


def test_several_answers_a_question_are_averaged() -> None:
    base = samples([0.5] * N, samples=4)
    target = {1.0: samples([0.25] * 20 + [0.5] * 20, samples=4)}
    (row,) = dose_response(base, target, {1.0: [base, base]})
    assert row["samples"] == 4
    assert row["effect"]["difference"] == pytest.approx(-0.125)
    assert row["effect"]["n"] == N  # questions, not answers
    assert row["control"]["beyond"]["difference"] == pytest.approx(-0.125)


def test_samples_are_paired_by_question_whatever_their_order() -> None:
    base, after = samples(wrong_at(7)), samples(wrong_at(7))
    (row,) = dose_response(base[::-1], {1.0: after}, {})
    assert row["effect"]["changed"] == 0


def test_arms_of_different_questions_are_refused() -> None:
    other = [{**row, "id": f"other{row['id']}"} for row in samples(wrong_at(0))]
    with pytest.raises(BadInputError, match="different questions"):
        dose_response(samples(wrong_at(0)), {1.0: other}, {})


def test_the_detectable_difference_is_found_in_four_of_five_runs() -> None:
    rng = np.random.default_rng(0)
    n, runs = 400, 2000
    before = np.zeros((n, 1))
    spread = rng.normal(size=(n, 1))
    size = detectable(before, spread)
    drawn = rng.normal(size, spread.std(ddof=1), size=(runs, n))
    z = drawn.mean(1) / (drawn.std(1, ddof=1) / math.sqrt(n))
    assert (np.abs(z) > 1.96).mean() == pytest.approx(0.8, abs=4 * math.sqrt(0.16 / runs))


def test_the_figure_holds_every_dose_and_every_set() -> None:
    base = samples(wrong_at(0))
    target = {s: samples(wrong_at(int(4 * s))) for s in (0.5, 1.0, 2.0)}
    doses = dose_response(base, target, {1.0: [samples(wrong_at(1)), samples(wrong_at(2))]})
    figure = dose_response_figure(doses, "ablate <b>3</b> features")
    lines, each, mean = figure.data
    assert list(lines.x) == [0.0, 0.5, 1.0, 2.0]
    assert list(lines.y) == pytest.approx([0, -5, -10, -20])
    assert list(each.y) == pytest.approx([-2.5, -5])
    assert list(mean.y) == pytest.approx([-3.75])
    assert "&lt;b&gt;" in figure.layout.title.text


def test_the_figures_page_needs_nothing_else(tmp_path: Path) -> None:
    base = samples(wrong_at(0))
    doses = dose_response(
        base,
        {0.5: base, 1.0: samples(wrong_at(10))},
        {1.0: [samples(wrong_at(1)), samples(wrong_at(2))]},
    )
    results = {
        "model": "a <b>model</b>", "where": "layer 5", "site": "mlp_out", "rule": "either",
        "features": [3, 17], "kind": "ablate", "strength": 1.0, "phases": ["think"],
        "base": {"accuracy": 1.0}, "doses": doses, "n": N, "note": "greedy",
    }  # fmt: skip
    module.write_figure(tmp_path / "page.html", results)
    text = (tmp_path / "page.html").read_text()
    assert "Plotly.newPlot" in text
    assert len(text) > 1_000_000  # Plotly itself
    assert not re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=.(?:https?:)?//", text)
    assert "a &lt;b&gt;model&lt;/b&gt;" in text
    assert "Features, counted by rule either: 3, 17." in text
    shown = [f"{100 * x:+.1f}" for x in doses[1]["effect"]["ci"]]
    assert f"<td>-25.0</td><td>{' to '.join(shown)}</td>" in text


# Runs on the bundled model


class Notes(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def sae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One untrained SAE, whose directions are long enough to be felt."""
    coder = new_coder(128, 256, 16, seed=0)
    with torch.no_grad():
        assert coder.W_dec is not None
        coder.W_dec.mul_(6)
    place = tmp_path_factory.mktemp("saes")
    save_coder(coder.requires_grad_(False), place / POINT.sparsify, "sparsify", POINT)
    return place


@pytest.fixture
def ctx(tmp_path: Path, tiny: Any) -> Context:
    made = Context(Workspace(tmp_path / "workspace"), SILENT)
    made.models["tiny-reasoner|"] = tiny
    return made


def run_of(folder: Path) -> SaeRun:
    return SaeRun(folder, (POINT,), {}, 0, 0.0, False)


def config(**fields: Any) -> AblationConfig:
    values: dict[str, Any] = {
        "point": POINT, "features": (3, 8, 20, 31, 77), "doses": (1.0,), "controls": 2,
        "eval": EvalConfig(generation=GenerationConfig(16)),
    }  # fmt: skip
    return AblationConfig(**{**values, **fields})


ITEMS = load_questions("tiny", levels=(1,), limit=6)


def test_a_run_says_effect_control_and_p_and_is_read_when_done(
    ctx: Context, tiny: Any, sae_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = EvalConfig(generation=GenerationConfig(40))
    asked = config(strength=50.0, doses=(1.0, 50.0), eval=long)
    first = ablate_run(ctx, tiny, run_of(sae_folder), ITEMS, asked)
    folder, found = first.artifact.path, first.results
    assert {file.name for file in folder.glob("*.parquet")} == {
        "plain.parquet", "target-1.parquet", "target-50.parquet", "control-0-50.parquet",
        "control-1-50.parquet",
    }  # fmt: skip
    assert folder.relative_to(ctx.workspace.root).parts[:2] == ("ablations", tiny.slug)
    assert not list(folder.parent.glob(".work-*"))
    main = found["doses"][-1]
    assert main["strength"] == 50.0
    assert found["effect"] == main["effect"]["difference"] != 0
    assert found["control"] == main["control"]["effect"]["difference"]
    assert found["p_value"] == main["control"]["beyond"]["p_value"]
    assert found["n"] == len(ITEMS)
    assert "greedy" in found["note"]
    # Controls stand beside the main dose alone.
    assert found["doses"][0]["control"] is None
    chosen = set(asked.features)
    for one in found["controls"]:
        assert len(set(one["features"]) - chosen) == len(chosen)
        assert one["mass"]["all"] == pytest.approx(1.0, abs=0.1)
    monkeypatch.setattr(module, "evaluate", None)
    again = ablate_run(ctx, tiny, run_of(sae_folder), ITEMS, asked)
    assert (again.artifact.path, again.results) == (folder, found)
    there = moved(ctx, tmp_path / "moved")
    again = ablate_run(there, tiny, run_of(sae_folder), ITEMS, asked)
    assert again.results == found
    assert again.artifact.path.is_relative_to(tmp_path / "moved")


def test_a_killed_run_goes_on_with_the_next_arm(
    ctx: Context, tiny: Any, sae_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = module.evaluate, [0]

    def dies(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(module, "evaluate", dies)
    with pytest.raises(KeyboardInterrupt):
        ablate_run(ctx, tiny, run_of(sae_folder), ITEMS[:2], config())
    assert not list(ctx.workspace.root.rglob("results.json"))
    ctx.reporter = Notes()
    ablation = ablate_run(ctx, tiny, run_of(sae_folder), ITEMS[:2], config())
    assert calls[0] == 5  # plain and target, the one that was killed, two controls
    (expected,) = [line for line in ctx.reporter.lines if "more arms" in line]
    assert "for 2 more arms of 2 answers" in expected
    assert ablation.artifact.manifest.seconds > 0
    ctx.force = True
    anew = ablate_run(ctx, tiny, run_of(sae_folder), ITEMS[:2], config())
    assert calls[0] == 9
    assert anew.results == ablation.results


def test_what_an_ablation_is_made_from(
    ctx: Context, tiny: Any, sae_folder: Path, tmp_path: Path
) -> None:
    run = run_of(sae_folder)

    def identity(
        items: Any = ITEMS, saes: SaeRun = run, source: str = "tiny", **fields: Any
    ) -> str:
        return identity_of(ablate_run, ctx, tiny, saes, items, config(**fields), source=source)

    def asked(longest: int = 16, batch_size: int = 64, **fields: Any) -> EvalConfig:
        return EvalConfig(generation=GenerationConfig(longest, batch_size=batch_size), **fields)

    plain = identity()
    assert identity(source="another name") == plain
    assert identity(eval=asked(batch_size=2)) == plain
    # What is asked counts, not how it was chosen.
    assert identity(items=ITEMS[:4]) == identity(items=ITEMS[:4], eval=asked(levels=(1,)))
    others = [
        identity(items=ITEMS[:4]),
        identity(eval=asked(limit=5)),
        identity(items=[replace(ITEMS[0], answer="7"), *ITEMS[1:]]),
        identity(features=(3, 8)),
        identity(rule="either"),
        identity(kind="scale"),
        identity(strength=2.0),
        identity(doses=(0.5, 1.0)),
        identity(phases=("think",)),
        identity(keep_error=False),
        identity(controls=3),
        identity(all_doses=True),
        identity(seed=1),
        identity(eval=asked(17)),
        identity(eval=asked(system_prompt="Be brief.")),
        identity(saes=changed_byte(run, tmp_path / "changed", 5)),
    ]
    assert len({plain, *others}) == 1 + len(others)


def test_without_the_error_term_the_base_is_the_reconstruction(
    ctx: Context, tiny: Any, sae_folder: Path
) -> None:
    """An untrained SAE in place of x ruins the answers: no part of the features' effect."""
    long = EvalConfig(generation=GenerationConfig(40))
    asked = config(keep_error=False, controls=1, phases=("think",), eval=long)
    ablation = ablate_run(ctx, tiny, run_of(sae_folder), ITEMS[:2], asked)
    found = ablation.results
    assert (ablation.artifact.path / "base.parquet").exists()
    assert found["insertion"]["n"] == 2
    assert found["base"]["accuracy"] != pytest.approx(
        found["base"]["accuracy"] - found["insertion"]["difference"]
    )
    assert found["phases"] == ["think"]
    assert set(found["active_tokens"]) == {"think"}


def test_steering_takes_each_features_own_mean(ctx: Context, tiny: Any, sae_folder: Path) -> None:
    steered = config(kind="steer", controls=1, all_doses=True, doses=(0.5, 1.0))
    found = ablate_run(ctx, tiny, run_of(sae_folder), ITEMS[:2], steered).results
    assert len(found["values"]) == 5
    assert max(found["values"]) > 0
    assert all(row["control"] for row in found["doses"])
    # Decoder rows of norm 6: what is pushed is as long as what the features add.
    clamp = config(kind="clamp", controls=1)
    clamped = ablate_run(ctx, tiny, run_of(sae_folder), ITEMS[:2], clamp).results
    assert found["values"] == pytest.approx([6 * v for v in clamped["values"]])
    clamp = config(kind="clamp", value=2.0, controls=1)
    fixed = ablate_run(ctx, tiny, run_of(sae_folder), ITEMS[:2], clamp).results
    assert fixed["values"] == [2.0] * 5


def test_features_that_are_never_active_say_so(ctx: Context, tiny: Any, tmp_path: Path) -> None:
    coder = new_coder(128, 64, 8, seed=0)
    with torch.no_grad():
        coder.encoder.bias[:20] = -1e6
    save_coder(coder.requires_grad_(False), tmp_path / "s" / POINT.sparsify, "sparsify", POINT)
    asked = config(features=(1, 2), controls=1)
    found = ablate_run(ctx, tiny, run_of(tmp_path / "s"), ITEMS[:2], asked).results
    assert "never active at the chosen tokens" in found["note"]
    assert (found["effect"], found["p_value"]) == (0.0, 1.0)
    assert found["controls"][0]["mass"]["all"] is None
    steered = config(features=(1, 2), kind="steer", controls=1)
    with pytest.raises(BadInputError, match="steer has no value to take; give one with --value"):
        ablate_run(ctx, tiny, run_of(tmp_path / "s"), ITEMS[:2], steered)


# Which features


def counts_of(monkeypatch: pytest.MonkeyPatch, layers: dict[int, dict[str, tuple[int, ...]]]):
    made = tuple(
        LayerCount(layer, {**dict.fromkeys(RULES, ()), **found}, 9)
        for layer, found in layers.items()
    )
    counts = FeatureCounts(TaggedPrompt("", (), (), (), ()), made)
    artifact: Any = None
    monkeypatch.setattr(module, "count_run", lambda *_, **__: CountRun(artifact, counts))


def test_the_layer_is_where_the_rule_counts_most(
    ctx: Context, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = tuple(Hookpoint(layer) for layer in (2, 3, 4))
    run = SaeRun(Path(), points, {}, 0, 0.0, False)
    counts_of(
        monkeypatch,
        {2: {"either": (1,)}, 3: {"either": (5, 6)}, 4: {"either": (7, 8), "any": (7,)}},
    )

    def named(rule: str, layer: int | None) -> tuple[int, tuple[int, ...]]:
        counted = counted_features(ctx, tiny, run, rule, layer)
        return counted.layer, counted.features

    assert named("either", None) == (3, (5, 6))
    assert named("any", None) == (4, (7,))
    assert named("either", 2) == (2, (1,))
    with pytest.raises(BadInputError, match=r"'all' counts no feature at any layer; any counts 1"):
        counted_features(ctx, tiny, run, "all", None)
    with pytest.raises(BadInputError, match=r"no SAE at layer 7 \(0-based; 8th of 12\)"):
        counted_features(ctx, tiny, run, "either", 7)
    with pytest.raises(BadInputError, match="rule 'most' is unknown"):
        counted_features(ctx, tiny, run, "most", None)
    counts_of(monkeypatch, {2: {"either": (1, 3)}})
    with pytest.raises(BadInputError, match=r"(?s)'all' counts no feature at layer 2.*either coun"):
        counted_features(ctx, tiny, run, "all", 2)


# Bad input


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"controls": 0}, "controls 0 is out of range"),
        ({"strength": 0.0}, "strength 0 changes nothing"),
        ({"doses": (1.0, float("inf"))}, "dose inf is out of range"),
        ({"kind": "remove"}, "kind 'remove' is unknown"),
        ({"phases": ("thinking",)}, "phase 'thinking' is unknown"),
        ({"value": 1.0}, "kind 'ablate' takes no value"),
        ({"kind": "steer", "value": math.nan}, "value nan is out of range"),
    ],
)
def test_configurations_that_make_no_sense(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        config(**fields)


def test_features_and_places_that_are_not_there(ctx: Context, tiny: Any, sae_folder: Path) -> None:
    with pytest.raises(BadInputError, match=r"feature 256 is out of range.* features 0 to 255"):
        ablate_run(ctx, tiny, run_of(sae_folder), ITEMS, config(features=(256,)))
    with pytest.raises(BadInputError, match="no SAE at layer 6"):
        ablate_run(ctx, tiny, run_of(sae_folder), ITEMS, config(point=Hookpoint(6)))
    with pytest.raises(BadInputError, match="resid_post"):
        ablate_run(ctx, tiny, run_of(sae_folder), ITEMS, config(point=Hookpoint(5, "resid_post")))
    assert not ctx.workspace.root.exists()


# The commands


def invoke(*args: str) -> Any:
    return CliRunner().invoke(app, list(args))


def test_ablate_prints_one_object(tmp_path: Path, sae_folder: Path) -> None:
    args = (
        "ablate", "--layer", "6th", "--features", "3,8", "--saes", str(sae_folder),
        "--allow-site-mismatch", "--doses", "1", "--control-sets", "1", "--limit", "3",
        "--max-new-tokens", "16", "--workspace", str(tmp_path / "w"),
    )  # fmt: skip
    done = invoke(*args, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["layer"], found["features"], found["n"]) == (5, [3, 8], 3)
    assert all(isinstance(found[key], float) for key in ("effect", "control", "p_value"))
    table = invoke(*args)
    assert "random features" in " ".join(table.stdout.split())
    page = Path(found["folder"]) / "dose_response.html"
    assert page.name in table.stdout
    assert page.is_file()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--features", "most"), "features 'most' are no indices; use counted or"),
        (("--rule", "most", "--features", "3"), "rule 'most' is unknown; use all, any, either"),
        (("--kind", "steer", "--value", "nan"), "value nan is out of range"),
        (("--doses", "a"), "--doses 'a' is no number"),
        (("--kind", "kill"), "kind 'kill' is unknown"),
        (("--phases", "thoughts"), "--phases 'thoughts' is unknown"),
        (("--samples", "2"), "2 samples at temperature 0"),
    ],
)
def test_commands_refuse_before_they_work(
    args: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = invoke("ablate", *args, "--workspace", str(tmp_path / "w"))
    assert done.exit_code == 2
    assert message in done.stderr
    assert not (tmp_path / "w").exists()
