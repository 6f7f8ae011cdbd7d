"""The chained stages on the demo's workspace: what they leave, and that they do it once."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from typer.testing import CliRunner, Result

from resa_lens.artifacts.kinds.saes import Saes
from resa_lens.artifacts.workspace import Workspace
from resa_lens.cli import app
from resa_lens.errors import BadInputError
from resa_lens.evals.run import EvalResult
from resa_lens.layers.selectors import Recommendation
from resa_lens.stages.scores import compare_results

Invoke = Callable[..., Result]
QUICK_SAE = ("--tokens", "2048", "--latents", "128")
QUICK_TUNE = ("--steps", "2", "--limit", "6", "--max-new-tokens", "12", "--rank", "4")


@pytest.fixture(scope="module")
def work(demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the demo's workspace that these tests may add to."""
    folder = tmp_path_factory.mktemp("pipeline") / "workspace"
    shutil.copytree(demo.workspace, folder)
    return folder


@pytest.fixture(scope="module")
def invoke(work: Path) -> Invoke:
    def run(*args: str, code: int = 0) -> Result:
        result = CliRunner().invoke(app, [*args, "--workspace", str(work)])
        assert result.exit_code == code, result.stderr or result.exception
        return result

    return run


def as_json(result: Result) -> Any:
    """Standard output holds one object and nothing else."""
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def stamps(folder: Path) -> dict[str, int]:
    return {
        str(file.relative_to(folder)): file.stat().st_mtime_ns
        for file in folder.rglob("*")
        if file.is_file()
    }


# The demo


def test_demo_leaves_the_workspace_of_the_design(demo: Any) -> None:
    kinds = {a.manifest.kind for a in Workspace(demo.workspace).artifacts()}
    assert kinds == {
        "saes", "counts", "recommendation", "activity", "falsification", "insertion", "adapter",
        "eval",
    }  # fmt: skip
    slug = next((demo.workspace / "saes").iterdir()).name
    assert slug.startswith("tiny-reasoner-")
    sae = next((demo.workspace / "saes" / slug).iterdir()) / "layers.5.mlp"
    assert {f.name for f in sae.iterdir()} == {"cfg.json", "sae.safetensors"}
    assert not list(demo.workspace.rglob(".tmp-*"))
    assert not [f for f in demo.workspace.rglob("*") if f.suffix in (".pt", ".pkl", ".bin")]


def test_every_manifest_says_what_made_it(demo: Any) -> None:
    space = Workspace(demo.workspace)
    for artifact in space.artifacts():
        folder, manifest = artifact.path, artifact.manifest
        assert manifest.schema_version == 2
        assert artifact.verifiable
        assert list(artifact.damage(cached=False)) == []
        assert artifact.foreign() == []
        assert manifest.ingredients["kind"] == manifest.kind
        assert set(manifest.ingredients["model"]) >= {"weights", "config", "tokenizer", "template"}
        assert manifest.config, folder
        assert manifest.command[1] == "demo"
        assert len(manifest.hashes["weights"]) == 64
        assert manifest.versions["torch"]
        assert (manifest.dtype, manifest.device) == ("float32", "cpu")
        assert manifest.threads >= 1
        assert manifest.peak_memory_mb > 0
        for parent in manifest.parents:
            assert space.read(space.path(parent)), f"{folder}: no parent {parent}"


def test_demo_json(demo: Any) -> None:
    found, tuned = demo.result["recommendation"], demo.result["tune"]
    assert [row["layer"] for row in found["layers"]] == list(range(1, 11))
    assert found["recommended"]
    assert found["reason"]
    assert set(demo.result["verdicts"]) == {"all", "any", "either"}
    assert tuned["layer"] == found["recommended"][0]
    assert tuned["layer_1_indexed"] == tuned["layer"] + 1
    assert tuned["base"]["n"] == tuned["tuned"]["n"] == tuned["paired"]["n"] == 64
    for score in (tuned["base"], tuned["tuned"]):
        assert score["ci"][0] <= score["accuracy"] <= score["ci"][1]
    if tuned["paired"]["changed"] == 0:
        assert tuned["paired"]["p_value"] == 1.0
        assert tuned["paired"]["ci"][0] < 0 < tuned["paired"]["ci"][1]
    assert Path(demo.result["page"]).is_file()
    assert min(demo.result["activity"]["tokens"].values()) > 0
    assert Path(demo.result["activity"]["folder"], "examples.parquet").is_file()
    judged = json.loads(Path(demo.result["falsification"]["folder"], "verdicts.json").read_text())
    assert judged["summary"] == demo.result["falsification"]["summary"]
    assert len(judged["features"]) == judged["summary"]["rules"][-1]["counted"] > 0


