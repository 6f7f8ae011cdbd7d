"""The noise of an evaluation that is asked again as it was."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from resa_lens.artifacts.stage import Context
from resa_lens.evals.engines import StreamingEngine
from resa_lens.evals.resume import AnswerLog, answer_all
from resa_lens.evals.run import Asked, EvalConfig, EvalResult, score


def replicate_noise(
    ctx: Context,
    engine: StreamingEngine,
    questions: Sequence[Asked],
    config: EvalConfig,
    first: EvalResult,
    replicates: int,
    *,
    work: Path,
    settings: Mapping[str, Any],
) -> tuple[dict[str, Any], float]:
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
        work: folder in which each replicate's answers are kept as they come; those that a killed
            run left there are not drawn again.
        settings: of the first replicate's file of answers.

    Returns:
        `accuracies` of all replicates, their standard deviation `sd`, and `flips`: the share of
        answers that are right in some replicate and wrong in another; and the seconds that the
        further replicates took, in all runs.

    Raises:
        BadInputError: a file of answers is damaged.
        RunFailedError: the engine failed; the finished answers are kept.
    """
    verdicts = [[bool(row["correct"]) for row in first.samples]]
    seconds = 0.0
    with ctx.bar("answering again", (replicates - 1) * len(questions)) as advance:
        for number in range(2, replicates + 1):
            # One replicate's answers at a time: they may be long.
            log = AnswerLog(work / f"answers-{number}.jsonl", dict(settings))
            if 0 < len(log.answers) < len(questions):
                ctx.reporter.note(
                    f"replicate {number} of {replicates}: {len(log.answers)} of {len(questions)} "
                    "answers are there; going on"
                )
            with log:
                answers = answer_all(engine, questions, config.generation, log, advance)
            graded = score(questions, answers, extraction=config.extraction)
            seconds += log.seconds + graded.seconds
            verdicts.append([bool(row["correct"]) for row in graded.samples])
    accuracies = [sum(right) / max(1, len(right)) for right in verdicts]
    flips = sum(len(set(answers)) > 1 for answers in zip(*verdicts, strict=True))
    noise = {
        "accuracies": accuracies,
        "sd": statistics.stdev(accuracies),
        "flips": flips / max(1, len(questions)),
    }
    return noise, seconds
