"""Attribution and causal effects as artifacts, and the selector that reads the effects."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from resa_lens.cli import app
from resa_lens.corpora import CorpusConfig
from resa_lens.errors import BadInputError
from resa_lens.features.exclusive import RULES, CountConfig
from resa_lens.hookpoints import Hookpoint
from resa_lens.pipeline.attribution import (
    attribute_run,
    document_batches,
    effects_run,
    measure_effects,
)
from resa_lens.pipeline.context import Context
from resa_lens.pipeline.discovery import count_run, discover
from resa_lens.pipeline.sae_training import train_run
from resa_lens.progress import Reporter
from resa_lens.saes.train import SaeConfig
from resa_lens.workspace import Workspace

LAYERS = [4, 7]
SAE = SaeConfig(latents=256, k=16, tokens=8192)
CORPUS = CorpusConfig()


def invoke(*args: str):
    return CliRunner().invoke(app, list(args))


class Notes(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture
def ctx(workspace, tiny):
    made = Context(Workspace(workspace), Notes())
    made.models["tiny-reasoner|"] = tiny
    return made


@pytest.fixture
def run(ctx, tiny):
    """SAEs, and counts in which layer 7 has no feature."""
    saes = train_run(ctx, tiny, LAYERS, SAE, CORPUS)
    _, counts = count_run(ctx, tiny, saes, CountConfig(), LAYERS)
    named = {4: tuple(range(40)), 7: ()}
    planted = replace(
        counts,
        layers=tuple(
            replace(item, features=dict.fromkeys(RULES, named[item.layer]))
            for item in counts.layers
        ),
    )
    return saes, planted


def test_attribution_is_kept_and_read(ctx, tiny, run):
    point = Hookpoint(4)
    folder, found = attribute_run(
        ctx, tiny, run[0], point, CORPUS, top=4, tokens=400, metric="answer"
    )
    assert len(found["effects"]) == found["agreement"]["n"] == 4
    assert found["metric"] == "answer"
    assert found["documents"] == sum(
        batch.ids.shape[0] for batch in document_batches(tiny, CORPUS, 400)
    )
    again, held = attribute_run(
        ctx, tiny, run[0], point, CORPUS, top=4, tokens=400, metric="answer"
    )
    assert (again, held) == (folder, json.loads(json.dumps(found)))
    with pytest.raises(BadInputError, match="metric 'logits' is unknown; use loss, think, answer"):
        attribute_run(ctx, tiny, run[0], point, CORPUS, metric="logits")


def test_effects_are_measured_once_for_every_layer(ctx, tiny, run):
    folder, found = effects_run(ctx, tiny, *run, "either", CORPUS, tokens=1500, controls=2)
    assert sorted(found) == LAYERS
    assert (found[7]["value"], found[7]["se"], found[7]["features"]) == (0.0, 0.0, 0)
    assert found[4]["features"] == 40
    assert found[4]["se"] > 0
    assert found[4]["value"] == pytest.approx(found[4]["target"] - found[4]["control"])
    again = effects_run(ctx, tiny, *run, "either", CORPUS, tokens=1500, controls=2)
    assert again == (folder, found)
    assert "done before" in ctx.reporter.lines[-1]
    with pytest.raises(BadInputError, match="rule 'most' is unknown"):
        effects_run(ctx, tiny, *run, "most", CORPUS)


@pytest.mark.parametrize("selector", ["causal", "blend"])
def test_the_selectors_read_the_effects(ctx, tiny, run, monkeypatch, selector):
    monkeypatch.setattr("resa_lens.pipeline.attribution.EFFECT_TOKENS", 1500)
    found = discover(
        ctx, tiny, sae=SAE, corpus=CORPUS, layers=LAYERS, rule="either", selector=selector,
        causal=measure_effects(ctx, tiny, "either", CORPUS),
    )  # fmt: skip
    made = found.recommendation
    assert made.requested == selector
    assert set(made.recommended) <= set(LAYERS)
    assert "causal effect" in made.reason
    assert list(Path(ctx.workspace.root, "effects").rglob("effects.json"))


def test_without_features_the_middle_layer_and_the_reason(ctx, tiny, run):
    found = discover(
        ctx, tiny, sae=SAE, corpus=CORPUS, layers=LAYERS, rule="all", selector="causal",
        causal=lambda saes, counts: dict.fromkeys(LAYERS, (0.0, 0.0)),
    )  # fmt: skip
    made = found.recommendation
    assert made.selector == "middle"
    assert "no layer's causal effect is above its control" in made.reason


def test_the_command_takes_the_causal_selector(workspace, run, monkeypatch):
    monkeypatch.setattr("resa_lens.pipeline.attribution.EFFECT_TOKENS", 1000)
    done = invoke(
"recommend-layers", "--layers", "4,7", "--k", "16", "--rule", "either",
        "--selector", "causal", "--workspace", str(workspace), "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["requested"] == "causal"
    assert found["recommended"]


def test_where_the_rule_counts_nothing_it_says_so_and_measures_nothing(ctx, tiny, run):
    saes, counts = run
    none = replace(
        counts,
        layers=tuple(
            replace(item, features={**item.features, "all": ()}) for item in counts.layers
        ),
    )
    found = measure_effects(ctx, tiny, "all", CORPUS)(saes, none)
    assert found == {4: (0.0, 0.0, 1.0), 7: (0.0, 0.0, 1.0)}
    said = ctx.reporter.lines[-1]
    assert "rule 'all' counts no feature at any layer; any counts 40, either counts 40" in said


@pytest.mark.parametrize(
    ("option", "value", "right"),
    [
        ("--rule", "most", "use all, any, either"),
        ("--metric", "logits", "use loss, think, answer"),
        ("--features", "most", "use active, counted or"),
    ],
)
def test_attribute_refuses_before_it_loads(tmp_path, option, value, right):
    place = tmp_path / "w"
    done = CliRunner().invoke(app, ["attribute", option, value, "--workspace", str(place)])
    assert done.exit_code == 2
    assert f"'{value}'" in done.stderr
    assert right in done.stderr
    assert "model" not in done.stderr
    assert not place.exists()
