"""The coder: sparsify's own numbers, hand-set weights with known answers, and refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from resa_lens.errors import BadInputError
from resa_lens.saes.coder import SparseCoder, encode, new_coder, reconstruct
from resa_lens.saes.formats import load_coder


@pytest.fixture
def coder() -> SparseCoder:
    """A coder with every weight at random, biases included."""
    made = new_coder(8, 24, 4, seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        made.encoder.bias.copy_(torch.randn(24, generator=generator) * 0.1)
        made.b_dec.copy_(torch.randn(8, generator=generator))
    return made.requires_grad_(False)


@pytest.fixture
def saved(coder: SparseCoder, tmp_path: Path) -> Path:
    coder.save_to_disk(tmp_path / "layers.1.mlp")
    return tmp_path / "layers.1.mlp"


def rows(count: int = 50, width: int = 8) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(0))


def test_reconstruction_equals_sparsifys_forward(coder: SparseCoder) -> None:
    """Up to the order in which the latents are summed."""
    x = rows()
    theirs = coder(x).sae_out
    torch.testing.assert_close(reconstruct(coder, x), theirs, atol=1e-6, rtol=0)
    shaped = reconstruct(coder, x.view(5, 10, 8)).view(50, 8)
    torch.testing.assert_close(shaped, theirs, atol=1e-6, rtol=0)


def test_encode_lists_sparsifys_active_latents(coder: SparseCoder) -> None:
    x = rows()
    acts, out = encode(coder, x), coder(x)
    dense = torch.zeros(50, 24)
    dense[acts.rows, acts.latents] = acts.values
    theirs = torch.zeros(50, 24).scatter_(1, out.latent_indices, out.latent_acts)
    assert torch.equal(dense, theirs)
    assert (acts.n_rows, acts.d_sae) == (50, 24)


def test_encode_equals_the_formula(coder: SparseCoder) -> None:
    """TopK(ReLU(W (x - b_dec) + b)), written out densely."""
    x = rows()
    pre = torch.relu((x - coder.b_dec) @ coder.encoder.weight.T + coder.encoder.bias)
    top = pre.topk(4, dim=1)
    expected = torch.zeros(50, 24).scatter_(1, top.indices, top.values)
    acts = encode(coder, x)
    dense = torch.zeros(50, 24)
    dense[acts.rows, acts.latents] = acts.values
    torch.testing.assert_close(dense, expected)


def hand_set() -> SparseCoder:
    """Latents are +x0, -x0, +x1, -x1; k 2."""
    made = new_coder(2, 4, 2, seed=0)
    directions = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    with torch.no_grad():
        made.encoder.weight.copy_(directions)
        assert made.W_dec is not None
        made.W_dec.copy_(directions)
        made.b_dec.copy_(torch.tensor([10.0, 0.0]))
    return made.requires_grad_(False)


def test_hand_set_weights_give_known_latents() -> None:
    acts = encode(hand_set(), torch.tensor([[13.0, -2.0], [9.0, 0.0]]))
    found = {
        (r, f): v
        for r, f, v in zip(
            acts.rows.tolist(), acts.latents.tolist(), acts.values.tolist(), strict=True
        )
    }
    assert found == {(0, 0): 3.0, (0, 3): 2.0, (1, 1): 1.0}


def test_zeros_are_never_active() -> None:
    """The top-k always names k latents; where the ReLU gave zero they do not count."""
    acts = encode(hand_set(), torch.tensor([[10.0, 0.0]]))
    assert acts.values.numel() == 0
    assert acts.n_rows == 1
    torch.testing.assert_close(
        reconstruct(hand_set(), torch.tensor([[10.0, 0.0]])), torch.tensor([[10.0, 0.0]])
    )


def test_reconstruction_keeps_dtype_and_lets_gradients_through(coder: SparseCoder) -> None:
    x = rows().to(torch.bfloat16).requires_grad_()
    out = reconstruct(coder, x)
    assert out.dtype == torch.bfloat16
    out.float().pow(2).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_new_coder_is_deterministic_with_a_unit_norm_decoder() -> None:
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    first = new_coder(8, 24, 4, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    second, other = new_coder(8, 24, 4, seed=1), new_coder(8, 24, 4, seed=2)
    assert torch.equal(first.encoder.weight, second.encoder.weight)
    assert not torch.equal(first.encoder.weight, other.encoder.weight)
    assert first.W_dec is not None
    torch.testing.assert_close(first.W_dec.norm(dim=1), torch.ones(24))


@pytest.mark.parametrize(("latents", "k"), [(0, 1), (8, 0), (8, 9)])
def test_new_coder_refuses_impossible_sizes(latents: int, k: int) -> None:
    with pytest.raises(BadInputError, match=str(latents)):
        new_coder(4, latents, k, seed=0)


def test_checkpoint_goes_both_ways(coder: SparseCoder, saved: Path) -> None:
    ours, theirs = load_coder(saved), SparseCoder.load_from_disk(saved)
    assert set(load_file(saved / "sae.safetensors")) == {
        "encoder.weight", "encoder.bias", "W_dec", "b_dec",
    }  # fmt: skip
    for name, value in coder.named_parameters():
        assert torch.equal(value, ours.get_parameter(name))
        assert torch.equal(value, theirs.get_parameter(name))
    assert not any(p.requires_grad for p in ours.parameters())


def test_encoder_alone_gives_the_same_latents(coder: SparseCoder, saved: Path) -> None:
    alone = load_coder(saved, decoder=False)
    assert alone.W_dec is None
    for ours, theirs in zip(encode(alone, rows()), encode(coder, rows()), strict=True):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))


def test_num_latents_zero_means_the_expansion_factor(coder: SparseCoder, saved: Path) -> None:
    change(saved, num_latents=0, expansion_factor=3)
    assert load_coder(saved).num_latents == 24


def change(folder: Path, **values: object) -> None:
    file = folder / "cfg.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def tensors(folder: Path, **values: torch.Tensor | None) -> None:
    held = {**load_file(folder / "sae.safetensors"), **values}
    kept = {k: v.clone() for k, v in held.items() if v is not None}
    save_file(kept, folder / "sae.safetensors")


def refused(folder: Path, match: str, d_in: int | None = None) -> None:
    with pytest.raises(BadInputError, match=match) as caught:
        load_coder(folder, d_in=d_in)
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize("name", ["cfg.json", "sae.safetensors"])
def test_missing_file(saved: Path, name: str) -> None:
    (saved / name).unlink()
    refused(saved, name)


@pytest.mark.parametrize("text", ["{", "", "[]", '"text"', "{}", '{"d_in": "8"}'])
def test_damaged_config(saved: Path, text: str) -> None:
    (saved / "cfg.json").write_text(text)
    refused(saved, r"cfg\.json")


def test_config_that_is_no_text(saved: Path) -> None:
    (saved / "cfg.json").write_bytes(b"\xff\xfe\x00\x81")
    refused(saved, r"cfg\.json")


def test_config_with_wrong_types(saved: Path) -> None:
    change(saved, num_latents="many")
    refused(saved, r"layers\.1\.mlp")


@pytest.mark.parametrize("k", [0, 25])
def test_k_that_the_latents_cannot_give(saved: Path, k: int) -> None:
    change(saved, k=k)
    refused(saved, f"k {k}")


@pytest.mark.parametrize("name", ["encoder.weight", "encoder.bias", "W_dec", "b_dec"])
def test_missing_tensor(saved: Path, name: str) -> None:
    tensors(saved, **{name: None})
    refused(saved, name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(saved: Path, value: float) -> None:
    broken = load_file(saved / "sae.safetensors")["W_dec"].clone()
    broken[3, 2] = value
    tensors(saved, W_dec=broken)
    refused(saved, "W_dec")


def test_wrong_width(saved: Path) -> None:
    refused(saved, "width 8, the model's is 128", d_in=128)


def test_weights_that_contradict_the_config(saved: Path) -> None:
    change(saved, d_in=9)
    refused(saved, r"layers\.1\.mlp.*(encoder|W_dec|b_dec)")


def test_unknown_activation(saved: Path) -> None:
    change(saved, activation="groupmax")
    refused(saved, "groupmax")


@pytest.mark.parametrize("kind", ["transcode", "skip_connection"])
def test_a_transcoder_is_no_autoencoder(saved: Path, kind: str) -> None:
    change(saved, **{kind: True})
    refused(saved, "transcoder")


@pytest.mark.parametrize("keep", [0, 4, 60, -16])
def test_truncated_safetensors(saved: Path, keep: int) -> None:
    file = saved / "sae.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(saved, "corrupt or truncated")
