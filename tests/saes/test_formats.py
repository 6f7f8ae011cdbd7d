"""Three projects' formats: layouts by hand, round trips, the real sparsify, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder

from resa_lens.errors import BadInputError, RunFailedError
from resa_lens.hookpoints import Hookpoint
from resa_lens.saes import convert as convert_module
from resa_lens.saes.coder import Coder, new_coder, reconstruct
from resa_lens.saes.convert import convert
from resa_lens.saes.formats import FORMATS, detect, find_coders, load_coder, save_coder
from resa_lens.saes.hub import find_sae_folder

POINT = Hookpoint(3, "resid_post")


def made(activation: str = "topk", d_in: int = 8, latents: int = 24, k: int = 4) -> Coder:
    coder = new_coder(d_in, latents, k, seed=3, activation=activation)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        coder.encoder.bias.copy_(torch.randn(latents, generator=generator) * 0.1)
        coder.b_dec.copy_(torch.randn(d_in, generator=generator))
    if activation == "batchtopk":
        coder.threshold = 0.75
    return coder.requires_grad_(False)


def rows(width: int = 8) -> torch.Tensor:
    return 2 * torch.randn(50, width, generator=torch.Generator().manual_seed(0))


def refused(match: str, job: Callable[[], object]) -> None:
    with pytest.raises(BadInputError, match=match) as caught:
        job()
    assert len(str(caught.value).splitlines()) <= 3


PAIRS = [(form, act) for form in FORMATS for act in ("topk", "batchtopk")]
PAIRS.remove(("sparsify", "batchtopk"))


@pytest.mark.parametrize(("form", "activation"), PAIRS)
def test_a_round_trip_changes_nothing(tmp_path: Path, form: str, activation: str) -> None:
    coder = made(activation)
    save_coder(coder, tmp_path / "sae", form, POINT)
    assert detect(tmp_path / "sae") == form
    again = load_coder(tmp_path / "sae", allow_pickle=True)
    for name, value in coder.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert (again.cfg.k, again.cfg.activation) == (4, activation)
    assert again.threshold == coder.threshold
    assert torch.equal(reconstruct(coder, rows()), reconstruct(again, rows()))
    if form != "sparsify":
        assert find_coders(tmp_path / "sae") == {tmp_path / "sae": POINT}


def test_the_real_sparsify_reads_what_we_write_and_the_other_way(tmp_path: Path) -> None:
    coder = made()
    save_coder(coder, tmp_path / "ours", "sparsify")
    theirs = SparseCoder.load_from_disk(tmp_path / "ours")
    torch.testing.assert_close(theirs(rows()).sae_out, reconstruct(coder, rows()))
    theirs.save_to_disk(tmp_path / "theirs")
    assert torch.equal(
        reconstruct(load_coder(tmp_path / "theirs"), rows()), reconstruct(coder, rows())
    )


def test_layouts_are_those_of_the_projects(tmp_path: Path) -> None:
    """Names, shapes and orientation, written down by hand (docs of SAELens 6.54, d_l 0.1.0)."""
    coder, batch = made(), made("batchtopk")
    save_coder(coder, tmp_path / "s", "saelens", POINT)
    held = load_file(tmp_path / "s" / "sae_weights.safetensors")
    assert {n: tuple(v.shape) for n, v in held.items()} == {
        "W_enc": (8, 24), "b_enc": (24,), "W_dec": (24, 8), "b_dec": (8,),
    }  # fmt: skip
    assert torch.equal(held["W_enc"], coder.encoder.weight.T)
    config = json.loads((tmp_path / "s" / "cfg.json").read_text())
    assert config["architecture"] == "topk"
    assert (config["d_in"], config["d_sae"], config["k"]) == (8, 24, 4)
    assert config["apply_b_dec_to_input"] is True
    assert config["metadata"]["hook_name"] == "blocks.3.hook_resid_post"
    save_coder(batch, tmp_path / "b", "saelens")
    config = json.loads((tmp_path / "b" / "cfg.json").read_text())
    assert config["architecture"] == "jumprelu"
    level = load_file(tmp_path / "b" / "sae_weights.safetensors")["threshold"]
    assert torch.equal(level, torch.full((24,), 0.75))
    save_coder(batch, tmp_path / "d", "dictionary_learning", POINT)
    state = torch.load(tmp_path / "d" / "ae.pt", weights_only=True)
    assert {n: tuple(v.shape) for n, v in state.items()} == {
        "encoder.weight": (24, 8), "encoder.bias": (24,), "decoder.weight": (8, 24),
        "b_dec": (8,), "k": (), "threshold": (),
    }  # fmt: skip
    trainer = json.loads((tmp_path / "d" / "config.json").read_text())["trainer"]
    assert (trainer["dict_class"], trainer["k"], trainer["layer"]) == ("BatchTopKSAE", 4, 3)


def test_batchtopk_at_inference_is_a_threshold() -> None:
    coder, x = made("batchtopk"), rows()
    pre = torch.relu((x - coder.b_dec) @ coder.encoder.weight.T + coder.encoder.bias)
    assert coder.W_dec is not None
    expected = torch.where(pre > 0.75, pre, 0) @ coder.W_dec + coder.b_dec
    torch.testing.assert_close(reconstruct(coder, x), expected)


def saelens(folder: Path, coder: Coder, **changes: Any) -> Path:
    save_coder(coder, folder, "saelens")
    file = folder / "cfg.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def test_saelens_options_are_folded_exactly(tmp_path: Path) -> None:
    coder, x = made(), rows()
    folder = saelens(tmp_path / "a", coder, apply_b_dec_to_input=False)
    plain = torch.relu(x @ coder.encoder.weight.T + coder.encoder.bias)
    top = plain.topk(4, dim=1)
    assert coder.W_dec is not None
    z = torch.zeros_like(plain).scatter_(1, top.indices, top.values)
    torch.testing.assert_close(
        reconstruct(load_coder(folder), x), z @ coder.W_dec + coder.b_dec, atol=1e-5, rtol=0
    )
    long = made()
    with torch.no_grad():
        assert long.W_dec is not None
        long.W_dec.mul_(torch.linspace(0.2, 3, 24)[:, None])
    folder = saelens(tmp_path / "b", long, rescale_acts_by_decoder_norm=True)
    norm = long.W_dec.norm(dim=1)
    pre = torch.relu(((x - long.b_dec) @ long.encoder.weight.T + long.encoder.bias) * norm)
    top = pre.topk(4, dim=1)
    z = torch.zeros_like(pre).scatter_(1, top.indices, top.values) / norm
    torch.testing.assert_close(
        reconstruct(load_coder(folder), x), z @ long.W_dec + long.b_dec, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"normalize_activations": "layer_norm"}, "layer_norm"),
        ({"reshape_activations": "hook_z"}, "hook_z"),
        ({"architecture": "gated"}, "gated"),
        ({"d_sae": 0}, "d_sae"),
        ({"k": 0}, "k 0"),
        ({"d_in": 9}, r"W_enc is \(8, 24\)"),
    ],
)
def test_saelens_that_cannot_be_read(tmp_path: Path, changes: dict, match: str) -> None:
    folder = saelens(tmp_path / "a", made(), **changes)
    refused(match, lambda: load_coder(folder))


def test_jumprelu_with_many_thresholds_or_without_k(tmp_path: Path) -> None:
    folder = saelens(tmp_path / "a", made("batchtopk"), metadata={})
    refused("--k", lambda: load_coder(folder))
    assert load_coder(folder, k=4).cfg.k == 4
    file = folder / "sae_weights.safetensors"
    held = load_file(file)
    held["threshold"][3] = 2.0
    save_file(held, file)
    refused("threshold for each latent", lambda: load_coder(folder, k=4))


def test_a_pickle_is_refused_and_then_read_as_weights_only(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    save_coder(made(), folder, "dictionary_learning")
    refused("(?s)pickle.*--allow-pickle", lambda: load_coder(folder))
    load_coder(folder, allow_pickle=True)

    class Evil:
        def __reduce__(self) -> tuple:
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"k": Evil()}, folder / "ae.pt")
    refused("weights only", lambda: load_coder(folder, allow_pickle=True))
    assert not (tmp_path / "ran").exists()


def change(folder: Path, **values: torch.Tensor | None) -> None:
    file = folder / "sae.safetensors"
    held = {**load_file(file), **values}
    save_file({k: v.clone() for k, v in held.items() if v is not None}, file)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"W_dec": None}, "lacks the tensor W_dec"),
        ({"surprise": torch.zeros(3)}, "without a place: surprise"),
        ({"b_dec": torch.full((8,), float("nan"))}, "b_dec holds values that are not finite"),
        ({"b_dec": torch.zeros(8, dtype=torch.bfloat16)}, "(?s)b_dec is bfloat16.*--cast"),
        ({"b_dec": torch.zeros(8, dtype=torch.int64)}, "b_dec is int64"),
        ({"b_dec": torch.zeros(9)}, r"b_dec is \(9,\)"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path: Path, values: dict, match: str) -> None:
    folder = tmp_path / "layers.1.mlp"
    save_coder(made(), folder, "sparsify")
    change(folder, **values)
    refused(match, lambda: load_coder(folder))


@pytest.mark.parametrize("changes", [{"num_latents": 0, "expansion_factor": 0}])
def test_no_latents(tmp_path: Path, changes: dict) -> None:
    save_coder(made(), tmp_path, "sparsify")
    file = tmp_path / "cfg.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    refused("no latents", lambda: load_coder(tmp_path))


def test_cast_turns_half_precision_into_float32(tmp_path: Path) -> None:
    folder = tmp_path / "layers.1.mlp"
    coder = made()
    save_coder(coder, folder, "sparsify")
    change(folder, **{k: v.bfloat16() for k, v in load_file(folder / "sae.safetensors").items()})
    again = load_coder(folder, cast=True)
    assert again.dtype == torch.float32
    assert torch.equal(again.b_dec, coder.b_dec.bfloat16().float())


def test_the_encoder_alone_reads_no_decoder(tmp_path: Path) -> None:
    """A decoder that holds NaN would be refused if it were read."""
    save_coder(made(), tmp_path, "sparsify")
    change(tmp_path, W_dec=torch.full((24, 8), float("nan")))
    assert load_coder(tmp_path, decoder=False).W_dec is None
    refused("W_dec", lambda: load_coder(tmp_path))


def test_sparsify_has_no_batchtopk(tmp_path: Path) -> None:
    refused("batchtopk", lambda: save_coder(made("batchtopk"), tmp_path, "sparsify"))
    # The workspace keeps it all the same, in a file that sparsify itself refuses.
    made("batchtopk").save_to_disk(tmp_path / "own")
    assert load_coder(tmp_path / "own").threshold == 0.75
    refused("unknown", lambda: save_coder(made(), tmp_path, "pickle"))


# convert


def folders(place: Path, activation: str = "topk", form: str = "sparsify") -> Path:
    for layer in (2, 10):
        point = Hookpoint(layer)
        save_coder(made(activation), place / point.sparsify, form, point)
    return place


@pytest.mark.parametrize("path", [("saelens", "dictionary_learning", "sparsify")])
def test_converting_around_returns_the_same_bits(tmp_path: Path, path: tuple[str, ...]) -> None:
    source = folders(tmp_path / "0")
    for number, form in enumerate(path):
        target = tmp_path / str(number + 1)
        result = convert(source, target, form, allow_pickle=True)
        assert result.max_difference == 0.0
        assert result.hookpoints == ("layers.10.mlp", "layers.2.mlp")
        source = target
    first, last = (tmp_path / p / "layers.2.mlp" / "sae.safetensors" for p in ("0", "3"))
    held, other = load_file(first), load_file(last)
    assert all(torch.equal(held[name], other[name]) for name in held)


def test_one_layer_and_one_folder(tmp_path: Path) -> None:
    source = folders(tmp_path / "0")
    convert(source, tmp_path / "one", "saelens", layers=[10])
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["layers.10.mlp"]
    convert(source / "layers.2.mlp", tmp_path / "flat", "saelens")
    assert (tmp_path / "flat" / "cfg.json").exists()
    refused("layer 7", lambda: convert(source, tmp_path / "x", "saelens", layers=[7]))


def test_failures_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folders(tmp_path / "0", "batchtopk", "saelens")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    refused("batchtopk", lambda: convert(source, tmp_path / "t", "sparsify"))
    refused("exists", lambda: convert(source, tmp_path / "kept", "saelens"))
    refused("holds the source", lambda: convert(source, tmp_path, "saelens", force=True))
    monkeypatch.setattr(convert_module, "difference", lambda a, b: 0.1)
    with pytest.raises(RunFailedError, match=r"0\.1"):
        convert(source, tmp_path / "t", "saelens")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command(cli, tmp_path: Path) -> None:
    source = folders(tmp_path / "0")
    done = cli("convert", str(source), str(tmp_path / "out"), "--to", "saelens", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["target"] == str(tmp_path / "out")
    assert result["source"] == str(source)
    assert result["max_difference"] <= 1e-5
    wrong = cli("convert", str(source), str(tmp_path / "out"), "--to", "saelens")
    assert wrong.returncode == 2
    assert "--force" in wrong.stderr
    lost = cli("convert", "nobody/nothing", str(tmp_path / "o"), "--to", "saelens")
    assert lost.returncode == 2
    assert "hf download nobody/nothing" in lost.stderr


# Folders and the hub


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folders(tmp_path / "elsewhere")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "layers.1.mlp").symlink_to(tmp_path / "elsewhere" / "layers.2.mlp")
    refused("leads out", lambda: find_coders(tmp_path / "here"))
    refused("not found", lambda: find_sae_folder("../x"))
    refused("not found", lambda: find_sae_folder("a/.."))


def test_files_of_no_format(tmp_path: Path) -> None:
    refused("no SAE", lambda: find_coders(tmp_path))
    refused("known format", lambda: detect(tmp_path))
    (tmp_path / "ae.pt").touch()
    refused(r"lacks config\.json", lambda: detect(tmp_path))


def test_hub_layout_reads_only_what_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub cache made small: EleutherAI's layout, two of 28 layers at hand, one asked for."""
    repo = "EleutherAI/sae-DeepSeek-R1-Distill-Qwen-1.5B-65k"
    cache = tmp_path / f"models--{repo.replace('/', '--')}"
    snapshot = cache / "snapshots" / "abc"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    for layer in (11, 12):
        save_coder(made(), snapshot / f"layers.{layer}.mlp", "sparsify")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    found = find_sae_folder(repo, [Hookpoint(12)])
    assert found == snapshot
    # The other layer's weights are never opened.
    (snapshot / "layers.11.mlp" / "sae.safetensors").write_bytes(b"not a tensor")
    places = {p: f for f, p in find_coders(found).items()}
    assert load_coder(places[Hookpoint(12)], decoder=False).W_dec is None
    refused(
        "(?s)hf download.*--include 'layers.20.mlp", lambda: find_sae_folder(repo, [Hookpoint(20)])
    )
