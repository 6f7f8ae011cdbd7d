"""Recommending on a workspace of its own: effects, the blend, and stability over SAE seeds."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from typer.testing import CliRunner

from resa_lens.artifacts.stage import Context
from resa_lens.artifacts.workspace import Workspace
from resa_lens.cli import app
from resa_lens.errors import BadInputError
from resa_lens.features.exclusive import CountConfig
from resa_lens.layers.stability import Stability
from resa_lens.progress import Reporter
from resa_lens.saes.train import SaeConfig
from resa_lens.stages import layer_probes
from resa_lens.stages.layer_probes import (
    measure_change,
    measure_gradient,
    measure_probes,
    worked,
)
from resa_lens.stages.recommendation import discover
from resa_lens.stages.sae_training import train_run
from resa_lens.stages.stability import seed_runs, stability_run
from resa_lens.stages.tune_job import TuneJob
from resa_lens.texts.corpora import CorpusConfig
from resa_lens.tuning.config import Objective

LAYERS = list(range(1, 7))
SAE = SaeConfig(latents=512, k=8, tokens=2048)


class Notes(Reporter):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="module")
def ctx(tmp_path_factory: pytest.TempPathFactory) -> Context:
    """Two seeds of quick SAEs, and a run of another size that is no seed of them."""
    made = Context(Workspace(tmp_path_factory.mktemp("discovery") / "workspace"), Notes())
    model = made.model("tiny-reasoner")
    for sae in (SAE, replace(SAE, seed=1), replace(SAE, seed=2, latents=256)):
        train_run(made, model, LAYERS, sae, CorpusConfig(seed=sae.seed))
    return made


@pytest.fixture
def found(ctx: Context) -> Any:
    def run(**options: Any) -> Any:
        model = ctx.model("tiny-reasoner")
        return discover(ctx, model, sae=SAE, corpus=CorpusConfig(), layers=LAYERS, **options)

    return run


# Effects -----------------------------------------------------------------------------------------


def test_causal_takes_the_measured_effects(found: Any) -> None:
    seen: list[Any] = []

    def measure(run: Any, counts: Any) -> dict[int, tuple[float, float]]:
        seen.append((run, counts))
        return {item.layer: (0.5 * (item.layer == 6), 0.05) for item in counts.counts.layers}

    made = found(selector="causal", causal=measure)
    assert made.recommendation.recommendation.recommended == (6,)
    assert made.recommendation.recommendation.selector == "causal"
    assert seen[0][0].folder == made.saes.folder
    assert [item.layer for item in seen[0][1].counts.layers] == LAYERS
    # Other effects make another recommendation; equal ones the same.
    again = found(selector="causal", causal=measure)
    assert again.recommendation.artifact.path == made.recommendation.artifact.path
    none = found(selector="causal", causal=lambda run, counts: dict.fromkeys(LAYERS, (0.0, 1.0)))
    assert none.recommendation.artifact.path != made.recommendation.artifact.path
    answer = none.recommendation.recommendation
    assert (answer.selector, answer.recommended) == ("middle", (5,))
    assert "no layer's causal effect is above its control's" in answer.reason


def test_causal_without_effects_is_refused(found: Any) -> None:
    with pytest.raises(BadInputError, match="needs measured effects"):
        found(selector="causal")


def test_blend_measures_quality_once_and_takes_effects(ctx: Context, found: Any) -> None:
    def measure(run: Any, counts: Any) -> dict[int, tuple[float, float]]:
        return {item.layer: (1.0 / item.layer, 0.01) for item in counts.counts.layers}

    made = found(selector="blend", causal=measure).recommendation.recommendation
    assert made.selector == "blend"
    assert "SAE quality" in made.reason
    assert "causal effect" in made.reason
    said = ctx.reporter.said
    before = len(said)
    again = found(selector="blend", causal=measure).recommendation
    assert again.recommendation == made
    assert any("recommendation: done before" in line for line in said[before:])


# Stability ---------------------------------------------------------------------------------------


def test_seeds_are_runs_that_differ_in_nothing_else(ctx: Context) -> None:
    model = ctx.model("tiny-reasoner")
    run = train_run(ctx, model, LAYERS, SAE, CorpusConfig())
    runs = seed_runs(ctx, model, run, LAYERS)
    assert [r.artifact.manifest.config["sae"]["seed"] for r in runs if r.artifact] == [0, 1]
    assert {r.artifact.manifest.config["sae"]["latents"] for r in runs if r.artifact} == {512}
    assert [r.folder for r in seed_runs(ctx, model, run, [*LAYERS, 9])] == [run.folder]
    assert seed_runs(ctx, model, replace(run, artifact=None), LAYERS)[0].folder == run.folder


def test_stability_over_prompts_rules_and_seeds(ctx: Context) -> None:
    model = ctx.model("tiny-reasoner")

    def judge(**options: Any) -> Any:
        return stability_run(ctx, model, sae=SAE, corpus=CorpusConfig(), layers=LAYERS, **options)

    run = judge()
    folder, made = run.artifact.path, run.stability
    assert len(made.tables) == 3 * 3 * 2
    assert made.blocks == 2
    assert made.layers == tuple(LAYERS)
    prompts, rules = ("r1", "steps", "short"), ("all", "any", "either")
    assert {tuple(t.factors.values()) for t in made.tables} == {
        (prompt, rule, seed) for prompt in prompts for rule in rules for seed in "01"
    }
    assert {item.factor for item in made.factors} == {"prompt", "rule", "SAE seed"}
    # The tables are the counts themselves.
    for prompt in ("r1", "short"):
        counted = discover(
            ctx, model, sae=SAE, corpus=CorpusConfig(), layers=LAYERS, rule="either",
            count=CountConfig(prompt=prompt),
        )  # fmt: skip
        assert counted.saes.artifact is not None
        seed = counted.saes.artifact.manifest.config["sae"]["seed"]
        named = {t.name: t.n for t in made.tables}
        n = sum(counted.counts.counts.table("either").values())
        assert named[f"SAE seed {seed}, prompt {prompt}, rule either"] == n > 0
    stored = json.loads((folder / "stability.json").read_text())
    assert Stability.from_dict(stored) == made
    again = judge()
    assert (again.artifact.path, again.stability) == (folder, made)
    other = judge(prompts=["r1"], rules=["either"], selector="most-features")
    few = other.stability
    assert other.artifact.path != folder
    assert [t.selector for t in few.tables] == ["most-features"] * 2


def test_stability_with_one_seed_says_so(ctx: Context) -> None:
    made = stability_run(
        ctx, ctx.model("tiny-reasoner"), sae=replace(SAE, latents=256, seed=2),
        corpus=CorpusConfig(seed=2), layers=LAYERS, selector="most-features",
    ).stability  # fmt: skip
    assert (made.blocks, made.between, made.verdict) == (1, None, "not testable")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"selector": "quality"}, "'quality' reads no counts"),
        ({"recipe": "magic"}, "magic"),
        ({"rules": ["some"]}, "'some' is unknown"),
        ({"prompts": ["no tags here"]}, "no tags here"),
    ],
)
def test_stability_bad_input(ctx: Context, options: dict[str, Any], match: str) -> None:
    with pytest.raises(BadInputError, match=match):
        stability_run(
            ctx,
            ctx.model("tiny-reasoner"),
            sae=SAE,
            corpus=CorpusConfig(),
            layers=LAYERS,
            **options,
        )


def test_the_command(ctx: Context) -> None:
    args = ["stability", "--workspace", str(ctx.workspace.root), "--layers", "1-6"]
    args += [
        "--latents",
        "512",
        "--k",
        "8",
        "--tokens",
        "2048",
        "--prompt",
        "r1",
        "--prompt",
        "short",
    ]
    done = CliRunner().invoke(app, [*args, "--json"])
    assert done.exit_code == 0, done.stderr or done.exception
    assert done.stdout.count("\n") == 1
    made = json.loads(done.stdout)
    assert {"model", "site", "selector", "tables", "pairs", "factors", "between", "first",
            "verdict", "reason", "next_step"} <= set(made)  # fmt: skip
    assert len(made["tables"]) == 2 * 3 * 2
    shown = CliRunner().invoke(app, args)
    assert "verdict: " in shown.stdout
    assert "between SAE seeds" in shown.stdout
    assert CliRunner().invoke(app, [*args, "--rule", "some"]).exit_code == 2


# Selectors that measure the target ---------------------------------------------------------------


def recommend_args(ctx: Context, selector: str) -> list[str]:
    return [
        "recommend-layers", "--workspace", str(ctx.workspace.root), "--layers", "1-6",
        "--latents", "512", "--k", "8", "--tokens", "2048", "--selector", selector, "--json",
    ]  # fmt: skip


def test_a_change_of_activations_needs_two_models_and_says_so_before_anything_is_loaded(
    ctx: Context, found: Any
) -> None:
    refused = CliRunner().invoke(app, recommend_args(ctx, "activation-change"))
    assert refused.exit_code == 2
    assert "name it with --target-model" in refused.stderr
    with pytest.raises(BadInputError, match="needs measured effects"):
        found(selector="activation-change")


def test_the_command_measures_gradients_and_changes(
    ctx: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_probes, "BATCHES", 2)
    monkeypatch.setattr(layer_probes, "SEQUENCES", 2)
    args = recommend_args(ctx, "activation-change")
    done = CliRunner().invoke(app, [*args, "--target-model", "tiny-reasoner-rl"])
    assert done.exit_code == 0, done.stderr or done.exception
    changed = json.loads(done.stdout)
    assert changed["selector"] == changed["requested"] == "activation-change"
    same = CliRunner().invoke(app, [*args, "--target-model", "tiny-reasoner"])
    assert json.loads(same.stdout)["selector"] == "middle"
    assert "same activations at every layer" in json.loads(same.stdout)["reason"]
    probed = CliRunner().invoke(app, recommend_args(ctx, "gradient-probe"))
    assert probed.exit_code == 0, probed.stderr or probed.exception
    energy = json.loads(probed.stdout)
    assert energy["selector"] == "gradient-probe"
    assert "standard error" in energy["reason"]
    # The tables are those that the measures give, and are in the recommendation's settings.
    model, corpus = ctx.model("tiny-reasoner"), worked(CorpusConfig())
    table = measure_gradient(model, corpus)(LAYERS)
    assert energy["recommended"][0] == max(table, key=lambda layer: table[layer][0])
    change = measure_change(model, ctx.model("tiny-reasoner-rl"), corpus, "mlp_out")(LAYERS)
    assert changed["recommended"][0] == max(change, key=lambda layer: change[layer][0])
    # A sweep's, of what its tunings adapt; where source and target are one, nothing changed.
    job = TuneJob(model="tiny-reasoner", objective=Objective(targets=("q_proj",)))
    both = measure_probes(ctx.model("tiny-reasoner-rl"), model, job, [2, 3])
    assert {name: set(values) for name, values in both.items()} == {
        "gradient": {2, 3}, "change": {2, 3},
    }  # fmt: skip
    assert both["gradient"][2] != table[2]
    stored = ctx.workspace.read(ctx.workspace.path(changed["folder"]))
    assert stored is not None
    assert set(stored.manifest.config["change"]) == {str(layer) for layer in LAYERS}
