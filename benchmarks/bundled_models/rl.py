"""Post-train `tiny-reasoner` on its own right answers.

    python -m benchmarks.bundled_models.rl --out FOLDER

Expert iteration (arXiv 1705.08439) with a filter, as in rejection fine-tuning (arXiv 2308.01825):
in each round the model of the round before answers fresh questions of the training split several
times, and LoRA adapters learn the answers whose result is verified to be right.  No worked step and
no question of the test split is seen.  FOLDER/round-N holds the adapters after a round: a killed
run goes on with the next.  At the end FOLDER/model is the bundled `tiny-reasoner-rl`.
"""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file, save_file

from benchmarks.bundled_models.questions import TRAIN_LEVELS, Question, draw_unique, split_of
from resa_lens.errors import BadInputError
from resa_lens.evals.engines import GenerationConfig, HFEngine
from resa_lens.evals.grading import is_correct
from resa_lens.evals.run import EvalConfig, evaluate
from resa_lens.evals.tasks import EvalItem
from resa_lens.models.adapters import attach_adapter
from resa_lens.models.host import load_model
from resa_lens.texts import prompts
from resa_lens.texts.corpora import CorpusConfig, Record
from resa_lens.tuning.loop import TuneConfig, fit
from resa_lens.tuning.objective import ATTENTION, MLP
from resa_lens.tuning.sft import OwnConfig, own_samples, sft_batches, sft_loss
from resa_lens.tuning.train import add_lora, save_adapter

BASE = "tiny-reasoner"
DEV_SEED = 31
RECORD = "record.json"


@dataclass(frozen=True)
class RlConfig:
    """How the second bundled model is made."""

    rounds: int = 8
    questions: int = 1_500
    """Asked a round, of levels 1 to 3."""
    temperature: float = 1.0
    own: OwnConfig = field(default_factory=OwnConfig)
    lora: TuneConfig = field(
        default_factory=lambda: TuneConfig(
            rank=16, alpha=32, dropout=0.0, learning_rate=1e-3, batch=8
        )
    )
    corpus: CorpusConfig = field(default_factory=lambda: CorpusConfig(system_share=0.1))
    """The share behind the R1 system prompt keeps what the base can do behind it."""
    dev_questions: int = 900
    """Of the training split, asked after each round and never trained on."""
    bundled_rounds: tuple[int, ...] = (1, 3, 5)
    """Rounds whose adapters become checkpoints of the model."""
    seed: int = 0


def dev_set(config: RlConfig) -> list[Question]:
    """Return the questions that show how the training goes; they are of the training split."""
    return _draw(DEV_SEED, config.dev_questions)


def questions_of(config: RlConfig, number: int) -> list[Question]:
    """Return a round's questions, numbered from 1: of the training split, none of the dev set.

    Small families come back in several rounds.
    """
    held = {item.question for item in dev_set(config)}
    drawn = _draw(1_000 * (config.seed + 1) + number, config.questions)
    return [item for item in drawn if item.question not in held]


