"""The insertion test as a stage, a command and the start of a tuning."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from pydantic import TypeAdapter
from typer.testing import CliRunner

import resa_lens as rl
from resa_lens.artifacts.kinds.insertion import LayerInsertion
from resa_lens.cli import app
from resa_lens.errors import BadInputError
from resa_lens.layers.selectors import recommend
from resa_lens.models.host import load_model
from resa_lens.session.insertion import Insertion
from resa_lens.stages import insertion
from resa_lens.stages.config import InsertionConfig

LAYER = 8
SHORT: dict[str, Any] = {"arms": "short", "tokens": 512, "limit": 8}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return rl.open(tmp_path_factory.mktemp("insert"), quiet=True)


@pytest.fixture(scope="module")
def saes(lab: Any) -> Any:
    model = lab.model("tiny-reasoner")
    return lab.train_saes(model, layers=[5, LAYER], latents=256, k=16, tokens=8192)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny-reasoner whose block 8 has a damaged MLP."""
    folder = tmp_path_factory.mktemp("damaged") / "damaged"
    model = load_model("tiny-reasoner")
    layers: Any = model.model.model.layers
    weight = layers[LAYER].mlp.down_proj.weight
    with torch.no_grad():
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
        weight += 4 * weight.std() * noise
    model.model.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


def test_one_model_says_cost_only_and_has_no_oracle(lab: Any, saes: Any) -> None:
    test = lab.insert(lab.model("tiny-reasoner"), saes, **SHORT)
    rows = TypeAdapter(list[LayerInsertion]).validate_python(test.run.layers)
    assert [row.layer for row in rows] == [5, LAYER]
    for row in rows:
        assert set(row.inserted) == {"sae", "noise"}
        assert row.verdict == "cost only"
        assert row.kl_tuning is not None
        assert row.kl_thoughts is not None
        assert row.kl_thoughts > row.kl_tuning > 0
        assert set(row.fvu) == {"prompt", "think", "answer", "all"}
        assert row.inserted["sae"].n == 8
    assert "cost only" in repr(test)
    assert len(test.plot().data) >= 1


@pytest.mark.slow
def test_another_source_has_all_arms_and_the_oracle_is_the_source(
    lab: Any, saes: Any, damaged: Path
) -> None:
    target = lab.model(damaged)
    test = lab.insert(target, saes, layers=LAYER, tokens=512, limit=16)
    (row,) = test.run.layers
    assert set(row["inserted"]) == {"sae", "noise", "pca", "own", "oracle"}
    assert set(row["ablation"]) == {"zero", "mean"}
    source = lab.eval(lab.model("tiny-reasoner"), limit=16)
    assert row["inserted"]["oracle"]["accuracy"] == source.accuracy
    assert row["inserted"]["oracle"]["difference"] > 0
    assert test.table().loc[(LAYER, "oracle"), "n"] == 16


def test_done_before_and_a_killed_test_keeps_its_arms(lab: Any, saes: Any) -> None:
    model, options = lab.model("tiny-reasoner"), {**SHORT, "limit": 6}
    scored: list[str] = []
    whole = insertion.evaluate_inserted

    def count(*args: Any) -> Any:
        scored.append("arm")
        if len(scored) == 3:
            raise KeyboardInterrupt
        return whole(*args)

    with patch.object(insertion, "evaluate_inserted", count):
        with pytest.raises(KeyboardInterrupt):
            lab.insert(model, saes, **options)
        test = lab.insert(model, saes, **options)
    # Five arms, of which two were kept and one was begun twice.
    assert len(scored) == 6
    with patch.object(insertion, "evaluate_inserted", None):
        assert lab.insert(model, saes, **options).path == test.path


def test_a_layer_without_an_sae_is_refused(lab: Any, saes: Any) -> None:
    with pytest.raises(BadInputError, match="no SAE at layer 3"):
        lab.insert(lab.model("tiny-reasoner"), saes, layers=3, **SHORT)


def test_tune_looks_at_the_start_and_warns(lab: Any, saes: Any) -> None:
    model = lab.model("tiny-reasoner")
    tuned = lab.tune(model, saes, layer=LAYER, steps=2, limit=8)
    start = tuned.run.to_dict()["start"]
    assert set(start) == {"kl", "fvu", "ablation", "insertion"}
    assert start["kl"]["tuning"] == pytest.approx(tuned.losses[0], rel=3)
    assert start["insertion"]["base"]["n"] == 8
    assert start["insertion"]["verdict"] == "cost only"
    without = lab.tune(model, saes, layer=LAYER, steps=2, limit=8, start_check=False)
    assert without.run.to_dict()["start"] is None
    assert without.path == tuned.path


@pytest.fixture
def cli(lab: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("RESA_LENS_WORKSPACE", str(lab.workspace.root))
    return lambda *words: CliRunner().invoke(app, list(words))


def test_the_command_prints_the_promised_keys(cli: Any, saes: Any, damaged: Path) -> None:
    done = cli("insert", "--model", str(damaged), "--source-model", "tiny-reasoner",
               "--saes", str(saes.path), "--layers", str(LAYER), "--limit", "8", "--arms", "short",
               "--text-tokens", "512", "--json")  # fmt: skip
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    assert {"layers", "base", "model", "source", "site"} <= set(values)
    keys = {"layer", "kl_tuning", "kl_thoughts", "fvu", "ablation", "inserted", "verdict"}
    assert keys <= set(values["layers"][0])
    assert {"accuracy", "n", "ci"} <= set(values["layers"][0]["inserted"]["sae"])
    shown = cli("insert", "--model", str(damaged), "--source-model", "tiny-reasoner",
                "--saes", str(saes.path), "--layers", str(LAYER), "--limit", "8", "--arms",
                "short", "--text-tokens", "512")  # fmt: skip
    assert "with the SAE inserted accuracy changes by" in " ".join(shown.output.split())


def test_the_selector_takes_the_layer_that_gains() -> None:
    counts = {1: 3, 2: 0, 3: 1, 4: 2}
    table = {1: (0.0, 0.02), 2: (0.2, 0.03), 3: (-0.1, 0.02), 4: (0.01, 0.02)}
    choice = recommend(counts, n_layers=6, selector="insertion", insertion=table)
    assert choice.recommended == (2,)
    assert choice.verdict == "supported"
    none = recommend(counts, n_layers=6, selector="insertion", insertion={**table, 2: (0.01, 0.03)})
    assert none.selector == "middle"
    assert "nothing to hand on" in none.next_step


def test_a_test_of_many_layers_has_a_gain_for_each(lab: Any, saes: Any) -> None:
    test: Insertion = lab.insert(lab.model("tiny-reasoner"), saes, **SHORT)
    table = insertion.gains(test.run)
    assert set(table) == {5, LAYER}
    assert all(error > 0 for _, error in table.values())
    row = dict(test.run.layers[0])
    row["inserted"] = {"sae": {**row["inserted"]["sae"], "difference_se": 0.0}}
    assert insertion.gains(replace(test.run, layers=[row]))[5][1] == 1 / 8


def test_the_starting_point_looks_at_as_many_tokens_as_the_command(
    small_starting_point: int,
) -> None:
    assert small_starting_point == InsertionConfig().tokens
