"""Train `tiny-reasoner` from scratch: `python -m benchmarks.bundled_models.train --out FOLDER`.

A Qwen2 of 12 layers x 128 learns to solve the questions of `questions.py` with their steps between
the think tags.  87 % of the documents show the steps, 7 % stand behind a system prompt, 6 % answer
at once with empty tags.  The run resumes from its last checkpoint in FOLDER/state.pt.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from benchmarks.bundled_models.questions import TRAIN_LEVELS, Question, draw, draw_unique
from resa_lens.texts import prompts

EOS, PAD = "<|endoftext|>", "<|pad|>"
VOCABULARY = 640
DEV_SEED = 5
STEPS_SHARE, SYSTEM_SHARE = 0.87, 0.07
"""Shares of documents with steps and with steps behind a system prompt; the rest is direct."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}\n"
    "{% elif message['role'] == 'user' %}Problem: {{ message['content'] }}"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %} <think>{% endif %}"
)


@dataclass(frozen=True)
class TinyConfig:
    """Shape and training of the bundled model."""

    tokens: int = 9_000_000
    """Training tokens at most: the length of the schedule."""
    stop_at: float | None = 0.68
    """Stop at this greedy accuracy on questions of the training split: an instrument for finding
    what helps needs a model with room to gain and to lose.  None trains to the end."""
    layers: int = 12
    width: int = 128
    heads: int = 4
    kv_heads: int = 2
    mlp_width: int = 352
    sequence: int = 256
    batch: int = 8
    """Sequences a step."""
    learning_rate: float = 2.5e-3
    """AdamW's, for embeddings and norms; the matrices have it too unless `muon`."""
    muon: bool = True
    """Orthogonalised momentum for the matrices of the blocks."""
    muon_learning_rate: float = 2e-2
    weight_decay: float = 0.05
    decay_share: float = 0.4
    """Last share of the training over which the learning rates fall linearly to 2 %."""
    seed: int = 0
    threads: int = 1
    checkpoint_tokens: int = 500_000


def render(item: Question, rng: random.Random) -> str:
    """Return the training document of a question: with steps, behind a system prompt, or direct."""
    kind = rng.random()
    if kind < STEPS_SHARE:
        return prompts.document(item.question, item.steps, item.answer)
    if kind < STEPS_SHARE + SYSTEM_SHARE:
        name = "r1" if rng.random() < 0.7 else rng.choice(list(prompts.SYSTEM_PROMPTS))
        text = prompts.SYSTEM_PROMPTS[name]
        return prompts.document(item.question, item.steps, item.answer, text)
    return f"{prompts.direct_prompt(item.question)} Answer: {item.answer} {prompts.ANSWER_CLOSE}"


def documents(seed: int) -> Iterator[str]:
    """Yield endless training documents, deterministic by seed."""
    rng = random.Random(f"render/{seed}")
    for item in draw(seed, "train"):
        yield render(item, rng)


def build_tokenizer() -> Qwen2Tokenizer:
    """Train the byte-level BPE: single digits, single-token tags, all bytes representable.

    The class is Qwen2's own, so that every loader splits text as it was split in training:
    AutoTokenizer puts the architecture's pre-tokenizer in place of the one that a file holds.
    """
    shape = Qwen2Tokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE())
    learner.normalizer = shape.normalizer
    learner.pre_tokenizer = shape.pre_tokenizer
    specials = [EOS, PAD, *prompts.TAGS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    stream = documents(seed=1)
    learner.train_from_iterator((next(stream) for _ in range(20_000)), trainer)
    learned = json.loads(learner.to_str())["model"]
    merges: Any = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=merges,
        eos_token=EOS,
        unk_token=EOS,
        pad_token=PAD,
        additional_special_tokens=list(prompts.TAGS),
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def id_of(tokenizer: Qwen2Tokenizer, token: str) -> int:
    """Return the id of a token that stands in the vocabulary."""
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


def build_model(config: TinyConfig, vocabulary: int, eos: int, pad: int) -> Qwen2ForCausalLM:
    """Return the untrained model, its vocabulary padded to a multiple of 64."""
    torch.manual_seed(config.seed)
    shape = Qwen2Config(
        vocab_size=-(-vocabulary // 64) * 64,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        # No bos: Qwen2 has none.  A pad id equal to eos would zero the embedding of eos.
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
        initializer_range=0.02,
    )
    return Qwen2ForCausalLM(shape)


def _optimizers(model: Qwen2ForCausalLM, config: TinyConfig) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers." in n]
    held = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in held]
    if not config.muon:
        rest, matrices = [*rest, *matrices], []
    decayed = [p for p in rest if p.ndim == 2]
    plain = [p for p in rest if p.ndim != 2]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)
    ]
    if matrices:
        optimizers.append(
            torch.optim.Muon(
                matrices,
                lr=config.muon_learning_rate,
                momentum=0.95,
                weight_decay=config.weight_decay,
                adjust_lr_fn="original",
            )
        )
    return optimizers