def test_demo_speaks_on_stderr_and_names_the_workspace_first(demo: Any) -> None:
    lines = demo.stderr.splitlines()
    assert lines[0] == f"workspace: {demo.workspace}"
    assert any("expected:" in line for line in lines)
    assert any("float32 on cpu (" in line for line in lines)


def test_demo_keeps_every_answer(demo: Any) -> None:
    for folder in demo.result["tune"]["evals"]:
        rows = pyarrow.parquet.read_table(Path(folder) / "samples.parquet").to_pylist()
        assert len(rows) == 64
        shown = json.loads((Path(folder) / "results.json").read_text())
        assert sum(bool(r["correct"]) for r in rows) / 64 == pytest.approx(shown["accuracy"])


@pytest.mark.usefixtures("whole_starting_point")
def test_demo_again_recomputes_nothing(work: Path, invoke: Invoke) -> None:
    before = stamps(work)
    result = invoke("demo", "--budget", "test", "--json")
    after = stamps(work)
    before.pop("report.html")
    after.pop("report.html")
    assert after == before
    assert result.stderr.count("done before, in") == 8
    assert as_json(result)["tune"]["base"]["n"] == 64


# SAEs


def test_train_saes_says_done_and_force_starts_anew(work: Path, invoke: Invoke) -> None:
    args = ("train-saes", "--layers", "3,5th", *QUICK_SAE, "--json")
    first = as_json(invoke(*args))
    assert set(first) >= {"saes", "tokens", "seconds", "resumed_at_tokens"}
    assert [row["layer"] for row in first["saes"]] == [3, 4]
    for row in first["saes"]:
        assert set(row) == {
            "layer", "path", "fvu", "fvu_special", "l0", "dead_share", "quality"
        }  # fmt: skip
        assert (Path(row["path"]) / "sae.safetensors").is_file()
        assert 0 < row["l0"] <= 32
        assert 0 <= row["dead_share"] <= 1
    # Of 2,048 tokens that are read the ends of documents are not trained on.
    assert 0.9 * 2048 < first["tokens"] < 2048
    assert (first["resumed_at_tokens"], first["fresh"]) == (0, True)
    before = stamps(work)
    again = invoke(*args)
    assert stamps(work) == before
    assert f"done before, in {first['folder']}" in again.stderr
    assert {**as_json(again), "fresh": True} == first
    forced = as_json(invoke(*args, "--force"))
    assert forced["fresh"] is True
    changed = {k for k, v in stamps(work).items() if before.get(k) != v}
    assert changed
    own = Path(first["folder"]).name, Path(first["report"]).name
    assert all(any(name in path for name in own) for path in changed)
    assert [row["fvu"] for row in forced["saes"]] == [row["fvu"] for row in first["saes"]]


def test_half_of_the_documents_carry_the_system_prompt(work: Path) -> None:
    for artifact in Workspace(work).artifacts(Saes):
        manifest = artifact.manifest
        assert manifest.config["corpus"]["system_share"] == 0.5
        assert manifest.config["corpus"]["system_prompt"] == "r1"
        assert all(
            set(q) >= {"layer", "fvu", "l0", "dead_share"} for q in manifest.results["layers"]
        )


def test_what_was_asked_for_is_not_replaced_by_what_lies_there(invoke: Invoke) -> None:
    """The demo's SAEs have 512 latents: they serve who asks for nothing else, and only them."""
    assert "SAEs: using" in invoke("count-features", "--layers", "3").stderr
    result = invoke("count-features", "--layers", "2", "--tokens", "2048", "--latents", "64")
    assert "training them" in result.stderr
    assert "64 latents" in result.stderr


def test_saes_of_the_other_site_need_a_word(demo: Any, work: Path, invoke: Invoke) -> None:
    saes = next((demo.workspace / "saes").glob("*/*-512x32-*"))
    args = ("count-features", "--site", "resid_post", "--saes", str(saes), "--json")
    before = stamps(work)
    refused = invoke(*args, code=2)
    assert "mlp_out" in refused.stderr
    assert "resid_post" in refused.stderr
    assert stamps(work) == before
    allowed = invoke(*args, "--allow-site-mismatch")
    assert "warning: the SAE for layer" in allowed.stderr
    folder = Path(as_json(allowed)["folder"])
    assert folder.name.startswith("resid_post-")
    artifact = Workspace(work).read(folder)
    assert artifact is not None
    manifest = artifact.manifest
    assert "--allow-site-mismatch" in manifest.results["warnings"][0]
    # The SAEs stood at the block's output: its counts differ from those at their own site.
    own = as_json(invoke("count-features", "--saes", str(saes), "--json"))
    active = [
        [row["active"] for row in json.loads((f / "features.json").read_text())["layers"]]
        for f in (folder, Path(own["folder"]))
    ]
    assert active[0] != active[1]


