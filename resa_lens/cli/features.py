"""Commands that look at single features: activity and falsify."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from resa_lens.cli import common
from resa_lens.cli.common import (
    DataOption,
    DeviceOption,
    DtypeOption,
    ForceOption,
    JsonOption,
    LatentsOption,
    LayersOption,
    MismatchOption,
    ModelOption,
    SaesOption,
    SeedOption,
    SiteOption,
    ThreadsOption,
    TokensOption,
    TopkOption,
    WorkspaceOption,
    YesOption,
)
from resa_lens.cli.layers import ChatOption, FirstOption, PromptOption, ThresholdOption


def activity(
    model: ModelOption = "tiny-reasoner",
    show: Annotated[
        str | None, typer.Option(help="LAYER:FEATURE: print this feature's page, for example 5:62.")
    ] = None,
    generations: Annotated[
        int,
        typer.Option(help="Look at the model's own answers to so many questions.", min=0),
    ] = 0,
    max_new_tokens: Annotated[int, typer.Option(help="Of one answer.", min=1)] = 256,
    text_tokens: Annotated[int, typer.Option(help="Tokens of the documents.", min=1)] = 100_000,
    examples: Annotated[int, typer.Option(help="Documents kept of each feature.", min=1)] = 8,
    threshold: ThresholdOption = 0.0,
    layers: LayersOption = None,
    site: SiteOption = "mlp_out",
    saes: SaesOption = None,
    tokens: TokensOption = None,
    latents: LatentsOption = None,
    k: TopkOption = 32,
    data: DataOption = "tiny",
    allow_site_mismatch: MismatchOption = False,
    memory_limit: Annotated[
        float | None, typer.Option(help="GB that may be taken; by default what is free.", min=0.0)
    ] = None,
    workspace: WorkspaceOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    threads: ThreadsOption = None,
    force: ForceOption = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Tally every feature over documents: how often, how strongly, in which phase, with examples.

    Example: resa-lens activity --model tiny-reasoner --layers 1-10 --show 5:62
    """

    def job() -> tuple[dict[str, Any], Any]:
        from resa_lens.corpora import CorpusConfig
        from resa_lens.features.activity import ActivityConfig
        from resa_lens.hookpoints import parse_layers
        from resa_lens.pipeline.activity import activity_run, feature_page, parse_feature
        from resa_lens.pipeline.sae_training import saes_for
        from resa_lens.saes.train import SaeConfig

        ctx = common.context(workspace, seed, device, dtype, force, threads)
        host = ctx.model(model)
        chosen = parse_layers(layers, host.n_layers)
        asked = parse_feature(show, host.n_layers) if show else None
        corpus = CorpusConfig(source=data, seed=seed)
        run = saes_for(
            ctx, host, chosen, SaeConfig(site, latents, k, tokens=tokens, seed=seed), corpus, saes,
            allow_mismatch=allow_site_mismatch, only=None if layers is None else chosen,
        )  # fmt: skip
        made = activity_run(
            ctx, host, run, corpus, ActivityConfig(examples=examples, threshold=threshold),
            layers=None if saes and layers is None else chosen, tokens=text_tokens,
            generations=generations, max_new_tokens=max_new_tokens,
            memory_limit_mb=None if memory_limit is None else memory_limit * 1024,
        )  # fmt: skip
        page = feature_page(host, run, made, *asked) if asked else None
        values = {
            "layers": made.layers, "tokens": made.tokens, "documents": made.documents,
            "seconds": made.seconds, "resumed_at": made.resumed_at, "model": host.name,
            "site": site, "folder": str(made.folder), "feature": page,
        }  # fmt: skip
        return values, lambda: _show_activity(values, host.slug, host.n_layers)

    common.run(job, as_json)


def _show_activity(values: dict[str, Any], slug: str, n_layers: int) -> None:
    from resa_lens.hookpoints import describe_layer

    if values["feature"]:
        _show_page(values["feature"], n_layers)
        return
    rows = common.table(
        f"Feature activity of {slug}, site {values['site']}",
        "layer", "fire", "latents", "L0", "median density", "denser than 10 %",
        "twice as dense in thoughts", "in prompts alone",
    )  # fmt: skip
    for row in values["layers"]:
        quartiles = row["density_quartiles"]
        rows.add_row(
            describe_layer(row["layer"], n_layers), str(row["alive"]), str(row["latents"]),
            f"{row['l0']:.1f}", f"{quartiles[1]:.2g}" if quartiles else "", str(row["dense"]),
            str(row["thinking"]), str(row["prompt_only"]),
        )  # fmt: skip
    tokens = ", ".join(f"{count} {phase}" for phase, count in values["tokens"].items())
    common.show_all(
        rows,
        f"{values['documents']} documents; tokens: {tokens}; in {values['folder']}",
        "one feature: add --show LAYER:FEATURE",
    )


