"""Three projects' formats: layouts by hand, round trips, the real sparsify, and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder

from resa_lens.errors import BadInputError
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.saes.coder import Coder, encode, new_coder, reconstruct
from resa_lens.saes.formats import (
    FORMATS,
    by_hookpoint,
    detect,
    find_coders,
    load_coder,
    save_coder,
)

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
    # Without its version SAELens takes the config for an old one and drops the metadata.
    assert config["metadata"]["sae_lens_version"].split(".")[0] == "6"
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
    assert (trainer["activation_dim"], trainer["dict_size"]) == (8, 24)
    assert trainer["submodule_name"] == "resid_post_layer_3"


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
        ({"architecture": ["topk"]}, r"\['topk'\]"),
        ({"normalize_activations": "expected_average_only_in"}, "expected_average_only_in"),
        ({"hook_head_index": 2}, "hook_head_index 2"),
        ({"metadata": {"hook_head_index": 2}}, "hook_head_index 2"),
        ({"k": 25}, "k 25"),
        ({"k": True}, "k True"),
        ({"k": None, "metadata": {}}, "(?s)does not say its k.*--k"),
        ({"d_sae": 0}, "d_sae"),
        ({"k": 0}, "k 0"),
        ({"d_in": 9}, r"W_enc is \(8, 24\)"),
    ],
)
def test_saelens_that_cannot_be_read(tmp_path: Path, changes: dict, match: str) -> None:
    folder = saelens(tmp_path / "a", made(), **changes)
    refused(match, lambda: load_coder(folder))


def test_jumprelu_with_many_thresholds_or_without_k(tmp_path: Path) -> None:
    trained = {"training_architecture_details": {"k": 5.0}}
    folder = saelens(tmp_path / "a", made("batchtopk"), metadata=trained)
    assert load_coder(folder).cfg.k == 5
    saelens(folder, made("batchtopk"), metadata={"training_architecture_details": {"k": 2.5}})
    refused(r"k 2\.5", lambda: load_coder(folder))
    saelens(folder, made("batchtopk"), metadata={})
    assert not load_coder(folder).states_k
    # Another project's file needs the number.
    refused("--k", lambda: save_coder(load_coder(folder), tmp_path / "b", "dictionary_learning"))
    assert load_coder(folder, k=4).cfg.k == 4
    file = folder / "sae_weights.safetensors"
    held = load_file(file)
    held["threshold"][3] = 2.0
    save_file(held, file)
    many = load_coder(folder, k=4)
    assert torch.equal(torch.as_tensor(many.threshold), held["threshold"])
    refused("one threshold", lambda: save_coder(many, tmp_path / "b", "dictionary_learning"))
    refused("sparsify has no", lambda: save_coder(many, tmp_path / "b", "sparsify"))


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
    for content in (b"", b"no pickle", b"PK\x03\x04 half a zip"):
        (folder / "ae.pt").write_bytes(content)
        refused("weights only", lambda: load_coder(folder, allow_pickle=True))


def change(folder: Path, **values: Any) -> None:
    """Put tensors into a folder's weights, or take them out (None)."""
    file = folder / FORMATS[detect(folder)].FILES[1]
    pickled = file.suffix == ".pt"
    held = {**(torch.load(file) if pickled else load_file(file)), **values}
    kept = {k: v.clone() for k, v in held.items() if v is not None}
    (torch.save if pickled else save_file)(kept, file)


def configure(folder: Path, **values: Any) -> None:
    """Change keys of a folder's config."""
    file = folder / FORMATS[detect(folder)].FILES[0]
    held = json.loads(file.read_text())
    held.get("trainer", held).update(values)
    file.write_text(json.dumps(held))


WEIGHTS = {
    "sparsify": ("encoder.weight", "encoder.bias", "W_dec", "b_dec"),
    "saelens": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "dictionary_learning": ("encoder.weight", "encoder.bias", "decoder.weight", "b_dec"),
}


@pytest.mark.parametrize("name", range(4))
@pytest.mark.parametrize("form", FORMATS)
def test_tensors_that_do_not_fit(tmp_path: Path, form: str, name: int) -> None:
    """Each tensor of each format: missing, of another type or shape, not finite; and one more."""
    folder, tensor = tmp_path / "layers.1.mlp", WEIGHTS[form][name]

    def read() -> Coder:
        return load_coder(folder, allow_pickle=True)

    save_coder(made(), folder, form)
    whole = FORMATS[form].FILES[1]
    original = (folder / whole).read_bytes()
    value = (torch.load if whole.endswith(".pt") else load_file)(folder / whole)[tensor]
    broken = value.clone()
    broken.view(-1)[-1] = float("nan")
    shape = tuple(value.shape)
    cases = [
        (None, f"lacks the tensor {tensor}"),
        (broken, f"{tensor} holds values that are not finite"),
        (torch.full_like(value, float("inf")), f"{tensor} holds values that are not finite"),
        (value.double(), f"(?s){tensor} is float64.*--cast"),
        (value.long(), f"{tensor} is int64"),
        (torch.zeros(*shape, 2), rf"{tensor} is \("),
    ]
    for wrong, match in cases:
        (folder / whole).write_bytes(original)
        change(folder, **{tensor: wrong})
        before = (folder / whole).read_bytes()
        refused(match, read)
        assert (folder / whole).read_bytes() == before
    (folder / whole).write_bytes(original)
    change(folder, surprise=torch.zeros(3))
    refused("without a place: surprise", read)
    (folder / whole).write_bytes(original)
    assert torch.equal(read().b_dec, made().b_dec)


