"""The draws of the experiment: damaged targets, SAEs, what is inserted, and the cells."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from benchmarks.shared import share
from resa_lens.evals.config import EvalConfig, GenerationConfig
from resa_lens.evals.engines.hf import HFEngine
from resa_lens.evals.grading import is_correct
from resa_lens.evals.insertion import MeanAblation, evaluate_inserted
from resa_lens.evals.tasks import EvalItem, load_tasks, select
from resa_lens.models.activations import stream_activations
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model, load_model
from resa_lens.saes.baselines import Blend, Noise, Replacement, fvu_on, match_fvu, pca
from resa_lens.saes.coder import SparseCoder
from resa_lens.saes.config import SaeConfig
from resa_lens.saes.train import train_saes
from resa_lens.stages.saes import split_records
from resa_lens.texts import corpora
from resa_lens.texts.corpora import CorpusConfig
from resa_lens.tuning.loop import TuneConfig, TuneResult, fit
from resa_lens.tuning.objective import Objective, preset
from resa_lens.tuning.sft import OwnConfig, examples, own_samples, sft_batches, sft_loss
from resa_lens.tuning.train import add_lora, lora_targets, save_adapter, tune

LAYER = 8
POINT = Hookpoint(LAYER, "mlp_out")
DRAWS = (100, 101, 102, 103, 104, 105)
DAMAGE = 4.0
"""Standard deviations of the weights; the prototype's."""
ACCEPTED = (0.15, 0.45)
"""A target's accuracy; outside of it the damage is drawn again, with the seed 1,000 higher."""
STEPS, BATCH, SEQUENCE = 40, 8, 256
QUESTIONS, GATE_QUESTIONS = 1500, 300
SAMPLE_TOKENS = 16_384
PRIMARY = "ABC"
CELLS = {
    "A": "paper, SAE of the source",
    "B": "paper, PCA of the source, equal FVU",
    "C": "paper, SAE of the target, its error lengthened to A's on the target",
    "D": "paper, noise as long as A's error",
    "E": "distil, SAE of the source",
    "F": "distil, PCA of the source",
    "G": "reference, SAE of the source",
    "H": "SFT on worked steps",
    "I": "SFT on the source's own right answers",
    "J": "paper, mean activation",
    "K": "paper, SAE of the target as it is",
}
INSERTED = ("base", "sae", "pca", "noise", "own", "own lengthened", "mean", "zero", "oracle")


def records(thought_share: float, seed: int) -> tuple[Sequence[Any], CorpusConfig]:
    """Return the training split and how it becomes sequences."""
    corpus = CorpusConfig(thought_share=thought_share, sequence=SEQUENCE, seed=seed)
    return corpora.read_records(corpus), corpus


def questions(split: str) -> tuple[list[EvalItem], EvalConfig]:
    """Return what is asked: of the test split, or for the gate of the training split."""
    if split == "test":
        return load_tasks("tiny"), EvalConfig(limit=QUESTIONS, levels=(1, 2, 3))
    items = [
        EvalItem(f"train-{number}", r.question, r.answer, r.family, r.level)
        for number, r in enumerate(corpora.load_records("tiny"))
    ]
    return items, EvalConfig(limit=GATE_QUESTIONS, levels=(1, 2, 3))


def damaged(
    seed: int, block: int = LAYER, sd: float = DAMAGE, name: str = "tiny-reasoner"
) -> Model:
    """Return a bundled model with noise on the down projection of one block's MLP.

    Args:
        seed: of the noise.
        block: 0-based.
        sd: of the noise, in standard deviations of the weights.
        name: of the model.
    """
    model = load_model(name)
    layers: Any = model.model.model.layers
    weight: Tensor = layers[block].mlp.down_proj.weight
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        weight += sd * weight.std() * noise
    return model


def activations(model: Model, seed: int, point: Hookpoint = POINT) -> Tensor:
    """Return activations at a place on worked documents, [token, d_model]."""
    rows, corpus = records(1.0, seed)
    ids = corpora.batches(model.tokenizer, rows, corpus, tokens=SAMPLE_TOKENS, batch=BATCH)
    parts = stream_activations(model, ids, [point])
    return torch.cat([part.acts[point].flatten(0, 1) for part in parts])


