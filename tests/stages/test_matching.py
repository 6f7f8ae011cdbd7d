"""Two runs' features: seeds, planted copies, other widths, runs by name, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from identities import changed_byte, data_file, identity_of, moved, write_rows
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

from resa_lens.artifacts.kinds.matches import MATCH_SCHEMA
from resa_lens.artifacts.stage import Context
from resa_lens.artifacts.workspace import Workspace
from resa_lens.cli import app
from resa_lens.errors import BadInputError
from resa_lens.features.exclusive import RULES, CountConfig, count_features
from resa_lens.figures import terminal
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import load_model
from resa_lens.saes.coder import new_coder
from resa_lens.saes.formats import load_coder, save_coder
from resa_lens.saes.train import SaeConfig
from resa_lens.stages import matching as module
from resa_lens.stages.matching import MatchConfig, Side, match_run, open_run
from resa_lens.stages.reports import scores
from resa_lens.stages.sae_training import train_run
from resa_lens.stages.saes import SaeRun
from resa_lens.texts.corpora import CorpusConfig

SAE = SaeConfig(latents=128, k=8, tokens=8192)
QUICK = MatchConfig(tokens=1500)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Context, Any, SaeRun, SaeRun]:
    ctx = Context(Workspace(tmp_path_factory.mktemp("matches") / "workspace"), device="cpu")
    model = ctx.model("tiny-reasoner")
    first, second = (
        train_run(ctx, model, layers, replace(SAE, seed=seed), CorpusConfig(seed=seed))
        for seed, layers in enumerate(([3, 5], [3, 4, 5]))
    )
    return ctx, model, first, second


def shuffled_run(run: SaeRun, place: Path, layer: int) -> tuple[SaeRun, torch.Tensor]:
    """The same SAE with its latents in another order."""
    coder = load_coder(run.place(Hookpoint(layer)))
    order = torch.randperm(coder.num_latents, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for part in (coder.encoder.weight, coder.encoder.bias, coder.W_dec):
            assert part is not None
            part.copy_(part[order].clone())
    save_coder(coder, place / f"layers.{layer}.mlp", "sparsify", Hookpoint(layer))
    return replace(run, folder=place, points=(Hookpoint(layer),), artifact=None), order


def test_two_seeds(runs: Any) -> None:
    ctx, model, a, b = runs
    matches = match_run(ctx, Side(model, a), Side(model, b), CorpusConfig(), QUICK)
    assert [row["layer"] for row in matches.layers] == [3, 5]
    for row in matches.layers:
        assert row["cosine"]["n"] == 128
        assert row["cosine_firing"]["n"] == row["correlation"]["n"] == row["firing"][0] <= 128
        for kind in ("cosine", "correlation"):
            found = row[kind]
            assert found["ci"][0] <= found["share"] <= found["ci"][1]
            assert found["null_mean"] < found["mean"]
        assert row["agreement"]["chance"] < row["agreement"]["share"]
    table = pq.read_table(matches.artifact.file("matches.parquet"))
    assert table.schema.equals(MATCH_SCHEMA)
    assert table.num_rows == 2 * 128
    assert matches.artifact.manifest.parents == [a.relative, b.relative]


def test_a_planted_permutation_is_recovered_by_both(runs: Any, tmp_path: Path) -> None:
    ctx, model, a, _ = runs
    copy, order = shuffled_run(a, tmp_path / "copy", 5)
    matches = match_run(ctx, Side(model, a), Side(model, copy), CorpusConfig(), QUICK, [5])
    (row,) = matches.layers
    assert row["cosine"]["share"] == row["correlation"]["share"] == 1
    frame = pq.read_table(matches.artifact.file("matches.parquet")).to_pandas()
    assert (order.numpy()[frame["cosine_match"]] == frame["feature"]).all()
    firing = frame[frame["fires"]]
    # Features that fire at the same one token have one correlation: the first of them is named.
    same = order.numpy()[firing["correlation_match"].astype(int)] == firing["feature"]
    assert same.mean() > 0.9
    assert (firing["correlation"] > 0.999).all()
    # What is counted there is counted here, so every followed match is counted.
    counted = count_features(model, a.coders(model, [5])).layers[0].features
    assert [(r["feature"], r["rule"]) for r in row["features"]] == [
        (feature, rule) for rule in RULES for feature in counted[rule]
    ]
    assert all(r["cosine_counted"] for r in row["features"])


def test_a_finished_artifact_is_read(
    runs: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ctx, model, a, b = runs
    sides = Side(model, a), Side(model, b)
    first = match_run(ctx, *sides, CorpusConfig(), QUICK, [3])
    monkeypatch.setattr(module, "phased_batches", lambda *_, **__: pytest.fail("made anew"))
    for where in (ctx, moved(ctx, tmp_path / "moved")):
        again = match_run(where, *sides, CorpusConfig(), QUICK, [3])
        assert again.layers == first.layers
        assert again.artifact.path.is_relative_to(where.workspace.root)
    with pytest.raises(pytest.fail.Exception):
        match_run(ctx, *sides, CorpusConfig(), replace(QUICK, threshold=0.6), [3])


def test_what_matches_are_made_from(runs: Any, tmp_path: Path) -> None:
    ctx, model, a, b = runs
    file = data_file(tmp_path / "data.jsonl")
    corpus = CorpusConfig(source=str(file))
    other_model = replace(model, parts={**model.parts, "config": "another"})

    def identity(
        corpus: CorpusConfig = corpus, first: SaeRun = a, second: SaeRun = b, there: Any = model,
        layers: Any = (3,), seed: int = 0, **fields: Any,
    ) -> str:  # fmt: skip
        where = replace(ctx, seed=seed)
        sides = Side(model, first), Side(there, second)
        return identity_of(match_run, where, *sides, corpus, replace(QUICK, **fields), layers)

    plain = identity()
    copy = shutil.copy(file, tmp_path / "copy.jsonl")
    assert identity(CorpusConfig(source=str(copy))) == plain
    others = [
        identity(layers=(3, 5)),
        identity(threshold=0.6),
        identity(tokens=1600),
        identity(count=CountConfig(prompt="steps")),
        identity(replace(corpus, seed=1)),
        identity(seed=1),
        identity(there=other_model),
        identity(first=b, second=a),
        identity(first=changed_byte(a, tmp_path / "first", 3)),
        identity(second=changed_byte(b, tmp_path / "second", 3)),
    ]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    write_rows(file, [{**rows[0], "answer": "another"}, *rows[1:]])
    others.append(identity())
    assert len({plain, *others}) == 1 + len(others)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A random model of width 32 with the bundled model's tokenizer."""
    from resa_lens.resources import data_path

    folder = tmp_path_factory.mktemp("narrow")
    torch.manual_seed(0)
    file = data_path("tiny-reasoner/tokenizer.json")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(file)), eos_token="<|endoftext|>"
    )
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=6,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_model(str(folder), device="cpu")


