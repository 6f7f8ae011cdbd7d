"""Notebooks run from top to bottom and find what they say they find."""

from __future__ import annotations

import json
import re
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pyarrow.parquet as pq
import pytest
from nbclient import NotebookClient
from safetensors.numpy import load_file
from typer.main import get_command

from benchmarks.insertion_experiment.analysis import contrast
from resa_lens.resources import data_path
from resa_lens.stats import holm

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
QUICK, GAUSSIANS, ANATOMY, TUNING, AUDIT = NOTEBOOKS
FLAT = "not distinguishable from flat"
RULES = ("all", "any", "either")
MINUTE = 60


@pytest.fixture
def execute(tmp_path, monkeypatch, record_property):
    """Runs a notebook on a workspace, in a kernel of this very interpreter.

    Each takes less than a minute on one core: of the processor's time, since a busy machine
    stretches the clock's.  Both are recorded.
    """
    kernel = tmp_path / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": command, "display_name": "this interpreter", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    # Jupyter asks the user's folder before JUPYTER_PATH.
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))

    def run(notebook: Path, workspace: Path, **replaced: str) -> Any:
        """`replaced`: other values for names that the notebook assigns to at a line's beginning."""
        monkeypatch.setenv("RESA_LENS_WORKSPACE", str(workspace))
        loaded = nbformat.read(notebook, as_version=4)
        for name, value in replaced.items():
            _assign(loaded, name, value)
        client = NotebookClient(
            loaded,
            timeout=300,
            kernel_name="python3",
            resources={"metadata": {"path": str(tmp_path)}},
        )
        began, before = time.monotonic(), _processor_seconds()
        executed = client.execute()
        spent = _processor_seconds() - before
        record_property("wall_seconds", round(time.monotonic() - began, 1))
        record_property("processor_seconds", round(spent, 1))
        # The kernel was waited for: nothing runs in less than its start.
        assert 0.5 < spent < MINUTE
        return executed

    return run


def _processor_seconds() -> float:
    """Of all processes that this one started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _assign(notebook: Any, name: str, value: str) -> None:
    for cell in notebook.cells:
        changed, times = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value}", cell.source)
        if cell.cell_type == "code" and times:
            cell.source = changed
            return
    raise AssertionError(f"the notebook assigns nothing to {name}")


def printed(cell: Any) -> str:
    return "".join(o["text"] for o in cell["outputs"] if o["output_type"] == "stream")


def said(executed: Any) -> str:
    return "".join(printed(c) for c in executed.cells if c.cell_type == "code")


def outputs(executed: Any) -> list[Any]:
    return [o for cell in executed.cells if cell.cell_type == "code" for o in cell["outputs"]]


def values(executed: Any) -> dict[str, Any]:
    return json.loads(printed(executed.cells[-1]))


def drawn(executed: Any) -> int:
    return sum(any("plotly" in kind for kind in o.get("data", {})) for o in outputs(executed))


def quiet(executed: Any) -> bool:
    """Whether nothing went to stderr, which a reader sees in red."""
    return not any(o.get("name") == "stderr" for o in outputs(executed))


def state(workspace: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in workspace.rglob("*") if p.is_file()}


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def one(folders: Any) -> Path:
    (found,) = folders
    return Path(found)


@pytest.fixture(scope="module")
def written(demo, tmp_path_factory) -> Path:
    """A copy of the session's workspace, for notebooks that add to it."""
    place = tmp_path_factory.mktemp("notebooks") / "workspace"
    shutil.copytree(demo.workspace, place)
    return place


# As they are stored


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_clean(path):
    loaded = nbformat.read(path, as_version=4)
    nbformat.validate(loaded)
    code = [c for c in loaded.cells if c.cell_type == "code"]
    assert code
    assert all(not c["outputs"] and c["execution_count"] is None for c in code)
    ids = [cell["id"] for cell in loaded.cells]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"(text|code)-\d\d", name) for name in ids)
    assert not any(cell["metadata"] for cell in loaded.cells)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert loaded["metadata"] == {"kernelspec": kernel, "language_info": {"name": "python"}}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_commands_in_the_text_exist(path):
    from resa_lens.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    text = "\n".join(c.source for c in nbformat.read(path, as_version=4).cells)
    spoken = re.findall(r"`resa-lens ([^`]+)`|with: resa-lens (\w+)", text)
    assert spoken
    for first, second in spoken:
        name, *words = (first or second).split()
        assert name in commands, name
        known = {o for p in commands[name].params for o in (*p.opts, *p.secondary_opts)}
        assert {w for w in words if w.startswith("--")} <= known, first


