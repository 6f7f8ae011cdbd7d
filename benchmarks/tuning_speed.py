"""Tuning against the authors' loop, re-created from its description, side by side in one run.

    python benchmarks/tuning_speed.py                          the default shape, on the CPU
    python benchmarks/tuning_speed.py --device cuda --dtype bfloat16 --full      the paper's shape

The authors' loop takes, an update: a pass of the base model (adapters off, no gradient), a pass
with the SAE in place, the SAE once more for a loss that is logged, the KL of both passes' whole
logits, AdamW with the norm clipped to 1.  Ours is the trainer's own loop with preset reference.
The floor is what no exact way can leave out: the base model's pass, the adapted blocks above the
hook with the head, and the way back through them; no KL, no SAE, no optimizer.
Rounds are interleaved and each continues its own training; medians; both losses are printed.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from typing import Any

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer

Update = Callable[[torch.Tensor], float]


def random_model(
    width: int, layers: int, vocab: int, dtype: torch.dtype, device: str, positions: int
) -> Any:
    """Return a random Llama-shaped model of this project's kind."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from resa_lens.models.host import Model

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=max(1, width // 64),
        num_key_value_heads=max(1, width // 192), intermediate_size=width * 8 // 3,
        vocab_size=vocab, max_position_embeddings=positions, tie_word_embeddings=True,
        # Larger than usual, so that the losses are not all rounding.
        initializer_range=0.05,
    )  # fmt: skip
    made: Any = LlamaForCausalLM(config)
    made = made.to(device, dtype).eval()
    return Model("random", made, None, None, "0" * 8, device, str(dtype)[6:], "benchmark")  # pyright: ignore


def authors(peft: Any, bridge: Any, point: Any, coder: Any, rate: float) -> Update:
    """Return an update of the authors' loop."""
    from resa_lens.saes.coder import reconstruct
    from resa_lens.tuning.objective import kl_divergence

    weights = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate)
    seen: list[torch.Tensor] = []

    def replace(acts: torch.Tensor, hook: object = None) -> torch.Tensor:
        seen.append(acts.detach())
        with torch.no_grad():
            return reconstruct(coder, acts)

    def update(ids: torch.Tensor) -> float:
        with torch.no_grad(), peft.disable_adapter():
            base = bridge(ids)
        with bridge.hooks(fwd_hooks=[(point.transformer_lens, replace)]):
            logits = bridge(ids)
        with torch.no_grad():
            acts = seen.pop()
            float((reconstruct(coder, acts) - acts).pow(2).mean())
        loss = kl_divergence(base, logits, "sum")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return update


def floor(peft: Any, bridge: Any, layer: int) -> Update:
    """Return the passes that no exact way can leave out."""
    block = bridge.blocks[layer]
    held: list[torch.Tensor] = []
    weights = [p for p in peft.parameters() if p.requires_grad]

    def update(ids: torch.Tensor) -> float:
        held.clear()
        handle = block.register_forward_hook(lambda module, args, out: held.append(out.detach()))
        with torch.no_grad(), peft.disable_adapter():
            base = bridge(ids, use_cache=False)
        handle.remove()
        for part in bridge.blocks[: layer + 1]:
            vars(part)["forward"] = lambda hidden_states, *args, **options: held[0]
        logits = bridge(ids, use_cache=False)
        for part in bridge.blocks[: layer + 1]:
            vars(part).pop("forward")
        # Any gradient of this shape does: the way back costs the same.
        logits.backward(base)
        for weight in weights:
            weight.grad = None
        return 0.0

    return update


