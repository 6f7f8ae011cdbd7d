"""A hub repository in sparsify's layout, by id and hookpoint, from a small cache; no network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from resa_lens.cli import app
from resa_lens.errors import BadInputError
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.saes import hub
from resa_lens.saes.coder import new_coder
from resa_lens.saes.formats import by_hookpoint, find_coders, load_coder
from resa_lens.saes.hub import find_sae_folder

REPO = "EleutherAI/sae-DeepSeek-R1-Distill-Qwen-1.5B-65k"


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """EleutherAI's layout in the hub's cache: files are links to blobs; 2 of 28 layers at hand."""
    cache = tmp_path / f"models--{REPO.replace('/', '--')}"
    folder = cache / "snapshots" / "abc"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    (cache / "blobs").mkdir()
    for layer in (11, 12):
        place = folder / f"layers.{layer}.mlp"
        new_coder(8, 24, 4, seed=layer).save_to_disk(place)
        for file in list(place.iterdir()):
            blob = cache / "blobs" / f"{layer}-{file.name}"
            file.rename(blob)
            file.symlink_to(blob)
    # Two places, because huggingface_hub reads the environment at import.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    return folder


def refusal(name: str, *points: Hookpoint) -> str:
    with pytest.raises(BadInputError) as caught:
        find_sae_folder(name, points or None)
    assert len(str(caught.value).splitlines()) <= 3
    return str(caught.value)


def test_only_the_layers_asked_for_are_opened(snapshot: Path) -> None:
    found = find_sae_folder(REPO, [Hookpoint(12)])
    assert found == snapshot
    (snapshot / "layers.11.mlp" / "sae.safetensors").unlink()
    (snapshot / "layers.11.mlp" / "sae.safetensors").write_bytes(b"not a tensor")
    place = by_hookpoint(find_coders(found))[Hookpoint(12)]
    alone = load_coder(place, decoder=False)
    assert alone.W_dec is None
    assert torch.equal(alone.encoder.weight, new_coder(8, 24, 4, seed=12).encoder.weight)


def test_only_the_layers_asked_for_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(name: str, *, allow_patterns: list[str] | None, local_files_only: bool) -> str:
        asked.append((name, allow_patterns, local_files_only))
        raise OSError("no network")

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    refusal(REPO, Hookpoint(12), Hookpoint(3, "resid_post"))
    wanted = [
        "layers.12.mlp/cfg.json", "layers.12.mlp/*.safetensors",
        "layers.3/cfg.json", "layers.3/*.safetensors",
    ]  # fmt: skip
    # What is at hand first, then the network.
    assert asked == [(REPO, wanted, True), (REPO, wanted, False)]


def test_what_is_not_at_hand_is_named_with_the_command_that_fetches_it(snapshot: Path) -> None:
    said = refusal(REPO, Hookpoint(12), Hookpoint(20))
    assert f"hf download {REPO} --include 'layers.20.mlp/*'" in said
    # Half of a download is not at hand.
    (snapshot / "layers.12.mlp" / "sae.safetensors").unlink()
    assert "--include 'layers.12.mlp/*'" in refusal(REPO, Hookpoint(12))
    assert "`hf download nobody/nothing`" in refusal("nobody/nothing")


@pytest.mark.parametrize(
    "name", ["../x", "a/..", "a/b/../c", "owner/repo:../x", "a/b/c", "", "/nowhere", "~/nowhere"]
)
def test_names_that_are_no_hub_id(name: str) -> None:
    assert repr(name) in refusal(name)


def test_a_hub_id_that_is_not_valid() -> None:
    assert "-a/b" in refusal("-a/b")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "sae").touch()
    assert "a file" in refusal(str(tmp_path / "sae"))


def test_one_layer_of_a_hub_repository_is_converted(snapshot: Path, tmp_path: Path) -> None:
    options = ["--to", "saelens", "--layers", "12", "--json"]
    result = CliRunner().invoke(app, ["convert", REPO, str(tmp_path / "out"), *options])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["hookpoints"] == ["layers.12.mlp"]
    held = load_coder(tmp_path / "out" / "layers.12.mlp")
    assert torch.equal(held.encoder.weight, new_coder(8, 24, 4, seed=12).encoder.weight)