def test_the_readme_names_every_notebook_and_no_other():
    text = (ROOT / "notebooks" / "README.md").read_text()
    assert sorted(set(re.findall(r"\]\((\S+\.ipynb)\)", text))) == [p.name for p in NOTEBOOKS]
    for named in re.findall(r"notebooks/\S+\.ipynb", text):
        assert (ROOT / named).is_file()


# 01


IMPORT = re.compile(r"(?m)^(import|from) ")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_with_the_front_door_and_little_else(notebook):
    """JSON for its test, tables of pandas, and `import resa_lens as rl`."""
    code = [c.source for c in nbformat.read(notebook, as_version=4).cells if c.cell_type == "code"]
    assert sum(len(IMPORT.findall(cell)) for cell in code) <= 3
    assert not any(IMPORT.search(cell) for cell in code[1:])
    assert "import resa_lens as rl" in code[0]
    assert not re.search(r"(?m)^from resa_lens", code[0])


def check_quick_start(found: dict[str, Any], place: Path) -> None:
    """Against what lies in the workspace, read without the front door."""
    saes, counts = manifest_of(place / found["saes"]), manifest_of(place / found["counts"])
    # BOS and EOS are among the tokens read and not among those trained on.
    assert 16_000 < saes["results"]["tokens"] < 16_384
    assert {int(k): v for k, v in found["fvu"].items()} == {
        row["layer"]: row["fvu"] for row in saes["results"]["layers"]
    }
    rows = counts["results"]["layers"]
    assert counts["parents"] == [found["saes"]]
    assert found["totals"] == {rule: sum(row[rule] for row in rows) for rule in RULES}
    kept = json.loads((place / found["recommendation"] / "recommendation.json").read_text())
    assert found["recommended"] == kept["recommended"]
    assert found["verdicts"]["all"] == kept["verdict"]
    base, *others = (pq.read_table(place / name / "samples.parquet") for name in found["evals"])
    right = np.array(base["correct"], dtype=float)
    assert found["score"]["accuracy"] == right.mean()
    assert found["score"]["n"] == len(right) == 64
    for table, difference in zip(others, found["differences"], strict=True):
        assert table["id"].to_pylist() == base["id"].to_pylist()
        assert difference == pytest.approx((np.array(table["correct"], dtype=float) - right).mean())
    tuned, noise = (manifest_of(place / name) for name in found["adapters"])
    assert (tuned["config"].get("control"), noise["config"]["control"]) == (None, "noise")
    assert tuned["config"]["layer"] == noise["config"]["layer"] == found["recommended"][0]
    assert tuned["parents"][0] == found["saes"]


@pytest.mark.recorded
def test_quick_start_makes_what_is_missing_and_then_reads_it(tmp_path, execute):
    place = tmp_path / "new"
    executed = execute(QUICK, place)
    found = values(executed)
    check_quick_start(found, place)
    assert f"workspace: {place}" in said(executed)
    folders = ["adapters", "counts", "evals", "insertions", "recommendations", "saes"]
    assert sorted(p.name for p in place.iterdir()) == folders
    assert drawn(executed) == 6
    assert quiet(executed)
    before = state(place)
    assert values(execute(QUICK, place)) == found
    # The adapter's card is written anew, with the same text.
    changed = {name for name, time in state(place).items() if before.get(name) != time}
    assert {Path(name).name for name in changed} <= {"README.md"}


# 02


def check_paper(found: dict[str, Any]) -> None:
    """The figures of the specification, section 5."""
    counts = [(14.48, 0.407), (4.86, 0.371), (22.70, 0.222)]
    scores = [(15.15, 0.390), (5.59, 0.368), (23.03, 0.242)]
    for fitted, expected in ((found["paper_counts"], counts), (found["paper_scores"], scores)):
        for (mean, weight), (other_mean, other_weight) in zip(fitted, expected, strict=True):
            assert mean == pytest.approx(other_mean, abs=0.006)
            assert weight == pytest.approx(other_weight, abs=0.0006)
    assert found["entropy"] == pytest.approx([3.1938, 3.2021, 3.2013], abs=6e-5)
    assert found["printed"]["counts"] == [[4.9, 41], [14.5, 37], [22.7, 22]]
    # The one digit that differs: the mean is 15.1514, printed as 15.1.
    assert found["printed"]["scores"] == [[5.6, 39], [15.2, 37], [23.0, 24]]
    assert found["differing"] == [["scores", [15.2, 37], [15.1, 37]]]
    assert found["recommended"] == [14, 5, 23]
    assert found["log_likelihood"] == pytest.approx([-3.3187, -3.2799, -3.2581], abs=6e-5)
    assert found["converged"] is False
    assert found["verdicts"] == [FLAT] * 3
    assert found["dispersion"] == pytest.approx(0.843, abs=1e-3)
    assert found["f_test"] == pytest.approx([1.148, 0.314], abs=6e-4)
    assert found["best_of_bias"] == pytest.approx(1.64, abs=6e-3)
    assert found["spearman"] == pytest.approx([-0.225, 0.12], abs=6e-3)
    assert found["alignment"][0] == pytest.approx(0.732, abs=1e-3)
    assert 0.04 < found["alignment"][1] < 0.11


