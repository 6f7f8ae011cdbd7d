"""Train `tiny-moe-reasoner` from scratch: `python -m benchmarks.bundled_models.moe --out FOLDER`.

A Qwen3 mixture of 8 layers x 16 experts, two of them for each token, learns the documents that
`train.py` gives to `tiny-reasoner`, with the same tokenizer.  Five things differ from that recipe:
Muon works on the experts' stacked matrices, gate and up apart; the routers are AdamW's; every layer
has a balancing loss of its own; all arithmetic is float32; the files name the class that they hold.
The run resumes from its last checkpoint in FOLDER/state.pt.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from benchmarks.bundled_models.train import (
    EOS,
    PAD,
    TinyConfig,
    build_tokenizer,
    dev_accuracy,
    id_of,
    packed_batches,
    rate_at,
)

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration that Muon orthogonalises with (Jordan 2024)."""
LEAST_SHARE = 0.1
"""Least use of any expert at the end, in units of its even share."""


@dataclass(frozen=True)
class MoEConfig(TinyConfig):
    """Shape and training of the bundled mixture."""

    tokens: int = 4_000_000
    decay_share: float = 0.25
    stop_at: float | None = 0.74
    layers: int = 8
    experts: int = 16
    """Experts a layer."""
    experts_per_token: int = 2
    expert_width: int = 96
    balance: float = 0.02
    """Weight of each layer's balancing loss."""