@pytest.mark.parametrize(
    ("tensors", "config", "match"),
    [
        ({"k": torch.tensor([4, 4])}, {}, r"k is int64 \(2,\)"),
        ({"k": torch.tensor(4.0)}, {}, "k is float32"),
        ({"k": torch.tensor(5)}, {}, "says k 4"),
        ({"k": torch.tensor(0)}, {"k": 0}, "k 0"),
        ({"k": None}, {}, "lacks the tensor k"),
        ({"threshold": torch.tensor(float("inf"))}, {}, "threshold holds values"),
        ({"threshold": torch.zeros(24)}, {}, r"threshold is \(24,\)"),
        ({"threshold": None}, {}, "lacks the tensor threshold"),
        ({"b_dec": torch.zeros(8).to_sparse()}, {}, "b_dec is no dense tensor"),
        ({"b_dec": torch.zeros(8, device="meta")}, {}, "b_dec is no dense tensor"),
        ({}, {"activation_dim": 9}, "activation_dim 9"),
        ({}, {"dict_size": 0}, "dict_size 0"),
        ({}, {"dict_class": "GatedAutoEncoder"}, "GatedAutoEncoder"),
        ({}, {"dict_class": ["BatchTopKSAE"]}, r"\['BatchTopKSAE'\]"),
    ],
)
def test_dictionary_learning_that_cannot_be_read(
    tmp_path: Path, tensors: dict, config: dict, match: str
) -> None:
    save_coder(made("batchtopk"), tmp_path, "dictionary_learning")
    change(tmp_path, **tensors)
    configure(tmp_path, **config)
    refused(match, lambda: load_coder(tmp_path, allow_pickle=True))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"threshold": float("nan")}, "threshold nan"),
        ({"threshold": "high"}, "threshold 'high'"),
        ({"threshold": True}, "threshold True"),
        ({"activation": ["topk"]}, r"\['topk'\]"),
        ({"k": True}, "k True"),
        ({"num_latents": -24}, "no latents"),
        ({"num_latents": 0, "expansion_factor": 0}, "no latents"),
        ({"num_latents": 0, "expansion_factor": 2}, r"encoder\.weight is \(24, 8\)"),
    ],
)
def test_sparsify_that_cannot_be_read(tmp_path: Path, config: dict, match: str) -> None:
    made("batchtopk").save_to_disk(tmp_path)
    configure(tmp_path, **config)
    refused(match, lambda: load_coder(tmp_path))


@pytest.mark.parametrize("form", FORMATS)
def test_a_config_that_cannot_be_read(tmp_path: Path, form: str) -> None:
    save_coder(made(), tmp_path, form)
    name = FORMATS[form].FILES[0]
    for text in ("", "{", "[]"):
        (tmp_path / name).write_text(text)
        refused(name, lambda: load_coder(tmp_path, allow_pickle=True))
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    refused("cannot be read", lambda: load_coder(tmp_path, allow_pickle=True))


# Set by hand: latents are +x0, -x0, +x1, -x1 about b_dec = (10, 0), and the decoder doubles.

DIRECTIONS = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
HAND = {
    "sparsify": {
        "encoder.weight": DIRECTIONS, "encoder.bias": torch.zeros(4), "W_dec": 2 * DIRECTIONS,
    },
    "saelens": {"W_enc": DIRECTIONS.T, "b_enc": torch.zeros(4), "W_dec": 2 * DIRECTIONS},
    "dictionary_learning": {
        "encoder.weight": DIRECTIONS, "encoder.bias": torch.zeros(4),
        "decoder.weight": 2 * DIRECTIONS.T, "k": torch.tensor(1), "threshold": torch.tensor(2.5),
    },
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "sparsify": {"d_in": 2, "num_latents": 4, "k": 1},
    "saelens": {"architecture": "topk", "d_in": 2, "d_sae": 4, "k": 1},
    "dictionary_learning": {"trainer": {"dict_class": "AutoEncoderTopK"}},
}


