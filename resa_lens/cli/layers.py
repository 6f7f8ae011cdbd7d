"""Commands that end in layers: train-saes, count-features, recommend-layers, fit-mixture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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

if TYPE_CHECKING:
    from resa_lens.layers.selectors import Recommendation

PromptOption = Annotated[
    str, typer.Option(help="r1, steps, short, a text, or @file: the prompt with the tags.")
]
ChatOption = Annotated[
    bool, typer.Option("--chat-template", help="Send the prompt through the chat template.")
]
ThresholdOption = Annotated[
    float, typer.Option(help="A feature is active above this value.", min=0.0)
]
FirstOption = Annotated[
    bool, typer.Option("--ignore-first", help='Leave the first position out of "other tokens".')
]


def train_saes(
    model: ModelOption = "tiny-reasoner",
    layers: LayersOption = None,
    site: SiteOption = "mlp_out",
    mode: Annotated[
        str,
        typer.Option(help="scratch, finetune (from --saes) or pretrained (as given)."),
    ] = "scratch",
    saes: SaesOption = None,
    tokens: TokensOption = None,
    latents: LatentsOption = None,
    expansion: Annotated[
        int | None, typer.Option(help="Latents as a multiple of the width.", min=1)
    ] = None,
    k: TopkOption = 32,
    activation: Annotated[str, typer.Option(help="topk or batchtopk.")] = "topk",
    optimizer: Annotated[str, typer.Option(help="signum or adam.")] = "signum",
    learning_rate: Annotated[
        float | None, typer.Option(help="2.5e-4 from width 1024 on.", min=0.0)
    ] = None,
    schedule: Annotated[str, typer.Option(help="constant, linear or cosine.")] = "constant",
    warmup: Annotated[int, typer.Option(help="Steps of warm-up.", min=0)] = 0,
    auxk_alpha: Annotated[
        float, typer.Option(help="Weight of the AuxK loss for dead latents; 0 is off.", min=0.0)
    ] = 0.0,
    multi_topk: Annotated[bool, typer.Option("--multi-topk", help="Add the top-4k loss.")] = False,
    dead_threshold: Annotated[
        int, typer.Option(help="Tokens without firing; at most half of the run.", min=1)
    ] = 1_000_000,
    batch: Annotated[int | None, typer.Option(help="Sequences a step.", min=1)] = None,
    sequence: Annotated[int, typer.Option(help="Tokens a sequence.", min=2)] = 256,
    seeds: Annotated[
        int, typer.Option(help="Train so many seeds and compare their features.", min=1)
    ] = 1,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Measure their quality by phase.")
    ] = True,
    plan: Annotated[
        bool, typer.Option("--plan", help="Only say what it will need: memory, disk, time.")
    ] = False,
    memory_limit: Annotated[
        float | None, typer.Option(help="GB that may be taken; by default what is free.", min=0.0)
    ] = None,
    spread_layers: Annotated[
        bool, typer.Option("--spread-layers", help="Under torchrun: divide layers, not rows.")
    ] = False,
    data: DataOption = "tiny",
    workspace: WorkspaceOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    threads: ThreadsOption = None,
    force: ForceOption = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train an SAE at every layer in one pass over the data; killed, it goes on where it was.

    Example: resa-lens train-saes --model tiny-reasoner --layers 1-10 --tokens 200000
    """

    def job() -> tuple[dict[str, Any], Any]:
        from dataclasses import asdict, replace

        from resa_lens.corpora import CorpusConfig
        from resa_lens.errors import BadInputError
        from resa_lens.hookpoints import parse_layers
        from resa_lens.pipeline.sae_quality import quality_run, stability_of
        from resa_lens.pipeline.sae_training import plan_run, train_run
        from resa_lens.saes.train import SaeConfig
        from resa_lens.saes.world import join_world, local_device

        if latents is not None and expansion is not None:
            raise BadInputError(f"--latents {latents} and --expansion {expansion}: give one")
        ctx = common.context(workspace, seed, local_device(device), dtype, force, threads)
        host = ctx.model(model)
        world = join_world(host.device)
        config = SaeConfig(
            site, latents if expansion is None else expansion * host.d_model, k, optimizer,
            learning_rate, tokens, batch, dead_threshold, seed, activation, auxk_alpha,
            multi_topk, schedule, warmup, mode,
        )  # fmt: skip
        chosen = parse_layers(layers, host.n_layers)
        corpus = CorpusConfig(source=data, seed=seed, sequence=sequence)
        limit = None if memory_limit is None else memory_limit * 1024
        if plan:
            made = plan_run(
                ctx, host, chosen, config, corpus, source=saes, memory_limit_mb=limit, world=world
            )
            values = {**asdict(made), "layers": chosen, "model": host.name, "site": site}
            return values, lambda: common.show_all(made.describe())
        runs = [
            train_run(
                ctx, host, chosen, replace(config, seed=seed + i), replace(corpus, seed=seed + i),
                source=saes, memory_limit_mb=limit, world=world, spread_layers=spread_layers,
            )
            for i in range(seeds)
        ]  # fmt: skip
        run = runs[0]
        if world.rank:
            return {}, lambda: None
        quality, quality_folder = {}, None
        if report:
            quality_folder, quality = quality_run(ctx, host, run, corpus)
        stability = stability_of(host, runs) if seeds > 1 else []
        rows = [
            {
                "layer": p.layer,
                "path": str(run.folder / p.sparsify),
                **{key: run.quality[p.layer][key] for key in ("fvu", "l0", "dead_share")},
                "quality": quality.get(p.layer, {}),
            }
            for p in run.points
        ]

        def show() -> None:
            where = f"in {run.folder}" + (f", report in {quality_folder}" if report else "")
            common.show_all(
                _sae_table(f"SAEs of {host.slug}, site {site}", host.n_layers, rows),
                *([_stability_table(stability, seeds)] if stability else []),
                f"{run.tokens} tokens, {run.seconds:.0f} s; {where}",
            )

        values = {
            "saes": rows, "tokens": run.tokens, "seconds": run.seconds,
            "resumed_at_tokens": run.resumed_at_tokens, "fresh": run.fresh,
            "folder": str(run.folder), "report": str(quality_folder) if report else None,
            "seeds": [str(r.folder) for r in runs], "stability": stability,
        }  # fmt: skip
        return values, show

    common.run(job, as_json)