def _show_page(page: dict[str, Any], n_layers: int) -> None:
    from resa_lens.hookpoints import describe_layer
    from resa_lens.phases import PHASES

    title = f"Feature {page['feature']} at {describe_layer(page['layer'], n_layers)}"
    rows = common.table(title, "phase", "tokens fired", "density", "mean", "max")
    for phase in PHASES:
        rows.add_row(
            phase, str(page[f"tokens_fired_{phase}"]), f"{page[f'density_{phase}']:.4g}",
            f"{page[f'mean_{phase}']:.3g}", f"{page[f'max_{phase}']:.3g}",
        )  # fmt: skip
    examples = common.table("Strongest documents", "value", "phase", "document", "around the peak")
    examples.columns[3].justify = "left"
    for row in page["examples"]:
        at = row["position"] - row["start"]
        shown = "".join(f">>{t}<<" if i == at else t for i, t in enumerate(row["tokens"]))
        examples.add_row(
            f"{row['value']:.3g}", row["phase"], str(row["document"]), repr(shown)[1:-1]
        )
    low, high = page["density_ci"]
    nearest = zip(page["nearest"], page["nearest_cosines"], strict=True)
    common.show_all(
        rows,
        f"density over all {page['density']:.4g} (95 % over documents {low:.4g} to {high:.4g}), in "
        f"{page['documents_fired']} documents",
        examples,
        f"raises: {', '.join(map(repr, page['top_tokens']))}",
        f"lowers: {', '.join(map(repr, page['bottom_tokens']))}",
        "nearest directions: " + ", ".join(f"{f} ({c:.2f})" for f, c in nearest),
    )


