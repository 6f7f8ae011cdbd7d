"""Modes, seeds, the report and controls, through the command line and the stages behind it."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from resa_lens.artifacts.kinds.saes import Saes
from resa_lens.artifacts.stage import Context
from resa_lens.artifacts.workspace import Workspace
from resa_lens.cli import app
from resa_lens.errors import BadInputError
from resa_lens.features.exclusive import CountConfig
from resa_lens.models.host import Model
from resa_lens.saes.coder import Coder
from resa_lens.saes.formats import load_coder, save_coder
from resa_lens.saes.train import SaeConfig
from resa_lens.stages import sae_training
from resa_lens.stages.counts import count_run
from resa_lens.stages.sae_training import train_run
from resa_lens.stages.saes import sae_run
from resa_lens.stages.stability import seed_runs
from resa_lens.texts.corpora import CorpusConfig

QUICK = ["--layers", "3,6", "--tokens", "4096", "--latents", "256"]


def run(workspace: Path, *args: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [*args, "--workspace", str(workspace), "--json"])
    assert result.exit_code == code, (result.stderr, result.exception)
    return json.loads(result.stdout) if code == 0 else result.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    workspace = tmp_path_factory.mktemp("trained")
    return workspace, run(workspace, "train-saes", *QUICK, "--seeds", "2")


def test_the_report_has_every_figure_by_phase(trained: tuple[Path, dict[str, Any]]) -> None:
    workspace, result = trained
    assert result["resumed_at_tokens"] == 0
    for row in result["saes"]:
        assert set(row["quality"]) == {"prompt", "think", "answer", "all"}
        everything = row["quality"]["all"]
        assert everything["tokens"] == sum(
            row["quality"][phase]["tokens"] for phase in ("prompt", "think", "answer")
        )
        assert everything["explained_variance"] == pytest.approx(1 - everything["fvu"])
        assert everything["kl"] > 0
        # What fires in one phase is alive over all.
        for phase in ("prompt", "think", "answer"):
            assert 0 <= everything["dead_share"] <= row["quality"][phase]["dead_share"] < 1
    held = json.loads((Path(result["report"]) / "quality.json").read_text())
    assert held["3"] == result["saes"][0]["quality"]
    assert Path(result["report"]).is_relative_to(workspace)
    again = run(workspace, "train-saes", *QUICK)
    assert (again["report"], again["fresh"]) == (result["report"], False)


def test_half_of_an_saes_documents_hold_thoughts_and_a_warning_says_where_none_do(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    workspace, _ = trained
    manifest = json.loads(next(workspace.glob("saes/*/*/manifest.json")).read_text())
    assert manifest["config"]["corpus"]["thought_share"] == 0.5
    data = tmp_path / "plain.jsonl"
    data.write_text('{"question": "What is 2 + 2?", "answer": "4"}\n')
    asked = ["train-saes", "--layers", "3", "--tokens", "512", "--latents", "64", "--no-report"]
    result = CliRunner().invoke(
        app, [*asked, "--data", str(data), "--workspace", str(tmp_path / "workspace")]
    )
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("never see a thought") == 1


def test_seeds_are_runs_of_their_own_with_their_agreement(
    trained: tuple[Path, dict[str, Any]],
) -> None:
    _, result = trained
    assert len(set(result["seeds"])) == 2
    assert [row["layer"] for row in result["stability"]] == [3, 6]
    for row in result["stability"]:
        assert 0 <= row["share"] <= 1
        assert row["null"] < 1e-6
        assert row["n"] == 256
        assert row["pairs"][0]["runs"] == [0, 1]


def test_pretrained_takes_saes_as_they_are(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    _, result = trained
    # From another project's format, with the layer in its metadata.
    from resa_lens.models.hookpoints import Hookpoint

    for row in result["saes"]:
        point = Hookpoint(row["layer"])
        save_coder(load_coder(Path(row["path"])), tmp_path / f"l{row['layer']}", "saelens", point)
    kept = run(
        tmp_path / "w", "train-saes", "--layers", "3,6", "--mode", "pretrained",
        "--saes", str(tmp_path),
    )  # fmt: skip
    assert kept["tokens"] == 0
    for ours, theirs in zip(kept["saes"], result["saes"], strict=True):
        assert ours["fvu"] == pytest.approx(theirs["fvu"])
        a, b = load_coder(Path(ours["path"])), load_coder(Path(theirs["path"]))
        assert torch.equal(a.encoder.weight, b.encoder.weight)


def test_finetune_goes_on_from_given_saes(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    _, result = trained
    options = ["--layers", "3", "--tokens", "1024", "--learning-rate", "1e-4", "--no-report"]
    tuned = run(tmp_path, "train-saes", *options, "--mode", "finetune", "--saes", result["folder"])
    scratch = run(tmp_path, "train-saes", *options, "--latents", "256")
    assert tuned["saes"][0]["fvu"] < scratch["saes"][0]["fvu"]
    assert tuned["saes"][0]["fvu"] == pytest.approx(result["saes"][0]["fvu"], rel=0.2)
    assert load_coder(Path(tuned["saes"][0]["path"])).num_latents == 256


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--mode", "finetune"], "--saes"),
        (["--mode", "recycle"], "recycle"),
        (["--saes", str(Path(__file__).parent)], "--mode"),
        (["--latents", "256", "--expansion", "4"], "give one"),
        (["--activation", "relu"], "relu"),
        (["--schedule", "stairs"], "stairs"),
        (["--k", "300", "--latents", "256"], "k 300 with 256 latents"),
        (["--memory-limit", "0.1"], r"needs"),
        (["--mode", "pretrained", "--saes", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_bad_options_leave_nothing(tmp_path: Path, options: list[str], names: str) -> None:
    said = run(tmp_path / "w", "train-saes", "--layers", "3", *options, code=2)
    assert names in said
    error = said[said.index("error:") :]
    assert len(error.strip().splitlines()) <= 3
    assert not (tmp_path / "w").exists()


def test_batchtopk_is_counted_and_read_back(tmp_path: Path) -> None:
    made = run(tmp_path, "train-saes", *QUICK, "--activation", "batchtopk", "--no-report")
    coder = load_coder(Path(made["saes"][0]["path"]))
    assert isinstance(coder, Coder)
    assert coder.threshold > 0
    # A threshold from one batch: k on average, near enough.
    assert made["saes"][0]["l0"] == pytest.approx(32, rel=0.35)


def test_the_plan_says_what_it_will_need(tmp_path: Path) -> None:
    plan = run(tmp_path / "w", "train-saes", *QUICK, "--plan")
    assert plan["groups"] == [[3, 6]]
    assert {"peak_memory_mb", "disk_mb", "work_disk_mb", "seconds"} <= set(plan)
    assert not (tmp_path / "w").exists()


def test_random_directions_are_counted_in_the_saes_place(tmp_path: Path) -> None:
    ctx = Context(Workspace(tmp_path))
    model = ctx.model("tiny-reasoner")
    saes = train_run(ctx, model, [3, 6], SaeConfig(tokens=4096, latents=256), CorpusConfig())
    config = CountConfig()
    run = count_run(ctx, model, saes, config, None)
    null_run = count_run(ctx, model, saes, config, None, control="random")
    counts, null = run.counts, null_run.counts
    assert run.artifact.path != null_run.artifact.path
    assert [c.layer for c in null.layers] == [c.layer for c in counts.layers]
    assert [c.active for c in null.layers] != [c.active for c in counts.layers]
    with pytest.raises(BadInputError, match="noise"):
        count_run(ctx, model, saes, config, None, control="noise")


@pytest.mark.parametrize("control", ["noise", "pca", "shuffled", "random"])
def test_tuning_takes_each_control_in_the_saes_place(
    trained: tuple[Path, dict[str, Any]], control: str
) -> None:
    workspace, result = trained
    tuned = run(
        workspace, "tune", "--model", "tiny-reasoner", "--layer", "3", "--control", control,
        "--saes", result["folder"], "--steps", "2", "--limit", "4", "--max-new-tokens", "8",
        "--learning-rate", "1e-3",
    )  # fmt: skip
    manifest = json.loads((Path(tuned["adapter"]) / "manifest.json").read_text())
    assert manifest["config"]["control"] == control
    assert all(loss > 0 for loss in tuned["loss"])


def test_an_unknown_control(trained: tuple[Path, dict[str, Any]]) -> None:
    said = run(
        trained[0], "tune", "--model", "tiny-reasoner", "--layer", "3", "--control", "magic", code=2
    )
    assert "magic" in said


def test_without_hard_links_files_are_copied(tmp_path, monkeypatch):
    def link(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    (tmp_path / "a").write_bytes(b"weights")
    sae_training._link(str(tmp_path / "a"), str(tmp_path / "b"))
    monkeypatch.setattr(os, "link", link)
    sae_training._link(str(tmp_path / "a"), str(tmp_path / "c"))
    assert (tmp_path / "a").stat().st_nlink == 2
    assert (tmp_path / "c").read_bytes() == b"weights"


@pytest.mark.slow
def test_seeds_that_are_trained_side_by_side_are_those_of_one_command(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, tiny: Model
) -> None:
    """A training of one seed is an independent job: equal terminals need nothing else."""
    workspace = tmp_path / "shared"
    crew = [
        subprocess.Popen(
            [sys.executable, "-m", "resa_lens", "train-saes", *QUICK, "--seed", seed, "--no-report",
             "--json", "--workspace", str(workspace)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for seed in ("0", "1")
    ]  # fmt: skip
    ended = [process.communicate(timeout=200) for process in crew]
    assert [process.returncode for process in crew] == [0, 0], ended
    both = run(workspace, "train-saes", *QUICK, "--seeds", "2", "--no-report")
    assert both["tokens"] == json.loads(ended[0][0])["tokens"]
    names = [[Path(folder).name for folder in r["seeds"]] for r in (both, trained[1])]
    assert names[0] == names[1]
    assert len(list(workspace.glob("saes/*/*/manifest.json"))) == 2
    # What `stability` and `falsify` take as the same SAEs of other seeds.
    saes = sae_run(Workspace(workspace).artifacts(Saes)[0], "mlp_out")
    alike = seed_runs(Context(Workspace(workspace)), tiny, saes, [3, 6])
    assert [one.folder.name for one in alike] == names[0]
