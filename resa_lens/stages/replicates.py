"""The noise of an evaluation that is asked again as it was."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from resa_lens.artifacts.stage import Context
from resa_lens.evals.engines import StreamingEngine
from resa_lens.evals.run import Asked, EvalConfig, EvalResult, score


def replicate_noise(
    ctx: Context,
    engine: StreamingEngine,
    questions: Sequence[Asked],
    config: EvalConfig,
    first: EvalResult,
    replicates: int,
) -> dict[str, Any]:
    """Answer all questions again with the same seeds, and say how far the scores are apart.

    An engine that batches as requests come, or kernels that add in any order, need not give the
    same answer twice; hf in float32 on a CPU does.

    Args:
        ctx: shows the progress.
        engine: that gave the first answers.
        questions: the prompts.
        config: how they are asked.
        first: the first replicate, graded.
        replicates: of all, the first one included.

    Returns:
        `accuracies` of all replicates, their standard deviation `sd`, and `flips`: the share of
        answers that are right in some replicate and wrong in another.
    """
    verdicts = [[bool(row["correct"]) for row in first.samples]]
    with ctx.bar("answering again", (replicates - 1) * len(questions)) as advance:
        for _ in range(replicates - 1):
            answers = engine.generate(
                [one.prompt for one in questions], config.generation,
                streams=[one.stream for one in questions], answered=lambda *_: advance(1),
            )  # fmt: skip
            graded = score(questions, answers, extraction=config.extraction)
            verdicts.append([bool(row["correct"]) for row in graded.samples])
    accuracies = [sum(right) / max(1, len(right)) for right in verdicts]
    flips = sum(len(set(answers)) > 1 for answers in zip(*verdicts, strict=True))
    return {
        "accuracies": accuracies,
        "sd": statistics.stdev(accuracies),
        "flips": flips / max(1, len(questions)),
    }
