"""Falsification as an artifact: further SAEs are found or trained, and what is left out is said."""

from __future__ import annotations

import html
import json
from dataclasses import replace

import pytest
from identities import changed_byte, data_file, identity_of, moved, write_rows
from typer.testing import CliRunner

from resa_lens.artifacts.kinds.saes import Saes
from resa_lens.artifacts.stage import Context
from resa_lens.artifacts.workspace import Workspace
from resa_lens.cli import app
from resa_lens.errors import BadInputError
from resa_lens.features.exclusive import RULES, CountConfig
from resa_lens.features.falsify import FalsifyConfig
from resa_lens.features.words import NEEDS, SEED, STANDS, WORDS
from resa_lens.progress import Reporter
from resa_lens.saes.train import SaeConfig
from resa_lens.stages.counts import count_run
from resa_lens.stages.falsification import falsify_run, read_plain_texts, survivors_of
from resa_lens.stages.sae_training import train_run
from resa_lens.stages.saes import find_saes
from resa_lens.texts.corpora import CorpusConfig

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
    counts = count_run(ctx, tiny, saes, CountConfig(), LAYERS)
    return saes, counts, falsify_run(ctx, tiny, saes, counts, FEW)


def test_every_counted_feature_has_a_verdict(run):
    _, counted, made = run
    counts = counted.counts
    union = {
        (item.layer, feature)
        for item in counts.layers
        for rule in RULES
        for feature in item.features[rule]
    }
    assert union, "no rule counts a feature of these SAEs: the test shows nothing"
    assert {(f["layer"], f["feature"]) for f in made.features} == union
    for found in made.features:
        assert found["verdict"] in WORDS
        assert found["depends_on"].keys() == NEEDS.keys()
        assert {item["needs"] for item in found["depends_on"].values()} <= {
            "yes", "no", "undetermined",
        }  # fmt: skip
        assert all(item["n"] == 10 for name, item in found["depends_on"].items()
                   if name not in ("order", "seed"))  # fmt: skip
        assert found["rule"] == found["rules"][0]
        strict = [r for r in RULES if found["feature"] in _counted(counts, found["layer"], r)]
        assert list(found["rules"]) == strict
        stands = WORDS[found["by_texts"]].group == STANDS
        assert stands or found["verdict"] == found["by_texts"]
        assert (found["verdict"] == SEED) <= stands
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
    page = (made.artifact.path / "verdicts.html").read_text()
    assert made.summary["reason"] in html.unescape(page)
    assert "counted with random weights" in page
    assert 'src="http' not in page
    assert "src='http" not in page


def test_a_finished_run_is_read(ctx, tiny, run):
    saes, counts, made = run
    again = falsify_run(ctx, tiny, saes, counts, FEW)
    assert replace(again, artifact=made.artifact) == made
    assert again.artifact.path == made.artifact.path
    assert "done before" in ctx.reporter.lines[-1]


def test_what_verdicts_are_made_from(ctx, tiny, run, tmp_path):
    saes, counted, made = run

    def identity(saes=saes, counts=counted, config=FEW, **options):
        return identity_of(falsify_run, ctx, tiny, saes, counts, config, **options)

    plain = identity()
    assert plain == made.artifact.manifest.identity
    others = [
        identity(config=replace(FEW, texts=11)),
        identity(config=replace(FEW, fires=0.4)),
        identity(config=replace(FEW, seed=1)),
        identity(plain_texts=["a plain first text", "and a second one"]),
        identity(other_seed=False),
        identity(random_weights=False),
        identity(counts=count_run(ctx, tiny, saes, CountConfig(prompt="steps"), LAYERS)),
        identity(saes=replace(saes, artifact=None)),
        identity(saes=changed_byte(saes, tmp_path / "changed", 4)),
    ]
    ctx.seed = 1
    others.append(identity())
    assert len({plain, *others}) == 1 + len(others)


