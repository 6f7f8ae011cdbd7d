"""Conversion between formats, in code and by the command: round trips, nothing half done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder
from typer.testing import CliRunner

from resa_lens import publishing
from resa_lens.cli import app
from resa_lens.errors import BadInputError, RunFailedError
from resa_lens.machine import limits
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.progress import Reporter
from resa_lens.saes import convert as module
from resa_lens.saes.coder import Coder, encode, new_coder, reconstruct
from resa_lens.saes.convert import convert
from resa_lens.saes.formats import load_coder, save_coder


def made(activation: str = "topk", seed: int = 3) -> Coder:
    coder = new_coder(8, 24, 4, seed=seed, activation=activation)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        coder.encoder.bias.copy_(torch.randn(24, generator=generator) * 0.1)
        coder.b_dec.copy_(torch.randn(8, generator=generator))
    coder.threshold = 0.75 if activation == "batchtopk" else 0.0
    return coder.requires_grad_(False)


def folders(place: Path, activation: str = "topk", form: str = "sparsify") -> Path:
    for layer in (2, 10):
        point = Hookpoint(layer)
        save_coder(made(activation, seed=layer), place / point.sparsify, form, point)
    return place


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


def refused(match: str, job: Callable[[], object]) -> None:
    with pytest.raises(BadInputError, match=match) as caught:
        job()
    assert len(str(caught.value).splitlines()) <= 3


ROUND = ("saelens", "dictionary_learning", "sparsify")


def test_converting_around_returns_the_same_bits(tmp_path: Path) -> None:
    source = folders(tmp_path / "0")
    for number, form in enumerate(ROUND):
        target = tmp_path / str(number + 1)
        result = convert(source, target, form, allow_pickle=True)
        assert result.max_difference == 0.0
        assert result.hookpoints == ("layers.10.mlp", "layers.2.mlp")
        source = target
    first, last = (tmp_path / p / "layers.2.mlp" / "sae.safetensors" for p in ("0", "3"))
    held, other = load_file(first), load_file(last)
    assert all(torch.equal(held[name], other[name]) for name in held)
    # And the real sparsify computes the same of the last as of the first.
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    one, two = (SparseCoder.load_from_disk(file.parent)(x).sae_out for file in (first, last))
    assert torch.equal(one, two)
    torch.testing.assert_close(reconstruct(load_coder(last.parent), x), two)


def test_batchtopk_goes_between_the_two_that_have_it(tmp_path: Path) -> None:
    source = folders(tmp_path / "0", "batchtopk", "saelens")
    convert(source, tmp_path / "1", "dictionary_learning")
    convert(tmp_path / "1", tmp_path / "2", "saelens", allow_pickle=True)
    back = load_coder(tmp_path / "2" / "layers.2.mlp")
    assert (back.cfg.activation, back.threshold, back.cfg.k) == ("batchtopk", 0.75, 4)
    refused("batchtopk", lambda: convert(source, tmp_path / "t", "sparsify"))


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_latents_fire_where_coders_are_compared(
    activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two SAEs of which nothing fires would agree whatever they are."""
    active: list[int] = []

    def spy(coder: SparseCoder, x: torch.Tensor) -> torch.Tensor:
        active.append(len(encode(coder, x).values))
        return reconstruct(coder, x)

    monkeypatch.setattr(module, "reconstruct", spy)
    assert module.difference(made(activation), made(activation)) == 0.0
    assert min(active) > module.ROWS
    assert module.difference(made(activation), made(activation, seed=4)) > 0.1


def test_one_layer_and_one_folder(tmp_path: Path) -> None:
    source = folders(tmp_path / "0")
    convert(source, tmp_path / "one", "saelens", layers=[10])
    assert [p.name for p in (tmp_path / "one").iterdir()] == ["layers.10.mlp"]
    convert(source / "layers.2.mlp", tmp_path / "flat", "saelens")
    assert (tmp_path / "flat" / "cfg.json").exists()
    refused("layer 7", lambda: convert(source, tmp_path / "x", "saelens", layers=[7]))


