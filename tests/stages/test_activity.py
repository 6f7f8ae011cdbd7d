"""Activity as an artifact: tables, resuming, groups that fit, the model's own generations."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from identities import changed_byte, data_file, identity_of, moved, write_rows

from resa_lens.artifacts.feature_tables import (
    ADDED,
    EXAMPLE_SCHEMA,
    FEATURE_SCHEMA,
    STRONGEST,
    THIRDS,
    read_feature,
)
from resa_lens.artifacts.stage import Context
from resa_lens.artifacts.workspace import Workspace
from resa_lens.errors import BadInputError
from resa_lens.features.activity import ActivityConfig
from resa_lens.models.hookpoints import Hookpoint, parse_feature
from resa_lens.progress import Reporter
from resa_lens.saes.baselines import random_coder
from resa_lens.saes.coder import new_coder
from resa_lens.saes.train import SaeConfig
from resa_lens.stages import activity as pipeline
from resa_lens.stages.activity import activity_run, feature_page
from resa_lens.stages.sae_training import train_run
from resa_lens.stages.saes import SaeRun
from resa_lens.texts.corpora import CorpusConfig

CORPUS = CorpusConfig()
CONFIG = ActivityConfig(examples=3)


class Notes(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def ctx(tmp_path, tiny):
    made = Context(Workspace(tmp_path / "workspace"), Notes())
    made.models["tiny-reasoner|"] = tiny
    return made


@pytest.fixture(scope="module")
def saes(tiny, tmp_path_factory) -> SaeRun:
    """Random directions at three layers, without a manifest."""
    folder = tmp_path_factory.mktemp("saes")
    points = tuple(Hookpoint(n) for n in (2, 5, 8))
    for point in points:
        coder = random_coder(new_coder(tiny.d_model, 200, 8, seed=0), point.layer)
        coder.save_to_disk(folder / point.sparsify)
    return SaeRun(folder, points, {}, 0, 0.0, False)


def tables(folder):
    return [pq.read_table(folder / f"{n}.parquet") for n in ("features", "examples", "documents")]


def check_intervals(row, shown, phases):
    """Each phase in which a feature fires has its strongest places and as many drawn ones."""
    assert [example["rank"] for example in shown] == list(range(len(shown)))
    for phase in phases:
        here = [example for example in shown if example["phase"] == phase]
        strongest = [e["value"] for e in here if e["interval"] == STRONGEST]
        drawn = {third: [e["value"] for e in here if e["interval"] == third] for third in THIRDS}
        n = sum(map(len, drawn.values()))
        if not row[f"tokens_fired_{phase}"]:
            assert not here
            continue
        assert strongest == sorted(strongest, reverse=True)
        assert strongest[0] == pytest.approx(row[f"max_{phase}"])
        assert 1 <= len(strongest) <= 3
        assert 1 <= n <= min(3, row[f"tokens_fired_{phase}"])
        # Of three one each, in their order.
        ordered = [value for third in THIRDS for value in drawn[third]]
        assert ordered == sorted(ordered)
        if n == 3:
            assert [len(values) for values in drawn.values()] == [1, 1, 1]


def check_tokens(row):
    """The tokens at which it fires stand with their share of all firings, and the mean there."""
    shares = row["fires_on_share"]
    assert shares == sorted(shares, reverse=True)
    assert len(row["fires_on"]) == len(shares) == len(row["fires_on_mean"]) <= 10
    assert sum(shares) <= 1 + 1e-6
    if len(shares) < 10:
        assert sum(shares) == pytest.approx(1)
        means = zip(shares, row["fires_on_mean"], strict=True)
        assert sum(share * mean for share, mean in means) == pytest.approx(row["mean"], rel=1e-5)


def test_tables_have_their_schema_and_agree(ctx, tiny, saes):
    run = activity_run(ctx, tiny, saes, CORPUS, CONFIG, tokens=3000)
    features, examples, documents = tables(run.artifact.path)
    assert features.schema.names == FEATURE_SCHEMA.names
    assert examples.schema.names == EXAMPLE_SCHEMA.names
    assert sum(run.tokens.values()) == sum(map(len, documents["ids"].to_pylist()))
    assert run.documents == len(documents)
    rows = features.to_pylist()
    keys = [(r["layer"], r["feature"]) for r in rows]
    assert keys == sorted(keys)
    assert {layer for layer, _ in keys} == {2, 5, 8}
    texts = {d["document"]: d["ids"] for d in documents.to_pylist()}
    for row in rows[::37]:
        found, shown = read_feature(run.artifact.path, row["layer"], row["feature"])
        assert found == row
        assert sum(row["histogram"]) == row["tokens_fired"]
        assert row["tokens_fired"] == sum(row[f"tokens_fired_{p}"] for p in run.tokens)
        assert len(row["top_tokens"]) == 10
        assert len(row["lens_histogram"]) == 40
        assert sum(row["lens_histogram"]) == tiny.model.config.vocab_size
        assert shown[0]["value"] == pytest.approx(row["max"])
        check_intervals(row, shown, run.tokens)
        check_tokens(row)
        for example in shown:
            at = example["position"] - example["start"]
            assert example["acts"][at] == example["value"]
            ids = texts[example["document"]][example["start"] :][: len(example["tokens"])]
            assert example["tokens"] == [tiny.tokenizer.decode([i]) for i in ids]
    layer = next(x for x in run.layers if x["layer"] == 5)
    assert layer["alive"] == sum(key[0] == 5 for key in keys)
    assert layer["l0"] == pytest.approx(8, abs=1e-6)


def test_a_stopped_run_goes_on_to_the_same_tables(ctx, tiny, saes, tmp_path, monkeypatch):
    whole = activity_run(ctx, tiny, saes, CORPUS, CONFIG, tokens=3000)
    other = Context(Workspace(tmp_path / "other"), Notes())
    real = pipeline.measure_activity
    monkeypatch.setattr("resa_lens.saes.checkpoint.COST", 10**9)

    def stopping(*args, store=None, **options):
        if store is None:
            return real(*args, **options)
        keep = store.keep

        def stop(step, steps, tallies):
            keep(step, steps, tallies)
            if step == steps // 2:
                store.write(step, tallies)
                raise KeyboardInterrupt

        store.keep = stop
        return real(*args, store=store, **options)

    monkeypatch.setattr(pipeline, "measure_activity", stopping)
    with pytest.raises(KeyboardInterrupt):
        activity_run(other, tiny, saes, CORPUS, CONFIG, tokens=3000)
    monkeypatch.setattr(pipeline, "measure_activity", real)
    again = activity_run(other, tiny, saes, CORPUS, CONFIG, tokens=3000)
    assert again.resumed_at > 0
    for a, b in zip(tables(whole.artifact.path), tables(again.artifact.path), strict=True):
        assert a.equals(b)
    assert not list(again.artifact.path.parent.glob(".work-*"))


def test_layers_that_do_not_fit_are_measured_in_turn(ctx, tiny, saes, tmp_path, monkeypatch):
    whole = activity_run(ctx, tiny, saes, CORPUS, CONFIG, tokens=2000)
    other = Context(Workspace(tmp_path / "other"), Notes())
    with pytest.raises(BadInputError, match="one layer of 200 latents needs"):
        activity_run(other, tiny, saes, CORPUS, CONFIG, tokens=2000, memory_limit_mb=1.0)
    seen: list[int] = []
    real = pipeline.measure_activity
    monkeypatch.setattr(
        pipeline,
        "measure_activity",
        lambda model, coders, *a, **o: (seen.append(len(coders)), real(model, coders, *a, **o))[1],
    )
    meter = pipeline.Meter(tiny.device)
    # Room for one layer more than the process has now, and not for two.
    limit = meter.now() + 40 + pipeline.ROOM_MB
    monkeypatch.setattr(pipeline, "needed_bytes", lambda *a: 30 * 2**20)
    parted = activity_run(other, tiny, saes, CORPUS, CONFIG, tokens=2000, memory_limit_mb=limit)
    assert seen[3:] == [1, 1, 1]  # after three probes of one layer
    assert any("in 3 passes" in line for line in other.reporter.lines)
    for a, b in zip(tables(whole.artifact.path), tables(parted.artifact.path), strict=True):
        assert a.equals(b)


def test_generations_are_looked_at_with_their_phases(ctx, tiny, saes):
    run = activity_run(ctx, tiny, saes, CORPUS, CONFIG, generations=5, layers=[5])
    assert run.documents == 5
    assert min(run.tokens.values()) > 0
    _, _, documents = tables(run.artifact.path)
    for row in documents.to_pylist():
        text = tiny.tokenizer.decode(row["ids"])
        assert text.count("<think>") == 1
        assert "</think>" in text
        assert row["phases"] == sorted(row["phases"])
    assert [x["layer"] for x in run.layers] == [5]


def test_a_finished_run_of_known_saes_is_read(ctx, tiny):
    sae = SaeConfig(latents=64, k=4, tokens=2048, batch=2)
    saes = train_run(ctx, tiny, [4], sae, CORPUS)
    first = activity_run(ctx, tiny, saes, CORPUS, CONFIG, tokens=1000)
    second = activity_run(ctx, tiny, saes, CORPUS, CONFIG, tokens=1000)
    assert second.artifact.path == first.artifact.path
    assert second.layers == first.layers
    assert "done before" in ctx.reporter.lines[-1]


def test_what_an_activity_run_is_made_from(ctx, tiny, saes, tmp_path):
    file = data_file(tmp_path / "data.jsonl")
    corpus = CorpusConfig(source=str(file))

    def identity(corpus=corpus, config=CONFIG, run=saes, **options):
        options = {"layers": [5], "tokens": 500, **options}
        return identity_of(activity_run, ctx, tiny, run, corpus, config, **options)

    plain = identity()
    assert identity(memory_limit_mb=3000.0) == plain
    copy = shutil.copy(file, tmp_path / "copy.jsonl")
    assert identity(CorpusConfig(source=str(copy))) == plain
    others = [
        identity(replace(corpus, seed=1)),
        identity(replace(corpus, system_prompt="steps")),
        identity(config=replace(CONFIG, examples=4)),
        identity(config=replace(CONFIG, threshold=0.5)),
        identity(layers=[2, 5]),
        identity(tokens=600),
        identity(CORPUS, generations=2),
        identity(CORPUS, generations=3),
        identity(CORPUS, generations=2, max_new_tokens=32),
        identity(run=changed_byte(saes, tmp_path / "changed", 5)),
    ]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    write_rows(file, [{**rows[0], "answer": "another"}, *rows[1:]])
    others.append(identity())
    assert len({plain, *others}) == 1 + len(others)
    # A byte of an SAE that is not looked at is no part of it.
    other_layer = changed_byte(saes, tmp_path / "elsewhere", 2)
    assert identity(CorpusConfig(source=str(copy)), run=other_layer) == plain


def test_a_moved_workspace_has_the_finished_run(ctx, tiny, saes, tmp_path):
    first = activity_run(ctx, tiny, saes, CORPUS, CONFIG, tokens=500, layers=[2])
    there = moved(ctx, tmp_path / "moved")
    again = activity_run(there, tiny, saes, CORPUS, CONFIG, tokens=500, layers=[2])
    assert "done before" in ctx.reporter.lines[-1]
    assert again.artifact.path.is_relative_to(tmp_path / "moved")
    assert replace(again, artifact=first.artifact) == first


def test_tables_of_recipe_1_are_read(ctx, tiny, saes):
    run = activity_run(ctx, tiny, saes, CORPUS, CONFIG, tokens=1000, layers=[2])
    feature = pq.read_table(run.artifact.path / "features.parquet")["feature"][0].as_py()
    row, shown = read_feature(run.artifact.path, 2, feature)
    for name in ("features", "examples"):
        file = run.artifact.path / f"{name}.parquet"
        table = pq.read_table(file)
        pq.write_table(table.drop_columns(sorted(ADDED.keys() & set(table.column_names))), file)
    old, examples = read_feature(run.artifact.path, 2, feature)
    assert old == {name: value for name, value in row.items() if name not in ADDED}
    assert [e["value"] for e in examples] == [e["value"] for e in shown]


def test_a_features_page_computes_what_the_tables_lack(ctx, tiny, saes, monkeypatch):
    full = activity_run(ctx, tiny, saes, CORPUS, CONFIG, tokens=2000)
    feature = pq.read_table(full.artifact.path / "features.parquet")["feature"][0].as_py()
    with_tables = feature_page(tiny, saes, full, 2, feature)
    monkeypatch.setattr(pipeline, "LENS_PRODUCTS", 0)
    ctx.force = True
    lean = activity_run(ctx, tiny, saes, CORPUS, CONFIG, tokens=2000)
    assert read_feature(lean.artifact.path, 2, feature)[0]["top_tokens"] is None
    without = feature_page(tiny, saes, lean, 2, feature)
    assert without["top_tokens"] == with_tables["top_tokens"]
    assert without["nearest"] == with_tables["nearest"]
    low, high = without["density_ci"]
    assert 0 <= low <= without["density"] <= high <= 1


def test_features_that_are_none(ctx, tiny, saes):
    run = activity_run(ctx, tiny, saes, CORPUS, CONFIG, tokens=500, layers=[2])
    with pytest.raises(BadInputError, match=r"feature 200 at layer 2 .* latents 0 to 199"):
        feature_page(tiny, saes, run, 2, 200)
    with pytest.raises(BadInputError, match="was not measured"):
        feature_page(tiny, saes, run, 5, 0)
    with pytest.raises(BadInputError, match="has no SAE at layer 3"):
        feature_page(tiny, saes, run, 3, 0)
    whole = (run.artifact.path / "features.parquet").read_bytes()
    (run.artifact.path / "features.parquet").write_bytes(whole[:500])
    with pytest.raises(BadInputError, match=r"features\.parquet was changed since it was written"):
        feature_page(tiny, saes, run, 2, 7)
    (run.artifact.path / "features.parquet").write_bytes(whole)
    assert parse_feature("3rd:7", 12) == (2, 7)
    for wrong in ("5", "5:", "5:x", ":3", "99:1"):
        with pytest.raises(BadInputError, match=r"LAYER:FEATURE|is not a layer|out of range"):
            parse_feature(wrong, 12)


@pytest.mark.recorded
def test_killed_at_any_moment_it_goes_on(tmp_path):
    """kill -9 of the command, then the same tables as of a run that nobody killed."""

    def start(workspace: str) -> subprocess.Popen[bytes]:
        command = [
            sys.executable, "-c", "from resa_lens.cli import main; main()", "activity",
            "--layers", "3,6", "--saes", str(tmp_path / "saes"), "--text-tokens", "20000",
            "--workspace", str(tmp_path / workspace), "--json",
        ]  # fmt: skip
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    trained = subprocess.run(
        [
            sys.executable, "-c", "from resa_lens.cli import main; main()", "train-saes",
            "--layers", "3,6", "--tokens", "8192", "--latents", "512", "--no-report",
            "--workspace", str(tmp_path / "made"), "--json",
        ],
        capture_output=True, check=True,
    )  # fmt: skip
    (tmp_path / "saes").symlink_to(json.loads(trained.stdout)["folder"])
    whole = json.loads(start("whole").communicate(timeout=200)[0])
    manifest = json.loads((Path(whole["folder"]) / "manifest.json").read_text())
    planned = manifest["results"]["planned_memory_mb"]
    assert planned == pytest.approx(manifest["peak_memory_mb"], rel=0.15)
    process = start("killed")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").rglob("checkpoint-*/state.json")):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    again = json.loads(start("killed").communicate(timeout=200)[0])
    assert again["resumed_at"] > 0
    assert again["layers"] == whole["layers"]
    for name in ("features", "examples", "documents"):
        a, b = (pq.read_table(f"{x['folder']}/{name}.parquet") for x in (whole, again))
        assert a.equals(b)