def test_three_gaussians(demo, execute):
    executed = execute(GAUSSIANS, demo.workspace)
    found = values(executed)
    check_paper(found)
    folder = Path(demo.workspace, "counts")
    manifest = json.loads(next(folder.rglob("manifest.json")).read_text())
    rows = manifest["results"]["layers"]
    assert found["own_totals"] == {r: sum(row[r] for row in rows) for r in RULES}
    assert found["own_verdicts"] == demo.result["verdicts"]
    assert drawn(executed) == 4 + 4


@pytest.mark.recorded
def test_three_gaussians_without_a_workspace(tmp_path, execute):
    missing = tmp_path / "nothing-here"
    executed = execute(GAUSSIANS, missing)
    found = values(executed)
    check_paper(found)
    assert found["own_totals"] == {}
    assert f"no counts in {missing}" in said(executed)
    assert "resa-lens demo" in said(executed)
    assert drawn(executed) == 4
    assert not missing.exists()


# 03


def check_anatomy(found: dict[str, Any], workspace: Path) -> None:
    """Against the tables that the notebook's stages left, read without its functions."""
    layer, feature = found["layer"], found["feature"]
    place = {name: workspace / folder for name, folder in found["places"].items()}
    assert feature in found["candidates"]
    rows = pq.read_table(place["activity"] / "features.parquet").to_pylist()
    row = next(r for r in rows if (r["layer"], r["feature"]) == (layer, feature))
    assert found["fired"] == found["histogram"] == row["tokens_fired"] > 0
    assert found["density"]["think"] == row["density_think"]
    assert found["peak"][1:] == [row["max"], row["max"]]
    # Of the candidates the one with the most activation in thoughts.
    mass = {r["feature"]: r["tokens_fired_think"] * r["mean_think"] for r in rows}
    assert mass[feature] == max(mass[other] for other in found["candidates"])
    # Neighbours by numpy, on the decoder itself.
    decoder = load_file(place["saes"] / f"layers.{layer}.mlp" / "sae.safetensors")["W_dec"]
    unit = decoder / np.linalg.norm(decoder, axis=1, keepdims=True)
    cosines = unit @ unit[feature]
    cosines[feature] = -1
    near = max(found["nearest"], key=lambda name: found["nearest"][name])
    assert int(near) == int(cosines.argmax())
    assert found["nearest"][near] == pytest.approx(float(cosines.max()), abs=1e-5)
    # Every counted feature has one verdict.
    verdicts = json.loads((place["falsified"] / "verdicts.json").read_text())["features"]
    counted = json.loads((place["counts"] / "features.json").read_text())["layers"]
    for item in counted:
        named = {f for features in item["features"].values() for f in features}
        assert sum(found["verdicts"][str(item["layer"])].values()) == len(named)
    assert len(verdicts) == sum(sum(by.values()) for by in found["verdicts"].values())
    # The base of the ablation is the mean of its own answers.
    plain = pq.read_table(place["ablation"] / "plain.parquet").to_pylist()
    assert found["ablation"]["n"] == len(plain)
    right = np.mean([answer["correct"] for answer in plain])
    assert found["ablation"]["base"]["accuracy"] == pytest.approx(right)