def by_hand(folder: Path, form: str, config: dict[str, Any], **more: torch.Tensor) -> Path:
    """Write the files without any code of ours."""
    config_name, weights = FORMATS[form].FILES
    held = {**HAND[form], "b_dec": torch.tensor([10.0, 0.0]), **more}
    held = {name: value.contiguous() for name, value in held.items()}
    folder.mkdir()
    (folder / config_name).write_text(json.dumps(config))
    (torch.save if weights.endswith(".pt") else save_file)(held, folder / weights)
    return folder


@pytest.mark.parametrize("form", FORMATS)
def test_weights_set_by_hand_give_known_reconstructions(tmp_path: Path, form: str) -> None:
    coder = load_coder(by_hand(tmp_path / "a", form, CONFIGS[form]), allow_pickle=True)
    # (3, -2) about b_dec: the larger alone, doubled; (0, 0) has nothing active.
    x = torch.tensor([[13.0, -2.0], [9.0, 0.5], [10.0, 0.0]])
    assert reconstruct(coder, x).tolist() == [[16.0, 0.0], [8.0, 0.0], [10.0, 0.0]]


@pytest.mark.parametrize("form", ["saelens", "dictionary_learning"])
def test_a_threshold_set_by_hand_gives_known_reconstructions(tmp_path: Path, form: str) -> None:
    config: dict[str, Any] = {"trainer": {"dict_class": "BatchTopKSAE"}}
    more = {}
    if form == "saelens":
        config = {"architecture": "jumprelu", "d_in": 2, "d_sae": 4, "metadata": {"k": 1}}
        more = {"threshold": torch.full((4,), 2.5)}
    coder = load_coder(by_hand(tmp_path / "a", form, config, **more), allow_pickle=True)
    # At the threshold itself a latent is off; k counts for nothing.
    x = torch.tensor([[13.0, -4.0], [12.5, 2.0]])
    assert reconstruct(coder, x).tolist() == [[16.0, -8.0], [10.0, 0.0]]


def test_a_threshold_that_is_not_set_leaves_what_is_above_zero(tmp_path: Path) -> None:
    """dictionary_learning begins with -1; SAELens' mask of a negative threshold is its ReLU."""
    off = torch.tensor(-1.0)
    config: dict[str, Any] = {"trainer": {"dict_class": "BatchTopKSAE"}}
    folder = by_hand(tmp_path / "d", "dictionary_learning", config, threshold=off)
    x = torch.tensor([[13.0, -4.0]])
    assert reconstruct(load_coder(folder, allow_pickle=True), x).tolist() == [[16.0, -8.0]]
    config = {"architecture": "jumprelu", "d_in": 2, "d_sae": 4, "metadata": {"k": 1}}
    folder = by_hand(tmp_path / "s", "saelens", config, threshold=off.expand(4))
    assert reconstruct(load_coder(folder), x).tolist() == [[16.0, -8.0]]


def test_top_k_before_or_after_the_relu_is_the_same(tmp_path: Path) -> None:
    """SAELens selects first: where fewer than k are positive it takes negative ones, then 0."""
    coder = made(k=20)
    pre = (rows() - coder.b_dec) @ coder.encoder.weight.T + coder.encoder.bias
    assert ((pre > 0).sum(1) < 20).any()
    top = pre.topk(20, dim=1)
    assert coder.W_dec is not None
    first = torch.zeros_like(pre).scatter_(1, top.indices, top.values.relu())
    folder = saelens(tmp_path / "a", coder)
    torch.testing.assert_close(
        reconstruct(load_coder(folder), rows()), first @ coder.W_dec + coder.b_dec,
        atol=1e-5, rtol=0,
    )  # fmt: skip


def test_cast_turns_half_precision_into_float32(tmp_path: Path) -> None:
    folder = tmp_path / "layers.1.mlp"
    coder = made()
    save_coder(coder, folder, "sparsify")
    change(folder, **{k: v.bfloat16() for k, v in load_file(folder / "sae.safetensors").items()})
    again = load_coder(folder, cast=True)
    assert again.dtype == torch.float32
    assert torch.equal(again.b_dec, coder.b_dec.bfloat16().float())


