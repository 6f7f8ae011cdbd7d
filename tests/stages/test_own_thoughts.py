"""The model's own thoughts as an SAE's data: what is written, resumed, planned and remembered."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from resa_lens.artifacts.stage import Context
from resa_lens.artifacts.workspace import Workspace
from resa_lens.cli import app
from resa_lens.errors import BadInputError
from resa_lens.progress import SILENT
from resa_lens.stages.own_thoughts import FILE, chosen, with_own_thoughts
from resa_lens.texts import prompts
from resa_lens.texts.config import check_data
from resa_lens.texts.corpora import CorpusConfig, Record, load_records

CORPUS = CorpusConfig(own_thoughts=5, sequence=64)
RECORDS = [replace(record, steps="") for record in load_records("tiny")[:12]]


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    place = Workspace(str(tmp_path / "workspace"))
    return Context(place, SILENT, 0, "cpu", "auto", False, None)


@torch.no_grad()
def plain_thought(model: Any, record: Record) -> str:
    """One token after the other by the largest logit, up to `</think>` or 64 tokens."""
    tokenizer, ids = model.tokenizer, model.tokenizer(prompts.question_prompt(record.question))
    ids = torch.tensor([ids["input_ids"]])
    start = ids.shape[1]
    for _ in range(CORPUS.sequence):
        ids = torch.cat([ids, model.model(ids).logits[:, -1:].argmax(-1)], 1)
        text = tokenizer.decode(ids[0, start:])
        if prompts.THINK_CLOSE in text or ids[0, -1] == tokenizer.eos_token_id:
            break
    return text.partition(prompts.THINK_CLOSE)[0].replace(tokenizer.eos_token, "").strip()


def test_the_thoughts_are_what_the_model_writes(tiny: Any, ctx: Context, tmp_path: Path) -> None:
    records = with_own_thoughts(ctx, tiny, RECORDS, CORPUS, tmp_path / "work")
    asked = chosen(RECORDS, CORPUS)
    assert len(asked) == len(set(asked)) == 5
    for index, (before, after) in enumerate(zip(RECORDS, records, strict=True)):
        assert replace(after, steps="") == before
        assert after.steps == (plain_thought(tiny, before) if index in asked else "")
    assert all(records[index].steps for index in asked)


def test_a_killed_run_goes_on_from_whole_lines(tiny: Any, ctx: Context, tmp_path: Path) -> None:
    kept = ["first", "second"]
    lines = "".join(f"{json.dumps(text)}\n" for text in kept)
    (tmp_path / FILE).write_text(f'{lines}"cut o')
    records = with_own_thoughts(ctx, tiny, RECORDS, CORPUS, tmp_path)
    thoughts = [records[index].steps for index in chosen(RECORDS, CORPUS)]
    assert thoughts[:2] == kept
    assert thoughts[2:] == [plain_thought(tiny, RECORDS[i]) for i in chosen(RECORDS, CORPUS)[2:]]
    assert [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()] == thoughts


def test_saes_on_own_thoughts_are_planned_trained_and_others(tmp_path: Path) -> None:
    data = tmp_path / "plain.jsonl"
    rows = ({"question": r.question, "answer": r.answer} for r in RECORDS)
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    common = [
        "train-saes", "--layers", "3", "--tokens", "512", "--latents", "64", "--no-report",
        "--data", str(data), "--workspace", str(tmp_path / "workspace"), "--json",
    ]  # fmt: skip

    def run(*options: str) -> Any:
        result = CliRunner().invoke(app, [*common, *options])
        assert result.exit_code == 0, (result.stderr, result.exception)
        return json.loads(result.stdout), result.stderr

    plan, _ = run("--own-thoughts", "6", "--plan")
    assert plan["own_thoughts_seconds"] > 0
    own, said = run("--own-thoughts", "6")
    assert "never see a thought" not in said
    plain, said = run()
    assert "never see a thought" in said
    folders = {Path(result["saes"][0]["path"]).parent for result in (own, plain)}
    assert len(folders) == 2
    manifests = [json.loads((f / "manifest.json").read_text())["config"]["corpus"] for f in folders]
    shares = sorted((c["own_thoughts"], c["thought_share"]) for c in manifests)
    assert shares == [(0, 0.0), (6, 0.5)]
    assert not list((tmp_path / "workspace").rglob(FILE))


def test_a_share_without_steps_names_the_way_out(tmp_path: Path) -> None:
    data = tmp_path / "plain.jsonl"
    data.write_text('{"question": "What is 2 + 2?", "answer": "4"}\n')
    corpus = CorpusConfig(str(data), thought_share=0.5)
    with pytest.raises(BadInputError, match="--own-thoughts"):
        check_data(corpus)
    check_data(replace(corpus, own_thoughts=1))