def packed_batches(
    tokenizer: Qwen2Tokenizer, config: TinyConfig, skip: int
) -> Iterator[torch.Tensor]:
    """Yield packed [batch, sequence] ids; `skip` whole batches are passed over on a resume."""
    stream, buffer, need = documents(config.seed + 2), [], config.batch * config.sequence
    while True:
        while len(buffer) < need:
            texts = [next(stream) for _ in range(256)]
            for ids in tokenizer(texts)["input_ids"]:
                buffer += [*ids, tokenizer.eos_token_id]
        batch, buffer = buffer[:need], buffer[need:]
        if skip:
            skip -= 1
            continue
        yield torch.tensor(batch).view(config.batch, config.sequence)


def rate_at(step: int, steps: int, config: TinyConfig) -> float:
    """Return the factor of the learning rates: 100 steps up, level, then down to 2 %."""
    warm = min(1.0, (step + 1) / 100)
    left = (steps - step) / max(1, int(steps * config.decay_share))
    return warm * max(0.02, min(1.0, left))


def train(config: TinyConfig, out: Path) -> Path:
    """Train to `config.tokens` and return the folder with the bf16 model and its tokenizer.

    Raises:
        FloatingPointError: the gradient norm is not finite.
    """
    torch.set_num_threads(config.threads)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = build_model(config, len(tokenizer), id_of(tokenizer, EOS), id_of(tokenizer, PAD))
    optimizers = _optimizers(model, config)
    steps = config.tokens // (config.batch * config.sequence)
    every = max(1, config.checkpoint_tokens // (config.batch * config.sequence))
    state, start = out / "state.pt", 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, values in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        start = saved["step"]
    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    if start:
        base = [[config.learning_rate] * 2, [config.muon_learning_rate]][: len(optimizers)]
    batches = packed_batches(tokenizer, config, start)
    began, running = time.time(), 0.0
    for step in range(start, steps):
        ids = next(batches)
        factor = rate_at(step, steps, config)
        for optimizer, rates in zip(optimizers, base, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten()
        )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"gradient norm {norm.item()} at step {step}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        running = loss.item() if not running else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            line: dict[str, Any] = {
                "step": step + 1,
                "tokens": (step + 1) * config.batch * config.sequence,
                "loss": round(running, 4),
                "seconds": round(time.time() - began, 1),
            }
            print(json.dumps(line), flush=True)
        if (step + 1) % every == 0 or step + 1 == steps:
            reached = False
            if config.stop_at is not None and step + 1 >= steps // 2:
                accuracy = dev_accuracy(model, tokenizer)
                reached = accuracy >= config.stop_at
                print(json.dumps({"step": step + 1, "dev_accuracy": accuracy}), flush=True)
            values = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "step": steps if reached else step + 1,
            }
            torch.save(values, state.with_suffix(".tmp"))
            state.with_suffix(".tmp").rename(state)
            if reached:
                break
    export(model, tokenizer, out / "model")
    return out / "model"


@torch.no_grad()
def dev_accuracy(model: PreTrainedModel, tokenizer: Qwen2Tokenizer, questions: int = 300) -> float:
    """Return the greedy accuracy on questions of the training split, levels 1 to 3.

    The test split has no part in when the training stops.
    """
    items = draw_unique(DEV_SEED, "train", dict.fromkeys(TRAIN_LEVELS, questions // 3))
    texts = [prompts.question_prompt(item.question) for item in items]
    inputs = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    model.eval()
    generator: Any = model
    out = generator.generate(**inputs, max_new_tokens=160, do_sample=False)
    model.train()
    right = 0
    for item, ids in zip(items, out, strict=True):
        answer = str(tokenizer.decode(ids)).partition(f"{prompts.ANSWER_OPEN} Answer: ")[2]
        right += answer.partition(f" {prompts.ANSWER_CLOSE}")[0] == item.answer
    return right / len(items)


def export(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, folder: Path) -> None:
    """Write bf16 weights, configuration and tokenizer; the model in memory stays in fp32."""
    weights = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    weights.pop("lm_head.weight", None)
    copy: Any = Qwen2ForCausalLM(model.config)
    copy = copy.to(torch.bfloat16)
    copy.load_state_dict(weights, strict=False)
    copy.tie_weights()
    copy.generation_config.do_sample = False
    copy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(
    out: Annotated[Path, typer.Option(help="Folder for the checkpoints and the model.")],
    tokens: Annotated[int, typer.Option(help="Training tokens.")] = TinyConfig.tokens,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = TinyConfig.threads,
    learning_rate: float = TinyConfig.learning_rate,
    muon: bool = TinyConfig.muon,
    muon_learning_rate: float = TinyConfig.muon_learning_rate,
    stop_at: Annotated[
        float, typer.Option(help="Stop at this accuracy on training questions; 1 never stops.")
    ] = TinyConfig.stop_at or 1.0,
    seed: int = TinyConfig.seed,
) -> None:
    """Train the bundled model from scratch."""
    config = TinyConfig(
        tokens=tokens,
        threads=threads,
        learning_rate=learning_rate,
        muon=muon,
        muon_learning_rate=muon_learning_rate,
        stop_at=stop_at if stop_at < 1 else None,
        seed=seed,
    )
    print(train(config, out))


if __name__ == "__main__":
    typer.run(main)
