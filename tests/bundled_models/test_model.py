"""The bundled model must reason: well with its steps, badly when made to answer at once."""

from __future__ import annotations

import pytest

from benchmarks.bundled_models.questions import TRAIN_LEVELS, draw_unique
from resa_lens.evals.engines import HFEngine
from resa_lens.evals.run import EvalConfig, evaluate
from resa_lens.evals.tasks import EvalItem

QUESTIONS = 1_000


@pytest.mark.slow
def test_it_reasons_on_a_thousand_held_out_questions(tiny):
    per_level = dict.fromkeys(TRAIN_LEVELS, QUESTIONS // 3 + 1)
    drawn = draw_unique(4_711, "test", per_level)[:QUESTIONS]
    items = [EvalItem(str(i), q.question, q.answer, q.family, q.level) for i, q in enumerate(drawn)]
    engine = HFEngine(tiny.model, tiny.tokenizer)
    steps = evaluate(engine, items, EvalConfig())
    direct = evaluate(engine, items, EvalConfig(prompt_style="direct"))
    assert steps.n == direct.n == QUESTIONS
    assert 0.55 <= steps.accuracy <= 0.80
    assert steps.accuracy - direct.accuracy >= 0.40