# Counts and recommendations


def test_count_features(work: Path, invoke: Invoke) -> None:
    made = as_json(invoke("count-features", "--rule", "any", "--json"))
    assert made["rule"] == "any"
    assert [row["layer"] for row in made["layers"]] == list(range(1, 11))
    for row in made["layers"]:
        assert set(row) == {"layer", "all", "any", "either"}
        assert row["all"] <= row["any"] <= row["either"]
    before = stamps(work)
    again = invoke("count-features", "--rule", "any", "--json")
    assert stamps(work) == before
    assert "counts: done before" in again.stderr
    assert as_json(again) == made


def test_counts_follow_the_text_of_a_prompt_file(tmp_path: Path, invoke: Invoke) -> None:
    file = tmp_path / "prompt.txt"
    folders = []
    for text in ("a <think> b </think>", "another <think> one </think>"):
        file.write_text(text)
        made = as_json(invoke("count-features", "--prompt", f"@{file}", "--json"))
        folders.append(made["folder"])
        assert json.loads((Path(folders[-1]) / "features.json").read_text())["prompt"] == text
    assert folders[0] != folders[1]


def test_recommend_layers(work: Path, invoke: Invoke) -> None:
    args = ("recommend-layers", "--selector", "quality", "--json")
    made = as_json(invoke(*args))
    assert set(made) >= {
        "model", "site", "selector", "reason", "layers", "recommended", "verdict",
    }  # fmt: skip
    assert (made["model"], made["site"], made["selector"]) == (
        "tiny-reasoner", "mlp_out", "quality",
    )  # fmt: skip
    assert all(set(row) == {"layer", "features"} for row in made["layers"])
    assert made["recommended"]
    before = stamps(work)
    again = invoke(*args)
    assert stamps(work) == before
    assert "recommendation: done before" in again.stderr
    assert as_json(again) == made
    assert set(as_json(invoke(*args, "--rule", "either"))) == set(made)


def test_a_recommendation_reads_back_whole(demo: Any) -> None:
    found = demo.result["recommendation"]
    assert json.loads(json.dumps(Recommendation.from_dict(found).to_dict())) == found


def test_zero_counts_give_the_middle_layer_and_say_why(invoke: Invoke) -> None:
    """A threshold that nothing reaches: no feature, no fit, no crash, no loosened rule."""
    made = as_json(invoke("recommend-layers", "--threshold", "1e9", "--json"))
    assert all(row["features"] == 0 for row in made["layers"])
    assert (made["selector"], made["recommended"]) == ("middle", [5])
    assert "No fit" in made["reason"]
    assert made["verdict"] == "not distinguishable from flat"


# Tuning


def test_tune_takes_the_newest_recommendation(work: Path, invoke: Invoke) -> None:
    newest = as_json(
        invoke("recommend-layers", "--selector", "most-features", "--rule", "either", "--json")
    )
    args = ("tune", *QUICK_TUNE, "--json")
    result = invoke(*args)
    made = as_json(result)
    assert "model: tiny-reasoner, of the newest recommendation" in result.stderr
    assert made["layer"] == newest["recommended"][0]
    assert made["selector"] == newest["selector"]
    assert set(made) >= {
        "adapter", "model", "layer", "site", "preset", "base", "tuned", "paired",
    }  # fmt: skip
    assert (made["model"], made["site"], made["preset"]) == ("tiny-reasoner", "mlp_out", "paper")
    assert set(made["paired"]) >= {"difference", "ci", "p_value", "changed"}
    assert made["base"]["n"] == 6
    artifact = Workspace(work).read(Path(made["adapter"]))
    assert artifact is not None
    manifest = artifact.manifest
    assert manifest.config["objective"]["preset"] == "paper"
    before = stamps(work)
    again = invoke(*args)
    assert stamps(work) == before
    assert "adapter: done before" in again.stderr
    assert as_json(again) == made


