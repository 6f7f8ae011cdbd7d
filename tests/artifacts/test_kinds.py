"""A kind of artifact is one class: what it says is what writer, reader, listing and pages use."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import kind_examples
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from app_driver import run_page, texts
from pydantic import BaseModel

from resa_lens.artifacts import lineage
from resa_lens.artifacts.artifact import COLUMNS, KINDS, Artifact, Kind
from resa_lens.artifacts.feature_tables import ADDED
from resa_lens.artifacts.kinds.sweep import Sweep, SweepTables
from resa_lens.artifacts.listing import scan
from resa_lens.artifacts.manifest import Manifest
from resa_lens.artifacts.workspace import Workspace
from resa_lens.errors import DamagedError
from resa_lens.hashes import digest
from resa_lens.resources import VARIABLE, data_path

GOLDEN = Path(__file__).parents[1] / "golden" / "workspace"


# A new kind is one file and one test: this is the file


class DreamResults(BaseModel):
    """Results of the manifest."""

    sheep: int


class Flock(BaseModel):
    """flock.json."""

    names: list[str]


@pytest.fixture
def dream() -> Iterator[type[Kind]]:
    class Dream(Kind):
        """A dream."""

        name = "dream"
        folder = "dreams"
        title, titles = "dream", "dreams"
        column = "Judged"
        Results = DreamResults
        files = {"flock.json": Flock}  # noqa: RUF012

        @classmethod
        def sentence(cls, artifact: Artifact) -> str:
            return f"{artifact.results.sheep} sheep were counted."

        @classmethod
        def detail(cls, artifact: Artifact, *, one_based: bool = False) -> str:
            return f"{artifact.results.sheep} sheep"

    yield Dream
    del KINDS["dream"]


# And this the test


def test_a_new_kind_is_one_file(tmp_path: Path, dream: type[Kind], monkeypatch):
    space = Workspace(tmp_path)
    saes = kind_examples.manifest("saes", hashes={"weights": "0" * 64})
    with space.artifact(space.path("saes", "m-00000000", "s"), saes):
        pass
    ingredients = {"kind": "dream", "parents": {"saes": saes.identity}}
    manifest = Manifest(
        kind="dream",
        config={},
        results={"sheep": 7},
        ingredients=ingredients,
        identity=digest(ingredients),
        hashes={"weights": "0" * 64},
    )
    folder = space.path("dreams", "m-00000000", "d")
    with space.artifact(folder, manifest) as target:
        (target / "flock.json").write_text(json.dumps({"names": ["Dolly"]}))

    (artifact,) = space.artifacts(dream)
    assert artifact.kind is dream
    assert artifact.read("flock.json", Flock).names == ["Dolly"]
    assert list(artifact.damage(cached=False)) == []
    listing = scan(tmp_path)
    assert [a.relative for a in listing.of(dream)] == ["dreams/m-00000000/d"]
    graph = lineage.build(listing)
    node = graph.node("dreams/m-00000000/d")
    assert (node.title, node.detail, COLUMNS[node.column]) == ("dream", "7 sheep", "Judged")
    assert ("saes/m-00000000/s", node.key) in graph.edges
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    app = run_page("overview", artifact=node.key)
    assert "7 sheep were counted." in texts(app)
    runs = next(frame.value for frame in app.dataframe if "CPU seconds" in frame.value)
    assert "dream" in runs["kind"].tolist()
    (folder / "flock.json").write_text("{}")
    assert next(artifact.damage()).startswith(str(folder / "flock.json"))


def test_results_of_another_kind_are_no_dream(tmp_path: Path, dream: type[Kind]):
    space = Workspace(tmp_path)
    with space.artifact(
        space.path("dreams", "m", "d"), Manifest(kind="dream", config={}, results={"cows": 7})
    ):
        pass
    (problem,) = scan(tmp_path).problems
    assert "dreams/m/d" in problem
    assert "at sheep" in problem


# The kinds there are


def test_each_kind_has_its_place():
    folders = [kind.folder for kind in KINDS.values()]
    assert len(set(folders)) == len(folders)
    for name, kind in KINDS.items():
        assert kind.name == name
        assert kind.column in COLUMNS
        assert kind.title
        assert kind.titles


@pytest.mark.parametrize("root", [data_path("workspace"), GOLDEN], ids=["shipped", "golden"])
def test_everything_that_ships_reads_by_its_schema(root: Path):
    listing = scan(root)
    assert listing.problems == ()
    assert {a.kind.name for a in listing.artifacts} >= {
        "saes", "counts", "recommendation", "falsification", "activity", "scores", "attribution",
        "ablation", "adapter", "eval", "sweep",
    }  # fmt: skip
    for artifact in listing.artifacts:
        assert artifact.kind.sentence(artifact).endswith(".")
        assert artifact.kind.detail(artifact)
        for name, schema in artifact.kind.files.items():
            # The golden workspace is trimmed: not all files are there.
            if root == GOLDEN and not (artifact.path / name).exists():
                continue
            if isinstance(schema, pa.Schema):
                stored = pq.read_schema(artifact.file(name))
                recipe = artifact.manifest.ingredients.get("recipe", 1)
                for field in schema:
                    # Older tables lack what a later recipe added.
                    if recipe < ADDED.get(field.name, 1) and field.name not in stored.names:
                        continue
                    assert stored.field(field.name).type == field.type, (artifact.relative, name)
            elif schema:
                assert artifact.value(name) == json.loads((artifact.path / name).read_text())
            else:
                assert artifact.file(name).exists()


def test_a_sweep_keeps_every_number_on_its_way_through_the_schema():
    sweep = scan(data_path("workspace")).of(Sweep)[0]
    tables = sweep.read("sweep.json", SweepTables)
    assert json.loads(json.dumps(tables.to_dict())) == sweep.value("sweep.json")


def test_what_a_schema_refuses_names_file_and_place():
    broken = kind_examples.artifact(
        Path("/w"), "counts/m/r", "counts", results={"layers": [{"layer": 1}]}
    )
    with pytest.raises(DamagedError, match=r"counts/m/r/manifest\.json .* at layers\.0\.all"):
        _ = broken.results


def test_kinds_load_no_model_library_and_no_statistics():
    code = (
        "import json, sys\nimport resa_lens.artifacts.listing, resa_lens.artifacts.lineage\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    heavy = {"torch", "transformers", "scipy", "pandas", "streamlit", "sklearn", "plotly"}
    assert not heavy & set(json.loads(done.stdout))
