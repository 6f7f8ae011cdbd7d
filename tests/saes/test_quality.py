"""An SAE at the wrong place is refused, or allowed with a warning."""

from __future__ import annotations

import math

import pytest
import torch

from resa_lens import corpora
from resa_lens.corpora import CorpusConfig, load_records
from resa_lens.errors import BadInputError
from resa_lens.hookpoints import Hookpoint
from resa_lens.models import Model
from resa_lens.saes import quality
from resa_lens.saes.coder import SparseCoder, new_coder
from resa_lens.saes.quality import check_fit, loss_change
from resa_lens.saes.train import SaeConfig, train_saes


def batches(count: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 500, (2, 128), generator=generator) for _ in range(count)]


@pytest.fixture(scope="module")
def trained(tiny: Model) -> SparseCoder:
    """An SAE for the MLP's output of layer 9."""
    config = SaeConfig(latents=512, k=32).for_width(tiny.d_model)
    return train_saes(tiny, [9], batches(25, 0), batches(1, 1), config).coders[Hookpoint(9)]


def test_at_its_own_site(tiny: Model, trained: SparseCoder) -> None:
    point = Hookpoint(9, "mlp_out")
    fvu, warnings = check_fit(tiny, {point: trained}, batches(2, 2))
    assert fvu[point] < 0.8
    assert warnings == []


def test_at_the_other_site_it_is_refused(tiny: Model, trained: SparseCoder) -> None:
    point = Hookpoint(9, "resid_post")
    with pytest.raises(BadInputError, match=r"(?s)10th of 12.*resid_post.*--site") as caught:
        check_fit(tiny, {point: trained}, batches(2, 2))
    assert len(str(caught.value).splitlines()) <= 3


def test_allowed_it_warns_with_the_figure(tiny: Model, trained: SparseCoder) -> None:
    point = Hookpoint(9, "resid_post")
    fvu, warnings = check_fit(tiny, {point: trained}, batches(2, 2), allow_mismatch=True)
    assert fvu[point] > 1
    assert len(warnings) == 1
    assert f"{fvu[point]:.2f}" in warnings[0]


def test_a_layer_beyond_the_model(tiny: Model) -> None:
    with pytest.raises(BadInputError, match="out of range"):
        check_fit(tiny, {Hookpoint(12): new_coder(tiny.d_model, 8, 1, seed=0)}, batches(1, 0))


def test_the_wrong_site_is_refused_below_the_limit(
    tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other site's FVU can stay below the limit; the comparison of the sites finds it."""
    monkeypatch.setattr(quality, "FVU_LIMIT", math.inf)
    records = load_records("tiny")[:400]

    def documents(tokens: int, seed: int) -> list[torch.Tensor]:
        config = CorpusConfig(sequence=128, seed=seed)
        return list(corpora.batches(tiny.tokenizer, records, config, tokens=tokens, batch=2))

    config = SaeConfig(latents=256, k=32).for_width(tiny.d_model)
    coder = train_saes(tiny, [1], documents(8192, 0), [], config).coders[Hookpoint(1)]
    right, wrong = Hookpoint(1, "mlp_out"), Hookpoint(1, "resid_post")
    fvu, _ = check_fit(tiny, {right: coder}, documents(1024, 1))
    with pytest.raises(BadInputError, match=f"{fvu[right]:.2f} at mlp_out"):
        check_fit(tiny, {wrong: coder}, documents(1024, 1))
    measured, _ = check_fit(tiny, {wrong: coder}, documents(1024, 1), allow_mismatch=True)
    assert fvu[right] < measured[wrong]


def test_the_loss_changes_by_what_the_reconstruction_loses(
    tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = load_records("tiny")[:100]
    probe = list(corpora.batches(tiny.tokenizer, records, CorpusConfig(), tokens=1024, batch=2))
    point = Hookpoint(3, "resid_post")
    coders = {point: new_coder(tiny.d_model, 64, 8, seed=0)}
    monkeypatch.setattr(quality, "reconstruct", lambda coder, acts: acts)
    assert loss_change(tiny, coders, probe)[point] == pytest.approx(0, abs=1e-6)
    monkeypatch.setattr(quality, "reconstruct", lambda coder, acts: torch.zeros_like(acts))
    assert loss_change(tiny, coders, probe)[point] > 0.05


def test_what_is_known_to_belong_here_is_not_called_misplaced(tiny: Model) -> None:
    """An SAE that has learnt nothing explains less than the mean, at its own place too."""
    point = Hookpoint(4)
    coder = new_coder(tiny.d_model, 64, 8, seed=0)
    with torch.no_grad():
        coder.b_dec += 100
    with pytest.raises(BadInputError, match="trained on another model"):
        check_fit(tiny, {point: coder}, batches(1, 0))
    fvu, warnings = check_fit(tiny, {point: coder}, batches(1, 0), known=True)
    assert fvu[point] > 1
    assert "--tokens" in warnings[0]
