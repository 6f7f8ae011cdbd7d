"""`--plan` of every long stage: what it says, that it leaves nothing, and that it is so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner
from whole_process import run_whole

from resa_lens.cli import app
from resa_lens.resources import data_path
from resa_lens.stages.controls import identity_coder

SAE = ("--latents", "64", "--tokens", "512")
ASKED = ("--limit", "4", "--max-new-tokens", "8")
COMMANDS: dict[str, tuple[tuple[str, ...], list[str]]] = {
    "eval": (ASKED, ["answers"]),
    "tune": (
        ("--layer", "5", *SAE, *ASKED, "--steps", "7"),
        ["training 1 SAEs", "checkpoints", "insertion before the tuning",
         "documents before the tuning", "tuning", "answers of the base", "answers of the tuned"],
    ),
    "sweep": (
        ("--layers", "5,6", "--seeds", "3", *SAE, *ASKED, "--steps", "7", "--no-start-check",
         "--probes"),
        ["training 2 SAEs", "checkpoints", "answers of the base", "tuning", "answers of the tuned",
         "counts", "causal effects", "probes of the layers"],
    ),
    "insert": (
        ("--layers", "5", *SAE, *ASKED, "--text-tokens", "512"),
        ["training 1 SAEs", "checkpoints", "answers of the target",
         "answers with something inserted", "documents"],
    ),
    "activity": (
        ("--layers", "4-6", *SAE, "--text-tokens", "2048"),
        ["training 3 SAEs", "checkpoints", "activity of 3 layers"],
    ),
    "falsify": (
        ("--layers", "4-6", *SAE, "--texts", "2", "--shuffles", "2"),
        ["training 3 SAEs", "checkpoints", "training 3 SAEs, another seed's",
         "checkpoints, another seed's", "training 3 SAEs, random weights'",
         "checkpoints, random weights'", "texts"],
    ),
}  # fmt: skip


def planned(tmp_path: Path, command: str, *options: str) -> dict[str, Any]:
    """Run a command with --plan in this process."""
    words = (command, "--plan", "--json", "--workspace", str(tmp_path / "w"), *options)
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0, (result.stderr, result.exception)
    return json.loads(result.stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_plan_names_its_parts_and_leaves_nothing(tmp_path: Path, command: str) -> None:
    options, names = COMMANDS[command]
    plan = planned(tmp_path, command, "--model", "tiny-reasoner", *options)
    assert not list(tmp_path.iterdir())
    assert (plan["stage"], plan["model"]) == (command, "tiny-reasoner")
    assert [part["name"] for part in plan["parts"]] == names
    amounts = {part["name"]: part["amount"] for part in plan["parts"]}
    for part in plan["parts"]:
        assert part["seconds"] >= 0
        # The process itself is in it.
        assert 300 < part["peak_memory_mb"] < plan["available_mb"]
    assert set(re.findall(r"--[a-z-]+", " ".join(plan["levers"]))) <= options_of(command)
    assert plan["cpu_seconds"] > 0
    assert plan["seconds"] == pytest.approx(sum(p["seconds"] for p in plan["parts"]), abs=0.1)
    if command == "sweep":
        assert (amounts["tuning"], amounts["answers of the tuned"]) == (6 * 7, 6 * 4)
        assert any("processes" in lever for lever in plan["levers"])
        assert any("--seeds" in lever for lever in plan["levers"])
    if command == "tune":
        assert (amounts["tuning"], amounts["answers of the base"]) == (7, 4)
        assert amounts["insertion before the tuning"] == 3 * 4
        assert amounts["documents before the tuning"] == 2
        options_named = set(re.findall(r"--[a-z-]+", " ".join(plan["levers"])))
        assert {"--steps", "--sequence", "--limit"} <= options_named
    if command == "insert":
        assert amounts["answers with something inserted"] == 5 * 4


def test_controls_have_parts_of_their_own(tmp_path: Path) -> None:
    """Own answers are four a question and seed; SAEs of random weights one a layer and seed."""
    data = tmp_path / "data.jsonl"
    rows = ({"question": f"What is {n}+1?", "answer": str(n + 1), "steps": "-"} for n in range(3))
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    shared = ("--model", "tiny-reasoner", "--data", str(data), *SAE, *ASKED)
    shared += ("--steps", "7", "--rank", "2")

    def amounts(command: str, *options: str) -> dict[str, int]:
        parts = planned(tmp_path, command, *shared, *options)["parts"]
        return {part["name"]: part["amount"] for part in parts}

    assert amounts("tune", "--control", "own-samples") == {
        "own answers": 12, "tuning": 7, "answers of the base": 4, "answers of the tuned": 4,
    }  # fmt: skip
    # No gradient passes this SAE: a fine-tuning has none.
    last = amounts("tune", "--layer", "11", "--preset", "reference", "--control", "cot-free")
    assert list(last) == ["tuning", "answers of the base", "answers of the tuned"]
    many = amounts(
        "sweep", "--layers", "4,5,6", "--seeds", "2", "--controls", "own-samples,random-weights",
        "--no-effects",
    )  # fmt: skip
    assert many["own answers"] == 2 * 12
    assert (many["tuning"], many["tuning, own-samples"]) == (7 * 2 * (3 + 2), 7 * 2)
    assert many["training 1 SAEs, random weights'"] == 2 * 2 * many["training 3 SAEs"]
    assert many["answers of the tuned"] == 4 * 2 * (3 + 2 + 1)


def test_replicates_are_answers_too(tmp_path: Path) -> None:
    plan = planned(tmp_path, "eval", "--model", "tiny-reasoner", *ASKED, "--replicates", "5")
    assert [part["amount"] for part in plan["parts"]] == [5 * 4]
    assert any("fewer --replicates" in lever for lever in plan["levers"])


def options_of(command: str) -> set[str]:
    """Return the options that a command has."""
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    params = group.commands[command].params
    return {name for option in params for name in (*option.opts, *option.secondary_opts)}


def test_levers_of_generated_texts_are_the_commands_options(tmp_path: Path) -> None:
    plan = planned(
        tmp_path, "activity", "--layers", "5", *SAE, "--generations", "4", "--max-new-tokens", "8"
    )
    options_named = set(re.findall(r"--[a-z-]+", " ".join(plan["levers"])))
    assert "--generations" in options_named
    assert options_named <= options_of("activity")


def test_given_saes_are_measured_and_not_trained(tmp_path: Path) -> None:
    """Mode pretrained: each is read, measured, copied, and reported on."""
    for layer in (3, 5):
        # One that fits its place wherever that is.
        identity_coder(128).save_to_disk(tmp_path / f"saes/layers.{layer}.mlp")
    plan = planned(
        tmp_path, "train-saes", "--mode", "pretrained", "--saes", str(tmp_path / "saes"),
        "--layers", "3,5",
    )  # fmt: skip
    assert [part["name"] for part in plan["parts"]] == ["measuring and copying", "quality report"]
    assert [part["amount"] for part in plan["parts"]] == [2, 2]
    assert plan["disk_mb"] == pytest.approx(2 * (2 * 256 * 128) * 4 / 2**20, rel=0.1)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("plan", [("--plan",), ()], ids=["plan", "run"])
def test_given_saes_that_a_limit_leaves_no_room_for(tmp_path: Path, plan: tuple[str, ...]) -> None:
    identity_coder(128).save_to_disk(tmp_path / "saes/layers.3.mlp")
    words = (
        "train-saes", "--model", "tiny-reasoner", "--mode", "pretrained", "--saes",
        str(tmp_path / "saes"), "--layers", "3", "--memory-limit", "0.001", *plan,
        "--workspace", str(tmp_path / "w"),
    )  # fmt: skip
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 2
    assert "1 MB are available; use a larger --memory-limit" in " ".join(result.stderr.split())
    assert not (tmp_path / "w").exists() or not list((tmp_path / "w").rglob("manifest.json"))


def test_one_batch_of_more_tokens_than_asked_for_is_said(tmp_path: Path) -> None:
    words = ("train-saes", "--layers", "5", "--latents", "64", "--tokens", "512", "--plan")
    result = CliRunner().invoke(
        app, [*words, "--model", "tiny-reasoner", "--workspace", str(tmp_path / "w")]
    )
    said = " ".join(result.stderr.split())
    assert "SAEs are trained on 1,024 tokens, not 512: one batch is 4 sequences of 256" in said


def wide_vocabulary(folder: Path) -> Path:
    """Write a model whose logits are more than its weights: what a quality report holds."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32_768, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=True,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((data_path("tiny-reasoner") / name).read_bytes())
    return folder


