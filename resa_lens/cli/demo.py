"""The main job in one command."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from resa_lens.cli import common
from resa_lens.cli.common import (
    DeviceOption,
    DtypeOption,
    ForceOption,
    JsonOption,
    ModelOption,
    SeedOption,
    ThreadsOption,
    WorkspaceOption,
    YesOption,
)


def demo(
    model: ModelOption = "tiny-reasoner",
    budget: Annotated[str, typer.Option(help="full, or test for a quick pass.")] = "full",
    learning_rate: Annotated[
        float, typer.Option(help="Of the tuning; the paper's is 1e-6, for a larger model.", min=0.0)
    ] = 1e-4,
    workspace: WorkspaceOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    threads: ThreadsOption = None,
    force: ForceOption = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run the main job end to end: SAEs, counts, mixture, recommendation, tuning, scores, page.

    Example: resa-lens demo
    """

    def job() -> tuple[dict[str, Any], Any]:
        from resa_lens.features.exclusive import RULES
        from resa_lens.hookpoints import describe_layer
        from resa_lens.pipeline import demo as pipeline

        ctx = common.context(workspace, seed, device, dtype, force, threads)
        ctx.reporter.note(
            "expected: about 3 minutes on two cores, 1 GB of memory, 60 MB on disk"
            if budget == "full"
            else "expected: about half a minute, 1 GB of memory, 15 MB on disk"
        )
        result = pipeline.demo(ctx, model, budget, learning_rate)
        found, tuned = result.discovery, result.tuned
        made = found.recommendation

        def show() -> None:
            layers = common.table("Layers", "layer", *RULES, "SAE FVU", "")
            for item in found.counts.layers:
                layers.add_row(
                    describe_layer(item.layer, made.n_layers),
                    *[str(len(item.features[rule])) for rule in RULES],
                    f"{found.saes.quality[item.layer]['fvu']:.4f}",
                    "tuned" if item.layer == tuned.layer else "",
                )
            scores = common.table("Scores", "", "accuracy", "95 % interval", "n")
            for row in pipeline.score_rows(tuned):
                scores.add_row(*row)
            common.show_all(
                layers,
                f"verdict: {result.fits['all'].verdict}",
                made.reason,
                scores,
                f"everything lies in {ctx.workspace.root}:",
                f"  SAEs            {found.saes.folder}",
                f"  counts          {found.counts_folder}",
                f"  recommendation  {found.folder}",
                f"  adapter         {tuned.adapter}",
                f"  scores          {tuned.base_folder}\n                  {tuned.tuned_folder}",
                f"  page            {result.page}",
                "next: resa-lens app",
            )

        return result.to_dict(), show

    common.run(job, as_json)