def test_two_saes_of_one_hookpoint_are_refused(tmp_path: Path) -> None:
    """They would lie in one folder, the second over the first."""
    for name in ("trainer_0", "trainer_1"):
        save_coder(made(), tmp_path / "s" / name, "saelens", Hookpoint(3))
    refused("both SAEs of", lambda: convert(tmp_path / "s", tmp_path / "t", "sparsify"))
    assert not (tmp_path / "t").exists()


def test_failures_leave_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folders(tmp_path / "0")
    kept = tmp_path / "kept"
    save_coder(made(), kept, "saelens")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(kept)
    weights = source / "layers.2.mlp" / "sae.safetensors"
    held = load_file(weights)
    save_file({**held, "b_dec": torch.full((8,), float("nan"))}, weights)
    before = tree(tmp_path)
    # The first of the two is converted before the second is found to be damaged.
    refused("b_dec", lambda: convert(source, tmp_path / "t", "saelens"))
    refused("b_dec", lambda: convert(source, kept, "saelens", force=True))
    refused("exists", lambda: convert(source, kept, "saelens"))
    refused("unknown", lambda: convert(source, tmp_path / "t", "pickle"))
    refused("holds the source", lambda: convert(source, tmp_path, "saelens", force=True))
    refused("exists", lambda: convert(source, tmp_path / "file", "saelens", force=True))
    refused("exists", lambda: convert(source, tmp_path / "link", "saelens", force=True))
    refused("no folder", lambda: convert(source, tmp_path / "file" / "t", "saelens"))
    assert tree(tmp_path) == before
    save_file(held, weights)
    before = tree(tmp_path)
    for wrong in (0.1, float("nan")):
        monkeypatch.setattr(module, "difference", lambda a, b, wrong=wrong: wrong)
        with pytest.raises(RunFailedError, match="would differ"):
            convert(source, kept, "saelens", force=True)
        assert tree(tmp_path) == before


def test_force_replaces_saes_and_nothing_else(tmp_path: Path) -> None:
    source = folders(tmp_path / "0")
    target = tmp_path / "t"
    save_coder(made(), target / "layers.5.mlp", "saelens")
    (target / "layers.5.mlp" / "thesis.txt").write_text("mine")
    before = tree(tmp_path)
    refused("thesis.txt", lambda: convert(source, target, "saelens", force=True))
    assert tree(tmp_path) == before
    (target / "layers.5.mlp" / "thesis.txt").unlink()
    convert(source, target, "saelens", force=True)
    assert sorted(p.name for p in target.iterdir()) == ["layers.10.mlp", "layers.2.mlp"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "t"]


def test_a_rename_that_fails_leaves_the_old_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folders(tmp_path / "0")
    save_coder(made(), tmp_path / "t", "saelens")
    before, rename = tree(tmp_path), Path.rename

    def fail(self: Path, to: Path) -> Path:
        if to == tmp_path / "t" and ".old-" not in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail)
    monkeypatch.setattr(publishing, "_exchange", lambda *_: False)
    with pytest.raises(RunFailedError, match="Input/output"):
        convert(source, tmp_path / "t", "saelens", force=True)
    assert tree(tmp_path) == before


def test_a_disk_that_is_too_small_is_said_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folders(tmp_path / "0")
    before = tree(tmp_path)
    monkeypatch.setattr(limits, "free_disk_mb", lambda _: 0.0)
    refused("MB of disk are needed", lambda: convert(source, tmp_path / "t", "saelens"))
    assert tree(tmp_path) == before


def test_a_large_job_says_its_size_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, notes = folders(tmp_path / "0"), []
    heard = Reporter()
    monkeypatch.setattr(heard, "note", notes.append)
    convert(source, tmp_path / "1", "saelens", reporter=heard)
    assert notes == []
    monkeypatch.setattr(module, "LARGE_BYTES", 1000)
    convert(source, tmp_path / "2", "saelens", reporter=heard)
    assert "2 SAEs: about 1 s" in notes[0]
    assert "of disk" in notes[0]
    assert "of memory" in notes[0]


