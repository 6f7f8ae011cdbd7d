"""Done before means the same work: a copy of a workspace keeps it, another content does not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from stage_cases import ADAPTER_CHANGES, MODEL_CHANGES
from typer.testing import CliRunner

from resa_lens.artifacts.stage import Context, Stage
from resa_lens.artifacts.workspace import Workspace
from resa_lens.cli import app
from resa_lens.evals.run import EvalConfig
from resa_lens.progress import Reporter
from resa_lens.resources import data_path
from resa_lens.saes.train import SaeConfig
from resa_lens.stages.demo import BUDGETS, LEARNING_RATE
from resa_lens.stages.recommendation import discover
from resa_lens.stages.tune_job import TuneJob
from resa_lens.stages.tuning import tune_run
from resa_lens.texts.corpora import CorpusConfig
from resa_lens.tuning.loop import TuneConfig

SMALL = ("--model", "tiny-reasoner", "--layers", "3-5")
SAES = ("--tokens", "1024", "--latents", "32")
ASKED = ("--limit", "4", "--max-new-tokens", "8")
TUNE = ("tune", "--model", "tiny-reasoner", "--steps", "2", "--rank", "2", *ASKED)


@dataclass
class Notes(Reporter):
    """Keeps what a stage says."""

    lines: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.lines.append(text)


def tree(workspace: Path) -> dict[str, str]:
    """Return the identity of each artifact by its folder."""
    files = workspace.glob("*/**/manifest.json")
    return {str(file.parent): json.loads(file.read_text())["identity"] for file in files}


def demo_again(workspace: Path) -> tuple[list[Stage], list[str]]:
    """Do the demo's stages; return what they named and what they said."""
    notes, stages = Notes(), []
    ctx = Context(Workspace(workspace), notes)
    plain, amount = Context.stage, BUDGETS["test"]
    corpus = CorpusConfig(thought_share=None)

    def stage(self: Context, *args: Any, **options: Any) -> Stage:
        stages.append(plain(self, *args, **options))
        return stages[-1]

    with patch.object(Context, "stage", stage):
        sae = SaeConfig(tokens=amount.sae_tokens, latents=amount.latents)
        found = discover(ctx, ctx.model("tiny-reasoner"), sae=sae, corpus=corpus)
        job = TuneJob(
            "tiny-reasoner",
            lora=TuneConfig(learning_rate=LEARNING_RATE),
            sae=sae,
            steps=amount.steps,
            evaluation=EvalConfig(limit=amount.questions),
        )
        tune_run(ctx, job, found.saes, found.recommendation.artifact)
    return stages, notes.lines


@pytest.fixture(scope="module")
def stages(demo: Any) -> list[Stage]:
    before = tree(demo.workspace)
    stages, said = demo_again(demo.workspace)
    assert [stage.kind.name for stage in stages] == [
        "counts", "recommendation", "adapter", "eval", "eval",
    ]  # fmt: skip
    assert sum("done before" in line for line in said) == len(stages)
    assert tree(demo.workspace) == before
    return stages


def copy_bytes(source: Path, target: Path) -> None:
    """Copy a tree file by file, with new times."""
    shutil.copytree(source, target, copy_function=shutil.copyfile)


def touch(workspace: Path) -> None:
    for path in workspace.rglob("*"):
        os.utime(path, (1e9, 1e9))