def _draw(seed: int, count: int) -> list[Question]:
    drawn = draw_unique(seed, "train", dict.fromkeys(TRAIN_LEVELS, count // len(TRAIN_LEVELS)))
    assert all(split_of(item.question) == "train" for item in drawn)
    return drawn


def train(config: RlConfig, out: Path) -> Path:
    """Train all rounds, or those that are missing, and return the folder of the bundled model.

    Raises:
        BadInputError: the folder holds rounds of another configuration.
    """
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    wanted = _identity(config)
    steps = 0
    for number in range(1, config.rounds + 1):
        folder = out / f"round-{number}"
        if not (folder / RECORD).exists():
            before = out / f"round-{number - 1}" if number > 1 else None
            record = _round(config, number, before, out / ".round")
            record |= {"steps_before": steps, "config": wanted}
            (out / ".round" / RECORD).write_text(json.dumps(record, indent=1) + "\n")
            (out / ".round").rename(folder)
        record = json.loads((folder / RECORD).read_text())
        if record["config"] != wanted:
            raise BadInputError(f"{folder} was made with another configuration; use another folder")
        steps += record["steps"]
        print(json.dumps({k: v for k, v in record.items() if k != "config"}), flush=True)
    return export(config, out)


def _identity(config: RlConfig) -> dict[str, Any]:
    """Return what makes a round what it is: not how many follow, nor which are bundled."""
    held = asdict(config)
    del held["rounds"], held["bundled_rounds"]
    return {"base": load_model(BASE).weights_hash, **json.loads(json.dumps(held))}


def _round(config: RlConfig, number: int, before: Path | None, folder: Path) -> dict[str, Any]:
    """Sample, learn and write the adapters; return the round's figures."""
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    model = load_model(BASE)
    if before is None:
        peft = add_lora(model.model, (*ATTENTION, *MLP), replace(config.lora, seed=config.seed))
    else:
        peft = attach_adapter(model.model, before, trainable=True)
    engine = HFEngine(merged(peft), model.tokenizer)
    asked = questions_of(config, number)
    records = [Record(item.question, item.answer) for item in asked]
    generation = GenerationConfig(temperature=config.temperature, seed=1_000 * config.seed + number)
    found = own_samples(
        records,
        lambda texts, names: engine.generate(texts, generation, streams=names),
        is_correct,
        replace(config.own, seed=generation.seed),
    )
    sampled = time.monotonic() - began
    corpus = replace(config.corpus, seed=generation.seed)
    texts = [prompts.question_prompt(item.question) + item.completion for item in found.examples]
    encoded: Any = model.tokenizer(texts)["input_ids"]
    tokens = sum(len(ids) + 1 for ids in encoded)
    steps = max(1, tokens // (config.lora.batch * corpus.sequence))
    result = fit(
        peft,
        sft_batches(
            model.tokenizer,
            found.examples,
            corpus,
            tokens=steps * config.lora.batch * corpus.sequence,
            batch=config.lora.batch,
        ),
        steps,
        lambda batch: sft_loss(peft, batch),
        replace(config.lora, seed=generation.seed),
        schedule="constant",
        clip_norm=1.0,
        doing=f"expert iteration, round {number}",
    )
    save_adapter(peft, folder, Path(BASE))
    dev = evaluate(HFEngine(merged(peft), model.tokenizer), items(dev_set(config)), EvalConfig())
    return {
        "round": number,
        **found.to_dict(),
        "steps": steps,
        "loss": sum(result.losses) / len(result.losses),
        "dev_accuracy": dev.accuracy,
        "sampling_seconds": round(sampled, 1),
        "seconds": round(time.monotonic() - began, 1),
    }


def items(questions: Sequence[Question]) -> list[EvalItem]:
    """Return drawn questions as the evaluation takes them."""
    return [
        EvalItem(f"drawn-{number}", q.question, q.answer, q.family, q.level)
        for number, q in enumerate(questions)
    ]


def merged(peft: Any) -> Any:
    """Return a plain copy of the model with the adapters in its weights."""
    return copy.deepcopy(peft).merge_and_unload().eval()


def export(config: RlConfig, out: Path) -> Path:
    """Write the last round as a whole model in bf16, and the bundled rounds as its checkpoints.

    A checkpoint is a PEFT adapter of `tiny-reasoner` by that name: it holds no path.
    """
    folder = out / "model"
    shutil.rmtree(folder, ignore_errors=True)
    base = load_model(BASE)
    peft = attach_adapter(base.model, out / f"round-{config.rounds}")
    merged(peft).to(torch.bfloat16).save_pretrained(folder)
    for file in sorted(base.folder.iterdir()):
        if file.suffix in (".jinja", ".json") and file.name != "config.json":
            shutil.copyfile(file, folder / file.name)
    steps = 0
    for number in range(1, config.rounds + 1):
        source = out / f"round-{number}"
        steps += json.loads((source / RECORD).read_text())["steps"]
        if number in config.bundled_rounds:
            _write_checkpoint(source, folder / "checkpoints" / f"step-{steps}")
    return folder


def _write_checkpoint(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    weights = load_file(source / "adapter_model.safetensors")
    half = {name: value.to(torch.bfloat16) for name, value in weights.items()}
    save_file(half, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = json.loads((source / "adapter_config.json").read_text())
    # A set, whose order changes from run to run.
    settings["target_modules"] = sorted(settings["target_modules"])
    text = json.dumps(settings, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n")


def main(
    out: Annotated[Path, typer.Option(help="Folder for the rounds and the model.")],
    rounds: Annotated[int, typer.Option(help="Rounds of sampling and learning.")] = RlConfig.rounds,
    seed: int = RlConfig.seed,
) -> None:
    """Post-train the bundled model on its own right answers."""
    print(train(RlConfig(rounds=rounds, seed=seed), out))


if __name__ == "__main__":
    typer.run(main)
