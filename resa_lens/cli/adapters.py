"""Adapters after their tuning: merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from resa_lens.cli import common
from resa_lens.cli.common import BaseOption, JsonOption, ModelOption


def merge(
    out: Annotated[Path, typer.Argument(help="The model folder to make.")],
    model: ModelOption = "tiny-reasoner",
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="A PEFT adapter folder; give several to add them up."),
    ] = None,
    scale: Annotated[
        list[float] | None,
        typer.Option(help="Factor on the adapters' change: one for all, or one each [1]."),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(help="Of the stored weights: base (the base's own), float32, bfloat16, ..."),
    ] = "base",
    base: BaseOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a folder that an earlier merge made.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a whole model folder with the adapters' changes in its weights.

    Example: resa-lens merge merged --model tiny-reasoner --adapter resa-workspace/adapters/RUN
    """

    def job() -> tuple[dict[str, Any], Any]:
        from dataclasses import asdict

        from resa_lens.progress import ConsoleReporter
        from resa_lens.tuning.adapters import merge_model

        reporter = ConsoleReporter()
        made = merge_model(
            model, adapter or [], out, scale=scale or 1.0, dtype=dtype, base=base, force=force,
            note=reporter.note,
        )  # fmt: skip
        config = made.manifest.config
        values = {
            "model": str(made.folder), "base": config["base"], "base_hash": config["base_hash"],
            "adapters": config["adapters"], "dtype": made.dtype,
            "weights_hash": made.manifest.hashes["weights"], "rounding": asdict(made.rounding),
            "notes": list(made.notes),
        }  # fmt: skip

        def show() -> None:
            parts = [
                f"{a['scale']:g} x {Path(a['folder']).name} ({a['weights_hash'][:8]})"
                for a in config["adapters"]
            ]
            rounding = made.rounding
            common.show_all(
                f"{config['base']} ({config['base_hash'][:8]}) + {' + '.join(parts)}, stored as "
                f"{made.dtype}; rounding errs by {100 * rounding.lost:.2g} % of the change "
                f"(n = {rounding.weights} weights)",
                f"model: {made.folder}",
            )

        return values, show

    common.run(job, as_json)