def build_moe(config: MoEConfig, vocabulary: int, eos: int, pad: int) -> Qwen3MoeForCausalLM:
    """Return the untrained mixture, its vocabulary padded to a multiple of 64."""
    torch.manual_seed(config.seed)
    # In what the configuration takes, and does not declare.
    head: dict[str, Any] = {"head_dim": config.width // config.heads}
    shape = Qwen3MoeConfig(
        vocab_size=-(-vocabulary // 64) * 64,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        moe_intermediate_size=config.expert_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        **head,
        num_experts=config.experts,
        num_experts_per_tok=config.experts_per_token,
        norm_topk_prob=True,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
        initializer_range=0.02,
    )
    return Qwen3MoeForCausalLM(shape)


def orthogonalise(stack: Tensor, steps: int = 5) -> Tensor:
    """Return the nearest semi-orthogonal matrix of each [rows, columns] matrix of a stack.

    Shape [..., rows, columns] in and out; singular values end between 0.6 and 1.3.  The iteration
    is in bfloat16, as in torch's own Muon; it forgives the rounding.
    """
    a, b, c = NEWTON_SCHULZ
    tall = stack.shape[-2] > stack.shape[-1]
    x = (stack.mT if tall else stack).bfloat16()
    x = x / x.flatten(-2).norm(dim=-1).clamp(min=1e-7)[..., None, None]
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(stack.dtype)


class StackedMuon(torch.optim.Optimizer):
    """Muon over stacks of matrices: [experts, out, in], or [out, in] as a stack of one.

    A tensor whose second-last dimension holds several matrices of equal height (gate and up of a
    fused projection) names their number in its group's `parts`; each is orthogonalised by itself.
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, momentum: float, weight_decay: float
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": 1}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Move every matrix along its orthogonalised Nesterov momentum."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                kept = self.state[p]
                if not kept:
                    kept["momentum"] = torch.zeros_like(p)
                average = kept["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(average, group["momentum"])
                rows, columns = p.shape[-2] // group["parts"], p.shape[-1]
                update = orthogonalise(update.view(*p.shape[:-2], group["parts"], rows, columns))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                scale = max(1.0, rows / columns) ** 0.5
                p.add_(update.view_as(p), alpha=-group["lr"] * scale)


def moe_optimizers(model: Qwen3MoeForCausalLM, config: MoEConfig) -> list[torch.optim.Optimizer]:
    """Return AdamW for embeddings, norms and routers, and Muon for every other matrix."""
    named = [(name, p) for name, p in model.named_parameters() if "layers." in name and p.ndim > 1]
    muon = [(name, p) for name, p in named if not name.endswith("mlp.gate.weight")]
    in_muon = {id(p) for _, p in muon}
    rest = [p for p in model.parameters() if id(p) not in in_muon]
    groups = [
        {"params": [p for p in rest if p.ndim == 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim != 2], "weight_decay": 0.0},
    ]
    fused = [p for name, p in muon if name.endswith("gate_up_proj")]
    single = [p for name, p in muon if not name.endswith("gate_up_proj")]
    return [
        torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True),
        StackedMuon(
            [{"params": single, "parts": 1}, {"params": fused, "parts": 2}],
            lr=config.muon_learning_rate,
            momentum=0.95,
            weight_decay=config.weight_decay,
        ),
    ]


def balancing_loss(logits: Tensor, k: int) -> Tensor:
    """Return one layer's balancing loss: 1 where the experts are used evenly, E/k at the worst.

    The number of experts times the sum over experts of (share of the slots) x (mean probability),
    as in the Switch Transformer (arXiv 2101.03961, equation 4), for the top k of E experts.
    `logits`: [tokens, experts].
    """
    probabilities = logits.float().softmax(-1)
    slots = torch.zeros_like(probabilities).scatter_(1, logits.topk(k, -1).indices, 1.0 / k)
    return logits.shape[-1] * (slots.mean(0) * probabilities.mean(0)).sum()


@contextmanager
def router_logits(model: Qwen3MoeForCausalLM) -> Iterator[list[Tensor]]:
    """Collect the [tokens, experts] logits of every router, layer by layer, of each forward pass.

    The list is the reader's to clear between passes.
    """
    collected: list[Tensor] = []
    gates = [m for name, m in model.named_modules() if name.endswith("mlp.gate")]
    handles = [g.register_forward_hook(lambda _m, _i, out: collected.append(out[0])) for g in gates]
    try:
        yield collected
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def shares(model: Qwen3MoeForCausalLM, batches: Sequence[Tensor], k: int) -> Tensor:
    """Return the [layers, experts] use of every expert, 1 where it has its even share."""
    counts: Tensor | None = None
    with router_logits(model) as collected:
        for ids in batches:
            collected.clear()
            model(input_ids=ids, use_cache=False)
            stacked = torch.stack(collected)
            slots = torch.zeros_like(stacked).scatter_(2, stacked.topk(k, -1).indices, 1.0)
            counts = slots.sum(1) if counts is None else counts + slots.sum(1)
    assert counts is not None
    return counts / counts.mean(1, keepdim=True)


def train(config: MoEConfig, out: Path) -> Path:
    """Train to `config.tokens` and return the folder with the bf16 model and its tokenizer.

    Raises:
        FloatingPointError: the gradient norm is not finite.
        RuntimeError: an expert ends with less than 0.1 of its even share.
    """
    torch.set_num_threads(config.threads)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = build_moe(config, len(tokenizer), id_of(tokenizer, EOS), id_of(tokenizer, PAD))
    optimizers = moe_optimizers(model, config)
    base = [[config.learning_rate] * 2, [config.muon_learning_rate] * 2]
    tokens_a_step = config.batch * config.sequence
    steps = config.tokens // tokens_a_step
    every = max(1, config.checkpoint_tokens // tokens_a_step)
    state, start = out / "state.pt", 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, values in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        start = saved["step"]
    batches = packed_batches(tokenizer, config, start)
    began, cpu, running, uneven = time.time(), time.process_time(), 0.0, 0.0
    for step in range(start, steps):
        ids = next(batches)
        factor = rate_at(step, steps, config)
        for optimizer, rates in zip(optimizers, base, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor
        with router_logits(model) as collected:
            logits = model(input_ids=ids, use_cache=False).logits
            balance = torch.stack(
                [balancing_loss(one, config.experts_per_token) for one in collected]
            )
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten()
        )
        (loss + config.balance * balance.sum()).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"gradient norm {norm.item()} at step {step}")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        running = loss.item() if not running else 0.98 * running + 0.02 * loss.item()
        even = balance.mean().item()
        uneven = even if not uneven else 0.98 * uneven + 0.02 * even
        if (step + 1) % 50 == 0:
            line = {
                "step": step + 1,
                "tokens": (step + 1) * tokens_a_step,
                "loss": round(running, 4),
                "balance": round(uneven, 4),
                "seconds": round(time.time() - began, 1),
                "cpu_seconds": round(time.process_time() - cpu, 1),
            }
            print(json.dumps(line), flush=True)
        if (step + 1) % every == 0 or step + 1 == steps:
            reached = False
            if config.stop_at is not None and step + 1 >= steps * 0.6:
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
    held_out = packed_batches(tokenizer, MoEConfig(seed=config.seed + 1_000), 0)
    use = shares(model, list(islice(held_out, 16)), config.experts_per_token)
    table = [[round(value, 3) for value in row] for row in use.tolist()]
    (out / "shares.json").write_text(json.dumps(table))
    print(json.dumps({"least": use.min().item(), "most": use.max().item()}), flush=True)
    if use.min() < LEAST_SHARE:
        layer, expert = divmod(int(use.argmin()), config.experts)
        raise RuntimeError(
            f"expert {expert} of layer {layer} has {use.min().item():.3f} of its even share, less "
            f"than {LEAST_SHARE}: raise --balance"
        )
    export(model, tokenizer, out / "model")
    return out / "model"


def export(model: Qwen3MoeForCausalLM, tokenizer: Qwen2Tokenizer, folder: Path) -> None:
    """Write bf16 weights, configuration and tokenizer; the model in memory stays in float32.

    Transformers writes one tensor an expert (`mlp.experts.0.up_proj.weight`), though the module
    holds all of a layer in one.
    """
    weights = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    weights.pop("lm_head.weight", None)
    copy: Any = Qwen3MoeForCausalLM(model.config)
    copy = copy.to(torch.bfloat16)
    copy.load_state_dict(weights, strict=False)
    copy.tie_weights()
    copy.generation_config.do_sample = False
    copy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(
    out: Annotated[Path, typer.Option(help="Folder for the checkpoints and the model.")],
    tokens: Annotated[int, typer.Option(help="Training tokens.")] = MoEConfig.tokens,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = MoEConfig.threads,
    balance: Annotated[float, typer.Option(help="Weight of the balancing loss of each layer.")] = (
        MoEConfig.balance
    ),
    stop_at: Annotated[
        float, typer.Option(help="Stop at this accuracy on training questions; 1 never stops.")
    ] = MoEConfig.stop_at or 1.0,
    seed: int = MoEConfig.seed,
) -> None:
    """Train the bundled mixture from scratch."""
    config = MoEConfig(
        tokens=tokens,
        threads=threads,
        balance=balance,
        stop_at=stop_at if stop_at < 1 else None,
        seed=seed,
    )
    print(train(config, out))


if __name__ == "__main__":
    typer.run(main)