def test_a_moved_workspace_has_the_finished_run(ctx, tiny, run, tmp_path):
    saes, counts, made = run
    there = moved(ctx, tmp_path / "moved")
    again = falsify_run(there, tiny, saes, counts, FEW)
    assert "done before" in ctx.reporter.lines[-1]
    assert replace(again, artifact=made.artifact) == made


def test_data_changed_since_the_training_are_named(tmp_path, tiny):
    ctx = Context(Workspace(tmp_path / "w"), Notes())
    file = data_file(tmp_path / "data.jsonl", 240)
    corpus = CorpusConfig(source=str(file))
    saes = train_run(ctx, tiny, [4], replace(SAE, tokens=8192), corpus)
    counts = count_run(ctx, tiny, saes, CountConfig(), [4])
    assert any(counts.counts.layers[0].features.values()), "nothing is counted: shows nothing"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    write_rows(file, rows[1:])
    with pytest.raises(BadInputError, match=r"data\.jsonl' are not those that the SAEs in"):
        falsify_run(ctx, tiny, saes, counts, FEW)
    assert not ctx.workspace.path("falsified").exists()
    made = falsify_run(ctx, tiny, saes, counts, FEW, other_seed=False, random_weights=False)
    assert made.features


def test_the_other_seed_is_not_trained_twice(ctx, tiny, run, monkeypatch):
    saes, counts, _ = run
    monkeypatch.setattr("resa_lens.stages.further_saes.train_job", None)
    ctx.force = True
    made = falsify_run(ctx, tiny, saes, counts, FEW, random_weights=False)
    assert any("another seed's SAEs: using" in line for line in ctx.reporter.lines)
    assert made.features[0]["other_seed"] is not None
    assert made.summary["rules"][-1]["p_value"] is None
    assert "was not measured" in made.summary["reason"]


def test_saes_without_their_training_say_what_is_left_out(tmp_path, tiny, run):
    saes, counts, made = run
    ctx = Context(Workspace(tmp_path), Notes())
    falsified = falsify_run(ctx, tiny, replace(saes, artifact=None), counts, FEW)
    reasons = [reason.split(":")[0] for reason in falsified.skipped]
    assert reasons == ["other seed", "random weights"]
    assert sum("left out" in line for line in ctx.reporter.lines) == 2
    assert falsified.features[0]["other_seed"] is None
    assert len(falsified.features) == len(made.features)


def test_counts_of_nothing_are_no_error(tmp_path, tiny, run):
    saes, counts, _ = run
    none = dict.fromkeys(RULES, ())
    layers = tuple(replace(item, features=none) for item in counts.counts.layers)
    empty = replace(counts, counts=replace(counts.counts, layers=layers))
    made = falsify_run(Context(Workspace(tmp_path), Notes()), tiny, saes, empty, FEW)
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
    assert found["folder"] == str(made.artifact.path)
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
    newest = next(a for a in ctx.workspace.artifacts(Saes) if a.slug == tiny.slug)
    assert newest.path != saes.folder
    found = find_saes(ctx, tiny, SaeConfig(k=16), CORPUS, LAYERS)
    assert found is not None
    assert found.folder == saes.folder
    other = find_saes(ctx, tiny, SaeConfig(k=16, seed=1), CORPUS, LAYERS)
    assert other is not None
    assert other.folder == newest.path


def test_a_recommendation_says_what_falsification_left(ctx, tiny, run, workspace):
    saes, counts, made = run
    either = survivors_of(ctx, counts, "either")
    assert either is not None
    assert either["survivors"] == made.summary["rules"][-1]["survivors"]
    other = count_run(ctx, tiny, saes, CountConfig(prompt="steps"), LAYERS)
    assert survivors_of(ctx, other, "either") is None
    done = invoke(
"recommend-layers", "--layers", "4,7", "--k", "16", "--rule", "either",
        "--workspace", str(workspace),
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    counted = len(made.features)
    said = f"falsification left {either['survivors']} of the {counted} counted features"
    assert said in " ".join(done.stdout.split())