def trained_sae(
    model: Model,
    seed: int,
    *,
    thought_share: float = 0.5,
    tokens: int | None = None,
    families: Collection[str] = (),
    initial: SparseCoder | None = None,
) -> SparseCoder:
    """Return the product's SAE of a model: 512 latents, k 8.

    Args:
        model: whose activations it learns.
        seed: of its weights and of the documents' order.
        thought_share: share of the documents that hold worked steps.
        tokens: of training; None is the product's default at this width.
        families: of questions, of which the documents are; empty for all.
        initial: an SAE to go on from.
    """
    rows, corpus = records(thought_share, seed)
    if families:
        rows = [row for row in rows if row.family in families]
    config = SaeConfig(latents=512, k=8, tokens=tokens, seed=seed).for_width(model.d_model)
    assert config.tokens is not None
    assert config.batch is not None
    training, held_out = split_records(rows)
    tail = corpora.batches(model.tokenizer, held_out, corpus, tokens=8192, batch=config.batch)
    batches = corpora.batches(
        model.tokenizer, training, corpus, tokens=config.tokens, batch=config.batch
    )
    trained = train_saes(
        model, [LAYER], batches, list(tail), config,
        initial=None if initial is None else {POINT: initial},
    )  # fmt: skip
    coder = trained.coders[POINT]
    return coder.requires_grad_(False)