def litter(workspace: Path) -> None:
    for folder in [workspace, *(path for path in workspace.rglob("*") if path.is_dir())]:
        (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")


def rename_models(workspace: Path) -> None:
    for folder in ("saes", "counts", "recommendations"):
        for model in (path for path in list((workspace / folder).iterdir()) if path.is_dir()):
            model.rename(model.with_name("renamed"))


def rename_runs(workspace: Path) -> None:
    for file in list(workspace.glob("*/**/manifest.json")):
        file.parent.rename(file.parent.with_name(f"my-{file.parent.name}"))


def protect(workspace: Path) -> None:
    for path in workspace.rglob("*"):
        if path.is_file():
            path.chmod(0o444)


CHANGES: tuple[Callable[[Path], None], ...] = (
    touch, litter, rename_models, rename_runs, protect,
)  # fmt: skip


@pytest.fixture(scope="module")
def copy(demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the workspace that has been through everything that changes no content."""
    target = tmp_path_factory.mktemp("copy") / "moved" / "elsewhere"
    copy_bytes(demo.workspace, target)
    return target


@pytest.mark.parametrize("change", [None, *CHANGES], ids=lambda change: change and change.__name__)
def test_what_changes_no_content_leaves_all_work_done(
    stages: list[Stage], copy: Path, change: Callable[[Path], None] | None
):
    if change:
        change(copy)
    for stage in stages:
        moved = replace(stage, ctx=replace(stage.ctx, workspace=Workspace(copy)))
        artifact = moved.done()
        assert artifact is not None, stage.kind.name
        assert artifact.path.is_relative_to(copy)


def test_the_same_commands_make_nothing_anew_in_a_copy(stages: list[Stage], copy: Path):
    for change in CHANGES:
        change(copy)
    before = tree(copy)
    again, said = demo_again(copy)
    assert [stage.identity for stage in again] == [stage.identity for stage in stages]
    assert sum("done before" in line for line in said) == len(stages)
    assert tree(copy) == before


# Another content


def invoke(*args: str, code: int = 0) -> tuple[dict[str, Any], str]:
    """Run a command; its object and what it said come back."""
    result = CliRunner().invoke(app, [*args, "--json"])
    assert result.exit_code == code, (result.stderr, result.exception)
    return json.loads(result.stdout) if result.stdout else {}, result.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SAEs of three layers, their counts and the recommendation made of them."""
    workspace = tmp_path_factory.mktemp("small") / "workspace"
    invoke("recommend-layers", *SMALL, *SAES, "--workspace", str(workspace))
    return workspace


@pytest.mark.parametrize("what", ["config", "tokenizer"])
def test_an_evaluation_of_a_changed_model_is_not_done_before(tmp_path: Path, what: str):
    folder = tmp_path / "model"
    shutil.copytree(data_path("tiny-reasoner"), folder)
    command = ("eval", "--model", str(folder), *ASKED, "--workspace", str(tmp_path / "w"))
    first, said = invoke(*command)
    assert "done before" not in said
    assert "done before" in invoke(*command)[1]
    MODEL_CHANGES[what](folder)
    changed, said = invoke(*command)
    assert "done before" not in said
    assert changed["n"] == first["n"]
    shutil.rmtree(folder)
    shutil.copytree(data_path("tiny-reasoner"), folder)
    assert "done before" in invoke(*command)[1]


def test_an_evaluation_of_a_changed_adapter_is_not_done_before(tmp_path: Path):
    folder = tmp_path / "adapter"
    shutil.copytree(data_path("tiny-reasoner-rl/checkpoints/step-35"), folder)
    command = ("eval", "--model", "tiny-reasoner", "--adapter", str(folder), *ASKED)
    command = (*command, "--workspace", str(tmp_path / "w"))
    invoke(*command)
    assert "done before" in invoke(*command)[1]
    ADAPTER_CHANGES["config"](folder)
    assert "done before" not in invoke(*command)[1]


def test_saes_are_not_looked_up_by_the_name_of_their_data(tmp_path: Path):
    file = tmp_path / "mine.jsonl"
    lines = data_path("tiny/train.jsonl").read_text().splitlines(keepends=True)
    command = ("count-features", "--model", "tiny-reasoner", "--layers", "4", *SAES)
    command = (*command, "--data", str(file), "--workspace", str(tmp_path / "w"))
    file.write_text("".join(lines[:50]))
    assert "training them" in invoke(*command)[1]
    assert "using" in invoke(*command)[1]
    file.write_text("".join(lines[50:100]))
    assert "training them" in invoke(*command)[1]
    file.rename(tmp_path / "renamed.jsonl")
    _, said = invoke(*[word.replace("mine.jsonl", "renamed.jsonl") for word in command])
    assert "using" in said
    assert "done before" in said


def test_exchanged_saes_are_named_as_changed_and_not_used(place: Path, tmp_path: Path):
    workspace = tmp_path / "workspace"
    shutil.copytree(place, workspace)
    command = ("count-features", *SMALL, *SAES, "--workspace", str(workspace))
    first, _ = invoke(*command)
    (run,) = workspace.glob("saes/*/*")
    a, b, aside = run / "layers.3.mlp", run / "layers.4.mlp", run / "aside"
    for source, target in ((a, aside), (b, a), (aside, b)):
        source.rename(target)
    _, said = invoke(*command, "--saes", str(run), code=2)
    assert f"{a}/" in said
    assert "was changed" in said
    again, said = invoke(*command)
    assert f"{a}/" in said
    assert "was changed" in said
    assert "training them" in said
    assert again["layers"] == first["layers"]
    # Made anew, they are whole again.
    listed, _ = invoke("runs", "--verify", "--workspace", str(workspace))
    assert [row["damaged"] for row in listed["runs"]] == [[]] * 3


# The SAEs of a recommendation


def test_tune_takes_the_saes_whose_counts_chose_the_layer(place: Path, tmp_path: Path):
    workspace = tmp_path / "workspace"
    shutil.copytree(place, workspace)
    (counted,) = workspace.glob("saes/*/*")
    (recommendation,) = workspace.glob("recommendations/*/*")
    # Newer ones of the same layers, which a search would prefer.
    other = ("--tokens", "1024", "--latents", "64", "--workspace", str(workspace))
    trained, _ = invoke("train-saes", *SMALL, *other)
    result, _ = invoke(*TUNE, "--workspace", str(workspace))
    assert Path(result["saes"]) == counted
    assert Path(result["recommendation"]) == recommendation
    manifest = json.loads((Path(result["adapter"]) / "manifest.json").read_text())
    assert set(manifest["parents"]) == {
        str(path.relative_to(workspace)) for path in (counted, recommendation)
    }
    identity = json.loads((recommendation / "manifest.json").read_text())["identity"]
    assert manifest["ingredients"]["parents"]["recommendation"] == identity
    assert "done before" in invoke(*TUNE, "--workspace", str(workspace))[1]

    before = tree(workspace)
    newer = Path(trained["saes"][0]["path"]).parent
    for options, values in (
        (("--latents", "64"), ("--latents 64", "32")),
        (("--k", "7"), ("--k 7", "32")),
        (("--saes", str(newer)), (str(newer), str(counted))),
    ):
        _, said = invoke(*TUNE, *options, "--workspace", str(workspace), code=2)
        error = said[said.index("error: ") :]
        assert len(error.strip().splitlines()) <= 3
        for value in values:
            assert value in error
    assert tree(workspace) == before
    # What does not contradict is no reason to refuse.
    for options in (("--latents", "32"), ("--saes", str(counted))):
        assert "done before" in invoke(*TUNE, *options, "--workspace", str(workspace))[1]

    # An adapter that was changed since is scored as it is now, and that is said.
    evaluate = ("eval", "--model", result["adapter"], *ASKED, "--workspace", str(workspace))
    assert "warning" not in invoke(*evaluate)[1]
    ADAPTER_CHANGES["config"](Path(result["adapter"]))
    _, said = invoke(*evaluate)
    assert f"warning: {result['adapter']}/adapter_config.json was changed" in said
    assert "done before" not in said


def test_tune_refuses_a_recommendation_whose_saes_were_changed(place: Path, tmp_path: Path):
    workspace = tmp_path / "workspace"
    shutil.copytree(place, workspace)
    (run,) = workspace.glob("saes/*/*")
    shutil.rmtree(run)
    _, said = invoke(*TUNE, "--workspace", str(workspace), code=2)
    assert "gone or were changed" in said
    assert str(run.relative_to(workspace)) in said


@pytest.mark.parametrize(("kind", "code"), [("recommendations", 0), ("counts", 2), ("saes", 2)])
def test_tune_names_what_is_damaged_of_a_recommendation(
    place: Path, tmp_path: Path, kind: str, code: int
):
    workspace = tmp_path / "workspace"
    shutil.copytree(place, workspace)
    (manifest,) = workspace.glob(f"{kind}/*/*/manifest.json")
    manifest.write_text("[")
    _, said = invoke(*TUNE, *SAES, "--workspace", str(workspace), code=code)
    assert str(manifest) in said
