"""SAEs as other projects lay them out: old SAELens, JumpReLU, Qwen-Scope, sparsify's runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from resa_lens.errors import BadInputError
from resa_lens.models.hookpoints import POST, Hookpoint, Names
from resa_lens.saes.coder import Coder, new_coder, reconstruct
from resa_lens.saes.convert import convert
from resa_lens.saes.formats import by_hookpoint, find_coders, load_coder, save_coder
from resa_lens.saes.formats.common import stated_figures

D, LATENTS, K = 8, 24, 4


def coder(seed: int = 3) -> Coder:
    made = new_coder(D, LATENTS, K, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        made.encoder.bias.copy_(0.1 * torch.randn(LATENTS, generator=generator))
        made.b_dec.copy_(torch.randn(D, generator=generator))
    return made.requires_grad_(False)


def rows() -> torch.Tensor:
    return 2 * torch.randn(50, D, generator=torch.Generator().manual_seed(0))


def old_saelens(folder: Path, made: Coder, **values: Any) -> Path:
    """A folder as SAELens 3 to 5 wrote it."""
    folder.mkdir(parents=True)
    state = made.state_dict()
    tensors = {"W_enc": state["encoder.weight"].T.contiguous(), "b_enc": state["encoder.bias"],
               "W_dec": state["W_dec"], "b_dec": state["b_dec"]}  # fmt: skip
    if values.get("architecture") == "jumprelu":
        tensors["threshold"] = torch.linspace(-0.2, 1.5, LATENTS)
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {"architecture": "standard", "d_in": D, "d_sae": LATENTS, "dtype": "torch.float32",
              "hook_name": "blocks.3.hook_resid_post", "hook_layer": 3, "hook_head_index": None,
              "apply_b_dec_to_input": True, "finetuning_scaling_factor": False,
              "normalize_activations": "none", "prepend_bos": True, **values}  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "values",
    [
        {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}},
        {"activation_fn": "topk", "activation_fn_kwargs": {"k": K}},
        {"architecture": "topk", "activation_fn_kwargs": {"k": K}},
        {"architecture": "topk", "k": K},
        {"architecture": "topk", "metadata": {"k": K}},
        {"architecture": "topk", "k": float(K)},
    ],
    ids=str,
)
def test_a_topk_of_old_saelens_wherever_k_stands(tmp_path: Path, values: dict[str, Any]) -> None:
    made = coder()
    folder = old_saelens(tmp_path / "sae", made, **values)
    again = load_coder(folder)
    assert (again.cfg.activation, again.cfg.k) == ("topk", K)
    assert torch.equal(reconstruct(again, rows()), reconstruct(made, rows()))
    assert find_coders(folder) == {folder: Hookpoint(3, "resid_post")}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"activation_fn_str": "relu"}, "'standard'"),
        ({"architecture": "gated"}, "'gated'"),
        ({"architecture": "topk", "k": K, "finetuning_scaling_factor": True}, "finetuning_scaling"),
        ({"architecture": "topk"}, "does not say its k"),
    ],
    ids=str,
)
def test_what_is_not_honoured_is_refused(
    tmp_path: Path, values: dict[str, Any], named: str
) -> None:
    with pytest.raises(BadInputError, match=named):
        load_coder(old_saelens(tmp_path / "sae", coder(), **values))


def test_a_jumprelu_has_a_threshold_for_each_latent(tmp_path: Path) -> None:
    made, x = coder(), rows()
    folder = old_saelens(tmp_path / "sae", made, architecture="jumprelu")
    threshold = load_file(folder / "sae_weights.safetensors")["threshold"]
    pre = (x - made.b_dec) @ made.encoder.weight.T + made.encoder.bias
    assert made.W_dec is not None
    expected = torch.where((pre > threshold) & (pre > 0), pre, 0) @ made.W_dec + made.b_dec
    again = load_coder(folder)
    torch.testing.assert_close(reconstruct(again, x), expected)
    # It is kept through the workspace's own files, and through SAELens'.
    again.save_to_disk(tmp_path / "own")
    save_coder(again, tmp_path / "theirs", "saelens")
    for place in ("own", "theirs"):
        loaded = load_coder(tmp_path / place)
        assert torch.equal(torch.as_tensor(loaded.threshold), threshold)
        assert torch.equal(reconstruct(loaded, x), reconstruct(again, x))
    done = convert(folder, tmp_path / "converted", "saelens")
    assert done.max_difference < 1e-6


@pytest.fixture
def scope(tmp_path: Path) -> Path:
    """Qwen-Scope's layout, k in the repository's name."""
    folder = tmp_path / "SAE-Res-Qwen3-0.1B-Base-W0K-L0_4"
    folder.mkdir()
    for layer in (2, 10):
        generator = torch.Generator().manual_seed(layer)
        sizes = {"W_enc": (LATENTS, D), "b_enc": (LATENTS,), "W_dec": (D, LATENTS), "b_dec": (D,)}
        state = {n: torch.randn(*shape, generator=generator) for n, shape in sizes.items()}
        # Far from zero, so that the largest are positive.
        state["b_enc"] += 6
        torch.save(state, folder / f"layer{layer}.sae.pt")
    return folder


def test_qwen_scope_computes_what_its_card_says(scope: Path, tmp_path: Path) -> None:
    places = by_hookpoint(find_coders(scope))
    assert list(places) == [Hookpoint(2, "resid_post"), Hookpoint(10, "resid_post")]
    state = torch.load(scope / "layer10.sae.pt", weights_only=True)
    values, latents = (rows() @ state["W_enc"].T + state["b_enc"]).topk(4, dim=-1)
    assert values.min() > 0
    z = torch.zeros(50, LATENTS).scatter_(-1, latents, values)
    expected = z @ state["W_dec"].T + state["b_dec"]
    made = load_coder(places[Hookpoint(10, "resid_post")], allow_pickle=True)
    torch.testing.assert_close(reconstruct(made, rows()), expected, atol=1e-4, rtol=1e-4)
    convert(scope, tmp_path / "out", "sparsify", allow_pickle=True, layers=[2, 10])
    assert torch.equal(reconstruct(load_coder(tmp_path / "out" / "layers.10"), rows()),
                       reconstruct(made, rows()))  # fmt: skip


def test_qwen_scopes_pickles_are_read_only_when_that_is_asked_for(scope: Path) -> None:
    with pytest.raises(BadInputError, match="--allow-pickle"):
        load_coder(scope / "layer2.sae.pt")
    (scope / "README.md").write_text("| Property | Value |\n|---|---|\n| Top-K | 3 |\n")
    assert load_coder(scope / "layer2.sae.pt", allow_pickle=True).cfg.k == 3
    state = torch.load(scope / "layer2.sae.pt", weights_only=True)
    torch.save({**state, "extra": state["b_dec"]}, scope / "layer2.sae.pt")
    with pytest.raises(BadInputError, match="without a place: extra"):
        load_coder(scope / "layer2.sae.pt", allow_pickle=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_turned_into_float32_and_it_is_said(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    made = coder()
    made.save_to_disk(tmp_path / "layers.3")
    file = tmp_path / "layers.3" / "sae.safetensors"
    save_file({n: v.to(dtype) for n, v in load_file(file).items()}, file)
    again = load_coder(tmp_path / "layers.3")
    assert again.stored == str(dtype).removeprefix("torch.")
    for name, value in made.state_dict().items():
        assert torch.equal(again.state_dict()[name], value.to(dtype).float())
    save_file({n: v.double() for n, v in load_file(file).items()}, file)
    with pytest.raises(BadInputError, match="--cast"):
        load_coder(tmp_path / "layers.3")


def test_an_option_that_would_change_the_function_is_refused(tmp_path: Path) -> None:
    coder().save_to_disk(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    for changes, named in (({"signed": True}, "signed"), ({"sign_flip": True}, "sign_flip")):
        (tmp_path / "cfg.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(BadInputError, match=f"{named} true, which is not honoured"):
            load_coder(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps({**config, "signed": False}))
    assert load_coder(tmp_path).cfg.k == K


@pytest.mark.parametrize(
    ("place", "passed"),
    [
        ("layers.1.mlp/seed0", ""),
        ("layers.1.mlp/seed0", "layers.1.mlp"),
        ("layers.1.mlp/seed0", "layers.1.mlp/seed0"),
        ("run1/layers.1.mlp", ""),
        ("run1/layers.1.mlp/seed0", ""),
        ("h.1.mlp", ""),
        ("runs/a/h.1.mlp", ""),
    ],
)
def test_nested_folders_of_sparsify_are_searched(tmp_path: Path, place: str, passed: str) -> None:
    coder().save_to_disk(tmp_path / "saes" / place)
    found = find_coders(tmp_path / "saes" / passed)
    assert found == {tmp_path / "saes" / place: Hookpoint(1)}


def test_where_several_could_be_meant_the_folder_to_pass_is_named(tmp_path: Path) -> None:
    for run in ("one", "two"):
        for layer in (1, 2):
            coder().save_to_disk(tmp_path / run / f"layers.{layer}.mlp")
    with pytest.raises(BadInputError, match=r"2 runs: one, two; pass .*/one"):
        find_coders(tmp_path)
    for seed in (0, 1):
        coder(seed).save_to_disk(tmp_path / "seeds" / "layers.1.mlp" / f"seed{seed}")
    with pytest.raises(BadInputError, match=r"seed0 .*seed1 are both SAEs of layers.1.mlp"):
        by_hookpoint(find_coders(tmp_path / "seeds"))


def test_hook_mlp_out_means_the_place_behind_the_norm_where_there_are_two(tmp_path: Path) -> None:
    two = Names(sites=("mlp_out", "resid_post", "attn_out", *POST.values()))
    for site, post in POST.items():
        for point in (Hookpoint(1, site), Hookpoint(1, post)):
            folder = tmp_path / point.site
            save_coder(coder(), folder, "saelens", point, two)
            hook = json.loads((folder / "cfg.json").read_text())["metadata"]["hook_name"]
            assert (hook == point.saelens) == (point.site == post)
            assert find_coders(folder, two) == {folder: point}
        # Without a second place both names are of the one.
        assert find_coders(tmp_path / post) == {tmp_path / post: Hookpoint(1, site)}
    done = convert(tmp_path / "mlp_post", tmp_path / "out", "sparsify", names=two)
    assert done.hookpoints == ("layers.1.post_feedforward_layernorm",)


def test_figures_that_files_state(tmp_path: Path) -> None:
    folder = old_saelens(tmp_path / "sae", coder(), architecture="topk", k=K, l0=31.5,
                         metadata={"explained_variance": 0.75})  # fmt: skip
    assert stated_figures(folder) == {"l0": 31.5, "fvu": 0.25}
    (folder / "eval_results.json").write_text('{"frac_variance_explained": 0.9, "l0": 30.0}')
    assert stated_figures(folder) == pytest.approx({"l0": 30.0, "fvu": 0.1})