@pytest.mark.recorded
def test_anatomy_of_a_counted_feature(written, execute):
    executed = execute(ANATOMY, written)
    found = values(executed)
    check_anatomy(found, written)
    counts = json.loads((written / found["places"]["counts"] / "features.json").read_text())
    sizes = {
        rule: {item["layer"]: len(item["features"][rule]) for item in counts["layers"]}
        for rule in RULES
    }
    assert found["totals"] == {rule: sum(table.values()) for rule, table in sizes.items()}
    # The strictest rule that counts anything, at the layer where it counts most.
    assert found["rule"] == next(rule for rule in RULES if found["totals"][rule])
    table = sizes[found["rule"]]
    assert table[found["layer"]] == max(table.values())
    held = next(i["features"] for i in counts["layers"] if i["layer"] == found["layer"])
    assert found["candidates"] == held[found["rule"]]
    # Counted: active at tags alone.
    assert set(found["prompt_tokens_active"]) <= set(found["tags"])
    assert found["prompt_tokens_active"]
    # The trials of one feature by itself, and of all: the same answers.
    record = found["record"]
    assert (record["layer"], record["feature"]) == (found["layer"], found["feature"])
    for kind, share in record["shares"].items():
        assert found["shares"][kind] == [share["fired"], share["n"]]
    assert f"Verdict: {record['verdict']}." in said(executed)
    assert found["shares"]["original"] == [1, 1]
    assert drawn(executed) == 7
    assert quiet(executed)


@pytest.mark.recorded
def test_anatomy_where_nothing_is_counted(written, execute):
    """The strict rule counts nothing on the bundled model; no other takes its place."""
    executed = execute(ANATOMY, written, considered='("all",)', limit="8")
    found = values(executed)
    check_anatomy(found, written)
    assert found["totals"]["all"] == 0
    assert found["rule"] is None
    assert "nothing is counted by: all" in said(executed)
    assert "not counted by all" in said(executed)
    # Active at a tag, and elsewhere too.
    active, tags = set(found["prompt_tokens_active"]), set(found["tags"])
    assert active & tags
    assert active - tags or found["record"]
    assert ("no rule counts this feature" in said(executed)) == (found["record"] is None)
    assert drawn(executed) == 7


# 04


@pytest.mark.slow
def test_tuning_and_its_controls(demo, written, execute):
    executed = execute(TUNING, written)
    found = values(executed)
    assert found["layer"] == demo.result["recommendation"]["recommended"][0]
    assert found["base"] == [demo.result["tune"]["base"][key] for key in ("accuracy", "n")]
    # With the identity, or nothing, the two distributions are one: to the bit.
    assert found["start"]["identity"] == found["start"]["none"] == [0.0, 0.0]
    (fvu, kl), (noise_fvu, noise_kl) = found["start"]["SAE"], found["start"]["noise"]
    assert noise_fvu == pytest.approx(fvu, rel=1e-4)
    assert kl > 0 < noise_kl
    assert found["losses"]["identity"] == [0.0] * 5
    # The demo's tuning begins at the same weights, with the same batch.
    assert found["losses"]["SAE"][0] == pytest.approx(demo.result["tune"]["loss"][0], rel=1e-5)
    for name, folder in found["adapters"].items():
        weights = load_file(written / folder / "adapter_model.safetensors")
        largest = max(np.abs(value).max() for key, value in weights.items() if "lora_B" in key)
        assert found["largest_b"][name] == pytest.approx(float(largest))
        assert (largest == 0) == (name == "identity")
    # An adapter of zeros is the base model.
    assert found["changed"]["identity"] == 0
    check_sweeps(found)
    check_insertion(found)
    assert drawn(executed) == 7
    assert quiet(executed)


def check_insertion(found: dict[str, Any]) -> None:
    """The test at a tiny shape, and the registered contrasts against the registered analysis."""
    assert list(found["verdicts"]) == list(found["insertion"]) == [str(found["layer"])]
    files = sorted(data_path("experiment/insertion").glob("draw-*.json"))
    stored = {file.stem: json.loads(file.read_text()) for file in files}
    for draw, cells in stored.items():
        accuracy = {name: 100 * cell["accuracy"] for name, cell in cells.items() if "n" in cell}
        # A cell that a draw lacks is no number.
        shown = {name: value for name, value in found["cells"][draw].items() if value == value}
        assert shown == pytest.approx(accuracy)
    for name in ("A - B", "A - C", "C - base"):
        first, second = name.split(" - ")
        row = contrast(name, [
            100 * (cells[first]["accuracy"] - cells[second]["accuracy"])
            for cells in stored.values()
        ])  # fmt: skip
        shown = found["contrasts"][name]
        assert shown["n"] == len(stored)
        assert [shown["mean"], *shown["ci"]] == pytest.approx([row.mean, *row.ci])
        assert shown["p"] == pytest.approx(row.p_value)
        assert shown["inside"] == (row.p_equivalent < 0.05)
    primary = [found["contrasts"][name]["p"] for name in ("A - B", "A - C")]
    assert list(found["holm"].values()) == pytest.approx(list(holm(primary)))


