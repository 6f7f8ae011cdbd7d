"""Features for Neuronpedia and on a page: lines against the schema, figures against the tables."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from app_driver import HOSTILE
from features_driver import SMALL
from synthetic_workspace import ACTIVITY, PLANTED, SAES, SLUG, write_workspace
from typer.testing import CliRunner

from resa_lens.artifacts.feature_tables import read_feature
from resa_lens.artifacts.listing import named, scan
from resa_lens.cli import app
from resa_lens.errors import BadInputError
from resa_lens.exports import neuronpedia
from resa_lens.exports.neuronpedia import naming, record, schema, write_folder, write_uploads
from resa_lens.exports.page import write_features
from resa_lens.exports.tables import Tables, open_tables

KINDS = {
    "release": "SourceRelease", "model": "Model", "sourceset": "SourceSet", "source": "Source",
    "features": "Feature", "activations": "Activation", "explanations": "Explanation",
}  # fmt: skip
"""By file or folder, what its lines are."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_workspace(tmp_path_factory.mktemp("export") / "workspace", SMALL)


@pytest.fixture(scope="module")
def opened(root: Path) -> Tables:
    listing = scan(root)
    return open_tables(listing, named(listing, ACTIVITY))


def lines_of(file: Path) -> list[dict[str, Any]]:
    text = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return [json.loads(line) for line in text.decode().splitlines()]


def check(kind: str, values: list[dict[str, Any]]) -> None:
    validator = jsonschema.Draft202012Validator(schema()["$defs"][kind])
    for value in values:
        validator.validate(value)


def test_the_command_takes_all_features_of_a_run(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "exports"
    done = CliRunner().invoke(
        app,
        ["export", ACTIVITY, str(out), "--to", "neuronpedia", "--workspace", str(root), "--json"],
    )
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["features"] == SMALL.layers * SMALL.latents
    assert len(list((out / "synthetic").iterdir())) == SMALL.layers


def test_the_folder_holds_every_feature_in_the_projects_form(
    opened: Tables, tmp_path: Path
) -> None:
    names = naming(opened)
    done = write_folder(opened, tmp_path / "exports", names)
    places = sorted((tmp_path / "exports" / "synthetic").iterdir())
    assert [p.name for p in places] == [f"{n}-resa-lens-mlp-out-1500" for n in range(3)]
    assert done.features == SMALL.layers * SMALL.latents == opened.features.rows
    seen = dict.fromkeys(KINDS, 0)
    for place in places:
        for file in sorted(f for f in place.rglob("*") if f.is_file()):
            name = file.parent.name if file.parent != place else file.stem
            values = lines_of(file)
            # Every one of some kinds; of the many, each hundredth.
            check(KINDS[name], values[:: 1 if len(values) < 100 else 100])
            seen[name] += len(values)
    assert seen["features"] == done.features
    assert seen["activations"] >= done.features
    assert (seen["model"], seen["source"]) == (3, 3)
    layer = tmp_path / "exports" / "synthetic" / names.source(PLANTED.layer)
    assert len(list((layer / "features").iterdir())) == 2
    row = next(v for v in lines_of(layer / "features" / "batch-0.jsonl.gz")
               if v["index"] == str(PLANTED.feature))  # fmt: skip
    assert row["frac_nonzero"] == pytest.approx(PLANTED.overall)
    assert row["pos_str"][0] == PLANTED.token
    assert row["hookName"] == f"blocks.{PLANTED.layer}.mlp.hook_out"


def test_an_examples_values_and_bins_are_those_of_the_table(opened: Tables, tmp_path: Path) -> None:
    write_folder(opened, tmp_path / "exports", naming(opened), {(PLANTED.layer, PLANTED.feature)})
    (place,) = (tmp_path / "exports" / "synthetic").iterdir()
    _, examples = read_feature(opened.run.path, PLANTED.layer, PLANTED.feature)
    values = lines_of(place / "activations" / "batch-0.jsonl.gz")
    assert len(values) == len(examples) > 0
    for value, example in zip(values, examples, strict=True):
        assert value["tokens"] == example["tokens"]
        assert value["values"] == pytest.approx(example["acts"])
        peak = value["qualifyingTokenIndex"]
        assert value["tokens"][peak] == example["tokens"][example["position"] - example["start"]]
        assert value["values"][value["maxValueTokenIndex"]] == value["maxValue"]
        assert value["binMin"] == (-1 if example["interval"] == "strongest" else value["binMin"])
    (explanation,) = lines_of(place / "explanations" / "batch-0.jsonl.gz")
    assert PLANTED.reason in explanation["description"]


def test_drawn_examples_fall_into_thirds_of_their_phase() -> None:
    row = {"tokens_fired_prompt": 60, "tokens_fired_think": 30, "tokens_fired_answer": 0}
    examples = [
        {"phase": "prompt", "interval": "upper third", "value": 4.0},
        {"phase": "prompt", "interval": "upper third", "value": 5.0},
        {"phase": "think", "interval": "lower third", "value": 1.0},
        {"phase": "think", "interval": "strongest", "value": 9.0},
    ]
    found = [rest for _, *rest in neuronpedia.bins(neuronpedia.Feature(row, examples, [], None))]
    assert found == [
        [4.0, 5.0, pytest.approx(60 / 90 / 3)],
        [4.0, 5.0, pytest.approx(60 / 90 / 3)],
        [1.0, 1.0, pytest.approx(30 / 90 / 3)],
        [-1.0, -1.0, -1.0],
    ]


def test_uploads_keep_the_limits(opened: Tables, tmp_path: Path) -> None:
    done = write_uploads(opened, tmp_path / "up", naming(opened, "mine", "someone"))
    files = sorted((tmp_path / "up").rglob("*.json"))
    bodies = [json.loads(file.read_text()) for file in files]
    check("UploadBatch", bodies[::3])
    assert done.features == sum(len(body["features"]) for body in bodies) == opened.features.rows
    assert max(len(body["features"]) for body in bodies) == neuronpedia.UPLOADED
    assert {body["source"] for body in bodies} == {"0-mine", "1-mine", "2-mine"}


def test_a_long_example_is_cut_around_its_peak() -> None:
    row = {
        "feature": 3, "density": 0.5, "max": 2.0, "tokens_fired": 4, "tokens_fired_think": 4,
        "top_tokens": ["a"] * 30, "top_logits": [1.0] * 30, "bottom_tokens": None,
        "bottom_logits": None, "layer": 0,
    }  # fmt: skip
    example = {
        "layer": 0, "feature": 3, "phase": "think", "interval": "strongest", "value": 2.0,
        "rank": 0, "position": 1900,
        "start": 0, "tokens": [str(n) for n in range(2000)], "acts": [0.0] * 2000,
    }  # fmt: skip
    sent = neuronpedia._uploaded(neuronpedia.Feature(row, [example], ["x" * 600], None))
    (activation,) = sent["activations"]
    assert len(activation["tokens"]) == len(activation["values"]) == neuronpedia.LONGEST
    assert "1900" in activation["tokens"]
    assert len(sent["topLogits"]) == neuronpedia.LOGITS
    assert len(sent["explanations"][0]["text"]) == neuronpedia.LABEL
    example["acts"] = [0.0]
    with pytest.raises(BadInputError, match="2000 tokens, 1 activations"):
        neuronpedia._uploaded(neuronpedia.Feature(row, [example], [], None))


def test_a_field_that_the_schema_lacks_is_refused() -> None:
    with pytest.raises(KeyError, match="Feature has no field density"):
        record("Feature", density=0.5)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("standing", "no feature of activity/.* is standing"), ("5:1", "layer"),
        ("0:99999", "none of activity"), ("x", "LAYER:FEATURE"),
    ],
)  # fmt: skip
def test_features_that_are_none_are_refused(opened: Tables, spec: str, words: str) -> None:
    stands = {(v.layer, v.feature) for v in opened.verdicts if v.verdict == "survives"}
    if spec == "standing" and stands:
        assert opened.choose(spec) == stands
        return
    with pytest.raises(BadInputError, match=words):
        opened.choose(spec)


