"""The command merge: one model folder, its JSON, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from resa_lens.cli import app
from resa_lens.models.host import load_model
from resa_lens.resources import data_path


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = data_path("tiny-reasoner")
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    folder = tmp_path_factory.mktemp("adapter") / "run"
    peft.save_pretrained(str(folder))
    return folder


def invoke(*args: str | Path, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["merge", *map(str, args)])
    assert result.exit_code == code, result.output
    return result


def test_a_merged_folder_and_what_is_said_of_it(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "whole"
    result = invoke(out, "--adapter", adapter, "--adapter", adapter, "--scale", "0.5", "--json")
    assert result.stdout.count("\n") == 1
    values = json.loads(result.stdout)
    assert values["dtype"] == "bfloat16"
    assert [a["scale"] for a in values["adapters"]] == [0.5, 0.5]
    assert values["weights_hash"] == load_model(str(out)).weights_hash
    assert 0 < values["rounding"]["lost"] < 0.1

    again = invoke(out, "--adapter", adapter, code=2)
    assert "--force" in again.stderr
    shown = invoke(out, "--adapter", adapter, "--force", "--dtype", "float32")
    assert "1 x run" in shown.stdout
    assert "stored as float32; rounding errs by 0 %" in shown.stdout
    assert str(out) in shown.stdout
    assert "MB of memory" in shown.stderr


def test_scales_of_zero_are_the_base(adapter: Path, tmp_path: Path) -> None:
    values = json.loads(
        invoke(tmp_path / "off", "--adapter", adapter, "--scale", "0", "--json").stdout
    )
    assert values["rounding"] == {"lost": 0.0, "unchanged": 1.0, "weights": 12 * 128 * 128}


def test_bad_input_is_named(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "no adapter to merge" in invoke(out, code=2).stderr
    assert "'int3'" in invoke(out, "--adapter", adapter, "--dtype", "int3", code=2).stderr
    two = invoke(out, "--adapter", adapter, "--scale", "1", "--scale", "2", code=2)
    assert "2 scales for 1 adapters" in two.stderr
    assert "/nope" in invoke(out, "--adapter", "/nope", code=2).stderr
    assert not out.exists()
