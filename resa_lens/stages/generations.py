"""A model's own answers as documents, kept as they come."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from resa_lens.artifacts.stage import Context
from resa_lens.evals.config import GenerationConfig, TextEngine
from resa_lens.evals.engines.choice import check_engine, open_engine
from resa_lens.evals.tasks import EvalItem
from resa_lens.files import write_errors
from resa_lens.models.host import Model
from resa_lens.texts import prompts

CHUNK = 64
"""Questions that are answered between two writes of the generations."""


def documents_of_answers(
    ctx: Context,
    model: Model,
    items: Sequence[EvalItem],
    config: GenerationConfig,
    engine: TextEngine,
    work: Path,
) -> list[str]:
    """Return the questions with a model's greedy answers; what a killed run had answered is read.

    Args:
        ctx: shows the progress.
        model: it answers.
        items: the questions.
        config: lengths and stop strings.
        engine: what generates.
        work: folder of what is finished.

    Raises:
        BadInputError: an engine that is not installed.
        RunFailedError: the engine failed; the finished answers are kept.
    """
    questions = [prompts.question_prompt(item.question) for item in items]
    file = work / "generations.jsonl"
    texts: list[str] = []
    if file.exists():
        texts = [json.loads(line) for line in file.read_text().splitlines()]
    check_engine(engine)
    if len(texts) == len(questions):
        return texts
    label = f"answering {len(questions)} questions"
    with open_engine(model, engine) as generator, ctx.bar(label, len(questions)) as advance:
        advance(len(texts))
        for first in range(len(texts), len(questions), CHUNK):
            some = questions[first : first + CHUNK]
            answers = generator.generate(some, config)
            texts += [p + a.text for p, a in zip(some, answers, strict=True)]
            with write_errors(file):
                temporary = file.with_suffix(".tmp")
                temporary.write_text("".join(json.dumps(text) + "\n" for text in texts))
                temporary.replace(file)
            advance(len(some))
    return texts