@pytest.mark.recorded
def test_the_report_of_a_large_vocabulary_takes_what_the_plan_says(tmp_path: Path) -> None:
    """The report is most of the memory; without a plan of it a machine would be too small."""
    model = wide_vocabulary(tmp_path / "model")
    options = (
        "train-saes", "--model", str(model), "--layers", "0", "--latents", "256", "--tokens",
        "1024", "--workspace", str(tmp_path / "w"),
    )  # fmt: skip
    plan, _ = run_whole(*options, "--plan")
    parts = {part["name"]: part["peak_memory_mb"] for part in plan["parts"]}
    assert parts["quality report"] > 1.3 * parts["training 1 SAEs"]
    _, peak = run_whole(*options)
    assert plan["peak_memory_mb"] == pytest.approx(peak, rel=0.15)


TIMED = (
    ("train-saes", "--layers", "4-6"),
    ("eval",),
    ("tune", "--layer", "5", "--limit", "100"),
    # Few answers and updates: most is what comes before the tuning.
    ("tune", "--layer", "5", "--limit", "2", "--max-new-tokens", "8", "--steps", "10"),
    ("insert", "--layers", "5", "--limit", "100"),
    ("activity", "--layers", "4-6"),
    ("falsify", "--layers", "5"),
    ("sweep", "--layers", "5,6", "--seeds", "2", "--limit", "100", "--no-effects"),
    ("sweep", "--layers", "5,6", "--seeds", "1", "--limit", "2", "--max-new-tokens", "8",
     "--steps", "10", "--start-check"),
)  # fmt: skip


@pytest.mark.recorded
@pytest.mark.parametrize("words", TIMED, ids=" ".join)
def test_the_time_is_within_a_factor_of_one_and_a_half(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    """Seconds of the processor: of the plan, and of all that the command then makes."""
    options = (*words, "--model", "tiny-reasoner", "--workspace", str(tmp_path / "w"))
    plan, _ = run_whole(*options, "--plan")
    _, peak = run_whole(*options)
    costs = [json.loads(f.read_text())["cost"] for f in (tmp_path / "w").rglob("manifest.json")]
    spent = sum(cost.get("cpu_seconds", 0.0) for cost in costs)
    print(
        f"{' '.join(words)}: planned {plan['cpu_seconds']:.0f} s and "
        f"{plan['peak_memory_mb']:.0f} MB, took {spent:.0f} s and {peak:.0f} MB"
    )
    assert 1 / 1.5 < plan["cpu_seconds"] / spent < 1.5
    assert plan["peak_memory_mb"] == pytest.approx(peak, rel=0.15)
