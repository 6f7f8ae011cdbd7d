"""BOS, EOS and padding stay out of SAE training and FVU, the think tags never do."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resa_lens.models.activations import ordinary, special_ids
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model, load_model
from resa_lens.saes.quality import measure_fvu
from resa_lens.saes.train import SaeConfig, train_saes
from resa_lens.texts.prompts import TAGS

POINT = Hookpoint(5, "resid_post")


@pytest.fixture(scope="module")
def planted() -> Model:
    """The bundled model with a BOS that has a norm of its own at the blocks' outputs."""
    model = load_model("tiny-reasoner")
    tokenizer: Any = model.tokenizer
    bos = len(tokenizer) - 1
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(bos)
    with torch.no_grad():
        weight = model.model.get_input_embeddings().weight  # pyright: ignore
        weight[bos] = 2000 * torch.randn(
            weight.shape[1], generator=torch.Generator().manual_seed(0)
        )
    return model


def sequences(model: Model, count: int) -> list[torch.Tensor]:
    """Random ordinary tokens behind a BOS."""
    generator = torch.Generator().manual_seed(count)
    bos = int(model.tokenizer.bos_token_id)  # pyright: ignore
    made = torch.randint(8, bos - 1, (count, 4, 48), generator=generator)
    made[:, :, 0] = bos
    return list(made)


def test_the_special_tokens_are_named_and_the_tags_never(planted: Model) -> None:
    tokenizer: Any = planted.tokenizer
    ids = set(special_ids(planted).tolist())
    assert ids == {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
    assert not ids & set(tokenizer.convert_tokens_to_ids(list(TAGS)))
    close = int(tokenizer.convert_tokens_to_ids(TAGS[1]))
    ends = SimpleNamespace(
        bos_token_id=None, eos_token_id=close, pad_token_id=None,
        convert_ids_to_tokens=tokenizer.convert_ids_to_tokens,
    )  # fmt: skip
    other = replace(planted, tokenizer=ends)  # pyright: ignore
    assert special_ids(other).numel() == 0


def test_a_batch_of_nothing_else_counts_whole(planted: Model) -> None:
    special = special_ids(planted)
    bos = int(planted.tokenizer.bos_token_id)  # pyright: ignore
    assert ordinary(torch.tensor([[bos, 9, 10]]), special).tolist() == [False, True, True]
    assert ordinary(torch.tensor([[bos, bos]]), special).all()


def test_an_outlier_bos_neither_moves_the_training_nor_hides_in_the_fvu(planted: Model) -> None:
    data, held = sequences(planted, 24), sequences(planted, 2)
    config = SaeConfig(site=POINT.site, latents=256, k=16).for_width(planted.d_model)
    assert not config.include_special
    without, including = (
        train_saes(planted, [POINT.layer], data, held, replace(config, include_special=flag))
        for flag in (False, True)
    )
    tokens = sum(ids.numel() for ids in data)
    assert (without.tokens, including.tokens) == (tokens - 4 * len(data), tokens)
    (left_out,), (taken_in,) = without.quality, including.quality
    # On ordinary tokens the SAE that never saw BOS explains them; the other one does not.
    ours = measure_fvu(planted, without.coders, held)[POINT][0]
    theirs = measure_fvu(planted, including.coders, held)[POINT][0]
    assert left_out.fvu == pytest.approx(ours)
    # 0.65 to 0.69 of it with three such vectors.
    assert ours < 0.8 * theirs
    # Both ways are stated, and one is about BOS alone.
    assert left_out.fvu_special is not None
    assert left_out.fvu_special == pytest.approx(
        measure_fvu(planted, without.coders, held, include_special=True)[POINT][0]
    )
    assert left_out.fvu_special > 2 * left_out.fvu
    assert taken_in.fvu == taken_in.fvu_special