def test_another_width_is_matched_by_activations_alone(
    runs: Any, narrow: Any, tmp_path: Path
) -> None:
    ctx, model, a, _ = runs
    save_coder(
        new_coder(32, 96, 8, seed=0), tmp_path / "s" / "layers.3.mlp", "sparsify", Hookpoint(3)
    )
    other = replace(a, folder=tmp_path / "s", points=(Hookpoint(3),), artifact=None)
    if narrow.tokenizer.get_vocab() != model.tokenizer.get_vocab():
        pytest.fail("the narrow model must share the tokenizer")
    matches = match_run(ctx, Side(model, a), Side(narrow, other), CorpusConfig(), QUICK)
    (row,) = matches.layers
    assert row["cosine"] is None
    assert row["agreement"] is None
    assert "widths 128 and 32 have no cosine" in row["cosine_reason"]
    assert row["latents"] == [128, 96]
    assert row["correlation"]["n"] > 0
    frame = pq.read_table(matches.artifact.file("matches.parquet")).to_pandas()
    assert frame["cosine"].isna().all()
    assert all(r["cosine"] is None for r in row["features"])


def test_runs_are_found_by_name(runs: Any, tmp_path: Path) -> None:
    ctx, model, a, b = runs
    name = a.folder.name
    for asked in (name, name.rsplit("-", 1)[1], str(a.folder)):
        assert open_run(ctx, model, asked, "mlp_out").folder == a.folder
    for run, seed in ((a, 0), (b, 1)):
        assert open_run(ctx, model, f"seed:{seed}", "mlp_out").folder == run.folder
    with pytest.raises(BadInputError, match="'seed:7' is no folder and no run"):
        open_run(ctx, model, "seed:7", "mlp_out")
    assert [p.layer for p in open_run(ctx, model, b.folder.name, "mlp_out").points] == [3, 4, 5]
    with pytest.raises(BadInputError, match=f"'absent' is no folder and no run .*{name}"):
        open_run(ctx, model, "absent", "mlp_out")
    with pytest.raises(BadInputError, match="at site resid_post; there: none"):
        open_run(ctx, model, name, "resid_post")


def test_refusals(runs: Any) -> None:
    ctx, model, a, b = runs
    sides = Side(model, a), Side(model, b)
    with pytest.raises(BadInputError, match=r"threshold 0\.0 is out of range"):
        match_run(ctx, *sides, CorpusConfig(), replace(QUICK, threshold=0.0))
    with pytest.raises(BadInputError, match=r"no SAE at layer 4 .*it has layers 3, 5"):
        match_run(ctx, *sides, CorpusConfig(), QUICK, [4])
    third, fourth = (
        Side(model, replace(run, points=(Hookpoint(at),))) for run, at in ((a, 3), (b, 4))
    )
    with pytest.raises(BadInputError, match="no layer in common"):
        match_run(ctx, third, fourth, CorpusConfig(), QUICK)
    stranger: Any = SimpleNamespace(
        name="stranger", tokenizer=SimpleNamespace(get_vocab=lambda: {"a": 0})
    )
    with pytest.raises(BadInputError, match="tiny-reasoner and stranger have different tokenizers"):
        match_run(ctx, sides[0], Side(stranger, b), CorpusConfig(), QUICK)


def test_the_command(runs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    ctx, _, a, b = runs
    options = [
        "match-features", a.folder.name, str(b.folder), "--layers", "3", "--text-tokens", "1500",
        "--workspace", str(ctx.workspace.root),
    ]  # fmt: skip
    done = CliRunner().invoke(app, [*options, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["run_a"] == str(a.folder)
    assert found["layers"][0]["layer"] == 3
    assert (Path(found["folder"]) / "matches.parquet").exists()
    shown = CliRunner().invoke(app, options)
    assert "return (above 0.7)" in shown.stdout
    assert "matched by: correlation; cosine, " in shown.stdout
    item: dict[str, Any] = {"feature": 7, "rule": "either"}
    for by in ("cosine", "correlation"):
        item |= {by: 0.5, f"{by}_match": 9, f"{by}_counted": True}
    found["layers"][0]["features"] = [item] * 33
    capsys.readouterr()
    terminal.show_all(*scores.matches_of("name", found))
    said = capsys.readouterr().out
    assert said.count("either") == scores.SHOWN
    assert f"and {33 - scores.SHOWN} more, in matches.json" in said
    wrong = CliRunner().invoke(app, [*options[:2], "absent", *options[3:]])
    assert wrong.exit_code == 2
    assert "'absent' is no folder" in wrong.output
