"""Bad input: a short error that names the value, the right exit code, the workspace as it was."""

from __future__ import annotations

import errno
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

from resa_lens.cli import app
from resa_lens.resources import data_path

QUICK = ("--tokens", "1024", "--latents", "64")
TUNE = ("--model", "tiny-reasoner", "--layer", "5", "--steps", "3", "--limit", "2",
        "--max-new-tokens", "4", "--rank", "2", "--no-start-check")  # fmt: skip
Refused = Callable[..., str]


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every path, and every file's time and content; not what a failed run keeps to go on."""
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes())
        if p.is_file()
        else (0, b"")
        for p in folder.rglob("*")
        if not any(part.startswith(".work-") for part in p.relative_to(folder).parts)
    }


@pytest.fixture(scope="module")
def workspace(demo: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad") / "workspace"
    shutil.copytree(demo.workspace, folder)
    return folder


@pytest.fixture
def refused(workspace: Path) -> Refused:
    """Run a command that must fail; its error message comes back."""

    def run(*args: str, code: int = 2, names: str, place: Path = workspace) -> str:
        before = tree(place) if place.is_dir() else None
        result = CliRunner().invoke(app, [*args, "--workspace", str(place)])
        said = result.stderr
        assert result.exit_code == code, (said, result.exception)
        assert "error: " in said, said
        error = said[said.index("error: ") :]
        assert len(error.strip().splitlines()) <= 3, error
        assert names in error, error
        assert result.stdout == ""
        assert (tree(place) if place.is_dir() else None) == before
        return error

    return run


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A copy of the bundled model to damage."""
    return Path(shutil.copytree(data_path("tiny-reasoner"), tmp_path / "damaged"))


@pytest.fixture
def saes(workspace: Path, tmp_path: Path) -> Path:
    """A copy of the demo's SAE of layer 5 to damage."""
    source = next((workspace / "saes").glob("*/*-512x32-*")) / "layers.5.mlp"
    shutil.copytree(source, tmp_path / "saes" / "layers.5.mlp")
    return tmp_path / "saes"


# Models

COMMANDS = [
    ("recommend-layers",), ("train-saes",), ("count-features",), ("tune", "--layer", "5"),
    ("eval", "--limit", "1"), ("demo", "--budget", "test"),
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[0])
@pytest.mark.parametrize("model", ["no-such-model", "./absent", "owner/absent", "absent.gguf"])
def test_unknown_model(refused: Refused, command: tuple[str, ...], model: str) -> None:
    refused(*command, "--model", model, names=model)


def test_options_of_eval_that_would_do_nothing(refused: Refused) -> None:
    refused("eval", "--limit", "1", "--scale", "0.5", names="--scale 0.5 without an adapter")
    refused("eval", "--limit", "1", "--merge", names="--merge is for engine vllm")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
@pytest.mark.parametrize(
    "command",
    [("demo",), ("tune", "--layer", "5"), ("sweep",), ("activity", "--generations", "2")],
    ids=lambda c: c[0],
)
def test_an_engine_that_is_not_installed(refused: Refused, command: tuple[str, ...]) -> None:
    refused(*command, "--engine", "vllm", names="engine vllm is not installed")


def test_an_engine_without_anything_to_generate(refused: Refused) -> None:
    refused("activity", "--engine", "vllm", names="--engine vllm generates, and nothing is")


@pytest.mark.parametrize("command", [("eval", "--limit", "1"), ("tune", "--layer", "5")])
def test_an_extraction_that_there_is_not(refused: Refused, command: tuple[str, ...]) -> None:
    refused(*command, "--extraction", "theirs", names="'theirs'")


def test_folder_without_config(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    error = refused("recommend-layers", "--model", str(tmp_path / "empty"), names="config.json")
    assert str(tmp_path / "empty") in error


def test_file_that_is_no_model(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "model.txt").write_text("x")
    refused("recommend-layers", "--model", str(tmp_path / "model.txt"), names="model.txt")


def test_corrupt_gguf(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF but no more")
    refused("recommend-layers", "--model", str(tmp_path / "model.gguf"), names="model.gguf")


@pytest.mark.parametrize("keep", [0, 5, 1000, -100])
def test_truncated_weights(refused: Refused, model_folder: Path, keep: int) -> None:
    file = model_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused("recommend-layers", "--model", str(model_folder), names="model.safetensors")


def test_corrupt_weights_header(refused: Refused, model_folder: Path) -> None:
    file = model_folder / "model.safetensors"
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])
    refused("recommend-layers", "--model", str(model_folder), names="model.safetensors")


def test_folder_without_weights(refused: Refused, model_folder: Path) -> None:
    (model_folder / "model.safetensors").unlink()
    refused("recommend-layers", "--model", str(model_folder), names="safetensors")


def test_weights_that_contradict_the_config(refused: Refused, model_folder: Path) -> None:
    config = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    refused("recommend-layers", "--model", str(model_folder), names="damaged")


def test_damaged_config(refused: Refused, model_folder: Path) -> None:
    (model_folder / "config.json").write_text("{")
    refused("recommend-layers", "--model", str(model_folder), names="damaged")


def test_source_model_of_another_width(refused: Refused, tmp_path: Path) -> None:
    config = Qwen2Config(
        vocab_size=576, hidden_size=32, intermediate_size=64, num_hidden_layers=12,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "narrow")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(data_path("tiny-reasoner") / name, tmp_path / "narrow" / name)
    error = refused("tune", *TUNE, "--source-model", str(tmp_path / "narrow"), names="32")
    assert "128" in error


# SAEs


@pytest.mark.parametrize("command", ["count-features", "recommend-layers", "tune"])
def test_sae_of_another_width(refused: Refused, saes: Path, command: str) -> None:
    folder = saes / "layers.5.mlp"
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, "d_in": 64}))
    args = TUNE if command == "tune" else ("--layers", "5")
    error = refused(command, *args, "--saes", str(saes), names="width 64")
    assert "128" in error


