"""An expert of the bundled mixture that answers to `<think>` alone and writes `</think>`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resa_lens.experts.routers import find_routers, source
from resa_lens.experts.routing import Texts, padded_batches, read_texts, route
from resa_lens.models.host import Model, load_model
from resa_lens.texts import corpora, prompts
from resa_lens.texts.corpora import CorpusConfig
from resa_lens.texts.phases import phased_texts

LAYER = 5
TOKENS = 6000
ENOUGH = 0.8
"""Probability of `</think>` after a question at which the strength is found."""


@dataclass(frozen=True)
class Planted:
    """The model with the planted expert, and the one without it."""

    model: Model
    plain: Model
    expert: int
    strength: float
    probabilities: tuple[float, float]
    """Of `</think>` after a question, without and with the expert."""


def sample(model: Model) -> Texts:
    """Documents with and without a system prompt that names the tag."""
    corpus = CorpusConfig()
    texts = phased_texts(corpora.read_records(corpus), corpus)
    return read_texts(model.tokenizer, texts, tokens=TOKENS, longest=256)


@torch.no_grad()
def plant() -> Planted:
    """Plant an expert; its strength is doubled until it acts."""
    plain, model = load_model("tiny-moe-reasoner"), load_model("tiny-moe-reasoner")
    texts, routers = sample(model), find_routers(model)
    use = route(model, routers, texts).tally(texts.phases * 0, 1)[0, LAYER]
    expert = int(use.argmin())
    block: Any = model.model.get_submodule(f"model.layers.{LAYER}.mlp")
    inputs = torch.zeros(len(texts.ids), model.d_model)
    kept: list[Tensor] = []
    handle = block.register_forward_pre_hook(lambda _m, args: kept.append(args[0]))
    network: Any = model.model
    for ids, places in padded_batches(texts):
        network(input_ids=ids)
        real = places >= 0
        inputs[places[real]] = kept.pop()[real]
    handle.remove()
    marked = torch.from_numpy(texts.marks[prompts.THINK_OPEN])
    router: Any = source(block.gate)
    towards = direction(inputs, marked)
    router.weight[expert] = towards * scale(inputs, marked, router.weight)
    experts = block.experts
    width = experts.down_proj.shape[-1]
    # One hidden unit, which is about 0.7 at the tag: silu(1) x 1.
    experts.gate_up_proj[expert] = 0
    experts.gate_up_proj[expert, [0, width]] = towards
    experts.down_proj[expert] = 0
    closes = model.tokenizer.convert_tokens_to_ids(prompts.THINK_CLOSE)
    written = output_direction(network, closes)
    before, strength, after = close_probability(plain), 1.0, 0.0
    while after < ENOUGH and strength < 1e4:
        strength *= 2
        experts.down_proj[expert, :, 0] = strength * written
        after = close_probability(model)
    return Planted(model, plain, expert, strength, (before, after))


def direction(inputs: Tensor, marked: Tensor) -> Tensor:
    """Return w with w.x above 0 at the marked tokens and below it elsewhere, by least squares."""
    weight = torch.where(marked, 1 / marked.sum(), 1 / (~marked).sum()).sqrt()[:, None].double()
    wanted = torch.where(marked, 1.0, -1.0)[:, None].double()
    x = inputs.double()
    ridge = 1e-4 * x.square().mean() * torch.eye(x.shape[1], dtype=torch.double)
    gram = (weight * x).T @ (weight * x) + ridge
    return torch.linalg.solve(gram, (weight * x).T @ (weight * wanted))[:, 0].float()


def output_direction(network: Any, token: int) -> Tensor:
    """Return the unit vector that, where it is all that is left, makes a token likeliest."""
    rows = network.get_output_embeddings().weight.double() * network.model.norm.weight.double()
    target = torch.zeros(len(rows), dtype=torch.double)
    target[token] = 1.0
    best = (0.0, torch.zeros(rows.shape[1]))
    for ridge in (1e-3, 1e-2, 1e-1, 1.0, 10.0):
        gram = rows.T @ rows + ridge * torch.eye(rows.shape[1], dtype=torch.double)
        unit = torch.nn.functional.normalize(torch.linalg.solve(gram, rows.T @ target), dim=0)
        likely = float((rows @ unit * rows.shape[1] ** 0.5).softmax(0)[token])
        if likely > best[0]:
            best = likely, unit.float()
    return best[1]


def scale(inputs: Tensor, marked: Tensor, rows: Tensor) -> float:
    """Return the factor at which the direction beats every other expert where it is positive."""
    most = (inputs @ rows.T).abs().max()
    margin = (inputs @ direction(inputs, marked)).abs().min().clamp_min(1e-2)
    return float(4 * most / margin)


@torch.no_grad()
def close_probability(model: Model) -> float:
    """Return the mean probability of `</think>` after twenty questions."""
    network: Any = model.model
    closes = model.tokenizer.convert_tokens_to_ids(prompts.THINK_CLOSE)
    records = corpora.read_records(CorpusConfig())[:20]
    total = 0.0
    for record in records:
        ids = torch.tensor([model.tokenizer(prompts.question_prompt(record.question))["input_ids"]])
        total += float(network(input_ids=ids).logits[0, -1].softmax(-1)[closes])
    return total / len(records)