def test_another_kind_or_name_is_refused(root: Path, opened: Tables) -> None:
    listing = scan(root)
    with pytest.raises(BadInputError, match="exported from an activity run"):
        open_tables(listing, next(a for a in listing.artifacts if a.kind.name == "counts"))
    with pytest.raises(BadInputError, match="source set"):
        naming(opened, "My Set")
    assert SAES.startswith(f"saes/{SLUG}")


def test_a_page_of_chosen_features_is_whole_and_text_stays_text(
    opened: Tables, tmp_path: Path
) -> None:
    places = {(PLANTED.layer, PLANTED.feature), (0, 7)}
    listing_page = tmp_path / "page.html"
    done = write_features(opened, listing_page, places)
    text = listing_page.read_text()
    assert done.features == text.count("<h2>") == 2
    assert f"layer 1 (0-based; 2nd of 3), feature {PLANTED.feature}" in text
    assert PLANTED.reason in text
    # Nothing is fetched: the page stands by itself.
    assert 'src="http' not in text.replace("'", '"')
    with pytest.raises(BadInputError, match="more than 200"):
        write_features(opened, tmp_path / "all.html", None)
    with pytest.raises(BadInputError, match="should end in"):
        write_features(opened, tmp_path / "page.pdf", places)
    hostile = neuronpedia.Feature(
        {**next(iter(opened.read(places))).row, "fires_on": [HOSTILE], "fires_on_share": [1.0]},
        [], [HOSTILE], None,
    )  # fmt: skip
    fake = Tables(**{**vars(opened)})
    object.__setattr__(fake, "read", lambda chosen: iter([hostile]))
    write_features(fake, tmp_path / "hostile.html", None)
    assert HOSTILE not in (tmp_path / "hostile.html").read_text()
