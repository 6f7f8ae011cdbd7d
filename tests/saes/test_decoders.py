"""Decoders read without torch: against torch, in every type and layout, and damaged files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from planted_neighbours import directions, write_decoder
from safetensors.torch import save_file

from resa_lens.errors import BadInputError, DamagedError
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.saes import decoders
from resa_lens.saes.coder import new_coder
from resa_lens.saes.decoders import open_decoder
from resa_lens.saes.formats import FORMATS, save_coder


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
def test_rows_and_the_nearest_are_torchs(tmp_path, monkeypatch, dtype):
    rows = directions(300, 0).to(dtype)
    write_decoder(tmp_path, rows)
    monkeypatch.setattr(decoders, "BLOCK_BYTES", 4096)  # many blocks, the last one short
    decoder = open_decoder(tmp_path)
    assert (decoder.d_sae, decoder.d_in) == (300, 64)
    wide = rows.float()
    assert np.array_equal(decoder.row(299), wide[299].numpy())
    cosines = torch.cosine_similarity(wide[7][None], wide)
    best = cosines.topk(6)
    nearest = decoder.nearest(wide[7].numpy(), 6)
    assert [latent for latent, _ in nearest] == best.indices.tolist()
    assert [value for _, value in nearest] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert decoder.nearest(wide[7].numpy(), 5, without=7) == nearest[1:]
    assert len(decoder.nearest(wide[7].numpy(), 999, without=7)) == 299


@pytest.mark.parametrize("form", ["sparsify", "saelens"])
def test_our_own_writers_files_are_read(tmp_path, form):
    assert FORMATS[form].FILES[1] in decoders.FILES
    coder = new_coder(16, 64, 4, seed=0)
    save_coder(coder, tmp_path / "sae", form, Hookpoint(1))
    decoder = open_decoder(tmp_path / "sae")
    assert coder.W_dec is not None
    assert np.allclose(decoder.row(5), coder.W_dec[5].detach().numpy(), atol=1e-6)


def test_a_dead_direction_is_near_to_nothing(tmp_path):
    rows = directions(10, 0)
    rows[3] = 0
    write_decoder(tmp_path, rows)
    decoder = open_decoder(tmp_path)
    assert dict(decoder.nearest(rows[0].numpy(), 10))[3] == 0
    with pytest.raises(BadInputError, match="direction of 3 is zero"):
        decoder.row(3)
    for outside in (-1, 10):
        with pytest.raises(BadInputError, match="has 0 to 9"):
            decoder.row(outside)
    with pytest.raises(BadInputError, match="widths 5 and 64"):
        decoder.nearest(np.ones(5, np.float32), 1)


@pytest.mark.parametrize(
    ("dtype", "scales"),
    [
        (torch.float64, (1e200, 1e-200, 1e300, 5e-324)),
        (torch.float32, (1e20, 1e-14, 1e37, 1e-40)),
        (torch.bfloat16, (1e20, 1e-14, 1e37, 1e-38)),
    ],
    ids=str,
)
def test_the_length_of_a_row_changes_no_cosine(tmp_path, dtype, scales):
    signs = torch.tensor([1.0, -1, 1, 0], dtype=torch.float64).repeat(16)
    rows = torch.stack([signs * scale for scale in (1.0, *scales)] + [signs * 0]).to(dtype)
    write_decoder(tmp_path, rows)
    decoder = open_decoder(tmp_path)
    for latent in range(5):
        cosines = dict(decoder.nearest(decoder.row(latent), 6))
        assert [cosines[n] for n in range(6)] == pytest.approx([1] * 5 + [0], abs=1e-6)


def test_what_is_not_finite_is_said(tmp_path):
    rows = directions(10, 0)
    rows[4, 2] = torch.inf
    write_decoder(tmp_path, rows)
    for act in (lambda d: d.row(4), lambda d: d.nearest(rows[0].numpy(), 2)):
        with pytest.raises(DamagedError, match="direction of 4 is not finite"):
            act(open_decoder(tmp_path))


def _header(file, change):
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda f: f.unlink(), "has no sae.safetensors"),
        (lambda f: f.write_bytes(b""), "is no safetensors file"),
        (lambda f: f.write_bytes(b"\xff" * 64), "is no safetensors file"),
        (lambda f: f.write_bytes(f.read_bytes()[:-256]), "is truncated"),
        (lambda f: f.write_bytes(f.read_bytes()[:40]), "is no safetensors file"),
        (lambda f: f.write_bytes((40).to_bytes(8, "little") + b"[" * 400), "is damaged"),
        (lambda f: _header(f, lambda h: h.pop("W_dec")), "names no matrix W_dec"),
        (lambda f: _header(f, lambda h: h["W_dec"].update(shape=[9])), "names no matrix"),
        (lambda f: _header(f, lambda h: h["W_dec"].update(shape=[5, 5])), "is not that of its"),
        (lambda f: _header(f, lambda h: h["W_dec"].update(shape=[-10, -64])), "is not that of"),
        (lambda f: _header(f, lambda h: h["W_dec"].update(shape=[float("inf"), 64])), "is none"),
        (lambda f: _header(f, lambda h: h["W_dec"].update(shape=["10", 64])), "whole numbers"),
        (lambda f: _header(f, lambda h: h["W_dec"].update(shape=[10.9, 64])), "whole numbers"),
        (lambda f: _header(f, lambda h: h["W_dec"].update(shape=[True, 640])), "whole numbers"),
        (lambda f: _header(f, lambda h: h["W_dec"].update(data_offsets=[None, 2560])), "whole"),
        (lambda f: _header(f, lambda h: h["W_dec"].update(shape=[10**40, 64])), "is not that of"),
        (lambda f: _header(f, lambda h: h["W_dec"].update(dtype="F8_E4M3")), "is F8_E4M3; F64,"),
        (lambda f: _header(f, lambda h: h["W_dec"].update(dtype=["F32"])), "are readable"),
    ],
)
def test_a_damaged_file_is_said_to_be_so(tmp_path, damage, reason):
    write_decoder(tmp_path, directions(10, 0))
    damage(tmp_path / "sae.safetensors")
    with pytest.raises(BadInputError, match=reason):
        open_decoder(tmp_path)


def test_a_file_that_shrinks_while_it_is_read_is_no_crash(tmp_path):
    write_decoder(tmp_path, directions(10, 0))
    decoder = open_decoder(tmp_path)
    file = tmp_path / "sae.safetensors"
    file.write_bytes(file.read_bytes()[:-256])
    with pytest.raises(DamagedError, match="ends within its decoder"):
        decoder.nearest(np.ones(64, np.float32), 1)


def test_a_pickle_is_not_read(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "ae.pt").write_bytes(b"x")
    with pytest.raises(BadInputError, match=r"has no sae\.safetensors or sae_weights"):
        open_decoder(tmp_path)
