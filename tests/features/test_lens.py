"""Logit lens against the model's own parts; neighbours against all cosines."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from resa_lens.errors import BadInputError
from resa_lens.features import lens
from resa_lens.features.lens import logit_lens, nearest_directions
from resa_lens.models.host import Model


def test_the_lens_goes_through_the_final_norm(tiny):
    directions = torch.randn(5, tiny.d_model, generator=torch.Generator().manual_seed(0))
    found = logit_lens(tiny, directions, top=4)
    model = tiny.model
    with torch.no_grad():
        logits = model.lm_head(model.model.norm(directions))
    assert torch.equal(found.top, logits.topk(4).indices)
    assert torch.equal(found.bottom, logits.topk(4, largest=False).indices)
    torch.testing.assert_close(found.top_logits, logits.topk(4).values)
    # The norm takes the length away.
    assert torch.equal(logit_lens(tiny, 1000 * directions, top=4).top, found.top)


def test_the_lens_in_pieces_is_the_same(tiny, monkeypatch):
    directions = torch.randn(7, tiny.d_model, generator=torch.Generator().manual_seed(1))
    whole = logit_lens(tiny, directions)
    monkeypatch.setattr(lens, "BLOCK_BYTES", 1)
    for a, b in zip(whole, logit_lens(tiny, directions), strict=True):
        torch.testing.assert_close(a, b)


def test_a_norm_with_a_bias_adds_nothing_of_its_own():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=30, n_positions=8)
    plain = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        plain.transformer.ln_f.bias.normal_()
    host = Model("toy", plain, None, None, "0" * 8, "cpu", "float32", "test")
    direction = torch.randn(1, 16)
    with torch.no_grad():
        head, norm = plain.lm_head, plain.transformer.ln_f
        wanted = head(norm(direction)) - head(norm.bias[None])
    found = logit_lens(host, direction, top=3)
    assert torch.equal(found.top, wanted.topk(3).indices)
    torch.testing.assert_close(found.top_logits, wanted.topk(3).values, atol=1e-5, rtol=1e-5)


def test_no_direction_gives_no_row(tiny):
    nothing = logit_lens(tiny, torch.zeros(0, tiny.d_model), top=3)
    assert nothing.top.shape == (0, 3)
    assert nothing.histogram.shape == (0, lens.BINS)


@pytest.mark.parametrize("binned", [1, 2**21])
def test_the_histogram_counts_every_token_by_its_logit(tiny, monkeypatch, binned):
    monkeypatch.setattr(lens, "_BINNED", binned)
    directions = torch.randn(6, tiny.d_model, generator=torch.Generator().manual_seed(2))
    found = logit_lens(tiny, directions, top=1)
    with torch.no_grad():
        logits = tiny.model.lm_head(tiny.model.model.norm(directions)).numpy()
    for row, counts, low, high in zip(
        logits, found.histogram, found.bottom_logits, found.top_logits, strict=True
    ):
        expected, edges = np.histogram(row.astype(np.float64), bins=lens.BINS)
        assert (edges[0], edges[-1]) == pytest.approx((float(low), float(high)), abs=1e-5)
        assert int(counts.sum()) == row.size
        assert counts[0] > 0
        assert counts[-1] > 0
        # A logit at an edge may fall on either side by its last bit.
        assert np.abs(counts.numpy() - expected).sum() <= 4


def test_logits_that_are_all_equal_fill_one_bin(tiny):
    (counts,) = logit_lens(tiny, torch.zeros(1, tiny.d_model), top=1).histogram
    assert sorted(counts.tolist())[-2:] == [0, int(counts.sum())]


@pytest.mark.parametrize(("width", "top"), [(64, 3), (None, 0), (None, 10**6)])
def test_lens_of_the_wrong_size(tiny, width, top):
    with pytest.raises(BadInputError, match=r"width 64|top"):
        logit_lens(tiny, torch.zeros(2, width or tiny.d_model), top=top)


@pytest.mark.parametrize("block", [1, 2**26])
def test_neighbours_are_the_largest_cosines(monkeypatch, block):
    monkeypatch.setattr(lens, "BLOCK_BYTES", block)
    directions = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    directions[4] = 3 * directions[9]
    index, cosines = nearest_directions(directions, [9, 0], count=3)
    unit = torch.nn.functional.normalize(directions, dim=1)
    every = unit @ unit.mT
    every.fill_diagonal_(-2)
    assert index.tolist() == every[[9, 0]].topk(3).indices.tolist()
    torch.testing.assert_close(cosines, every[[9, 0]].topk(3).values)
    assert index[0, 0] == 4


def test_fewer_neighbours_where_there_are_fewer():
    index, _ = nearest_directions(torch.eye(3), [0], count=9)
    assert index.shape == (1, 2)


@pytest.mark.parametrize("feature", [3, -1])
def test_neighbours_of_a_feature_beyond_the_sae(feature):
    with pytest.raises(BadInputError, match="0 to 2"):
        nearest_directions(torch.eye(3), [feature])
