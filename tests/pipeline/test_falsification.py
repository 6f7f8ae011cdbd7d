"""Falsification as an artifact: further SAEs are found or trained, and what is left out is said."""

from __future__ import annotations

import html
import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from resa_lens.cli import app
from resa_lens.corpora import CorpusConfig
from resa_lens.errors import BadInputError
from resa_lens.features.exclusive import RULES, CountConfig
from resa_lens.features.falsify import SURVIVES, VERDICTS, FalsifyConfig
from resa_lens.pipeline.context import Context
from resa_lens.pipeline.discovery import count_run
from resa_lens.pipeline.falsification import falsify_run, read_plain_texts, survivors_of
from resa_lens.pipeline.sae_training import train_run
from resa_lens.pipeline.saes import find_saes
from resa_lens.progress import Reporter
from resa_lens.saes.train import SaeConfig
from resa_lens.workspace import Workspace

LAYERS = [4, 7]
SAE = SaeConfig(latents=512, k=16, tokens=16_384)
CORPUS = CorpusConfig()
FEW = FalsifyConfig(texts=10, shuffles=6)


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


@pytest.fixture(scope="module")
def run(workspace, tiny):
    """SAEs, counts and verdicts with every test."""
    ctx = Context(Workspace(workspace), Notes())
    saes = train_run(ctx, tiny, LAYERS, SAE, CORPUS)
    folder, counts = count_run(ctx, tiny, saes, CountConfig(), LAYERS)
    return saes, folder, counts, falsify_run(ctx, tiny, saes, counts, folder, FEW)


def test_every_counted_feature_has_a_verdict(run):
    _, _, counts, made = run
    union = {
        (item.layer, feature)
        for item in counts.layers
        for rule in RULES
        for feature in item.features[rule]
    }
    assert union, "no rule counts a feature of these SAEs: the test shows nothing"
    assert {(f["layer"], f["feature"]) for f in made.features} == union
    for found in made.features:
        assert found["verdict"] in VERDICTS
        assert found["rule"] == found["rules"][0]
        strict = [r for r in RULES if found["feature"] in _counted(counts, found["layer"], r)]
        assert list(found["rules"]) == strict
        assert (found["verdict"] == SURVIVES) == (not found["failed"])
        assert found["shares"]["injected"]["n"] == 10
        assert found["other_seed"] is not None
    assert made.skipped == ()
    assert made.trials["shuffled"] == 6


def _counted(counts, layer, rule):
    return next(item for item in counts.layers if item.layer == layer).features[rule]


def test_the_summary_has_the_null_beside_it(run):
    made = run[-1]
    either = made.summary["rules"][-1]
    assert either["counted"] == len(made.features)
    assert sum(either["verdicts"].values()) == either["counted"]
    assert either["null_active"] > 0
    assert 0 < either["p_value"] <= 1
    assert "random-weights model" in made.summary["reason"]
    by_layer = {f["layer"]: f["random_weights"] for f in made.features if f["rule"] == "either"}
    assert sum(null["active"] for null in by_layer.values()) <= either["null_active"]
    assert sum(null["counted"] for null in by_layer.values()) <= either["null_counted"]
    assert all(null["pass"] <= null["counted"] <= null["active"] for null in by_layer.values())


def test_the_page_shows_the_verdicts_and_needs_no_network(run):
    made = run[-1]
    page = (made.folder / "verdicts.html").read_text()
    assert made.summary["reason"] in html.unescape(page)
    assert "counted with random weights" in page
    assert 'src="http' not in page
    assert "src='http" not in page


def test_a_finished_run_is_read(ctx, tiny, run):
    saes, folder, counts, made = run
    again = falsify_run(ctx, tiny, saes, counts, folder, FEW)
    assert again == made
    assert "done before" in ctx.reporter.lines[-1]


