"""Scores from a model's own text: designs, words, artifacts, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from identities import changed_byte, data_file, identity_of, moved, write_rows
from typer.testing import CliRunner

from resa_lens.artifacts.feature_tables import SCORE_SCHEMA
from resa_lens.artifacts.stage import Context
from resa_lens.artifacts.workspace import Workspace
from resa_lens.cli import app
from resa_lens.errors import BadInputError
from resa_lens.features.chance import rule_chance
from resa_lens.features.contrast_nulls import NULLS
from resa_lens.features.evidence import TINY_WORDS
from resa_lens.features.exclusive import CountConfig, count_features, tag_prompt
from resa_lens.features.scores import SCORES
from resa_lens.saes.train import SaeConfig
from resa_lens.stages import feature_scores as module
from resa_lens.stages.feature_scores import ScoreConfig, labelled_batches, score_run
from resa_lens.stages.sae_training import train_run
from resa_lens.stages.saes import SaeRun, split_records
from resa_lens.texts import corpora
from resa_lens.texts.corpora import CorpusConfig
from resa_lens.texts.phases import PHASES

SAE = SaeConfig(latents=128, k=8, tokens=8192)
QUICK = ScoreConfig(tokens=1200, draws=60, top=3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Context, Any, SaeRun]:
    ctx = Context(Workspace(tmp_path_factory.mktemp("scores") / "workspace"), device="cpu")
    model = ctx.model("tiny-reasoner")
    return ctx, model, train_run(ctx, model, [3, 5], SAE, CorpusConfig())


def write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_every_score_of_every_active_feature_is_there(trained: Any) -> None:
    ctx, model, run = trained
    scored = score_run(ctx, model, run, CorpusConfig(), QUICK)
    summary = scored.summary
    assert [s["score"] for s in summary["scores"]] == list(SCORES)
    assert summary["design"] == "phases"
    assert summary["words"] == list(TINY_WORDS)
    assert summary["left_out"] == {}
    assert summary["nulls"]["auc"] == NULLS["phases"]
    assert set(summary["nulls"]) == set(SCORES)
    # Questions and thoughts differ in length: position settles a part of the labels only.
    assert 0.2 < summary["informative"] < 0.9
    table = pq.read_table(scored.artifact.file("scores.parquet"))
    assert table.schema.equals(SCORE_SCHEMA)
    frame = table.to_pandas()
    assert set(frame["layer"]) == {3, 5}
    assert set(frame["score"]) == set(SCORES)
    for _, part in frame.groupby("score"):
        assert ((part["q"] >= part["p"]) & (part["p"] > 0)).all()
        assert not part.duplicated(["layer", "feature"]).any()
    for score in summary["scores"]:
        assert score["tested"] == int((frame["score"] == score["score"]).sum())
        for row in score["top"]:
            if row["ci"] is not None:
                assert row["ci"][0] <= row["value"] <= row["ci"][1]
    manifest = scored.artifact.manifest
    assert manifest.kind == "scores"
    assert manifest.parents == [run.relative]


def test_the_rules_are_those_of_the_counter(trained: Any) -> None:
    ctx, model, run = trained
    scored = score_run(ctx, model, run, CorpusConfig(), QUICK)
    summary = scored.summary
    counts = count_features(model, run.coders(model))
    frame = pq.read_table(scored.artifact.file("scores.parquet")).to_pandas()
    prompt = tag_prompt(model, CountConfig())
    for rule in ("all", "any", "either"):
        part = frame[frame["score"] == rule]
        named = part[part["value"] == 1]
        for item in counts.layers:
            assert tuple(named[named["layer"] == item.layer]["feature"]) == item.features[rule]
            assert (part["layer"] == item.layer).sum() == item.active
        (score,) = [s for s in summary["scores"] if s["score"] == rule]
        assert score["named"] == len(named)
        assert score["named_by_chance"] == pytest.approx(part["null"].sum())
    # A feature of one active token has the chance of the tags' share of the prompt.
    n = len(prompt.ids)
    assert rule_chance("either", frozenset({3}), n, (1, 1), (1, 1)) == pytest.approx(4 / n)


def test_the_labels_are_the_phases(trained: Any) -> None:
    _, model, _ = trained
    records = [r for r in split_records(corpora.load_records("tiny"))[1] if r.steps][:12]
    batches = labelled_batches(model, [records], CorpusConfig(), 10_000, TINY_WORDS, (0, 0))
    assert len({int(d) for b in batches for d in b.documents}) == 12
    for batch in batches:
        tokens = np.array(model.tokenizer.convert_ids_to_tokens(batch.ids.flatten().tolist()))
        assert not batch.keep[torch.tensor(tokens == model.tokenizer.eos_token)].any()
        # Every occurrence is marked; ";" stands in the steps alone, "=" in equations too.
        for word, near in zip(TINY_WORDS, batch.windows.numpy(), strict=True):
            np.testing.assert_array_equal(near, [word in token for token in tokens])
        assert batch.reasoning[batch.windows[1]].all()
        assert (tokens[batch.reasoning.numpy()] == "</think>").sum() == batch.ids.shape[0]
    assert PHASES.index("think") == 1


def test_whole_documents_against_the_same_without_steps(trained: Any) -> None:
    ctx, model, run = trained
    config = replace(
        QUICK, other="no-steps", scores=("auc", "reason_score"), tokens=12_000, draws=400
    )
    summary = score_run(ctx, model, run, CorpusConfig(), config, [5]).summary
    assert summary["design"] == "documents"
    assert summary["reasoning_documents"] > 3
    assert summary["other_documents"] > 3
    assert summary["scores"][0]["significant"] > 0


def test_another_source_loses_its_steps(trained: Any, tmp_path: Path) -> None:
    ctx, model, run = trained
    rows = [
        {"question": f"Name the number after {i}.", "answer": str(i + 1), "steps": f"{i}+1={i + 1}"}
        for i in range(12)
    ]
    other = write(tmp_path / "other.jsonl", rows)
    config = replace(QUICK, other=other, scores=("reason_score",), tokens=4000)
    first = score_run(ctx, model, run, CorpusConfig(), config, [5])
    summary = first.summary
    assert summary["design"] == "documents"
    assert summary["other_documents"] == 12
    groups = module._records(CorpusConfig(), other)
    assert {r.steps for r in groups[1]} == {""}
    # The file's content is part of the identity.
    write(tmp_path / "other.jsonl", rows[:-1])
    again = score_run(ctx, model, run, CorpusConfig(), config, [5])
    assert again.artifact.manifest.identity != first.artifact.manifest.identity
    assert again.summary["other_documents"] == 11


def test_a_finished_artifact_is_read(
    trained: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ctx, model, run = trained
    config = replace(QUICK, scores=("auc",))
    first = score_run(ctx, model, run, CorpusConfig(), config, [3])
    monkeypatch.setattr(module, "labelled_batches", lambda *_: pytest.fail("made anew"))
    for where in (ctx, moved(ctx, tmp_path / "moved")):
        again = score_run(where, model, run, CorpusConfig(), config, [3])
        assert again.summary == first.summary
        assert again.artifact.path.is_relative_to(where.workspace.root)
    with pytest.raises(pytest.fail.Exception):
        score_run(ctx, model, run, CorpusConfig(), replace(config, draws=61), [3])


def test_what_scores_are_made_from(trained: Any, tmp_path: Path) -> None:
    ctx, model, saes = trained
    file = data_file(tmp_path / "data.jsonl")
    corpus = CorpusConfig(source=str(file))
    other = data_file(tmp_path / "other.jsonl", 12)

    def identity(
        corpus: CorpusConfig = corpus, run: SaeRun = saes, seed: int = 0, layer: int = 3,
        **fields: Any,
    ) -> str:  # fmt: skip
        where = replace(ctx, seed=seed)
        return identity_of(score_run, where, model, run, corpus, replace(QUICK, **fields), [layer])

    plain = identity()
    assert identity(top=7) == plain
    copy = shutil.copy(file, tmp_path / "copy.jsonl")
    assert identity(CorpusConfig(source=str(copy))) == plain
    other_copy = shutil.copy(other, tmp_path / "other_copy.jsonl")
    assert identity(other=str(other)) == identity(other=str(other_copy))
    others = [
        identity(scores=("auc",)),
        identity(other="no-steps"),
        identity(other=str(other)),
        identity(tokens=1300),
        identity(words=("=",)),
        identity(window=(1, 1)),
        identity(draws=61),
        identity(correction="holm"),
        identity(count=CountConfig(prompt="steps")),
        identity(replace(corpus, seed=1)),
        identity(seed=1),
        identity(layer=5),
        identity(run=changed_byte(saes, tmp_path / "changed", 3)),
    ]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    write_rows(file, [{**rows[0], "answer": "another"}, *rows[1:]])
    others.append(identity())
    assert len({plain, *others}) == 1 + len(others)


def test_fewer_are_shown_of_what_was_kept_and_more_are_made(trained: Any) -> None:
    ctx, model, run = trained
    config = replace(QUICK, scores=("frequency_ratio",))

    def top(count: int) -> tuple[Path, list[dict[str, Any]]]:
        scored = score_run(ctx, model, run, CorpusConfig(), replace(config, top=count), [3])
        assert scored.summary["top"] == count
        return scored.artifact.path, scored.summary["scores"][0]["top"]

    folder, three = top(3)
    written = (folder / "scores.parquet").stat().st_mtime_ns
    assert top(2) == (folder, three[:2])
    assert (folder / "scores.parquet").stat().st_mtime_ns == written
    assert top(4)[0] == folder
    assert top(4)[1][:3] == three
    assert len(top(4)[1]) == 4
    assert (folder / "scores.parquet").stat().st_mtime_ns > written


def test_text_without_steps_is_refused_before_saes_are_trained_on_it(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain.jsonl", [{"question": "Add 2 and 3.", "answer": "5"}] * 4)
    place = tmp_path / "w"
    done = CliRunner().invoke(app, ["score-features", "--data", plain, "--workspace", str(place)])
    assert done.exit_code == 2
    assert "has no steps" in done.stderr
    assert not place.exists()


def test_groups_of_saes_give_what_all_at_once_give(
    trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx, model, run = trained
    forced = replace(ctx, force=True)
    config = replace(QUICK, scores=("auc",))
    whole = score_run(forced, model, run, CorpusConfig(), config).summary
    monkeypatch.setattr("resa_lens.stages.saes.FIT_BYTES", 1)
    assert score_run(forced, model, run, CorpusConfig(), config).summary == whole


def test_holm_calls_no_more_than_benjamini_hochberg(trained: Any) -> None:
    ctx, model, run = trained
    bh, holm = (
        score_run(
            ctx, model, run, CorpusConfig(), replace(QUICK, scores=("auc",), correction=name)
        ).summary["scores"][0]
        for name in ("bh", "holm")
    )
    assert holm["significant"] <= bh["significant"]
    assert holm["tested"] == bh["tested"]


def test_words_that_do_not_occur(trained: Any) -> None:
    ctx, model, run = trained
    config = replace(QUICK, words=("wait", "however"))
    summary = score_run(ctx, model, run, CorpusConfig(), config, [5]).summary
    assert "reason_score" not in [s["score"] for s in summary["scores"]]
    assert "('wait', 'however') occurs" in summary["left_out"]["reason_score"]
    asked = replace(config, scores=("reason_score",))
    with pytest.raises(BadInputError, match=r"none of the reasoning words \('wait', 'however'\)"):
        score_run(ctx, model, run, CorpusConfig(), asked, [5])
    with pytest.raises(BadInputError, match=r"\(no word given\)"):
        score_run(ctx, model, run, CorpusConfig(), replace(asked, words=()), [5])


def test_refusals(trained: Any, tmp_path: Path) -> None:
    ctx, model, run = trained
    plain = write(tmp_path / "plain.jsonl", [{"question": "Add 2 and 3.", "answer": "5"}] * 4)
    with pytest.raises(BadInputError, match=r"plain\.jsonl' has no steps"):
        score_run(ctx, model, run, CorpusConfig(source=plain), QUICK)
    empty = write(tmp_path / "empty.jsonl", [])
    with pytest.raises(BadInputError, match="is empty"):
        score_run(ctx, model, run, CorpusConfig(source=empty), QUICK)
    with pytest.raises(BadInputError, match="is empty"):
        score_run(ctx, model, run, CorpusConfig(), replace(QUICK, other=empty))
    with pytest.raises(BadInputError, match="score 'best' is unknown"):
        score_run(ctx, model, run, CorpusConfig(), replace(QUICK, scores=("best",)))
    with pytest.raises(BadInputError, match="correction 'none' is unknown; use bh or holm"):
        score_run(ctx, model, run, CorpusConfig(), replace(QUICK, correction="none"))
    with pytest.raises(BadInputError, match="1 document holds reasoning text"):
        score_run(ctx, model, run, CorpusConfig(), replace(QUICK, tokens=1))
    one = write(tmp_path / "one.jsonl", [{"question": "Add 2 and 3.", "answer": "5"}])
    with pytest.raises(BadInputError, match="1 document holds other text"):
        score_run(ctx, model, run, CorpusConfig(), replace(QUICK, other=one))
    assert not list(ctx.workspace.path("scores").rglob(".tmp-*"))


def test_the_command(trained: Any) -> None:
    ctx, _, run = trained
    options = [
        "score-features", "--layers", "3,5", "--latents", "128", "--k", "8",
        "--text-tokens", "1200", "--draws", "60", "--top", "2",
        "--workspace", str(ctx.workspace.root),
    ]  # fmt: skip
    done = CliRunner().invoke(app, [*options, "--score", "auc", "--score", "any", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert [s["score"] for s in found["scores"]] == ["auc", "any"]
    assert len(found["scores"][0]["top"]) == 2
    assert (Path(found["folder"]) / "scores.parquet").exists()
    shown = CliRunner().invoke(app, [*options, "--score", "auc", "--score", "any"])
    assert "features with q < 0.05 (bh)" in shown.stdout
    assert "tags at random places would" in shown.stdout
    wrong = CliRunner().invoke(app, [*options, "--score", "best"])
    assert wrong.exit_code == 2
    assert "score 'best' is unknown" in wrong.output
    assert run.folder.exists()
