"""Files that other tools read, and what they cost: convert, merge, export, cost."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from resa_lens.cli.common import Outcome
from resa_lens.cli.groups import AdapterBase, Adapters, NamedModel, Output, Place
from resa_lens.cli.options import argument, command, options, part
from resa_lens.config import give_one, setting
from resa_lens.errors import BadInputError
from resa_lens.exports import reports as export_reports
from resa_lens.files import check_file, check_path
from resa_lens.models.hookpoints import (
    LLAMA,
    MOST_LAYERS,
    Hookpoint,
    check_layers,
    parse_layers,
)
from resa_lens.progress import ConsoleReporter
from resa_lens.saes.config import SaeConfig, check_saes
from resa_lens.stages.reports import costs as cost_reports
from resa_lens.stages.reports import files as reports


@options("Format")
class Convert(Output):
    """What is converted, and into which format."""

    source: str = argument("An SAE's folder, a folder of SAEs or a hub id.", check=check_saes)
    target: Path = argument("The folder that is made.")
    to: Literal["sparsify", "saelens", "dictionary_learning"] = setting(
        help="The format that is written."
    )
    layers: str | None = setting(
        None, 'Only these: "12", "1-26", "3,13th" or "all".', layers=check_layers
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
    from resa_lens.models.unloaded import read_unloaded
    from resa_lens.saes.convert import convert as run
    from resa_lens.saes.hub import find_sae_folder

    if args.layers == "default":
        raise BadInputError("layers 'default' are those of a model; use all, 12 or 1-26")
    # Without --model nothing says how many layers there are.
    n_layers = read_unloaded(args.model).n_layers if args.model else MOST_LAYERS
    layers = None if args.layers is None else parse_layers(args.layers, n_layers)
    if args.layers is not None and (args.layers == "all" or "*" in args.layers):
        layers = None
    points = None if layers is None else [Hookpoint(layer, args.sae.site) for layer in layers]
    folder = find_sae_folder(args.source, points)
    names = load_model(args.model).names if args.model else LLAMA
    result = run(
        folder, args.target, args.to, layers=layers, names=names, reporter=ConsoleReporter(),
        **args.pick("allow_pickle", "cast", "k", "force"),
    )  # fmt: skip
    values = {"source": str(folder), **result.to_dict(), "to": args.to}
    return values, reports.converted(result, args.to)


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
    return merged.to_dict(), reports.merged(merged)


@options("Export")
class Export(Place, Output):
    """What is exported, and in which form."""

    source: str = argument("An id of `resa-lens runs`, or a path: activity, SAEs, an adapter.")
    target: Path = argument("The folder or .html file that is made.", check=check_path)
    to: Literal["neuronpedia", "neuronpedia-upload", "html", "hub"] = setting(
        help="Neuronpedia's export folder or upload batches, a page, or a hub's folder with a card."
    )
    features: str = setting(
        "", 'LAYER:FEATURE by commas, "counted", "standing" or "all".  [html: counted, else all]'
    )
    notes: Path | None = setting(None, "CSV file of your labels, as of app.", check=check_file)
    source_set: str | None = setting(None, "Neuronpedia's name of the SAEs.")
    creator: str = setting("resa-lens", "Neuronpedia's id of the account.")
    push: str | None = setting(None, "Push the hub's folder to this repository, owner/name.")
    public: bool = setting(False, "Make a repository that is pushed to a public one.")

    def __post_init__(self) -> None:
        """Raise BadInputError where an option says nothing of the form."""
        if self.push is not None and self.to != "hub":
            raise BadInputError(f"--push {self.push} is of --to hub, not of {self.to}")
        if self.features and self.to == "hub":
            raise BadInputError(f"--features {self.features} is of features, not of --to hub")


@command("export")
def export(args: Export) -> Outcome:
    """Write features, SAEs or adapters for other tools.

    Features of an activity run go to Neuronpedia or onto a self-contained page; SAEs and adapters,
    with a card, into a folder for a hub.

    Example: resa-lens export ACTIVITY exported --to neuronpedia
    """
    from resa_lens.artifacts.listing import named, scan

    workspace, reporter = args.open()
    listing = scan(workspace.root)
    artifact = named(listing, args.source)
    if args.to == "hub":
        from resa_lens.exports import hub

        package = hub.write_package(listing, artifact, args.target)
        if args.push:
            reporter.note(f"pushing {package.megabytes:.1f} MB to {args.push} ...")
            package = hub.push(package, args.push, private=not args.public)
        values = {"files": list(package.files), "megabytes": package.megabytes, "url": package.url}
        return {**_exported(args, artifact.relative), **values}, export_reports.packaged(package)
    from resa_lens.exports import neuronpedia, page
    from resa_lens.exports.tables import open_tables

    tables = open_tables(listing, artifact, args.notes)
    chosen = tables.choose(args.features or ("counted" if args.to == "html" else "all"))
    total = tables.features.rows if chosen is None else len(chosen)
    with reporter.bar("features", total) as advance:
        if args.to == "html":
            done = page.write_features(tables, args.target, chosen, advance)
        else:
            names = neuronpedia.naming(tables, args.source_set, args.creator)
            write = (
                neuronpedia.write_folder if args.to == "neuronpedia" else neuronpedia.write_uploads
            )
            done = write(tables, args.target, names, chosen, advance)
    counts = {"features": done.features, "files": done.files, "left_out": done.skipped}
    return {**_exported(args, artifact.relative), **counts}, export_reports.exported(done)


def _exported(args: Export, source: str) -> dict[str, object]:
    return {"source": source, "target": str(args.target), "to": args.to}


@options("Cost")
class Cost(Place, Output):
    """Whose cost is summed, at which prices."""

    adapter: str | None = setting(
        None, "Only what this adapter took: its folder, or its name in adapters/.", check=check_path
    )
    prices: Path | None = setting(
        None, "A .csv of prices: device,usd_per_hour,source,date.", check=check_file
    )
    usd_per_hour: float | None = setting(
        None, "The price of an hour of any device.", min=0, max=10**9
    )

    def __post_init__(self) -> None:
        """Raise BadInputError where two prices are given."""
        give_one(self, "prices", "usd_per_hour")


@command("cost")
def cost(args: Cost) -> Outcome:
    """Sum what each stage cost: time, energy, money.

    Time, tokens, memory, energy and USD, with the paper's table for comparison.

    Example: resa-lens cost --usd-per-hour 0.5
    """
    from resa_lens.artifacts import costs

    price = args.usd_per_hour
    prices = costs.read_prices(args.prices) if price is None else costs.one_price(price)
    workspace, reporter = args.open()
    items, problems = costs.costs_of(workspace, args.adapter)
    for text in problems:
        reporter.note(f"left out: {text}")
    values = costs.report(items, prices)
    return values, cost_reports.cost_of(values, args.adapter)
