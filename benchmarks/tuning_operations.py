"""Operations of a tuning update: what Python and the dispatcher pay for, whatever the width.

    python benchmarks/tuning_operations.py                  the table, before and after
    python benchmarks/tuning_operations.py --most 30        and which operators they are

A random Qwen2-shaped model with the 28 layers of DeepSeek-R1-Distill-Qwen-1.5B, narrow, since the
number of operations does not depend on the width.  One update of the trainer's own loop is counted
on the CPU by torch.profiler: the `aten` operators that no other one calls (what Python and autograd
call), and all, with those inside.  CPU seconds are of the fastest of several updates; at this width
nearly all of them are dispatch.

Not in it: on a CPU the softmaxes of the KL go over as many rows at once as its cache holds, at a
vocabulary of 151,936 one by one (18 operators a token, each over 151,936 numbers); on a GPU a piece
of the logits is one (`--vocab` shows it).  Exits with 1 where a target is missed.
"""

from __future__ import annotations

import collections
import os
import time
from datetime import date
from typing import Any

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer

LAYERS = 28
BEFORE = {"paper": (17_355, 57_514), "reference": (8_989, 30_562), "distil": (11_845, 39_830)}
"""Of the commit before LoRA, norms, rotations and optimizer were shortened, 2026-11-29: operators
that no other one calls, and all.  At one shape of an update, whatever its tokens."""
SHARE, SHARE_PER_TOKEN = 0.6, 0.1
PLAIN_SEQUENCE = 256
"""Tokens of an update of every preset then."""


def tiny_model(layers: int, vocab: int, context: int) -> Any:
    """Return a random Qwen2-shaped model of width 24."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from resa_lens.models.host import Model

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocab, hidden_size=24, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=context,
        tie_word_embeddings=False, initializer_range=0.1,
    )  # fmt: skip
    plain: Any = Qwen2ForCausalLM(config)
    return Model("random", plain.eval(), None, None, "0" * 8, "cpu", "float32", "benchmark")  # pyright: ignore


def measure(
    name: str,
    *,
    layers: int = LAYERS,
    batch: int = 1,
    sequence: int = 32,
    dropout: float = 0.05,
    vocab: int = 64,
    repeats: int = 5,
) -> tuple[collections.Counter[str], int, float]:
    """Count the operators of one update, and time the fastest of some others.

    Returns:
        Calls by operator of those that no other one calls, the number of all, and CPU seconds.
    """
    from resa_lens.models.hookpoints import Hookpoint
    from resa_lens.saes.coder import new_coder
    from resa_lens.tuning.loop import TuneConfig, fit
    from resa_lens.tuning.objective import preset
    from resa_lens.tuning.passes import Passes
    from resa_lens.tuning.train import add_adapters

    objective = preset(name)
    config = TuneConfig(rank=4, alpha=16, dropout=dropout, learning_rate=1e-4)
    model = tiny_model(layers, vocab, sequence)
    peft, bridge = add_adapters(model, objective, config)
    coder = new_coder(model.d_model, 48, 4, seed=0).requires_grad_(False)
    passes = Passes(bridge, peft, Hookpoint(layers // 2 - 1, objective.site), coder, objective)
    ids = torch.randint(vocab, (batch, sequence), generator=torch.Generator().manual_seed(1))
    counts: collections.Counter[str] = collections.Counter()
    seconds: list[float] = []
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def batches() -> Any:
        """Give the same batch again and again; the third update is counted, the others timed."""
        for number in range(repeats + 4):
            if number == 2:
                profile.start()
            elif number == 3:
                profile.stop()
            began = time.process_time()
            yield ids
            if number > 2:
                seconds.append(time.process_time() - began)

    fit(
        peft, batches(), repeats + 4, passes, config, schedule=objective.schedule,
        clip_norm=objective.clip_norm,
    )  # fmt: skip
    every = [event for event in profile.events() or () if event.name.startswith("aten::")]
    for event in every:
        parent = event.cpu_parent
        while parent is not None and not parent.name.startswith("aten::"):
            parent = parent.cpu_parent
        if parent is None:
            counts[event.name] += 1
    return counts, len(every), min(seconds)


def main(
    layers: int = LAYERS,
    batch: int = 1,
    sequence: int = 32,
    vocab: int = 64,
    most: int = 0,
    dropout: float = 0.05,
) -> None:
    """Count, print the table, and hold the targets."""
    from resa_lens.stages.tune_job import REFERENCE_SEQUENCE

    torch.set_num_threads(1)
    print(f"{date.today()}, {layers} layers, {batch} x {sequence} tokens, vocabulary {vocab}, "
          f"dropout {dropout}, torch {torch.__version__}")  # fmt: skip
    met = True
    for name, (before, before_all) in BEFORE.items():
        counts, every, seconds = measure(
            name, layers=layers, batch=batch, sequence=sequence, vocab=vocab, dropout=dropout
        )
        share = counts.total() / before
        # The number of operators of an update does not depend on its tokens.
        per_token = share * PLAIN_SEQUENCE / REFERENCE_SEQUENCE
        met = met and share <= SHARE and per_token <= SHARE_PER_TOKEN
        print(
            f"{name:10} operations an update {before:6} before, {counts.total():6} now: "
            f"{share:.3f}; with those inside {before_all:6} and {every:6}: "
            f"{every / before_all:.3f}; a token at {REFERENCE_SEQUENCE} in place of "
            f"{PLAIN_SEQUENCE}: {per_token:.3f}; {seconds * 1000:.0f} ms of CPU an update"
        )
        for key, count in counts.most_common(most):
            print(f"    {count:6} {key}")
    print(f"targets {SHARE} an update and {SHARE_PER_TOKEN} a token: {'met' if met else 'MISSED'}")
    if not met and (layers, vocab) == (LAYERS, 64):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
