"""The workspace that ships: whole, readable, the same on any machine."""

from __future__ import annotations

import json
import re
import subprocess

import pyarrow.parquet as pq
import pytest

from resa_lens.artifacts.artifact import KINDS
from resa_lens.artifacts.workspace import Workspace
from resa_lens.models.files import resolve_base
from resa_lens.resources import data_path

SHIPPED = data_path("workspace")
SCRIPT = data_path("make_workspace.sh")


@pytest.fixture(scope="module")
def artifacts():
    problems: list[str] = []
    listed = Workspace(SHIPPED).artifacts(problems=problems)
    assert problems == []
    return [(artifact.path, artifact.manifest) for artifact in listed]


def test_it_holds_every_stage_of_one_model(artifacts):
    kinds = {manifest.kind for _, manifest in artifacts}
    assert kinds <= set(KINDS)
    assert kinds >= {
        "saes", "counts", "recommendation", "falsification", "activity", "scores", "ablation",
        "attribution", "adapter", "eval", "sweep",
    }  # fmt: skip
    # An eval's are those of the model with its adapter.
    weights = {m.hashes["weights"][:8] for _, m in artifacts if m.kind != "eval"}
    assert weights == {"459a3904"}


def test_no_file_names_a_place_of_the_machine_that_made_it():
    for file in SHIPPED.rglob("*"):
        if file.suffix in (".json", ".md", ".csv", ".jsonl"):
            for path in re.findall(r'"(/[^"\s]{3,})"', file.read_text()):
                pytest.fail(f"{file} holds {path}")


def test_parents_are_in_it_but_for_the_controls_of_falsification(artifacts):
    held = {str(folder.relative_to(SHIPPED)) for folder, _ in artifacts}
    shipped = [(f, m) for f, m in artifacts if m.kind != "sweep"]
    parents = {(m.kind, p) for _, m in shipped for p in m.parents if not p.startswith("/")}
    missing = {(kind, parent) for kind, parent in parents if parent not in held}
    assert all((kind, p.split("/")[0]) == ("falsification", "saes") for kind, p in missing)
    assert len(missing) == 2


def test_every_table_and_weight_can_be_read(artifacts):
    for file in SHIPPED.rglob("*.parquet"):
        assert pq.ParquetFile(file).metadata.num_rows > 0
    adapters = [folder for folder, m in artifacts if m.kind == "adapter"]
    assert adapters
    for folder in adapters:
        assert resolve_base(folder, None).name == "tiny-reasoner"
    saes = next(folder for folder, m in artifacts if m.kind == "saes")
    layers = sorted(int(p.parent.name.split(".")[1]) for p in saes.rglob("cfg.json"))
    assert layers == list(range(1, 11))


def test_what_it_says_agrees_with_itself(artifacts):
    """The verdicts are of the features that were counted, and these were measured."""
    by_kind = {manifest.kind: (folder, manifest) for folder, manifest in artifacts}
    folder, _ = by_kind["falsification"]
    verdicts = json.loads((folder / "verdicts.json").read_text())["features"]
    counted = {row["layer"]: row["either"] for row in by_kind["counts"][1].results["layers"]}
    for layer, expected in counted.items():
        assert sum(v["layer"] == layer for v in verdicts) == expected
    rows = pq.read_table(by_kind["activity"][0] / "features.parquet", columns=["layer", "feature"])
    measured = set(zip(rows["layer"].to_pylist(), rows["feature"].to_pylist(), strict=True))
    found = sum((v["layer"], v["feature"]) in measured for v in verdicts)
    assert found > 0.5 * len(verdicts) > 0


def test_its_script_is_one_that_bash_reads_and_whose_commands_exist(cli):
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    listed = cli("--help").stdout
    commands = re.findall(r"^resa ([a-z-]+)", SCRIPT.read_text(), re.MULTILINE)
    assert len(commands) == 9
    for command in commands:
        assert f" {command} " in listed
