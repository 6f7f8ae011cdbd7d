"""Memory and disk of every stage: looked at before the work, and one sentence where they end.

The stages are those of the registry of kinds (`test_identity_matrix.py` holds that each has a
case), so a new one is tested here too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from stage_cases import CASES, MODELS, Case, Ingredients, Materials, call_of
from typer.testing import CliRunner

from resa_lens.artifacts.artifact import KINDS
from resa_lens.artifacts.stage import Draft
from resa_lens.cli import app
from resa_lens.errors import BadInputError, RunFailedError
from resa_lens.machine import limits
from resa_lens.machine.hardware import MB
from resa_lens.models.host import load_model
from resa_lens.progress import Reporter
from resa_lens.resources import data_path
from resa_lens.saes.plan import Meter
from resa_lens.stages import merge
from resa_lens.stages.adapters import adapter_mb
from resa_lens.stages.merge import merge_model
from resa_lens.stages.tune_job import TuneJob
from resa_lens.tuning.loop import TuneConfig
from resa_lens.tuning.objective import Objective
from resa_lens.tuning.train import add_lora

each_case = pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
LIGHTER = {kind.lighter for kind in KINDS.values()}
LOADED = {"counts", "effects", "attribution", "falsification", "scores", "matches", "quality"}
"""Kinds whose stages load SAEs and are not resumed; the resumable ones are in test_resume.py."""

EXPERTS = {"routing", "ranking", "steering"}
"""Kinds whose stages refuse the materials' model, which has no experts, before it runs; the same
test of a mixture stands in test_experts.py."""


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Materials]:
    yield Materials(tmp_path_factory.mktemp("materials"))
    MODELS.clear()


class Notes(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


class _ReachedError(Exception):
    """The work has begun."""


@contextmanager
def failing_work(error: BaseException) -> Iterator[None]:
    """Raise an error at the first pass of a model, or where a stage without one keeps a result."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    with patch.object(torch.nn.Embedding, "forward", fail), patch.object(Draft, "json", fail):
        yield


def run(case: Case, given: Ingredients, workspace: Path) -> Notes:
    """Call a stage in a workspace of its own; return what it said."""
    call, notes = call_of(case, replace(given, workspace=workspace)), Notes()
    call.ctx.reporter = notes
    with suppress(_ReachedError):
        case.call(call)
    return notes


def files(place: Path) -> list[Path]:
    return [path for path in place.rglob("*") if path.is_file()]


ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
)


@pytest.mark.parametrize(
    "case",
    [case for case in CASES.values() if case.name not in EXPERTS],
    ids=lambda case: case.name,
)
def test_out_of_memory_in_a_stage_names_what_takes_less(
    materials: Materials, tmp_path: Path, case: Case
) -> None:
    error = ERRORS[len(case.name) % len(ERRORS)]
    with failing_work(error), pytest.raises(RunFailedError) as caught:
        run(case, materials.plain, tmp_path / "w")
    assert re.search(r"out of memory|the engine failed after 0 of", str(caught.value))
    assert len(str(caught.value).splitlines()) <= 3
    # Of the stage, or of one that it makes first.
    assert any(lighter in str(caught.value) for lighter in LIGHTER)
    assert caught.value.__cause__ is error
    assert not files(tmp_path)


@each_case
def test_a_disk_without_room_is_said_before_a_stage_works(
    materials: Materials, tmp_path: Path, case: Case
) -> None:
    with (
        failing_work(AssertionError("the work has begun")),
        patch.object(limits, "free_disk_mb", lambda _: 0.5),
        pytest.raises(BadInputError, match="MB of disk are needed, 0 MB are free") as caught,
    ):
        run(case, materials.plain, tmp_path / "w")
    assert "--workspace" in str(caught.value)
    assert not files(tmp_path)


@pytest.mark.parametrize("name", sorted(n for n, c in CASES.items() if c.kind.name in LOADED))
def test_memory_for_saes_is_compared_before_a_stage_works(
    materials: Materials, tmp_path: Path, name: str
) -> None:
    with failing_work(_ReachedError()), patch.object(Meter, "available", lambda _: 0.0):
        notes = run(CASES[name], materials.plain, tmp_path / "w")
    (warning,) = (line for line in notes.lines if "memory are needed, 0 MB are free" in line)
    assert CASES[name].kind.lighter in warning


@pytest.mark.parametrize("kind", [k for k in KINDS.values() if k.command], ids=lambda k: k.name)
def test_what_takes_less_memory_is_an_option_of_the_kinds_command(kind: Any) -> None:
    shown = CliRunner().invoke(app, [kind.command[0], "--help"]).stdout
    options = re.findall(r"--[a-z-]+[a-z]", kind.lighter)
    assert options or kind.name == "model"
    assert [option for option in options if not re.search(rf"{option}\b", shown)] == []


def test_the_size_of_an_adapter_is_that_of_its_weights() -> None:
    model = load_model("tiny-reasoner")
    for targets in (("q_proj", "v_proj"), ("q_proj", "down_proj")):
        job = TuneJob(
            "tiny-reasoner", lora=TuneConfig(rank=3), objective=Objective(targets=targets)
        )
        peft = add_lora(load_model("tiny-reasoner").model, targets, job.lora)
        values = sum(p.numel() for p in peft.parameters() if p.requires_grad)
        assert adapter_mb(model, job) == pytest.approx(4 * values / MB)


def test_a_file_system_that_does_not_say_its_size_is_no_full_disk(tmp_path: Path) -> None:
    with patch.object(limits.shutil, "disk_usage", lambda _: SimpleNamespace(total=0, free=0)):
        limits.check_disk(tmp_path, 1e6, "work")
    with (
        patch.object(limits.shutil, "disk_usage", lambda _: SimpleNamespace(total=1, free=0)),
        pytest.raises(BadInputError, match="work: 1 MB of disk are needed, 0 MB are free"),
    ):
        limits.check_disk(tmp_path / "not" / "there", 1.0, "work")


# Merging has no stage: its folder lies where the user says


def test_a_merge_without_room_is_one_sentence(tmp_path: Path) -> None:
    adapter = str(data_path("tiny-reasoner-rl/checkpoints/step-35"))
    out = tmp_path / "merged"
    with patch.object(limits, "free_disk_mb", lambda _: 0.5), pytest.raises(BadInputError) as full:
        merge_model("tiny-reasoner", [adapter], out)
    assert "merging: " in str(full.value)
    assert "MB of disk are needed, 0 MB are free" in str(full.value)
    failing = patch.object(merge, "_merge", side_effect=MemoryError)
    with failing, pytest.raises(RunFailedError, match="merging: out of memory") as caught:
        merge_model("tiny-reasoner", [adapter], out)
    assert KINDS["model"].lighter in str(caught.value)
    assert not list(tmp_path.iterdir())