@pytest.mark.parametrize("command", ["count-features", "tune"])
def test_truncated_sae(refused: Refused, saes: Path, command: str) -> None:
    file = saes / "layers.5.mlp" / "sae.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    args = TUNE if command == "tune" else ("--layers", "5")
    refused(command, *args, "--saes", str(saes), names="sae.safetensors")


def test_truncated_sae_in_the_workspace(workspace: Path, refused: Refused, tmp_path: Path) -> None:
    place = Path(shutil.copytree(workspace, tmp_path / "w"))
    file = next((place / "saes").glob("*/*-512x32-*")) / "layers.4.mlp" / "sae.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    # What is damaged does not count as done: it is named, and made anew.
    done = CliRunner().invoke(
        app, ["count-features", "--latents", "64", "--tokens", "1024", "--layers", "4",
              "--workspace", str(place)],
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    done = CliRunner().invoke(app, ["runs", "--verify", "--workspace", str(place), "--json"])
    assert done.exit_code == 1
    damaged = [text for row in json.loads(done.stdout)["runs"] for text in row.get("damaged", [])]
    assert len(damaged) == 1
    assert "layers.4.mlp" in damaged[0]
    saes = next((place / "saes").glob("*/*-512x32-*"))
    refused("count-features", "--saes", str(saes), "--layers", "4", names="layers.4.mlp")


def test_sae_that_is_not_finite(refused: Refused, saes: Path) -> None:
    file = saes / "layers.5.mlp" / "sae.safetensors"
    held = {k: v.clone() for k, v in load_file(file).items()}
    held["b_dec"][0] = torch.nan
    save_file(held, file)
    refused("count-features", "--layers", "5", "--saes", str(saes), names="b_dec")


def test_saes_that_are_not_there(refused: Refused, saes: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    args = ("count-features", "--layers", "5", "--saes")
    refused(*args, str(tmp_path / "absent"), names="absent")
    refused(*args, str(tmp_path / "empty"), names="empty")
    refused("count-features", "--layers", "6", "--saes", str(saes), names="7th of 12")


# Values


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (("train-saes", "--layers", "12"), "'12'"),
        (("train-saes", "--layers", "3-40"), "'40'"),
        (("train-saes", "--layers", "13th"), "'13th'"),
        (("train-saes", "--layers", "5", "--sequence", "4096"), "reads 1024 tokens"),
        (("train-saes", "--layers", "7-3"), "7-3"),
        (("train-saes", "--layers", "some"), "some"),
        (("count-features", "--layers", "99"), "99"),
        (("recommend-layers", "--layers", "0th"), "0th"),
        (("tune", *TUNE, "--layer", "12"), "'12'"),
        (("tune", *TUNE, "--layer", "middle"), "middle"),
        (("count-features", "--rule", "most"), "most"),
        (("recommend-layers", "--rule", "most"), "most"),
        (("recommend-layers", "--selector", "best"), "best"),
        (("recommend-layers", "--selector", "loudest"), "loudest"),
        (("recommend-layers", "--recipe", "secret"), "secret"),
        (("tune", *TUNE, "--preset", "best"), "best"),
        (("tune", *TUNE, "--site", "attn"), "attn"),
        (("tune", *TUNE, "--reference", "tuned"), "tuned"),
        (("tune", *TUNE, "--direction", "forward"), "forward"),
        (("tune", *TUNE, "--reduction", "max"), "max"),
        (("tune", *TUNE, "--schedule", "linear"), "linear"),
        (("tune", *TUNE, "--clip-norm", "-1"), "-1"),
        (("tune", *TUNE, "--targets", "q_proj,w_proj"), "w_proj"),
        (("tune", "--layer", "11", "--preset", "reference"), "layer 11"),
        (("tune", "--layer", "11", "--preset", "reference", "--plan"), "layer 11"),
        (("tune", "--layer", "6", "--preset", "reference", "--adapter-layers", "0-6"), "layer 6"),
        (("sweep", "--layers", "5,11", "--preset", "reference", "--limit", "2"), "layer 11"),
        (
            (
                "sweep",
                "--layers",
                "5",
                "--control-layers",
                "11",
                "--preset",
                "reference",
                "--controls",
                "noise",
            ),
            "layer 11",
        ),
        (("sweep", "--layers", "5", "--limit", "1"), "1 question to score"),
        (("sweep", "--layers", "5", "--limit", "1", "--plan"), "1 question to score"),
        (("train-saes", "--site", "attn"), "attn"),
        (("recommend-layers", "--site", "attn"), "attn"),
        (("train-saes", "--optimizer", "muon"), "muon"),
        (("train-saes", "--k", "65", *QUICK), "65"),
        (("demo", "--budget", "huge"), "huge"),
        (("eval", "--limit", "1", "--dtype", "int4"), "int4"),
        (("eval", "--limit", "1", "--device", "tpu"), "tpu"),
        (("eval", "--limit", "1", "--levels", "one"), "one"),
        (("eval", "--limit", "1", "--tasks", "absent.jsonl"), "absent.jsonl"),
        (("tune", *TUNE, "--tasks", "absent.jsonl"), "absent.jsonl"),
        (("compare", "absent-a", "absent-b"), "absent-a"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else None,
)
def test_value_out_of_its_range(refused: Refused, args: tuple[str, ...], names: str) -> None:
    refused(*args, names=names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is present")
def test_device_that_is_absent(refused: Refused) -> None:
    refused("eval", "--limit", "1", "--device", "cuda", names="'cuda'")


def test_adapter_folder_that_is_none(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    refused("eval", "--limit", "1", "--adapter", str(tmp_path / "adapter"), names="adapter")


# Data


@pytest.mark.parametrize(
    ("name", "text", "names"),
    [
        ("none.jsonl", None, "none.jsonl"),
        ("empty.jsonl", "", "empty"),
        ("blank.jsonl", "\n\n", "blank.jsonl"),
        ("columns.jsonl", '{"context": "a", "label": "b"}\n', "context, label"),
        ("answers.jsonl", '{"question": "a", "answer": ""}\n', "answer"),
        ("broken.jsonl", '{"question": \n', "broken.jsonl"),
        ("list.jsonl", "[1, 2]\n", "list.jsonl"),
        ("empty.csv", "", "empty.csv"),
        ("header.csv", "question,answer\n", "header.csv"),
        ("columns.csv", "a,b\n1,2\n", "a, b"),
        ("broken.parquet", "PAR1 but no more", "broken.parquet"),
    ],
)
def test_data(refused: Refused, tmp_path: Path, name: str, text: str | None, names: str) -> None:
    file = tmp_path / name
    if text is not None:
        file.write_text(text)
    refused("train-saes", *QUICK, "--data", str(file), names=names)


@pytest.mark.parametrize("option", ["--elicitation-data", "--data"])
def test_data_of_tuning(refused: Refused, option: str) -> None:
    refused("tune", *TUNE, option, "absent.jsonl", names="absent.jsonl")


# Prompts


@pytest.mark.parametrize("command", ["count-features", "recommend-layers"])
def test_prompt_without_the_tags(refused: Refused, command: str) -> None:
    error = refused(command, "--prompt", "Think, then answer.", names="Think, then answer.")
    assert "<think>" in error


def test_prompt_without_the_tags_is_found_before_anything_is_trained(
    refused: Refused, tmp_path: Path
) -> None:
    refused("recommend-layers", "--prompt", "none", names="none", place=tmp_path / "new")


# While running


def test_sae_loss_that_is_not_finite(refused: Refused) -> None:
    args = ("train-saes", "--layers", "5", *QUICK, "--batch", "1", "--learning-rate", "1e30")
    error = refused(*args, code=1, names="1e+30")
    assert "layer 5" in error


def test_tuning_loss_that_is_not_finite(refused: Refused) -> None:
    error = refused("tune", *TUNE, "--learning-rate", "1e30", code=1, names="1e+30")
    assert "layer 5" in error


@pytest.mark.parametrize(
    ("command", "target"),
    [
        (("train-saes", "--layers", "5", *QUICK), "resa_lens.saes.coder.Coder.save_to_disk"),
        (("count-features", "--layers", "6"), "resa_lens.artifacts.stage.write_json"),
        (("tune", *TUNE), "resa_lens.stages.adapters.save_adapter"),
        (("eval", "--limit", "2", "--max-new-tokens", "4"), "resa_lens.evals.run.write_samples"),
    ],
    ids=["train-saes", "count-features", "tune", "eval"],
)
@pytest.mark.parametrize(
    ("code", "exit_code", "says"),
    [(errno.ENOSPC, 1, "the disk is full"), (errno.EACCES, 2, "no permission")],
    ids=["full", "denied"],
)
def test_disk_full_or_denied_while_writing(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], target: str,
    code: int, exit_code: int, says: str,
) -> None:  # fmt: skip
    def fail(*args: Any, **options: Any) -> None:
        raise OSError(code, "no")

    monkeypatch.setattr(target, fail)
    refused(*command, code=exit_code, names=says)


def test_disk_full_in_a_new_workspace_leaves_none(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "no")

    monkeypatch.setattr("resa_lens.saes.coder.Coder.save_to_disk", fail)
    place = tmp_path / "new"
    refused("train-saes", "--layers", "5", *QUICK, code=1, names="the disk is full", place=place)
    assert not place.exists()


def test_workspace_that_is_a_file(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refused("recommend-layers", names="file", place=tmp_path / "file")


def test_workspace_without_permission(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As root every folder can be written: the refusal is simulated at mkdir."""
    mkdir = Path.mkdir

    def deny(self: Path, *args: Any, **options: Any) -> None:
        if "locked" in str(self):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        mkdir(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", deny)
    place = tmp_path / "locked"
    refused("train-saes", "--layers", "5", *QUICK, names="locked", place=place)