@pytest.mark.parametrize(("form", "activation"), PAIRS)
def test_the_encoder_alone_gives_the_same_latents(
    tmp_path: Path, form: str, activation: str
) -> None:
    save_coder(made(activation), tmp_path, form)
    alone = load_coder(tmp_path, decoder=False, allow_pickle=True)
    assert alone.W_dec is None
    whole = load_coder(tmp_path, allow_pickle=True)
    for one, other in zip(encode(alone, rows()), encode(whole, rows()), strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


@pytest.mark.parametrize("form", ["sparsify", "saelens"])
def test_the_encoder_alone_reads_no_decoder(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_coder(made(), tmp_path, form)
    change(tmp_path, W_dec=torch.full((24, 8), float("nan")))
    taken: list[str] = []

    class Spy:
        def __init__(self, *args: Any, **options: Any) -> None:
            self.file = safe_open(*args, **options)

        def __enter__(self) -> Any:
            self.file.__enter__()
            return self

        def __exit__(self, *args: object) -> None:
            self.file.__exit__(*args)

        def keys(self) -> list[str]:
            return self.file.keys()

        def get_tensor(self, name: str) -> torch.Tensor:
            taken.append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr("resa_lens.saes.formats.common.safe_open", Spy)
    load_coder(tmp_path, decoder=False)
    assert len(taken) == 3
    assert "W_dec" not in taken
    refused("W_dec", lambda: load_coder(tmp_path))


def test_sparsify_has_no_batchtopk(tmp_path: Path) -> None:
    refused("batchtopk", lambda: save_coder(made("batchtopk"), tmp_path, "sparsify"))
    # The workspace keeps it all the same, in a file that sparsify itself refuses.
    made("batchtopk").save_to_disk(tmp_path / "own")
    assert load_coder(tmp_path / "own").threshold == 0.75
    refused("unknown", lambda: save_coder(made(), tmp_path, "pickle"))


# Folders


def test_hookpoints_in_the_projects_own_words(tmp_path: Path) -> None:
    """dictionary_learning's users name the sub-module themselves; folders may say it too."""
    save_coder(made(), tmp_path / "a", "dictionary_learning")
    for name, point in (
        ("resid_post_layer_8", Hookpoint(8, "resid_post")),
        ("mlp_out_layer_8", Hookpoint(8)),
        ("resid_layer_8", Hookpoint(8, "resid_post")),
        ("attn_layer_8", None),
        ("resid_post_layer_\u00b2", None),
        (None, None),
    ):
        configure(tmp_path / "a", submodule_name=name)
        assert find_coders(tmp_path / "a") == {tmp_path / "a": point}, name
    (tmp_path / "a").rename(tmp_path / "layers.4.mlp")
    assert find_coders(tmp_path) == {tmp_path / "layers.4.mlp": Hookpoint(4)}
    hook = {"hook_name": "blocks.5.hook_mlp_out"}
    saelens(tmp_path / "s", made(), metadata=hook)
    assert find_coders(tmp_path / "s") == {tmp_path / "s": Hookpoint(5)}
    saelens(tmp_path / "s", made(), metadata={"hook_name": "../../blocks.5.hook_mlp_out"})
    assert find_coders(tmp_path / "s") == {tmp_path / "s": None}


def test_two_saes_of_one_hookpoint_are_not_one(tmp_path: Path) -> None:
    for name in ("trainer_0", "trainer_1"):
        save_coder(made(), tmp_path / name, "dictionary_learning", POINT)
    refused("trainer_0 and trainer_1 are both", lambda: by_hookpoint(find_coders(tmp_path)))
    assert by_hookpoint(find_coders(tmp_path / "trainer_0")) == {POINT: tmp_path / "trainer_0"}


def test_half_a_download_hinders_no_other_layer(tmp_path: Path) -> None:
    for layer in (1, 2):
        save_coder(made(), tmp_path / f"layers.{layer}.mlp", "sparsify")
    (tmp_path / "layers.1.mlp" / "sae.safetensors").unlink()
    # What a killed conversion leaves is no SAE of the folder.
    save_coder(made(), tmp_path / ".tmp-1-out", "sparsify")
    found = find_coders(tmp_path)
    places = by_hookpoint(found)
    assert sorted(places) == [Hookpoint(1), Hookpoint(2)]
    assert len(found) == 2
    load_coder(places[Hookpoint(2)])
    refused(r"layers\.1\.mlp lacks sae\.safetensors", lambda: load_coder(places[Hookpoint(1)]))
    (tmp_path / "layers.2.mlp" / "sae.safetensors").unlink()
    refused(r"lacks sae\.safetensors", lambda: find_coders(tmp_path))


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    save_coder(made(), tmp_path / "elsewhere", "sparsify")
    # A folder of that name was once taken for the hub's cache, where links are the rule.
    here = tmp_path / "snapshots" / "here"
    here.mkdir(parents=True)
    (here / "layers.1.mlp").symlink_to(tmp_path / "elsewhere")
    refused("leads out", lambda: find_coders(here))


def test_files_of_no_format(tmp_path: Path) -> None:
    refused("no SAE", lambda: find_coders(tmp_path))
    refused("no such folder", lambda: find_coders(tmp_path / "nowhere"))
    refused("known format", lambda: detect(tmp_path))
    (tmp_path / "ae.pt").touch()
    refused(r"lacks config\.json", lambda: detect(tmp_path))
