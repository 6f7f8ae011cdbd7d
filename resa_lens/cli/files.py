"""Files that other tools read: convert, merge."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Literal

from resa_lens.cli.common import Outcome
from resa_lens.cli.groups import AdapterBase, Adapters, NamedModel, Output
from resa_lens.cli.options import argument, command, options, part
from resa_lens.config import setting
from resa_lens.errors import BadInputError
from resa_lens.files import check_path
from resa_lens.models.hookpoints import (
    LLAMA,
    MOST_LAYERS,
    Hookpoint,
    check_layers,
    parse_layers,
)
from resa_lens.progress import ConsoleReporter
from resa_lens.saes.config import SaeConfig, check_saes


@options("Format")
class Convert(Output):
    """What is converted, and into which format."""

    source: str = argument("An SAE's folder, a folder of SAEs or a hub id.", check=check_saes)
    target: Path = argument("The folder that is made.")
    to: Literal["sparsify", "saelens", "dictionary_learning"] = setting(
        help="The format that is written."
    )
    layers: str | None = setting(
        None, 'Only these: "12", "1-26", "3,13th" or "all".', check=check_layers
    )
    sae: SaeConfig = part(SaeConfig, "site", "Format")
    model: str | None = setting(
        None, "Of the SAEs: where its MLP has two places (Gemma 2, ...), names mean its own.",
        "--model", "-m", check=check_path,
    )  # fmt: skip
    k: int | None = setting(
        None, "Active SAE latents a token, where the source does not say it.", "--k", min=1,
        max=2**16,
    )  # fmt: skip
    allow_pickle: bool = setting(False, "Read pickled files, as weights only.")
    cast: bool = setting(False, "Turn other floating types into float32.")
    force: bool = setting(False, "Replace a target that holds SAEs.")


@command("convert")
def convert(args: Convert) -> Outcome:
    """Convert SAEs between libraries, checked by their outputs.

    The formats are those of sparsify, SAELens and dictionary_learning.

    Example: resa-lens convert saes/layers.12.mlp out --to saelens
    """
    from resa_lens.models.host import load_model
    from resa_lens.saes.convert import convert as run
    from resa_lens.saes.hub import find_sae_folder

    if args.layers == "default":
        raise BadInputError("layers 'default' are those of a model; use all, 12 or 1-26")
    # No model says how many layers there are.
    layers = None if args.layers is None else parse_layers(args.layers, MOST_LAYERS)
    if args.layers is not None and (args.layers == "all" or "*" in args.layers):
        layers = None
    points = None if layers is None else [Hookpoint(layer, args.sae.site) for layer in layers]
    folder = find_sae_folder(args.source, points)
    names = load_model(args.model).names if args.model else LLAMA
    result = run(
        folder, args.target, args.to, layers=layers, names=names, reporter=ConsoleReporter(),
        **args.pick("allow_pickle", "cast", "k", "force"),
    )  # fmt: skip
    values = {
        "source": str(folder), "target": str(result.target),
        "max_difference": result.max_difference, "rows": result.rows,
        "from": list(result.sources), "to": args.to, "hookpoints": list(result.hookpoints),
    }  # fmt: skip
    count = len(result.hookpoints)
    return values, [
        f"{count} SAE{'s' if count > 1 else ''} from {', '.join(result.sources)} to {args.to}, in "
        f"{result.target}; reconstructions of {result.rows} random activations differ by at most "
        f"{result.max_difference:.1e}"
    ]


@options("Adapters")
class Merge(Adapters, NamedModel, AdapterBase, Output):
    """What is merged, and where to."""

    out: Path = argument("The model folder to make.", check=check_path)
    dtype: Literal["base", "float32", "bfloat16", "float16"] = setting(
        "base", "Numbers of the stored weights; base is the base's own."
    )
    force: bool = setting(False, "Replace a folder that an earlier merge made.")


@command("merge")
def merge(args: Merge) -> Outcome:
    """Write a whole model with the adapters in its weights.

    Example: resa-lens merge merged --model tiny-reasoner --adapter resa-workspace/adapters/RUN
    """
    from resa_lens.stages.merge import merge_model

    merged = merge_model(
        args.model, args.adapter or [], args.out, scale=args.scale or 1.0,
        note=ConsoleReporter().note, **args.pick("dtype", "base", "force"),
    )  # fmt: skip
    config, rounding = merged.manifest.config, merged.rounding
    values = {
        "model": str(merged.folder), "base": config["base"], "base_hash": config["base_hash"],
        "adapters": config["adapters"], "dtype": merged.dtype,
        "weights_hash": merged.manifest.hashes["weights"], "rounding": asdict(rounding),
        "notes": list(merged.notes),
    }  # fmt: skip
    parts = [
        f"{a['scale']:g} x {Path(a['folder']).name} ({a['weights_hash'][:8]})"
        for a in config["adapters"]
    ]
    return values, [
        f"{config['base']} ({config['base_hash'][:8]}) + {' + '.join(parts)}, stored as "
        f"{merged.dtype}; rounding errs by {100 * rounding.lost:.2g} % of the change "
        f"(n = {rounding.weights} weights)",
        f"model: {merged.folder}",
    ]
