"""Commands about SAEs on disk: convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from resa_lens.cli import common
from resa_lens.cli.common import JsonOption


def convert(
    source: Annotated[str, typer.Argument(help="An SAE's folder, a folder of SAEs or a hub id.")],
    target: Annotated[Path, typer.Argument(help="The folder that is made.")],
    to: Annotated[str, typer.Option(help="sparsify, saelens or dictionary_learning.")],
    layers: Annotated[
        str | None, typer.Option(help='Only these: "12", "1-26", "3,13th" or "all".')
    ] = None,
    site: Annotated[str, typer.Option(help="Of a hub repository: mlp_out or resid_post.")] = (
        "mlp_out"
    ),
    k: Annotated[int | None, typer.Option(help="Where the source does not say it.", min=1)] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read ae.pt, as weights only.")
    ] = False,
    cast: Annotated[
        bool, typer.Option("--cast", help="Turn other floating types into float32.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a target that holds SAEs.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Convert SAEs between sparsify, SAELens and dictionary_learning.

    Example: resa-lens convert saes/layers.12.mlp out --to saelens
    """

    def job() -> tuple[dict[str, Any], Any]:
        from resa_lens.errors import BadInputError
        from resa_lens.hookpoints import Hookpoint, parse_layers
        from resa_lens.progress import ConsoleReporter
        from resa_lens.saes.convert import convert as run
        from resa_lens.saes.hub import find_sae_folder

        if layers == "default":
            raise BadInputError("layers 'default' are those of a model; use all, 12 or 1-26")
        # No model says how many layers there are.
        chosen = None if layers is None else parse_layers(layers, 10_000)
        if layers is not None and (layers == "all" or "*" in layers):
            chosen = None
        points = None if chosen is None else [Hookpoint(layer, site) for layer in chosen]
        folder = find_sae_folder(source, points)
        made = run(
            folder, target, to, layers=chosen, allow_pickle=allow_pickle, cast=cast, k=k,
            force=force, reporter=ConsoleReporter(),
        )  # fmt: skip
        values = {
            "source": str(folder), "target": str(made.target),
            "max_difference": made.max_difference, "rows": made.rows, "from": list(made.sources),
            "to": to, "hookpoints": list(made.hookpoints),
        }  # fmt: skip

        def show() -> None:
            count = len(made.hookpoints)
            common.show_all(
                f"{count} SAE{'s' if count > 1 else ''} from {', '.join(made.sources)} to {to}, in "
                f"{made.target}; reconstructions of {made.rows} random activations differ by at "
                f"most {made.max_difference:.1e}"
            )

        return values, show

    common.run(job, as_json)