@dataclass
class Draw:
    """One damage with its SAEs; everything is made when it is first asked for."""

    seed: int
    folder: Path

    def stored(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return a finished piece of work, or do it."""
        file = self.folder / f"{name}.json"
        if not file.exists():
            began, cpu = time.monotonic(), time.process_time()
            result = work()
            result["seconds"] = round(time.monotonic() - began, 1)
            result["cpu_seconds"] = round(time.process_time() - cpu, 1)
            self.folder.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(".part")
            part.write_text(json.dumps(result))
            part.replace(file)
            print(f"draw {self.seed}, {name}: {result['seconds']} s", flush=True)
        return json.loads(file.read_text())

    @cached_property
    def damage_seed(self) -> int:
        """The seed of the damage that the rule accepts."""

        def work() -> dict[str, Any]:
            items, config = questions("test")
            refused = []
            for seed in range(self.seed, self.seed + 10_000, 1000):
                scored = evaluate_inserted(damaged(seed), items, config)
                if ACCEPTED[0] <= scored.accuracy <= ACCEPTED[1]:
                    return {"damage_seed": seed, "refused": refused, **answers(scored)}
                refused.append([seed, scored.accuracy])
            raise SystemExit(f"draw {self.seed}: no damage was accepted")

        return self.stored("base", work)["damage_seed"]

    def target(self) -> Model:
        """A fresh target."""
        return damaged(self.damage_seed)

    @cached_property
    def source(self) -> Model:
        """The intact model."""
        return load_model("tiny-reasoner")

    @cached_property
    def plain(self) -> Model:
        """A target that is not tuned."""
        return self.target()

    def _coder(self, name: str, model: Callable[[], Model]) -> SparseCoder:
        file = self.folder / f"{name}.pt"
        if not file.exists():
            torch.save(trained_sae(model(), self.seed), file)
        return torch.load(file, weights_only=False)

    @cached_property
    def sae(self) -> SparseCoder:
        """The source's SAE."""
        return self._coder("sae", lambda: self.source)

    @cached_property
    def own(self) -> SparseCoder:
        """The target's SAE."""
        return self._coder("own", lambda: self.plain)

    @cached_property
    def source_acts(self) -> Tensor:
        """A sample of the source's activations."""
        return activations(self.source, self.seed)

    @cached_property
    def target_acts(self) -> Tensor:
        """The same sample of the target's."""
        return activations(self.plain, self.seed)

    @cached_property
    def lengthened(self) -> Blend:
        """The target's SAE with an error as large as the source's SAE makes on the target."""
        return match_fvu(self.own, self.sae, self.target_acts)

    def replacement(self, name: str) -> SparseCoder | Replacement | Model | None:
        """Return what stands in the activations' place."""
        match name:
            case "base":
                return None
            case "sae":
                return self.sae
            case "pca":
                return pca(self.source_acts, self.sae)
            case "noise":
                return Noise(self.sae, self.seed)
            case "own":
                return self.own
            case "own lengthened":
                return self.lengthened
            case "mean":
                return MeanAblation(self.target_acts.mean(0))
            case "zero":
                return MeanAblation(torch.zeros(self.plain.d_model))
            case "oracle":
                return self.source
        raise KeyError(name)

    def insertion(self) -> dict[str, Any]:
        """Score everything inserted and nothing tuned, on questions of the training split."""

        def work() -> dict[str, Any]:
            items, config = questions("train")
            scores = {}
            for name in INSERTED:
                result = evaluate_inserted(self.plain, items, config, POINT, self.replacement(name))
                scores[name] = answers(result)
            return {
                "inserted": scores,
                "fvu": {
                    "sae on source": fvu_on(self.sae, self.source_acts),
                    "sae on target": fvu_on(self.sae, self.target_acts),
                    "own on target": fvu_on(self.own, self.target_acts),
                    "pca on target": fvu_on(pca(self.source_acts, self.sae), self.target_acts),
                },
                "lengthened": self.lengthened.scale,
                "rank of pca": pca(self.source_acts, self.sae).rank,
            }  # fmt: skip

        _ = self.damage_seed
        return self.stored("insertion", work)

    def cell(self, name: str) -> dict[str, Any]:
        """Tune one cell and score it."""
        _ = self.damage_seed
        return self.stored(name, lambda: self._tuned(name))

    def _tuned(self, name: str) -> dict[str, Any]:
        rows, corpus = records(1.0, self.seed)
        lora = adapters(self.seed)
        fresh = self.target()
        folder = self.folder / f"adapter-{name}"
        tokens = STEPS * BATCH * SEQUENCE
        if name in "HI":
            course = self._imitate(name, fresh, lora, folder)
        else:
            inserted = {
                "A": "sae", "B": "pca", "C": "own lengthened", "D": "noise", "E": "sae",
                "F": "pca", "G": "sae", "J": "mean", "K": "own",
            }[name]  # fmt: skip
            replacement: Any = self.replacement(inserted)
            if isinstance(replacement, Noise):
                replacement.generator = torch.default_generator
            batches = corpora.batches(fresh.tokenizer, rows, corpus, tokens=tokens, batch=BATCH)
            peft, course = tune(fresh, replacement, POINT, batches, STEPS, objective(name), lora)
            save_adapter(peft, folder, fresh.folder)
        outcome = {
            **self._scored(folder, 1.0),
            "losses": [round(loss, 6) for loss in course.losses],
            "tokens": course.tokens,
            "trainable": course.trainable,
        }
        if name == "G":
            outcome["negated"] = self._scored(folder, -1.0)
        return outcome

    def _imitate(self, name: str, fresh: Model, lora: TuneConfig, folder: Path) -> TuneResult:
        rows, corpus = records(1.0, self.seed)
        shared = objective("A")
        items = examples(rows, "cot") if name == "H" else self._answers_of_the_source(rows)
        peft = add_lora(fresh.model, lora_targets(fresh.model, shared.targets), lora)
        tokens = STEPS * BATCH * SEQUENCE
        batches = sft_batches(fresh.tokenizer, items, corpus, tokens=tokens, batch=BATCH)
        course = fit(
            peft, batches, STEPS, lambda batch: sft_loss(peft, batch), lora,
            schedule=shared.schedule, clip_norm=shared.clip_norm, doing=name,
        )  # fmt: skip
        save_adapter(peft, folder, fresh.folder)
        return course

    def _answers_of_the_source(self, rows: Sequence[Any]) -> list[Any]:
        items = [EvalItem(str(i), r.question, r.answer, r.family, r.level)
                 for i, r in enumerate(rows)]  # fmt: skip
        chosen = {item.id for item in select(items, levels=(1, 2, 3), limit=300, seed=self.seed)}
        sampled = [row for number, row in enumerate(rows) if str(number) in chosen]
        engine = HFEngine(self.source.model, self.source.tokenizer)
        drawn = GenerationConfig(temperature=1.0, seed=self.seed)
        samples = own_samples(
            sampled,
            lambda texts, names: engine.generate(texts, drawn, streams=names),
            is_correct,
            OwnConfig(samples=2, seed=self.seed),
        )
        return list(samples.examples)

    def _scored(self, folder: Path, scale: float) -> dict[str, Any]:
        """Score a fresh target with the adapter, at a scale, merged into it."""
        merged = with_adapter(self.target(), folder, scale)
        items, config = questions("test")
        return {
            **answers(evaluate_inserted(merged, items, config)),
            "loss": loss_on_documents(merged),
        }


def adapters(seed: int) -> TuneConfig:
    """Return how every cell is tuned."""
    return TuneConfig(rank=32, alpha=128, dropout=0.0, learning_rate=1e-4, batch=BATCH, seed=seed)


def with_adapter(
    fresh: Model, folder: Path, scale: float = 1.0, rotation: int | None = None
) -> Model:
    """Return a target with an adapter merged into it.

    Args:
        fresh: the target.
        folder: of the adapter.
        scale: of what it adds to each weight.
        rotation: seed of one random rotation of each module's inputs: what is added keeps its
            singular values and its outputs, and reads other directions.
    """
    peft: Any = PeftModel.from_pretrained(fresh.model, str(folder))
    generator = None if rotation is None else torch.Generator().manual_seed(rotation)
    with torch.no_grad():
        for weight_name, weight in peft.named_parameters():
            if "lora_B" in weight_name:
                weight *= scale
            elif "lora_A" in weight_name and generator is not None:
                weight.copy_(weight @ random_rotation(weight.shape[1], generator))
    return replace(fresh, model=peft.merge_and_unload())


def random_rotation(size: int, generator: torch.Generator) -> Tensor:
    """Return an orthogonal matrix drawn evenly (Haar), [size, size]."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator))
    return q * r.diagonal().sign()


def objective(cell: str) -> Objective:
    """Return a cell's objective; all share modules, schedule and the mean over tokens."""
    if cell in "EF":
        return preset("distil")
    if cell == "G":
        return Objective(
            preset="reference", reference="base", reference_gradient=False,
            direction="reference||sae", sae_gradient=False,
        )  # fmt: skip
    return preset("paper")


@torch.no_grad()
def loss_on_documents(model: Model) -> float:
    """Return the next-token loss on held-out worked documents, nats a token."""
    rows, corpus = records(1.0, 0)
    _, held_out = split_records(rows)
    total = count = 0.0
    for ids in corpora.batches(model.tokenizer, held_out, corpus, tokens=8192, batch=BATCH):
        logits = model.model(ids).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
        ).item()
        count += ids[:, 1:].numel()
    return total / count


