"""The change of activations between two models, by hand and where nothing or one layer changed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from resa_lens.errors import BadInputError
from resa_lens.models.activation_change import activation_change
from resa_lens.models.activations import stream_activations
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import load_model
from resa_lens.texts import corpora
from resa_lens.texts.corpora import CorpusConfig


@pytest.fixture(scope="module")
def ids() -> list[torch.Tensor]:
    corpus = CorpusConfig(sequence=64)
    records = corpora.read_records(corpus)[:40]
    tokenizer = load_model("tiny-reasoner").tokenizer
    return list(corpora.batches(tokenizer, records, corpus, tokens=512, batch=4))


def test_the_change_is_the_one_computed_by_hand(ids: list[torch.Tensor]) -> None:
    source, target = load_model("tiny-reasoner"), load_model("tiny-reasoner-rl")
    points = [Hookpoint(layer, "mlp_out") for layer in (2, 7)]
    measured = activation_change(source, target, ids, points)
    tokenizer: Any = source.tokenizer
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    for point in points:
        rows, errors = [], []
        read = zip(stream_activations(source, ids, [point]),
                   stream_activations(target, ids, [point]), strict=True)  # fmt: skip
        for plain, changed in read:
            for i, sequence in enumerate(plain.ids):
                kept = [t for t, token in enumerate(sequence.tolist()) if token not in special]
                rows.append(plain.acts[point][i, kept].double())
                errors.append((changed.acts[point][i, kept].double() - rows[-1]).pow(2).sum())
        mean = torch.cat(rows).mean(0)
        variance = torch.stack([(x - mean).pow(2).sum() for x in rows])
        error = torch.stack(errors)
        ratio = error.sum() / variance.sum()
        n = len(rows)
        spread = ((error - ratio * variance).pow(2).sum() * n / (n - 1)).sqrt() / variance.sum()
        assert measured[point.layer] == pytest.approx((float(ratio), float(spread)), rel=1e-6)


def test_equal_models_do_not_change_and_one_changed_layer_changes_none_before_it(
    ids: list[torch.Tensor],
) -> None:
    source, target = load_model("tiny-reasoner"), load_model("tiny-reasoner")
    points = [Hookpoint(layer, "mlp_out") for layer in range(12)]
    same = activation_change(source, target, ids, points)
    assert set(same.values()) == {(0.0, 0.0)}
    layers: Any = target.model.model.layers
    with torch.no_grad():
        layers[6].mlp.down_proj.weight.mul_(-1.0)
    changed = activation_change(source, load_changed(target), ids, points)
    assert all(changed[layer] == (0.0, 0.0) for layer in range(6))
    # x against -x: four times the square, where the mean is small beside it.
    assert max(changed, key=lambda layer: changed[layer][0]) == 6
    assert all(changed[layer][0] > 0 and math.isfinite(changed[layer][1]) for layer in range(6, 12))


def load_changed(model: Any) -> Any:
    """A model again, whose bridge is booted over the weights as they now are."""
    return replace(model)


def test_bad_input(ids: list[torch.Tensor]) -> None:
    source = load_model("tiny-reasoner")
    point = Hookpoint(3, "mlp_out")
    with pytest.raises(BadInputError, match="1 sequence"):
        activation_change(source, source, [ids[0][:1]], [point])
    other = load_model("tiny-reasoner")
    other.model.config.vocab_size = 7
    with pytest.raises(BadInputError, match="vocabulary"):
        activation_change(source, other, ids, [point])