def _sae_table(title: str, n_layers: int, rows: list[dict[str, Any]]) -> Any:
    from resa_lens.hookpoints import describe_layer

    made = common.table(title, "layer", "FVU", "L0", "dead", "loss change", "KL", "recovered")
    for row in rows:
        found = row["quality"].get("all", {})
        change, error = found.get("loss_change"), found.get("loss_change_se")
        made.add_row(
            describe_layer(row["layer"], n_layers),
            f"{row['fvu']:.4f}",
            f"{row['l0']:.1f}",
            f"{100 * row['dead_share']:.1f} %",
            "" if change is None else f"{change:+.4f}" + (f" ± {error:.4f}" if error else ""),
            "" if found.get("kl") is None else f"{found['kl']:.4f}",
            "" if found.get("loss_recovered") is None else f"{found['loss_recovered']:.3f}",
        )
    return made


def _stability_table(rows: list[dict[str, Any]], seeds: int) -> Any:
    made = common.table(
        f"Decoder directions found again, {seeds} seeds (cosine above 0.7)",
        "layer", "share", "random directions", "n",
    )  # fmt: skip
    for row in rows:
        made.add_row(
            row["name"], f"{100 * row['share']:.1f} %", f"{100 * row['null']:.2g} %", str(row["n"])
        )
    return made