def answers(result: Any) -> dict[str, Any]:
    """Return a score and which questions were right, in the order of their ids."""
    rows = sorted(result.samples, key=lambda row: row["id"])
    return {
        "accuracy": result.accuracy,
        "n": result.n,
        "correct": "".join("1" if row["correct"] else "0" for row in rows),
        "unfinished": result.unfinished,
    }


def plan(cells: str) -> list[str]:
    """Return the groups of cells in their order: A, B and C of every draw before anything else."""
    groups = ["".join(c for c in cells if c in PRIMARY), *[c for c in cells if c not in PRIMARY]]
    return [group for group in groups if group]


def run(work: Path, draws: list[int], cells: str) -> None:
    """Do what is missing.  Several processes share the draws of each group of cells."""
    torch.set_num_threads(1)

    def score(seed: int, group: str) -> None:
        # Models and samples of a draw are not needed beside those of the next one.
        draw = Draw(seed, work / f"draw-{seed}")
        draw.folder.mkdir(parents=True, exist_ok=True)
        for cell in group:
            draw.cell(cell)

    def insert(seed: int) -> None:
        Draw(seed, work / f"draw-{seed}").insertion()

    for group in plan(cells):
        share(work, {f"{group}-{seed}": partial(score, seed, group) for seed in draws})
        if all((work / f"draw-{seed}" / f"{c}.json").exists() for seed in draws for c in PRIMARY):
            share(work, {f"insertion-{seed}": partial(insert, seed) for seed in draws})
