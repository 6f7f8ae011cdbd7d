"""The noise of an evaluation asked again as it was: what generated it, and what it changes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from resa_lens.artifacts.stage import Context
from resa_lens.evals.engines import StreamingEngine
from resa_lens.evals.run import Asked, EvalConfig, EvalResult, score
from resa_lens.models.host import Model


def generated_by(model: Model, config: EvalConfig, engine: str) -> str:
    """Say what decides an answer's last bits, and so some answers, besides model and questions."""
    package = "vllm" if engine == "vllm" else "transformers"
    parts = [f"{package} {metadata.version(package)}"]
    # In float32 the batch is below what a token's choice feels; vllm makes batches of its own.
    if engine != "vllm" and model.dtype != "float32":
        parts.append(f"batches of {config.generation.batch_size}")
    if engine == "vllm":
        parts.append("tensor parallel over 1")
    return ", ".join(parts)


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