def test_preset_reference_trains_the_missing_sae_and_says_so(work: Path, invoke: Invoke) -> None:
    result = invoke(
        "tune", "--model", "tiny-reasoner", "--layer", "8th", "--preset", "reference",
        *QUICK_SAE, *QUICK_TUNE, "--json",
    )  # fmt: skip
    made = as_json(result)
    assert "layer 7 (0-based; 8th of 12)" in result.stderr
    assert "site resid_post, layers 7; training them" in result.stderr
    assert (made["layer"], made["site"], made["preset"]) == (7, "resid_post", "reference")
    artifact = Workspace(work).read(Path(made["adapter"]))
    assert artifact is not None
    manifest = artifact.manifest
    norms = manifest.results["grad_norms"]
    assert len(norms) == 2
    sae = Workspace(work).read(work / manifest.parents[0])
    assert sae is not None
    assert sae.manifest.results["site"] == "resid_post"
    targets = json.loads((Path(made["adapter"]) / "adapter_config.json").read_text())
    assert len(targets["target_modules"]) == 7


def test_an_adapter_on_an_adapter_is_refused(demo: Any, invoke: Invoke) -> None:
    adapter = demo.result["tune"]["adapter"]
    result = invoke("tune", "--model", adapter, "--layer", "5", *QUICK_TUNE, code=2)
    assert "is an adapter" in result.stderr


# Scores


def test_eval_and_compare(demo: Any, work: Path, invoke: Invoke) -> None:
    options = ("--limit", "8", "--max-new-tokens", "12", "--json")
    base = as_json(invoke("eval", *options))
    assert set(base) >= {"accuracy", "n", "ci", "by_task"}
    assert base["n"] == 8
    before = stamps(work)
    again = invoke("eval", *options)
    assert stamps(work) == before
    assert "done before, in" in again.stderr
    tuned = as_json(invoke("eval", "--adapter", demo.result["tune"]["adapter"], *options))
    assert tuned["folder"] != base["folder"]
    paired = as_json(invoke("compare", base["folder"], Path(tuned["folder"]).name, "--json"))
    assert set(paired) >= {"difference", "ci", "p_value", "n", "changed"}
    assert paired["n"] == 8
    assert paired["difference"] == pytest.approx(tuned["accuracy"] - base["accuracy"])
    other = as_json(invoke("eval", "--limit", "4", "--max-new-tokens", "12", "--json"))
    refused = invoke("compare", base["folder"], other["folder"], code=2)
    assert "different questions" in refused.stderr


# Killed runs

KILLED = """
import os, signal, sys
from resa_lens.saes.coder import Coder
save, seen = Coder.save_to_disk, []
def die_at_the_second(self, path):
    save(self, path)
    seen.append(path)
    if len(seen) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
Coder.save_to_disk = die_at_the_second
from resa_lens.cli import main
main()
"""


@pytest.mark.recorded
def test_killed_while_writing_then_run_again(tmp_path: Path) -> None:
    args = [
        "train-saes", "--layers", "3-5", *QUICK_SAE, "--workspace", str(tmp_path / "w"), "--json",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *args], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((tmp_path / "w").rglob(".work-*"))) == 1
    assert Workspace(tmp_path / "w").artifacts() == []
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.stderr
    assert len(json.loads(result.stdout)["saes"]) == 3
    assert not list((tmp_path / "w").rglob(".work-*"))
    kinds = sorted(a.manifest.kind for a in Workspace(tmp_path / "w").artifacts())
    assert kinds == ["quality", "saes"]


def test_runs_on_other_questions_of_the_same_name_are_not_paired(tmp_path: Path) -> None:
    """The id of an own file's question is the file's name and a row number."""

    def result(question: str) -> EvalResult:
        row = {"id": "own-0", "question": question, "gold": "5", "correct": True, "sample": 0}
        row |= {"answer": "5", "family": None, "level": None}
        return EvalResult(1.0, 1, (0.0, 1.0), {}, {}, [row], 0.0, 1)

    with pytest.raises(BadInputError, match="different questions"):
        compare_results(result("What is 2+3?"), result("What is 9-4?"))
    assert compare_results(result("What is 2+3?"), result("What is 2+3?")).n == 1


def test_another_dtype_is_another_result(work: Path, invoke: Invoke) -> None:
    args = ("eval", "--limit", "4", "--max-new-tokens", "2", "--json")
    first = as_json(invoke(*args))
    second = as_json(invoke(*args, "--dtype", "bfloat16"))
    assert first["folder"] != second["folder"]
