"""The planner: its arithmetic, its groups, and groups that train to the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from resa_lens.artifacts.stage import Context
from resa_lens.artifacts.workspace import Workspace
from resa_lens.errors import BadInputError
from resa_lens.models.host import Model
from resa_lens.saes import plan as module
from resa_lens.saes.plan import Meter, plan_training, state_mb
from resa_lens.saes.train import SaeConfig
from resa_lens.stages.sae_training import train_run
from resa_lens.texts.corpora import CorpusConfig

BATCH = torch.randint(2, 500, (2, 64), generator=torch.Generator().manual_seed(0))


def test_state_is_the_weights_and_their_optimizers() -> None:
    signum = SaeConfig(latents=1024).for_width(128)
    assert state_mb(signum, 128) == 2 * 2 * 1024 * 128 * 4 / 2**20
    adam = SaeConfig(latents=1024, optimizer="adam").for_width(128)
    assert state_mb(adam, 128) == 1.5 * state_mb(signum, 128)


def test_all_layers_at_once_where_they_fit(tiny: Model) -> None:
    config = SaeConfig(latents=256).for_width(tiny.d_model)
    made = plan_training(tiny, [2, 4, 6], config, BATCH, 10)
    assert made.groups == ((2, 4, 6),)
    assert made.disk_mb == pytest.approx(3 * 2 * 256 * 128 * 4 / 2**20, abs=0.1)
    assert made.time == (made.forward * 1 + made.step * 3) * 10
    assert made.time.cpu_seconds > 0
    assert made.peak_memory_mb < made.available_mb


def test_groups_of_nearly_equal_size_where_they_do_not(
    tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SaeConfig(latents=16_384).for_width(tiny.d_model)
    # One reading for all: only the weights count then.
    monkeypatch.setattr(Meter, "now", lambda self: 500.0)
    monkeypatch.setattr(module, "peak_memory_mb", lambda: 500.0)
    layer = state_mb(config, tiny.d_model)
    layers = list(range(1, 8))
    made = plan_training(tiny, layers, config, BATCH, 10, memory_limit_mb=500 + 3.5 * layer)
    assert made.groups == ((1, 2, 3), (4, 5, 6), (7,))
    assert made.peak_memory_mb == pytest.approx(500 + 3 * layer, rel=0.01)
    two = plan_training(tiny, layers, config, BATCH, 10, memory_limit_mb=500 + 6.5 * layer)
    assert two.groups == ((1, 2, 3, 4), (5, 6, 7))
    with pytest.raises(BadInputError, match=r"one SAE of 16384 latents needs \d+ MB"):
        plan_training(tiny, layers, config, BATCH, 10, memory_limit_mb=500 + 0.5 * layer)


def test_groups_train_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SaeConfig(latents=128, k=8, tokens=4096)
    runs = []
    for name, groups in (("one", ((2, 4, 6),)), ("three", ((2,), (4,), (6,)))):
        if name == "three":
            from resa_lens.stages import sae_plan

            real = sae_plan.plan_training

            def grouped(*args, real=real, groups=groups, **options):
                from dataclasses import replace

                return replace(real(*args, **options), groups=groups)

            monkeypatch.setattr(sae_plan, "plan_training", grouped)
        ctx = Context(Workspace(tmp_path / name))
        model = ctx.model("tiny-reasoner")
        runs.append((ctx, model, train_run(ctx, model, [2, 4, 6], config, CorpusConfig())))
    (_, model, one), (_, _, three) = runs
    assert three.artifact is not None
    assert three.artifact.manifest.results["groups"] == [[2], [4], [6]]
    assert one.folder.name == three.folder.name
    ours, theirs = one.coders(model), three.coders(model)
    assert list(ours) == list(theirs)
    for point, coder in ours.items():
        for key, value in coder.state_dict().items():
            assert torch.equal(value, theirs[point].state_dict()[key])
    assert one.quality == three.quality
    assert not list(three.folder.parent.glob(".work-*"))


@pytest.mark.slow
def test_the_peak_is_within_15_percent_of_the_plan(cli, tmp_path: Path) -> None:
    """Two processes: one plans, one trains; a size at which the weights are most of the memory."""
    options = [
        "train-saes", "--layers", "1-8", "--latents", "16384", "--tokens", "3072",
        "--workspace", str(tmp_path), "--json",
    ]  # fmt: skip
    planned = cli(*options, "--plan")
    assert planned.returncode == 0, planned.stderr
    plan = json.loads(planned.stdout)
    assert not list(tmp_path.rglob("sae.safetensors"))
    done = cli(*options)
    assert done.returncode == 0, done.stderr
    assert "expected:" in done.stderr
    result = json.loads(done.stdout)
    manifest = json.loads((Path(result["folder"]) / "manifest.json").read_text())
    assert manifest["peak_memory_mb"] == pytest.approx(plan["peak_memory_mb"], rel=0.15)
    size = sum(f.stat().st_size for f in Path(result["folder"]).rglob("*.safetensors")) / 2**20
    assert size == pytest.approx(plan["disk_mb"], rel=0.02)