def test_the_other_seed_is_not_trained_twice(ctx, tiny, run, monkeypatch):
    saes, folder, counts, _ = run
    monkeypatch.setattr("resa_lens.pipeline.falsification.train_run", None)
    ctx.force = True
    made = falsify_run(ctx, tiny, saes, counts, folder, FEW, random_weights=False)
    assert any("another seed's SAEs: using" in line for line in ctx.reporter.lines)
    assert made.features[0]["other_seed"] is not None
    assert made.summary["rules"][-1]["p_value"] is None
    assert "was not measured" in made.summary["reason"]


def test_saes_without_their_training_say_what_is_left_out(ctx, tiny, run):
    saes, folder, counts, made = run
    given = replace(saes, manifest=None)
    found = falsify_run(ctx, tiny, given, counts, folder, replace(FEW, seed=3))
    assert [reason.split(":")[0] for reason in found.skipped] == ["other seed", "random weights"]
    assert sum("left out" in line for line in ctx.reporter.lines) == 2
    assert found.features[0]["other_seed"] is None
    assert len(found.features) == len(made.features)


def test_counts_of_nothing_are_no_error(ctx, tiny, run):
    saes, folder, counts, _ = run
    empty = replace(
        counts,
        layers=tuple(replace(item, features=dict.fromkeys(RULES, ())) for item in counts.layers),
    )
    made = falsify_run(ctx, tiny, saes, empty, folder, replace(FEW, seed=4))
    assert made.features == []
    assert made.summary["reason"].startswith("no rule counts a feature")


def test_files_of_plain_texts(tmp_path):
    file = tmp_path / "plain.txt"
    with pytest.raises(BadInputError, match="does not exist"):
        read_plain_texts(str(file))
    file.write_text("one line alone\n\n")
    with pytest.raises(BadInputError, match="has 1 lines"):
        read_plain_texts(str(file))
    file.write_text("a first line\n\n  a second one\n")
    assert read_plain_texts(str(file)) == ["a first line", "a second one"]


def test_the_command_prints_one_object(workspace, run):
    made = run[-1]
    done = invoke(
"falsify", "--layers", "4,7", "--k", "16", "--texts", "10", "--shuffles", "6",
        "--workspace", str(workspace), "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["folder"] == str(made.folder)
    assert {"layer", "feature", "rule", "verdict"} <= set(found["features"][0])
    assert len(found["features"]) == len(made.features)
    wrong = invoke("falsify", "--rule", "some", "--workspace", str(workspace))
    assert wrong.exit_code == 2
    assert "rule 'some' is unknown" in wrong.stderr
    beyond = invoke(
"activity", "--layers", "4,7", "--k", "16", "--show", "4:512",
        "--text-tokens", "2000", "--workspace", str(workspace),
    )  # fmt: skip
    assert beyond.exit_code == 2
    assert "out of range: its SAE has latents 0 to 511" in " ".join(beyond.stderr.split())


def test_saes_trained_for_comparison_are_not_taken_for_the_models_own(ctx, tiny, run):
    """The other seed's run is newer; a command that names no seed goes on with its own."""
    saes = run[0]
    runs = ctx.workspace.find(f"saes/{tiny.slug}", "saes")
    assert runs[0][0] != saes.folder
    found = find_saes(ctx, tiny, SaeConfig(k=16), CORPUS, LAYERS)
    assert found is not None
    assert found.folder == saes.folder
    other = find_saes(ctx, tiny, SaeConfig(k=16, seed=1), CORPUS, LAYERS)
    assert other is not None
    assert other.folder == runs[0][0]


def test_a_recommendation_says_what_falsification_left(ctx, tiny, run, workspace):
    _, folder, _, made = run
    either = survivors_of(ctx, tiny, folder, "either")
    assert either is not None
    assert either["survivors"] == made.summary["rules"][-1]["survivors"]
    assert survivors_of(ctx, tiny, folder.parent / "other", "either") is None
    done = invoke(
"recommend-layers", "--layers", "4,7", "--k", "16", "--rule", "either",
        "--workspace", str(workspace),
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    counted = len(made.features)
    said = f"falsification left {either['survivors']} of the {counted} counted features"
    assert said in " ".join(done.stdout.split())