def check_sweeps(found: dict[str, Any]) -> None:
    """Against the files of the shipped sweeps, and the figures in docs/findings.md."""
    files = sorted(data_path("workspace/sweeps").glob("*/sweep.json"))
    sweeps = {file.parent.name: json.loads(file.read_text()) for file in files}
    best = [max(100 * row["difference"] for row in s["layers"]) for s in sweeps.values()]
    assert sorted(found["sweeps"]) == sorted(round(value, 2) for value in best)
    main = sweeps[found["main"]]
    assert len(main["layers"]) == max(len(s["layers"]) for s in sweeps.values()) == 12
    assert found["recomputed"] < 1e-12
    assert found["f_all"] == [main["effect"]["anova"][key] for key in ("f_statistic", "p_value")]
    assert found["f_without_worst"] == pytest.approx([4.11, 0.0027, 11], abs=5e-3)
    assert found["rho"][0] == pytest.approx(0.154, abs=1e-3)
    assert found["selectors"] == {
        row["selector"]: [row["layer"], row["regret"]] for row in main["selectors"]
    }
    power = sorted(100 * s["power"]["any_layer"] for s in sweeps.values())
    assert sorted(found["power"]) == pytest.approx(power)
    # No layer gains, no selector beats chance, no control differs; the positive control does.
    assert found["gains"] == 0
    assert found["clear_selectors"] == []
    assert found["better_than_control"] == [0, 10]
    gain, p = found["positive"]["cot"]
    assert gain == pytest.approx(0.020, abs=5e-4)
    assert p < 0.001
    assert found["positive"]["cot-free"][0] == pytest.approx(-0.210, abs=5e-4)


# 05


@pytest.mark.slow
def test_audit_of_the_papers_tables(tmp_path, execute):
    """The figures of the specification, section 5, and of docs/findings.md."""
    executed = execute(AUDIT, tmp_path / "none")
    found = values(executed)
    assert found["f_test"] == pytest.approx([1.148, 0.314, 25, 78], abs=6e-4)
    assert found["permuted"] == pytest.approx(0.314, abs=0.04)
    assert found["sd"] == pytest.approx([0.83, 1.54], abs=6e-3)
    assert found["bias"][0] == pytest.approx(1.64, abs=6e-3)
    assert found["bias"][3] == pytest.approx(1.59, abs=0.02)
    assert found["error"] == pytest.approx([2.4, 9.4, 6.7], abs=0.06)
    assert found["exchanged"] == {
        "table6_hookpoints": [26, 26],
        "tables36_61_layer_checkpoints": [104, 104],
        "tables3_4_5_models": [33, 45],
        "tables8_61_checkpoints": [234, 240],
    }
    assert found["verdicts"]["tables3_4_5_models"]["as labelled"] == 10
    # Put right, both differences to the base model change their sign.
    assert found["gaps"]["gpqa_diamond"] == pytest.approx([-2.4, 3.1], abs=0.06)
    assert found["gaps"]["minerva"] == pytest.approx([4.8, -0.7], abs=0.06)
    # The test's level where layers are alike, and its power where they differ.
    power = list(found["power"].values())
    assert power == sorted(power)
    assert power[0] == pytest.approx(0.05, abs=0.02)
    assert power[-1] > 0.99
    # What was planted is found, and nothing where nothing was.
    faulty, sound = found["own"].values()
    assert faulty["p"] < 0.001
    assert {int(name.split()[1]) for name in faulty["exchanged"]} == {1, 3, 5, 7, 9, 11}
    assert len(faulty["exchanged"]) == faulty["rows"] // 2
    assert sound["p"] > 0.05
    assert sound["exchanged"] == []
    assert drawn(executed) == 5
    assert quiet(executed)


@pytest.mark.slow
def test_audit_of_the_readers_own_table(tmp_path, execute):
    own = tmp_path / "mine.csv"
    shutil.copy(data_path("paper/tables36_61_layer_checkpoints.csv"), own)
    found = values(execute(AUDIT, tmp_path / "none", own=repr(str(own))))
    (mine,) = found["own"].values()
    assert len(mine["exchanged"]) == mine["rows"] == 104
    assert mine["p"] == pytest.approx(found["f_test"][1])
