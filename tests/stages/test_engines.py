"""What generates without hooks has one option for its engine; here a package in place of vllm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from resa_lens.artifacts.stage import Context
from resa_lens.artifacts.workspace import Workspace
from resa_lens.errors import BadInputError
from resa_lens.evals.config import EvalConfig, GenerationConfig
from resa_lens.features.activity import ActivityConfig
from resa_lens.models.host import Model
from resa_lens.progress import SILENT
from resa_lens.saes.train import SaeConfig
from resa_lens.stages.activity import activity_run
from resa_lens.stages.sae_training import train_run
from resa_lens.stages.tune_job import TuneJob
from resa_lens.stages.tuning import tune_run
from resa_lens.texts.corpora import CorpusConfig, load_records
from resa_lens.tuning.loop import TuneConfig

BY = "vllm 0.0.0, tensor parallel over 1"

pytestmark = pytest.mark.usefixtures("fake_vllm")


@pytest.fixture
def ctx(tmp_path: Path, tiny: Model) -> Context:
    context = Context(Workspace(tmp_path / "workspace"), SILENT, device="cpu")
    context.models["tiny-reasoner|"] = tiny
    return context


@pytest.mark.slow
def test_own_samples_and_both_scores_of_a_tuning(ctx: Context, tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    rows = [{"question": r.question, "answer": r.answer} for r in load_records("tiny")[:6]]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    job = TuneJob(
        model="tiny-reasoner", control="own-samples", lora=TuneConfig(rank=2), steps=1,
        elicitation=CorpusConfig(source=str(file), sequence=64, thought_share=0.0),
        evaluation=EvalConfig(limit=3, generation=GenerationConfig(40)), engine="vllm",
    )  # fmt: skip
    tuned = tune_run(ctx, job)
    samples = tuned.adapter.artifact.manifest.results["own_samples"]
    assert samples["answers"] == 24
    assert samples["generated_by"] == BY
    for run in (tuned.base, tuned.tuned):
        assert run.artifact.manifest.results["generated_by"] == BY
        assert run.artifact.manifest.config["engine"] == "vllm"


def test_generations_of_activity(ctx: Context, tiny: Model) -> None:
    """Greedy, so the texts are hf's, and the tables too; the identity says what generated them."""
    saes = train_run(ctx, tiny, [4], SaeConfig(latents=64, k=4, tokens=2048), CorpusConfig())

    def run(engine):
        return activity_run(
            ctx, tiny, saes, CorpusConfig(), ActivityConfig(examples=2), generations=3,
            max_new_tokens=40, engine=engine,
        )  # fmt: skip

    hf, vllm = run("hf"), run("vllm")
    assert vllm.artifact.path != hf.artifact.path
    assert (vllm.tokens, vllm.layers) == (hf.tokens, hf.layers)
    assert vllm.artifact.manifest.results["generated_by"] == BY
    assert hf.artifact.manifest.results["generated_by"].startswith("transformers ")
    with pytest.raises(BadInputError, match="engine vllm generates, and nothing is"):
        activity_run(ctx, tiny, saes, CorpusConfig(), ActivityConfig(), engine="vllm")
