"""Two evaluations question by question: compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from resa_lens.cli import common
from resa_lens.cli.common import (
    JsonOption,
    SeedOption,
    WorkspaceOption,
)


def compare(
    run_a: Annotated[Path, typer.Argument(help="An evaluation folder (evals/<run>): the base.")],
    run_b: Annotated[Path, typer.Argument(help="Another on the same questions.")],
    workspace: WorkspaceOption = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Compare two evaluations question by question.

    Example: resa-lens compare resa-workspace/evals/A resa-workspace/evals/B
    """

    def job() -> tuple[dict[str, Any], Any]:
        from dataclasses import asdict

        from resa_lens.pipeline.scores import compare_results, read_eval

        ctx = common.context(workspace, seed, "cpu", "auto", False, None)
        folders = [p if p.exists() else ctx.workspace.path("evals", str(p)) for p in (run_a, run_b)]
        first, second = (read_eval(ctx, folder) for folder in folders)
        paired = compare_results(first, second, seed)

        def show() -> None:
            rows = common.table("B minus A", "", "accuracy", "95 % interval", "n")
            rows.add_row("A", *common.percent(first.accuracy, first.ci, first.n))
            rows.add_row("B", *common.percent(second.accuracy, second.ci, second.n))
            rows.add_row(
                "difference",
                f"{100 * paired.difference:+.1f} points",
                f"{100 * paired.ci[0]:+.1f} to {100 * paired.ci[1]:+.1f}",
                f"{paired.changed} changed",
            )
            common.show_all(rows, f"p = {paired.p_value:.3g} ({paired.note})")

        return asdict(paired), show

    common.run(job, as_json)