def main(
    width: int = 576,
    n_layers: int = 12,
    vocab: int = 49_152,
    latents: int = 9216,
    k: int = 32,
    tokens: int = 2048,
    batch: int = 1,
    rounds: int = 5,
    dropout: float = 0.05,
    learning_rate: float = 1e-4,
    threads: int = 1,
    device: str = "cpu",
    dtype: str = "float32",
    full: bool = False,
) -> None:
    """Time the updates and print the table."""
    if full:
        width, n_layers, vocab, latents = 1536, 28, 151_936, 65_536
    from resa_lens.models.hookpoints import Hookpoint
    from resa_lens.saes.coder import new_coder
    from resa_lens.tuning.loop import TuneConfig, fit
    from resa_lens.tuning.objective import preset
    from resa_lens.tuning.passes import Passes
    from resa_lens.tuning.train import add_adapters

    torch.set_num_threads(threads)
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor()
    print(f"{date.today()}, {name or platform.machine()}, {threads} threads of {os.cpu_count()} "
          f"cores, torch {torch.__version__}")  # fmt: skip
    layer = n_layers // 2 - 1
    print(
        f"{n_layers} layers x {width}, vocabulary {vocab}, {dtype}, SAE of {latents} latents after "
        f"layer {layer}, {batch} x {tokens} tokens, LoRA r 32 dropout {dropout}, {rounds} rounds"
    )
    point, objective = Hookpoint(layer, "resid_post"), preset("reference")
    config = TuneConfig(dropout=dropout, learning_rate=learning_rate)
    coder = new_coder(width, latents, k, seed=0, device=device).requires_grad_(False)
    kind = getattr(torch, dtype)

    def prepared(*, shortened: bool = True) -> tuple[Any, Any]:
        model = random_model(width, n_layers, vocab, kind, device, tokens)
        peft, bridge = add_adapters(model, objective, config, shortened=shortened)
        return peft.to(device).train(), bridge

    generator = torch.Generator().manual_seed(1)
    data = [
        torch.randint(vocab, (batch, tokens), generator=generator).to(device)
        for _ in range(rounds + 1)
    ]
    # PEFT's layers, as they have them.
    theirs_peft, theirs_bridge = prepared(shortened=False)
    ours_peft, ours_bridge = prepared()
    floor_peft, floor_bridge = prepared()
    passes = Passes(
        ours_bridge, ours_peft, point, coder, objective, compiled=device == "cuda", note=print
    )
    times: dict[str, list[float]] = {"authors": [], "ours": [], "floor": []}
    losses: dict[str, list[float]] = {"authors": [], "ours": []}

    def timed(name: str, job: Update, ids: torch.Tensor, count: bool) -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        began = time.perf_counter()
        loss = job(ids)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        if count:
            times[name].append(time.perf_counter() - began)
        if name in losses:
            losses[name].append(loss)

    others = {
        "authors": authors(theirs_peft, theirs_bridge, point, coder, learning_rate),
        "floor": floor(floor_peft, floor_bridge, layer),
    }

    def batches() -> Any:
        """Between two updates of the trainer's loop the others take theirs."""
        for number, ids in enumerate(data):
            timed("authors", others["authors"], ids, number > 0)
            timed("floor", others["floor"], ids, number > 0)
            marks.append(time.perf_counter())
            yield ids

    marks: list[float] = []

    def ended(line: dict[str, Any]) -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        if len(losses["ours"]):
            times["ours"].append(time.perf_counter() - marks[-1])
        losses["ours"].append(line["loss"])

    fit(
        ours_peft, batches(), len(data), passes, config,
        schedule=objective.schedule, clip_norm=objective.clip_norm, device=device,
        trackers=[ended],
    )  # fmt: skip
    median = {name: statistics.median(values) for name, values in times.items()}
    for name, label in (
        ("authors", "authors' loop"),
        ("ours", "resa-lens"),
        ("floor", "floor: the passes alone"),
    ):
        print(
            f"{label:28} {median[name]:8.3f} s an update {batch * tokens / median[name]:9.0f} "
            f"tokens/s   (each: {', '.join(f'{t:.2f}' for t in times[name])})"
        )
    difference = max(abs(a / b - 1) for a, b in zip(losses["ours"], losses["authors"], strict=True))
    print(f"losses: ours {losses['ours'][0]:.6g} to {losses['ours'][-1]:.6g}, authors' "
          f"{losses['authors'][0]:.6g} to {losses['authors'][-1]:.6g}")  # fmt: skip
    print(
        f"largest relative difference of a loss {difference:.1e} "
        f"({'the same' if dropout == 0 else 'other'} dropout masks)"
    )
    ratio = median["authors"] / median["ours"]
    print(f"authors / ours {ratio:.2f}x, target 1.30x {'met' if ratio >= 1.3 else 'MISSED'}; "
          f"ours / floor {median['ours'] / median['floor']:.2f}x")  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
