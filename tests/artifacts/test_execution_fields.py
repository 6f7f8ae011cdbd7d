"""Fields that are declared execution change how a result is made, and not the result."""

from __future__ import annotations

import shutil
import sys
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stage_cases import CORPUS, LAYER, Ingredients, Materials, run_of

from resa_lens.artifacts.stage import Context
from resa_lens.artifacts.workspace import Workspace
from resa_lens.config import roles
from resa_lens.evals.engines import GenerationConfig
from resa_lens.evals.run import EvalConfig
from resa_lens.evals.tasks import load_questions
from resa_lens.saes.plan import TrainingPlan
from resa_lens.saes.train import SaeConfig
from resa_lens.stages import sae_plan
from resa_lens.stages.adapters import adapter_run
from resa_lens.stages.sae_training import train_run
from resa_lens.stages.scores import eval_run
from resa_lens.stages.tune_job import TuneJob
from resa_lens.tuning.loop import TuneConfig

TESTED = {
    ("GenerationConfig", "batch_size"),
    ("TuneConfig", "gradient_checkpointing"),
    ("TuneConfig", "compile"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Ingredients:
    return Materials(tmp_path_factory.mktemp("materials")).plain


def context(place: Path, **options: Any) -> Context:
    return Context(Workspace(place), **options)


def test_every_execution_field_is_tested_here():
    declared = {
        (value.__name__, name)
        for module in [m for n, m in sys.modules.items() if n.startswith("resa_lens.")]
        for value in vars(module).values()
        if isinstance(value, type) and is_dataclass(value)
        for name, role in roles(value).items()
        if role == "execution"
    }
    assert declared == TESTED


def answers(place: Path, generation: GenerationConfig, **options: Any) -> list[str]:
    """Answer four questions; return the texts."""
    ctx = context(place, **options)
    items = load_questions("tiny", limit=4)
    run = eval_run(ctx, ctx.model("tiny-reasoner"), items, EvalConfig(generation=generation))
    return [sample["generation"] for sample in run.result.samples]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_size_of_a_batch_changes_no_answer(tmp_path: Path, temperature: float):
    asked = GenerationConfig(16, temperature, batch_size=1)
    one = answers(tmp_path / "one", asked)
    assert len(set(one)) > 1
    assert answers(tmp_path / "all", replace(asked, batch_size=64)) == one


def test_the_threads_change_no_answer(tmp_path: Path):
    asked = GenerationConfig(4)
    one = answers(tmp_path / "one", asked, threads=1)
    assert answers(tmp_path / "two", asked, threads=2) == one
    torch.set_num_threads(1)


def adapter_weights(plain: Ingredients, place: Path, **execution: Any) -> dict[str, torch.Tensor]:
    """Tune three updates; return the adapter's weights."""
    lora = TuneConfig(rank=2, learning_rate=1e-3, **execution)
    elicitation = replace(CORPUS, source=str(plain.records))
    job = TuneJob(
        "tiny-reasoner", str(LAYER), lora=lora, elicitation=elicitation, steps=3,
        allow_mismatch=True,
    )  # fmt: skip
    adapter = adapter_run(context(place), job, run_of(plain.saes))
    return load_file(adapter.folder / "adapter_model.safetensors")


def test_checkpointing_of_gradients_changes_no_weight(plain: Ingredients, tmp_path: Path):
    first = adapter_weights(plain, tmp_path / "kept")
    second = adapter_weights(plain, tmp_path / "again", gradient_checkpointing=True)
    changed = [name for name in first if "lora_B" in name and first[name].abs().max() > 0]
    assert changed
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-7)


@pytest.mark.slow  # a compiler takes half a minute
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no compiler: torch.compile needs gcc")
def test_a_compiled_loss_changes_weights_by_its_noise_alone(plain: Ingredients, tmp_path: Path):
    first = adapter_weights(plain, tmp_path / "off", compile="off")
    second = adapter_weights(plain, tmp_path / "on", compile="on")
    other = adapter_weights(plain, tmp_path / "seed", compile="off", seed=1)

    def distance(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
        ends = [name for name in one if "lora_B" in name]
        apart = torch.cat([(one[n] - two[n]).flatten() for n in ends]).norm()
        return float(apart / torch.cat([one[n].flatten() for n in ends]).norm())

    # AdamW's first steps follow signs, also of gradients that are all but zero.
    assert distance(first, second) < 0.02
    assert distance(first, other) > 0.5


def test_layers_in_groups_of_a_small_memory_are_the_same_saes(
    plain: Ingredients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config, corpus = (
        SaeConfig(latents=32, k=4, tokens=512),
        replace(CORPUS, source=str(plain.records)),
    )
    ctx = context(tmp_path / "together")
    together = train_run(ctx, ctx.model("tiny-reasoner"), [3, LAYER], config, corpus)
    planned = sae_plan.plan_training

    def in_groups(*args: Any, **options: Any) -> TrainingPlan:
        return replace(planned(*args, **options), groups=((3,), (LAYER,)))

    monkeypatch.setattr(sae_plan, "plan_training", in_groups)
    ctx = context(tmp_path / "apart")
    apart = train_run(ctx, ctx.model("tiny-reasoner"), [3, LAYER], config, corpus)
    assert apart.artifact is not None
    assert apart.artifact.manifest.results["groups"] == [[3], [LAYER]]
    assert apart.parent().identity == together.parent().identity
    assert apart.quality == together.quality