def falsify(
    model: ModelOption = "tiny-reasoner",
    rule: Annotated[
        str | None, typer.Option(help="all, any or either: show this rule alone; all are tried.")
    ] = None,
    prompt: PromptOption = "r1",
    chat_template: ChatOption = False,
    threshold: ThresholdOption = 0.0,
    ignore_first: FirstOption = False,
    texts: Annotated[int, typer.Option(help="Plain texts with the tags put in.", min=1)] = 40,
    shuffles: Annotated[int, typer.Option(help="Orders of the prompt's words.", min=1)] = 20,
    fires: Annotated[
        float, typer.Option(help="Share of trials from which a feature fires.", min=0.0, max=1.0)
    ] = 0.5,
    plain_texts: Annotated[
        str | None, typer.Option(help="File of plain texts, one a line, in place of ours.")
    ] = None,
    other_seed: Annotated[
        bool, typer.Option(help="Look for each feature in another seed's SAEs.")
    ] = True,
    random_weights: Annotated[
        bool, typer.Option(help="Put a random-weights model's SAEs to the same tests.")
    ] = True,
    layers: LayersOption = None,
    site: SiteOption = "mlp_out",
    saes: SaesOption = None,
    tokens: TokensOption = None,
    latents: LatentsOption = None,
    k: TopkOption = 32,
    data: DataOption = "tiny",
    allow_site_mismatch: MismatchOption = False,
    workspace: WorkspaceOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    threads: ThreadsOption = None,
    force: ForceOption = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Try to refute every counted feature: token detector, prompt artefact, or survives?

    Needs SAEs of the model, of another seed and of a random-weights model; what is missing is
    trained.

    Example: resa-lens falsify --model tiny-reasoner --json
    """

    def job() -> tuple[dict[str, Any], Any]:
        from resa_lens.corpora import CorpusConfig
        from resa_lens.errors import BadInputError
        from resa_lens.features.exclusive import RULES, CountConfig, tag_prompt
        from resa_lens.features.falsify import FalsifyConfig
        from resa_lens.features.stimuli import PLAIN_TEXTS
        from resa_lens.hookpoints import parse_layers
        from resa_lens.pipeline.discovery import count_run
        from resa_lens.pipeline.falsification import falsify_run, read_plain_texts
        from resa_lens.pipeline.sae_training import saes_for
        from resa_lens.saes.train import SaeConfig

        if rule is not None and rule not in RULES:
            raise BadInputError(f"rule {rule!r} is unknown; use {', '.join(RULES)}")
        config = FalsifyConfig(texts, shuffles, fires, seed)
        plain = read_plain_texts(plain_texts) if plain_texts else PLAIN_TEXTS
        ctx = common.context(workspace, seed, device, dtype, force, threads)
        host = ctx.model(model)
        count = CountConfig(prompt, chat_template, threshold=threshold, ignore_first=ignore_first)
        tag_prompt(host, count)
        chosen = parse_layers(layers, host.n_layers)
        sae = SaeConfig(site, latents, k, tokens=tokens, seed=seed)
        run = saes_for(
            ctx, host, chosen, sae, CorpusConfig(source=data, seed=seed), saes,
            allow_mismatch=allow_site_mismatch,
            only=None if layers is None else chosen,
        )  # fmt: skip
        folder, counts = count_run(
            ctx, host, run, count, None if saes and layers is None else chosen
        )
        made = falsify_run(
            ctx, host, run, counts, folder, config,
            plain_texts=plain, other_seed=other_seed, random_weights=random_weights,
        )  # fmt: skip
        features = [f for f in made.features if rule is None or rule in f["rules"]]
        values = {
            "features": features, "summary": made.summary, "trials": made.trials,
            "skipped": made.skipped, "model": host.name, "site": site, "folder": str(made.folder),
        }  # fmt: skip
        return values, lambda: _show_verdicts(values, host.slug, host.n_layers)

    common.run(job, as_json)


SHOWN = 20
"""Features in the terminal's table; the JSON and the file have all."""


def _show_verdicts(values: dict[str, Any], slug: str, n_layers: int) -> None:
    from resa_lens.features.falsify import SURVIVES, VERDICTS
    from resa_lens.hookpoints import describe_layer

    kinds = ("injected", "plain", "shuffled", "neutral", "paraphrase")
    # What survives is what a reader looks for, then what falls at the fewest tests.
    ordered = sorted(values["features"], key=lambda f: (f["verdict"] != SURVIVES, len(f["failed"])))
    rows = common.table(
        f"Counted features of {slug}, site {values['site']} (layers 0-based)",
        "layer", "feature", "rule", *kinds, "other seed", "verdict",
    )  # fmt: skip
    for item in ordered[:SHOWN]:
        twin = item["other_seed"]
        shares = [f"{item['shares'][k]['fired']}/{item['shares'][k]['n']}" for k in kinds]
        seed = "" if twin is None else "found" if twin["found"] else "not found"
        rows.add_row(
            str(item["layer"]), str(item["feature"]), item["rule"], *shares, seed, item["verdict"]
        )
    layers = common.table("By layer", "layer", "counted", *VERDICTS)
    for layer in sorted({item["layer"] for item in ordered}):
        here = [item["verdict"] for item in ordered if item["layer"] == layer]
        cells = [str(here.count(name)) for name in VERDICTS]
        layers.add_row(describe_layer(layer, n_layers), str(len(here)), *cells)
    tallies = common.table(
        "By rule", "rule", "counted", *VERDICTS, "95 %", "pass the texts", "random weights", "p"
    )
    for tally in values["summary"]["rules"]:
        low, high = tally["ci"]
        null = tally["null_by_texts"]
        tallies.add_row(
            tally["rule"], str(tally["counted"]), *map(str, tally["verdicts"].values()),
            f"{100 * low:.1f} to {100 * high:.1f} %" if tally["counted"] else "",
            f"{tally['by_texts']} of {tally['active']}",
            "" if null is None else f"{null} of {tally['null_active']}",
            "" if null is None else f"{tally['p_value']:.2g}",
        )  # fmt: skip
    more = len(ordered) - SHOWN
    common.show_all(
        *([rows] if ordered else []),
        *([f"and {more} more in {values['folder']}"] if more > 0 else []),
        *([layers] if ordered else []),
        tallies,
        *[f"left out: {reason}" for reason in values["skipped"]],
        values["summary"]["reason"],
        f"in {values['folder']}; figure: verdicts.html",
    )