# The command


def command(*args: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["convert", *args])
    assert result.exit_code == code, (result.stderr, result.exception)
    return result


def test_the_command_goes_around(tmp_path: Path) -> None:
    source = folders(tmp_path / "0")
    for number, form in enumerate(ROUND):
        target = tmp_path / str(number + 1)
        options = ["--to", form, "--json", "--allow-pickle"]
        result = json.loads(command(str(source), str(target), *options).stdout)
        assert (result["source"], result["target"]) == (str(source), str(target))
        assert result["max_difference"] <= 1e-5
        source = target
    for layer in (2, 10):
        one, two = (tmp_path / n / f"layers.{layer}.mlp" / "sae.safetensors" for n in ("0", "3"))
        assert all(torch.equal(load_file(one)[n], v) for n, v in load_file(two).items())
    said = command(str(tmp_path / "0"), str(tmp_path / "4"), "--to", "saelens").stdout
    assert "2 SAEs from sparsify to saelens" in said


@pytest.mark.parametrize(
    ("layers", "names"),
    [("all", ["10", "2"]), ("layers.*.mlp", ["10", "2"]), ("11th", ["10"]), ("1-3,10", None)],
)
def test_the_commands_layers(tmp_path: Path, layers: str, names: list[str] | None) -> None:
    source = folders(tmp_path / "0")
    args = (str(source), str(tmp_path / "1"), "--to", "saelens", "--layers", layers)
    if names is None:
        assert "no SAE at layer 1" in command(*args, code=2).stderr
        return
    command(*args)
    assert sorted(p.name for p in (tmp_path / "1").iterdir()) == [f"layers.{n}.mlp" for n in names]


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (("SOURCE", "TARGET", "--to", "pickle"), "sparsify, saelens, dictionary_learning"),
        (("SOURCE", "SOURCE", "--to", "saelens"), "choose another"),
        (("SOURCE", "TARGET", "--to", "saelens", "--layers", "default"), "'default'"),
        (("SOURCE", "TARGET", "--to", "saelens", "--layers", "../x"), "'../x'"),
        (("nobody/nothing", "TARGET", "--to", "saelens"), "hf download nobody/nothing"),
        (("nobody/nothing", "TARGET", "--to", "saelens", "--layers", "12"), "layers.12.mlp"),
        (("../nothing", "TARGET", "--to", "saelens"), "../nothing"),
        (("PICKLE", "TARGET", "--to", "sparsify"), "--allow-pickle"),
    ],
)
def test_the_command_refuses(tmp_path: Path, args: tuple[str, ...], names: str) -> None:
    places = {
        "SOURCE": str(folders(tmp_path / "0")),
        "PICKLE": str(folders(tmp_path / "d", form="dictionary_learning")),
        "TARGET": str(tmp_path / "t"),
    }
    before = tree(tmp_path)
    result = command(*(places.get(arg, arg) for arg in args), code=2)
    error = result.stderr[result.stderr.index("error: ") :].strip()
    assert names in error
    assert len(error.splitlines()) <= 3
    assert result.stdout == ""
    assert tree(tmp_path) == before


def test_cast_and_k_by_the_command(tmp_path: Path) -> None:
    folder = tmp_path / "0"
    save_coder(made("batchtopk"), folder, "saelens")
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, "metadata": {}}))
    weights = folder / "sae_weights.safetensors"
    save_file({name: v.double() for name, v in load_file(weights).items()}, weights)
    args = (str(folder), str(tmp_path / "t"), "--to", "dictionary_learning")
    assert "--cast" in command(*args, code=2).stderr
    assert "--k" in command(*args, "--cast", code=2).stderr
    command(*args, "--cast", "--k", "4")
    assert load_coder(tmp_path / "t", allow_pickle=True).cfg.k == 4