def count_features(
    model: ModelOption = "tiny-reasoner",
    rule: Annotated[str, typer.Option(help="all, any or either: which one to rank by.")] = "all",
    prompt: PromptOption = "r1",
    chat_template: ChatOption = False,
    threshold: ThresholdOption = 0.0,
    ignore_first: FirstOption = False,
    layers: LayersOption = None,
    site: SiteOption = "mlp_out",
    saes: SaesOption = None,
    control: Annotated[
        str | None, typer.Option(help="random: count on random directions in the SAEs' place.")
    ] = None,
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
    """Count the features that fire at the think tags and nowhere else, by every rule.

    Example: resa-lens count-features --model tiny-reasoner --rule all
    """

    def job() -> tuple[dict[str, Any], Any]:
        from resa_lens.corpora import CorpusConfig
        from resa_lens.errors import BadInputError
        from resa_lens.features.exclusive import RULES, CountConfig, tag_prompt
        from resa_lens.hookpoints import describe_layer, parse_layers
        from resa_lens.pipeline.discovery import count_run
        from resa_lens.pipeline.sae_training import saes_for
        from resa_lens.saes.train import SaeConfig

        if rule not in RULES:
            raise BadInputError(f"rule {rule!r} is unknown; use {', '.join(RULES)}")
        ctx = common.context(workspace, seed, device, dtype, force, threads)
        host = ctx.model(model)
        config = CountConfig(prompt, chat_template, threshold=threshold, ignore_first=ignore_first)
        tag_prompt(host, config)
        chosen = parse_layers(layers, host.n_layers)
        sae = SaeConfig(site, latents, k, tokens=tokens, seed=seed)
        run = saes_for(
            ctx, host, chosen, sae, CorpusConfig(source=data, seed=seed), saes,
            allow_mismatch=allow_site_mismatch,
            only=None if layers is None else chosen,
        )  # fmt: skip
        folder, counts = count_run(
            ctx, host, run, config, None if saes and layers is None else chosen, control=control
        )

        def show() -> None:
            made = common.table(f"Exclusive features of {host.slug}", "layer", *RULES, "active")
            for item in counts.layers:
                made.add_row(
                    describe_layer(item.layer, host.n_layers),
                    *[str(len(item.features[name])) for name in RULES],
                    str(item.active),
                )
            spans = counts.prompt
            common.show_all(
                made,
                f"{len(spans.open_spans)} occurrences of {config.open_tag} at tokens "
                f"{[list(s) for s in spans.open_spans]}, {len(spans.close_spans)} of "
                f"{config.close_tag} at {[list(s) for s in spans.close_spans]}; in {folder}",
            )

        values = {
            "rule": rule, "layers": [c.to_dict() for c in counts.layers], "model": host.name,
            "site": site, "folder": str(folder),
        }  # fmt: skip
        return values, show

    common.run(job, as_json)


def _show_recommendation(
    name: str, site: str, made: Recommendation, falsified: dict[str, Any] | None
) -> None:
    from resa_lens.hookpoints import describe_layer

    rows = common.table(f"{name}, site {site}", "layer", "features", "")
    for layer, features in made.layers.items():
        rank = made.recommended.index(layer) + 1 if layer in made.recommended else 0
        mark = f"recommended ({rank})" if rank else ""
        rows.add_row(describe_layer(layer, made.n_layers), f"{features:g}", mark)
    best = describe_layer(made.recommended[0], made.n_layers)
    counted = int(sum(made.layers.values()))
    tests = f"the {counted} counted features were not tested: resa-lens falsify"
    if falsified is not None:
        tests = f"falsification left {falsified['survivors']} of the {counted} counted features"
    common.show_all(
        rows,
        f"recommended: {best}, selector {made.selector}",
        f"verdict: {made.verdict}",
        made.reason,
        *([tests] if counted else []),
        made.next_step,
    )


def recommend_layers(
    model: ModelOption = "tiny-reasoner",
    selector: Annotated[
        str, typer.Option(help="mixture, most-features, middle, quality, causal or blend.")
    ] = "mixture",
    rule: Annotated[str, typer.Option(help="all (strict), any or either.")] = "all",
    recipe: Annotated[str, typer.Option(help="Of the mixture: robust or paper.")] = "robust",
    prompt: PromptOption = "r1",
    chat_template: ChatOption = False,
    threshold: ThresholdOption = 0.0,
    ignore_first: FirstOption = False,
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
    """Recommend layers to tune, with an honest verdict; SAEs that are missing are trained.

    Example: resa-lens recommend-layers --model tiny-reasoner --json
    """

    def job() -> tuple[dict[str, Any], Any]:
        from resa_lens.corpora import CorpusConfig
        from resa_lens.features.exclusive import CountConfig
        from resa_lens.hookpoints import parse_layers
        from resa_lens.pipeline.attribution import measure_effects
        from resa_lens.pipeline.discovery import discover
        from resa_lens.pipeline.falsification import survivors_of
        from resa_lens.saes.train import SaeConfig

        ctx = common.context(workspace, seed, device, dtype, force, threads)
        host = ctx.model(model)
        found = discover(
            ctx,
            host,
            sae=SaeConfig(site, latents, k, tokens=tokens, seed=seed),
            corpus=CorpusConfig(source=data, seed=seed),
            count=CountConfig(
                prompt, chat_template, threshold=threshold, ignore_first=ignore_first
            ),
            layers=parse_layers(layers, host.n_layers) if layers else None,
            rule=rule,
            selector=selector,
            recipe=recipe,
            saes=saes,
            allow_mismatch=allow_site_mismatch,
            causal=measure_effects(ctx, host, rule, CorpusConfig(source=data, seed=seed)),
        )
        made = found.recommendation
        values = {"model": host.name, "site": site, "rule": rule, **made.to_dict()}
        left = survivors_of(ctx, host, found.counts_folder, rule)
        values |= {"folder": str(found.folder), "saes": str(found.saes.folder), "falsified": left}
        return values, lambda: _show_recommendation(host.slug, site, made, left)

    common.run(job, as_json)


def fit_mixture(
    table: Annotated[
        Path,
        typer.Argument(help="CSV with a column layer or layer_1_indexed.", metavar="TABLE.csv"),
    ],
    column: Annotated[str, typer.Option(help="The column of counts or scores.")],
    baseline: Annotated[
        float | None, typer.Option(help="The untuned model's score; makes the values scores.")
    ] = None,
    noise: Annotated[
        float | None, typer.Option(help="Standard deviation of one layer's score.", min=0.0)
    ] = None,
    recipe: Annotated[str, typer.Option(help="robust, or paper for the published one.")] = "robust",
    components: Annotated[int, typer.Option(help="Gaussians of recipe paper.", min=1)] = 3,
    restarts: Annotated[
        int, typer.Option(help="Seeds that recipe paper tries beside its own; 0 is none.", min=0)
    ] = 200,
    against: Annotated[
        str | None, typer.Option(help="A second column: do its components lie at the same layers?")
    ] = None,
    against_baseline: Annotated[
        float | None, typer.Option(help="The untuned model's score in that column.")
    ] = None,
    draws: Annotated[int, typer.Option(help="Draws of each null and bootstrap.", min=20)] = 1000,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Fit Gaussians over layers to a table, with its nulls and a verdict.

    Recipe paper says too what speaks against it: its convergence, other seeds, the uniform.

    Example: resa-lens fit-mixture data/paper/table6_hookpoints.csv --column feature_count
    """

    def job() -> tuple[dict[str, Any], Any]:
        from resa_lens.errors import BadInputError
        from resa_lens.layers import read_table
        from resa_lens.layers.alignment import align
        from resa_lens.layers.mixture import fit_mixture as fit
        from resa_lens.layers.mixture import objections

        if against_baseline is not None and against is None:
            raise BadInputError(f"--against-baseline {against_baseline} goes with --against COLUMN")
        options: dict[str, Any] = {
            "recipe": recipe, "components": components, "seed": seed, "draws": draws,
        }  # fmt: skip
        made = fit(
            read_table(table, column), baseline=baseline, noise=noise, restarts=restarts, **options
        )
        beside = None
        if against is not None:
            other = fit(read_table(table, against), baseline=against_baseline, **options)
            beside = align(made, other, seed=seed)
        against_it = objections(made)

        def show() -> None:
            title = f"{table.name}, {column}: recipe {recipe}, n = {made.n}"
            rows = common.table(
                title, "component", "mean (0-based)", "95 %", "weight", "95 %", "sd"
            )
            for index, part in enumerate(made.components):
                interval = made.intervals[index] if index < len(made.intervals) else None
                rows.add_row(
                    str(index + 1),
                    f"{part.mean:.2f}",
                    f"{interval.mean[0]:.1f} to {interval.mean[1]:.1f}" if interval else "",
                    f"{part.weight:.3f}",
                    f"{interval.weight[0]:.2f} to {interval.weight[1]:.2f}" if interval else "",
                    f"{part.std:.2f}",
                )
            nulls = common.table("Nulls", "null", "value", "p", "draws")
            for name, null in made.nulls.items():
                if "p" in null:
                    cells = (f"{null['value']:.4g}", f"{null['p']:.3g}", str(null["draws"]))
                    nulls.add_row(f"{name}: {null['statistic']}", *cells)
            entropy = "" if made.entropy is None else f"entropy {made.entropy:.4f}"
            level = made.log_likelihood
            likelihood = "" if level is None else f"log-likelihood {level:.4f} a sample"
            facts = ", ".join(x for x in (entropy, likelihood) if x)
            layers = ", ".join(map(str, made.recommended)) or "none"
            common.show_all(
                rows if made.components else f"{title}: no component (flat)",
                *([nulls] if nulls.row_count else []),
                facts,
                f"recommended (0-based): {layers}",
                f"verdict: {made.verdict}",
                made.reason,
                made.next_step,
                *(["What speaks against this recipe:"] if against_it else []),
                *(f"- {line}" for line in against_it),
                *([f"{column} against {against}: {beside.reason}"] if beside else []),
            )

        values = {**made.to_dict(), "objections": list(against_it)}
        if beside:
            values["against"] = {"column": against, **beside.to_dict()}
        return values, show

    common.run(job, as_json)
