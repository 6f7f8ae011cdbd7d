"""Controls in the SAE's place, and what is imitated in place of SAE-Tuning."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.kinds.saes import Saes
from resa_lens.artifacts.stage import Context, Draft
from resa_lens.artifacts.workspace import Workspace
from resa_lens.errors import BadInputError
from resa_lens.evals.engines import GenerationConfig, HFEngine
from resa_lens.evals.grading import is_correct
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model, load_model
from resa_lens.progress import Reporter
from resa_lens.saes import checkpoint
from resa_lens.saes.baselines import substitute
from resa_lens.saes.coder import SparseCoder
from resa_lens.saes.train import SaeConfig
from resa_lens.stages import adapters
from resa_lens.stages import controls as module
from resa_lens.stages.adapters import adapter_run
from resa_lens.stages.controls import (
    CONTROLS,
    MATCHED,
    SANITY,
    check_control,
    identity_coder,
    replacement_for,
    sft_examples,
)
from resa_lens.stages.sae_training import train_run
from resa_lens.stages.saes import SaeRun
from resa_lens.stages.tune_job import TuneJob
from resa_lens.texts import corpora
from resa_lens.texts.corpora import CorpusConfig, Record, load_records
from resa_lens.tuning.objective import preset
from resa_lens.tuning.sft import OwnConfig
from resa_lens.tuning.train import TuneConfig, tune

POINT = Hookpoint(6)
RECORDS = load_records("tiny")[:300]
CORPUS = CorpusConfig(sequence=128)
QUICK = SaeConfig(latents=256, k=16, tokens=4096)


class Heard(Reporter):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def ctx(tmp_path_factory: pytest.TempPathFactory) -> Context:
    place = tmp_path_factory.mktemp("controls") / "workspace"
    return Context(Workspace(str(place)), Heard(), device="cpu")


@pytest.fixture(scope="module")
def run(ctx: Context, tiny: Model) -> SaeRun:
    return train_run(ctx, tiny, [POINT.layer], QUICK, CORPUS)


@pytest.fixture(scope="module")
def coder(run: SaeRun, tiny: Model) -> SparseCoder:
    return run.coders(tiny, [POINT.layer])[POINT]


def put(ctx: Context, tiny: Model, coder: SparseCoder, run: SaeRun, control: str):
    return replacement_for(
        ctx, tiny, POINT, coder, control, CORPUS, RECORDS, trained=run.training()
    )


def notes(ctx: Context) -> list[str]:
    assert isinstance(ctx.reporter, Heard)
    return ctx.reporter.notes


# Controls


@pytest.mark.parametrize("name", MATCHED)
def test_each_matched_control_says_two_equal_fvus(
    ctx: Context, tiny: Model, coder: SparseCoder, run: SaeRun, name: str
) -> None:
    made = put(ctx, tiny, coder, run, name)
    said = re.search(rf"control {name} .*FVU ([\d.]+) on 1024 tokens, the SAE's ([\d.]+)",
                     notes(ctx)[-1])  # fmt: skip
    assert said
    assert float(said[1]) == pytest.approx(float(said[2]), rel=2e-3)
    assert 0 < float(said[2]) < 1
    x = torch.randn(2, 5, tiny.d_model, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(substitute(made, x), substitute(coder, x))
    assert not torch.allclose(substitute(made, x), x)


def test_a_stopped_tuning_goes_on_with_the_same_noise(
    ctx: Context,
    tiny: Model,
    coder: SparseCoder,
    run: SaeRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = put(ctx, tiny, coder, run, "noise")
    # A state is kept after each update, however long a busy disk takes.
    monkeypatch.setattr(checkpoint, "UNNOTICED_S", 10**9)

    def tuned(folder: Path | None, stop_at: int | None = None) -> tuple[int, dict[str, Any]]:
        def advance(done: int) -> None:
            nonlocal stop_at
            stop_at = None if stop_at is None else stop_at - done
            if stop_at == 0:
                raise KeyboardInterrupt

        fresh = load_model("tiny-reasoner", device="cpu")
        data = corpora.batches(fresh.tokenizer, RECORDS, CORPUS, tokens=4 * 128, batch=1)
        lora = TuneConfig(rank=2, alpha=4, learning_rate=1e-3)
        peft, result = tune(fresh, made, POINT, data, 4, preset("paper"), lora,
                       advance=advance, folder=folder)  # fmt: skip
        held = {name: value for name, value in peft.named_parameters() if "lora_B" in name}
        return result.resumed_at, held

    _, whole = tuned(None)
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path / "run", stop_at=2)
    resumed, again = tuned(tmp_path / "run")
    assert resumed == 2
    assert any(value.any() for value in whole.values())
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_the_random_models_sae_is_trained_alike_and_once(
    ctx: Context, tiny: Model, coder: SparseCoder, run: SaeRun
) -> None:
    put(ctx, tiny, coder, run, "random-weights")
    (null,) = (
        artifact.manifest
        for artifact in ctx.workspace.artifacts(Saes)
        if artifact.weights != tiny.weights_hash
    )
    assert run.artifact is not None
    own = run.artifact.manifest
    assert null.config["sae"] == own.config["sae"]
    assert null.config["corpus"] == own.config["corpus"]
    put(replace(ctx, force=True), tiny, coder, run, "random-weights")
    assert sum("SAEs: using" in note for note in notes(ctx)) >= 1
    assert len(ctx.workspace.artifacts(Saes)) == 2


@pytest.mark.parametrize("width", [3, 128])
def test_the_identity_reconstructs_to_the_bit(width: int) -> None:
    x = torch.randn(4, 7, width, generator=torch.Generator().manual_seed(1)) * 37
    x[0, 0] = 0
    assert torch.equal(substitute(identity_coder(width), x), x)


@pytest.mark.parametrize("control", SANITY)
@pytest.mark.parametrize(("name", "dropout"), [("paper", 0.0), ("paper", 0.5), ("reference", 0.5)])
def test_where_nothing_is_changed_nothing_trains(
    ctx: Context, tiny: Model, coder: SparseCoder, control: str, name: str, dropout: float
) -> None:
    """To the bit, with dropout too: its masks meet a B of zeros in both passes."""
    objective = preset(name)
    point = Hookpoint(POINT.layer, objective.site)
    made = replacement_for(ctx, tiny, point, coder, control, CORPUS, RECORDS)
    fresh = load_model("tiny-reasoner", device="cpu")
    data = corpora.batches(fresh.tokenizer, RECORDS, CORPUS, tokens=3 * 128, batch=1)
    lora = TuneConfig(rank=4, alpha=8, dropout=dropout, learning_rate=1e-2)
    peft, result = tune(fresh, made, point, data, 3, objective, lora)
    assert result.losses == (0.0, 0.0, 0.0)
    held = {key: value for key, value in peft.named_parameters() if "lora_B" in key}
    assert len(held) == 12 * len(objective.targets)
    assert not any(value.any() for value in held.values())


def test_through_the_sae_itself_the_same_run_does_train(tiny: Model, coder: SparseCoder) -> None:
    """Without this the test above could pass for another reason."""
    fresh = load_model("tiny-reasoner", device="cpu")
    data = corpora.batches(fresh.tokenizer, RECORDS, CORPUS, tokens=3 * 128, batch=1)
    lora = TuneConfig(rank=4, alpha=8, dropout=0.0, learning_rate=1e-2)
    peft, result = tune(fresh, coder, POINT, data, 3, preset("paper"), lora)
    assert min(result.losses) > 1e-6
    assert all(v.any() for k, v in peft.named_parameters() if "lora_B" in k and "layers.9" in k)


def test_an_unknown_control_is_refused_with_the_list() -> None:
    for known in (None, *CONTROLS):
        check_control(known)
    with pytest.raises(BadInputError, match=r"'random_weights' is unknown.*random-weights"):
        check_control("random_weights")


def test_saes_of_unknown_training_have_none(run: SaeRun) -> None:
    assert run.training() is not None
    assert replace(run, artifact=None).training() is None


# What is imitated


@pytest.fixture
def draft(tmp_path: Path) -> Draft:
    return Draft(tmp_path / "work")


def test_own_samples_are_the_models_right_answers(ctx: Context, tiny: Model, draft: Draft) -> None:
    generation = GenerationConfig(temperature=1.0, seed=4)
    items, found = sft_examples(
        ctx, draft, tiny, "own-samples", RECORDS,
        own=OwnConfig(samples=2, easy_share=1.0), questions=12,
        generation=generation,
    )  # fmt: skip
    assert found is not None
    assert (found.questions, found.answers) == (12, 24)
    assert 0 < found.solved <= 12
    assert found.right < 24
    gold = {record.question: record.answer for record in RECORDS}
    assert len(items) == len(found.examples) >= found.solved
    for item in items:
        assert item.completion.endswith("</answer>")
        assert is_correct("<think>" + item.completion, gold[item.question])
    assert f"{found.right} of 24 answers right" in notes(ctx)[-1]
    again, _ = sft_examples(
        ctx, draft, tiny, "own-samples", RECORDS,
        own=OwnConfig(samples=2, easy_share=1.0), questions=12,
        generation=generation,
    )  # fmt: skip
    assert again == items


def test_the_records_kinds_and_bad_data(ctx: Context, tiny: Model, draft: Draft) -> None:
    items, found = sft_examples(ctx, draft, tiny, "cot", RECORDS)
    assert found is None
    assert len(items) == len(RECORDS)
    with pytest.raises(BadInputError, match=r"'sft' is unknown; use cot-free"):
        sft_examples(ctx, draft, tiny, "sft", RECORDS)
    for kind in ("cot-free", "cot", "own-samples"):
        with pytest.raises(BadInputError, match="hold no record"):
            sft_examples(ctx, draft, tiny, kind, [])
    with pytest.raises(BadInputError, match="no steps"):
        sft_examples(ctx, draft, tiny, "cot", [Record("What is 1+1?", "2")])


def test_a_model_that_is_never_right_cannot_teach_itself(
    ctx: Context, tiny: Model, draft: Draft, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "is_correct", lambda text, gold: False)
    with pytest.raises(BadInputError, match=r"none of 8 answers.*0 are right"):
        sft_examples(ctx, draft, tiny, "own-samples", RECORDS, questions=2)


def test_own_answers_that_are_there_are_not_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted at the second update of a tuning: it goes on with the texts that it began on."""
    monkeypatch.setattr(checkpoint, "UNNOTICED_S", 10**9)
    file, drawn = tmp_path / "rows.jsonl", []
    rows = [{"question": r.question, "answer": r.answer} for r in RECORDS[:6]]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    job = TuneJob(
        model="tiny-reasoner", control="own-samples", lora=TuneConfig(rank=2), steps=2,
        elicitation=CorpusConfig(source=str(file), sequence=64),
    )  # fmt: skip
    generate, fit = HFEngine.generate, adapters.fit

    def counted(self: HFEngine, prompts: Any, *args: Any, **options: Any) -> Any:
        drawn.append(len(prompts))
        return generate(self, prompts, *args, **options)

    def stopped(*args: Any, **options: Any) -> Any:
        def advance(done: int) -> None:
            if done:
                raise KeyboardInterrupt

        return fit(*args, **{**options, "advance": advance})

    monkeypatch.setattr(HFEngine, "generate", counted)

    def tuned(place: str) -> Artifact:
        return adapter_run(Context(Workspace(tmp_path / place), device="cpu"), job).artifact

    whole = tuned("whole")
    assert drawn == [24]
    with monkeypatch.context() as patch:
        patch.setattr(adapters, "fit", stopped)
        with pytest.raises(KeyboardInterrupt):
            tuned("w")
    assert drawn == [24, 24]
    again = tuned("w")
    assert drawn == [24, 24]
    assert again.manifest.results["resumed_at"] == 1
    assert again.manifest.results["losses"] == whole.manifest.results["losses"]
    assert again.manifest.results["own_samples"] == whole.manifest.results["own_samples"]
