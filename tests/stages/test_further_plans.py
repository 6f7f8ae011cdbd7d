"""Plans of SAEs that are trained beside a command's own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
from typer.testing import CliRunner

from resa_lens.artifacts.stage import Context
from resa_lens.artifacts.workspace import Workspace
from resa_lens.cli import app
from resa_lens.machine.plans import Part, Plan
from resa_lens.models.host import load_model
from resa_lens.saes.baselines import random_weights_model
from resa_lens.saes.train import SaeConfig
from resa_lens.stages import further_plans
from resa_lens.stages.sae_training import train_run
from resa_lens.texts.corpora import CorpusConfig

SAE = ("--latents", "256", "--k", "8", "--tokens", "2048")
NULL = "training 1 SAEs, random weights'"


def plan_of_layer(layer: int) -> Plan:
    """Return a plan whose time is the layer's number of blocks."""
    seconds = float(layer + 1)
    parts = (
        Part("training 1 SAEs", 100, "tokens", seconds, 2 * seconds, 50.0 + layer, 3.0),
        Part("checkpoints", 2, "writes", 0.5, 0.0, 10.0),
    )
    return Plan("train-saes", "m", "cpu", parts, 1000.0, 1000.0, work_disk_mb=7.0 + layer)


@pytest.mark.parametrize("layers", [[4], [4, 4], [1, 9], [9, 1, 5], [0, 3, 3, 11]])
def test_trainings_one_by_one_take_what_their_layers_take(layers: list[int], tiny) -> None:
    with patch.object(further_plans, "plan_run", lambda ctx, model, at, *_: plan_of_layer(*at)):
        needs = further_plans.plan_each(
            None, tiny, layers, (SaeConfig(), CorpusConfig()), ", null", extra_mb=100.0
        )  # fmt: skip
    training, checkpoints = needs.parts
    assert training.name == "training 1 SAEs, null"
    assert training.amount == 100 * len(layers)
    assert training.seconds == pytest.approx(sum(layer + 1 for layer in layers))
    assert training.cpu_seconds == 2 * training.seconds
    assert training.disk_mb == 3 * len(layers)
    assert training.peak_memory_mb == 150 + max(layers)
    assert (checkpoints.amount, checkpoints.seconds) == (2 * len(layers), 0.5 * len(layers))
    assert needs.work_disk_mb == 7 + max(layers)


def test_no_training_takes_nothing(tiny) -> None:
    nothing = further_plans.plan_each(None, tiny, [], (SaeConfig(), CorpusConfig()), "")
    assert nothing == further_plans.Trainings()


def planned(workspace: Path, *words: str) -> dict[str, dict]:
    """Return a plan's parts by name, and under "work" the disk that it needs meanwhile."""
    words = (*words, "--plan", "--json", "--model", "tiny-reasoner", "--workspace", str(workspace))
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, (result.stderr, result.exception)
    plan = json.loads(result.stdout)
    return {part["name"]: part for part in plan["parts"]} | {"work": plan["work_disk_mb"]}


def test_further_saes_that_are_there_are_not_planned_again(tmp_path: Path) -> None:
    workspace, tiny = tmp_path / "w", load_model("tiny-reasoner")
    ctx = Context(Workspace(workspace))
    config = SaeConfig(latents=256, k=8, tokens=2048)
    saes = train_run(ctx, tiny, [3, 4], config, CorpusConfig(sequence=256))
    full = saes.training()
    assert full
    tune = ("tune", *SAE, "--control", "random-weights", "--limit", "2", "--max-new-tokens", "2",
            "--steps", "1", "--no-start-check")  # fmt: skip
    sweep = ("sweep", *SAE, "--layers", "3,4", "--controls", "random-weights", "--limit", "2",
             "--max-new-tokens", "2", "--steps", "1", "--no-start-check", "--no-effects",
             "--seeds", "2")  # fmt: skip
    falsify = ("falsify", *SAE, "--layers", "3,4", "--texts", "2", "--shuffles", "2")
    tokens = planned(workspace, *tune, "--layer", "3")[NULL]["amount"]
    assert planned(workspace, *sweep)[NULL]["amount"] == 4 * tokens
    assert {"training 2 SAEs, another seed's", "training 2 SAEs, random weights'"} <= set(
        planned(workspace, *falsify)
    )

    host = random_weights_model(tiny, 0, weights="matched")
    train_run(ctx, host, [3], *full)
    assert NULL not in planned(workspace, *tune, "--layer", "3")
    assert NULL in planned(workspace, *tune, "--layer", "4")
    assert NULL in planned(workspace, *tune, "--layer", "3", "--seed", "1")
    assert planned(workspace, *sweep)[NULL]["amount"] == 3 * tokens
    assert "training 2 SAEs, random weights'" in planned(workspace, *falsify)

    train_run(ctx, host, [3, 4], *full)
    other = replace(full[0], seed=1), replace(full[1], seed=full[1].seed + 1)
    train_run(ctx, tiny, [3, 4], *other)
    assert [name for name in planned(workspace, *falsify) if name.startswith("training")] == []


def test_a_layer_that_is_not_known_yet_is_the_middle_one(tmp_path: Path) -> None:
    """Without a recommendation; and disk of a training within is disk of the plan."""
    tried = []
    real = further_plans.plan_run

    def plan_run(ctx, model, layers, *training):
        tried.append(list(layers))
        return replace(real(ctx, model, layers, *training), work_disk_mb=4321.0)

    with patch.object(further_plans, "plan_run", plan_run):
        plan = planned(
            tmp_path / "w", "tune", *SAE, "--layer", "auto", "--control", "random-weights",
            "--limit", "2", "--max-new-tokens", "2", "--steps", "1", "--no-start-check",
        )  # fmt: skip
    assert tried == [[6]]
    assert plan["work"] == 4321.0
