"""Attribution and causal effects as artifacts, and the selector that reads the effects."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from identities import changed_byte, data_file, identity_of, moved, write_rows
from typer.testing import CliRunner

from resa_lens.artifacts.stage import Context
from resa_lens.artifacts.workspace import Workspace
from resa_lens.cli import app
from resa_lens.errors import BadInputError
from resa_lens.features.exclusive import RULES, CountConfig
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.progress import Reporter
from resa_lens.saes.train import SaeConfig
from resa_lens.stages.attribution import (
    attribute_run,
    document_batches,
    effects_run,
    held_out,
    measure_effects,
)
from resa_lens.stages.counts import count_run
from resa_lens.stages.recommendation import discover
from resa_lens.stages.sae_training import train_run
from resa_lens.texts.corpora import CorpusConfig

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
    counted = count_run(ctx, tiny, saes, CountConfig(), LAYERS)
    named = {4: tuple(range(40)), 7: ()}
    layers = tuple(
        replace(item, features=dict.fromkeys(RULES, named[item.layer]))
        for item in counted.counts.layers
    )
    return saes, replace(counted, counts=replace(counted.counts, layers=layers))


def test_attribution_is_kept_and_read(ctx, tiny, run):
    point = Hookpoint(4)
    saes, counts = run
    options = {"top": 4, "tokens": 400, "metric": "answer", "counts": counts}
    first = attribute_run(ctx, tiny, saes, point, CORPUS, **options)
    assert first.artifact.manifest.parents == [saes.relative, counts.artifact.relative]
    found = first.results
    assert len(found["effects"]) == found["agreement"]["n"] == 4
    assert found["metric"] == "answer"
    assert found["documents"] == sum(
        batch.ids.shape[0] for batch in document_batches(tiny, held_out(CORPUS), CORPUS, 400)
    )
    again = attribute_run(ctx, tiny, saes, point, CORPUS, **options)
    assert "done before" in ctx.reporter.lines[-1]
    assert (again.artifact.path, again.results) == (first.artifact.path, found)
    with pytest.raises(BadInputError, match="metric 'logits' is unknown; use loss, think, answer"):
        attribute_run(ctx, tiny, saes, point, CORPUS, metric="logits")


def test_effects_are_measured_once_for_every_layer(ctx, tiny, run):
    first = effects_run(ctx, tiny, *run, "either", CORPUS, tokens=1500, controls=2)
    effects = first.layers
    assert sorted(effects) == LAYERS
    assert (effects[7].value, effects[7].se, effects[7].features) == (0.0, 0.0, 0)
    assert effects[4].features == 40
    assert effects[4].se > 0
    assert effects[4].value == pytest.approx(effects[4].target - effects[4].control)
    again = effects_run(ctx, tiny, *run, "either", CORPUS, tokens=1500, controls=2)
    assert (again.artifact.path, again.layers) == (first.artifact.path, effects)
    assert "done before" in ctx.reporter.lines[-1]
    with pytest.raises(BadInputError, match="rule 'most' is unknown"):
        effects_run(ctx, tiny, *run, "most", CORPUS)


def test_what_attributions_and_effects_are_made_from(ctx, tiny, run, tmp_path):
    saes, counted = run
    file = data_file(tmp_path / "data.jsonl")
    corpus = CorpusConfig(source=str(file))

    def attribution(corpus=corpus, run=saes, layer=4, **options):
        return identity_of(attribute_run, ctx, tiny, run, Hookpoint(layer), corpus, **options)

    def effects(corpus=corpus, run=saes, counts=counted, rule="either", **options):
        return identity_of(effects_run, ctx, tiny, run, counts, rule, corpus, **options)

    other_counts = count_run(ctx, tiny, saes, CountConfig(prompt="steps"), LAYERS)
    changed = changed_byte(saes, tmp_path / "changed", 4)
    copy = CorpusConfig(source=str(shutil.copy(file, tmp_path / "copy.jsonl")))
    options = {"features": (1,)}, {"metric": "think"}, {"top": 3}, {"tokens": 300}, {"layer": 7}
    plain = attribution(), effects()
    assert (attribution(copy), effects(copy)) == plain
    others = [
        *(attribution(**option) for option in options),
        *(one(replace(corpus, system_share=0.2)) for one in (attribution, effects)),
        *(one(run=changed) for one in (attribution, effects)),
        effects(counts=other_counts),
        *(effects(**option) for option in ({"rule": "any"}, {"tokens": 300}, {"controls": 3})),
    ]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    write_rows(file, [{**rows[0], "answer": "another"}, *rows[1:]])
    others += [attribution(), effects()]
    ctx.seed = 1
    others += [attribution(copy), effects(copy)]
    assert len({*plain, *others}) == len(plain) + len(others)


def test_a_moved_workspace_has_them_done(ctx, tiny, run, tmp_path):
    def both(where):
        return (
            attribute_run(where, tiny, run[0], Hookpoint(4), CORPUS, top=4, tokens=400).results,
            effects_run(where, tiny, *run, "either", CORPUS, tokens=1500, controls=2).layers,
        )

    first = both(ctx)
    there = moved(ctx, tmp_path / "moved")
    ctx.reporter.lines.clear()
    assert both(there) == first
    assert ["done before" in line for line in ctx.reporter.lines] == [True, True]


@pytest.mark.parametrize("selector", ["causal", "blend"])
def test_the_selectors_read_the_effects(ctx, tiny, run, monkeypatch, selector):
    monkeypatch.setattr("resa_lens.stages.attribution.EFFECT_TOKENS", 1500)
    found = discover(
        ctx, tiny, sae=SAE, corpus=CORPUS, layers=LAYERS, rule="either", selector=selector,
        causal=measure_effects(ctx, tiny, "either", CORPUS),
    )  # fmt: skip
    made = found.recommendation.recommendation
    assert made.requested == selector
    assert set(made.recommended) <= set(LAYERS)
    assert "causal effect" in made.reason
    assert list(Path(ctx.workspace.root, "effects").rglob("effects.json"))


def test_without_features_the_middle_layer_and_the_reason(ctx, tiny, run):
    found = discover(
        ctx, tiny, sae=SAE, corpus=CORPUS, layers=LAYERS, rule="all", selector="causal",
        causal=lambda saes, counts: dict.fromkeys(LAYERS, (0.0, 0.0)),
    )  # fmt: skip
    made = found.recommendation.recommendation
    assert made.selector == "middle"
    assert "no layer's causal effect is above its control" in made.reason


def test_the_command_takes_the_causal_selector(workspace, run, monkeypatch):
    monkeypatch.setattr("resa_lens.stages.attribution.EFFECT_TOKENS", 1000)
    done = invoke(
"recommend-layers", "--layers", "4,7", "--k", "16", "--rule", "either",
        "--selector", "causal", "--workspace", str(workspace), "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["requested"] == "causal"
    assert found["recommended"]


def test_where_the_rule_counts_nothing_it_says_so_and_measures_nothing(ctx, tiny, run):
    saes, counted = run
    layers = tuple(
        replace(item, features={**item.features, "all": ()}) for item in counted.counts.layers
    )
    none = replace(counted, counts=replace(counted.counts, layers=layers))
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
