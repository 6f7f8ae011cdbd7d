"""Commands that change or weigh features in the running model: ablate, attribute."""

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
    MismatchOption,
    ModelOption,
    NewTokensOption,
    SaesOption,
    SeedOption,
    SiteOption,
    TasksOption,
    ThreadsOption,
    TokensOption,
    TopkOption,
    WorkspaceOption,
    YesOption,
)
from resa_lens.cli.layers import PromptOption

LayerOption = Annotated[
    str, typer.Option(help='auto (where the rule counts most), "4" (0-based) or "5th".')
]
RuleOption = Annotated[
    str, typer.Option(help="Of the counted features: either, any or all (strict).")
]


def ablate(
    model: ModelOption = "tiny-reasoner",
    layer: LayerOption = "auto",
    features: Annotated[
        str, typer.Option(help='counted (by --rule), or indices: "3,17,40".')
    ] = "counted",
    rule: RuleOption = "either",
    kind: Annotated[str, typer.Option(help="ablate, scale, clamp or steer.")] = "ablate",
    strength: Annotated[float, typer.Option(help="Of the figures printed first.")] = 1.0,
    doses: Annotated[str, typer.Option(help="Strengths of the curve.")] = "0.25,0.5,1,2",
    phases: Annotated[
        str, typer.Option(help="Tokens that are changed: prompt, think, answer.")
    ] = "prompt,think,answer",
    no_error: Annotated[
        bool, typer.Option("--no-error", help="Drop what the SAE does not explain.")
    ] = False,
    value: Annotated[
        float | None,
        typer.Option(help="Of clamp and steer; each feature's mean activation by default."),
    ] = None,
    controls: Annotated[int, typer.Option(help="Sets of random features.", min=1)] = 5,
    all_doses: Annotated[
        bool, typer.Option("--all-doses", help="Random features at every strength, not at one.")
    ] = False,
    tasks: TasksOption = "tiny",
    limit: Annotated[int, typer.Option(help="Questions at most.", min=1)] = 200,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 0.0,
    samples: Annotated[
        int, typer.Option(help="Answers a question, each by a seed of its own.", min=1)
    ] = 1,
    max_new_tokens: NewTokensOption = 160,
    prompt: PromptOption = "r1",
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
    """Change features while the model answers; accuracy and length, against random features.

    Strength 0 is the identity.  Random features are matched in activation mass and drawn anew for
    every control.

    Example: resa-lens ablate --model tiny-reasoner --layer 4 --features counted
    """

    def job() -> tuple[dict[str, Any], Any]:
        from resa_lens.corpora import CorpusConfig
        from resa_lens.evals.engines import GenerationConfig
        from resa_lens.evals.run import EvalConfig
        from resa_lens.features.exclusive import CountConfig
        from resa_lens.hookpoints import Hookpoint
        from resa_lens.pipeline.ablation import (
            AblationConfig,
            ablate_run,
            check_rule,
            counted_features,
        )
        from resa_lens.pipeline.scores import load_eval_items
        from resa_lens.saes.train import SaeConfig

        check_rule(rule)
        # Refused before anything is loaded: any feature will do.
        named = None if features == "counted" else _indices(features)
        counted_by = rule if named is None else None
        asked = EvalConfig(
            limit=limit,
            generation=GenerationConfig(max_new_tokens, temperature, seed=seed),
            samples=samples,
        )

        def config(at: int, chosen: tuple[int, ...]) -> AblationConfig:
            return AblationConfig(
                Hookpoint(at, site), chosen, counted_by, kind, strength,
                _numbers(doses), _names(phases), not no_error, value, controls, all_doses, seed,
                asked,
            )  # fmt: skip

        config(0, named or (0,))
        items = load_eval_items(tasks, asked)
        ctx = common.context(workspace, seed, device, dtype, force, threads)
        host = ctx.model(model)
        at = _layer(layer, host.n_layers)
        run = _saes(
            ctx, host, at,
            SaeConfig(site, latents, k, tokens=tokens, seed=seed),
            CorpusConfig(source=data, seed=seed), saes, allow_site_mismatch,
        )  # fmt: skip
        if named is None or at is None:
            at, counted = counted_features(ctx, host, run, rule, at, CountConfig(prompt))
            named = named or counted
            ctx.reporter.note(
                f"{Hookpoint(at, site).describe(host.n_layers)}: rule {rule!r} counts "
                f"{len(counted)} features"
            )
        folder, found = ablate_run(ctx, host, run, items, config(at, named), source=tasks)
        return {**found, "folder": str(folder)}, lambda: _show_ablation(host.slug, found, folder)

    common.run(job, as_json)


def attribute(
    model: ModelOption = "tiny-reasoner",
    layer: LayerOption = "auto",
    features: Annotated[
        str, typer.Option(help='active (the --top most active), counted, or indices: "3,17,40".')
    ] = "active",
    rule: RuleOption = "either",
    top: Annotated[int, typer.Option(help="Features, the most active first.", min=1)] = 20,
    metric: Annotated[
        str, typer.Option(help="Loss over think and answer tokens (loss), or think, or answer.")
    ] = "loss",
    text_tokens: Annotated[
        int, typer.Option(help="Tokens of the held-out documents.", min=1)
    ] = 4096,
    prompt: PromptOption = "r1",
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
    """Weigh features by gradient x activation and by patching, and say how far the two agree.

    Example: resa-lens attribute --model tiny-reasoner --layer 4 --top 20
    """

    def job() -> tuple[dict[str, Any], Any]:
        from resa_lens.corpora import CorpusConfig
        from resa_lens.features.exclusive import CountConfig
        from resa_lens.hookpoints import Hookpoint
        from resa_lens.pipeline.ablation import check_rule, counted_features
        from resa_lens.pipeline.attribution import attribute_run, check_metric
        from resa_lens.saes.train import SaeConfig

        check_rule(rule)
        check_metric(metric)
        named = None if features in ("active", "counted") else _indices(features, "active, counted")
        ctx = common.context(workspace, seed, device, dtype, force, threads)
        host = ctx.model(model)
        at = _layer(layer, host.n_layers)
        corpus = CorpusConfig(source=data, seed=seed)
        run = _saes(
            ctx, host, at,
            SaeConfig(site, latents, k, tokens=tokens, seed=seed), corpus, saes,
            allow_site_mismatch,
        )  # fmt: skip
        if features == "counted" or at is None:
            at, counted = counted_features(ctx, host, run, rule, at, CountConfig(prompt))
            named = counted if features == "counted" else named
        folder, found = attribute_run(
            ctx, host, run, Hookpoint(at, site), corpus,
            metric=metric, features=named, top=top, tokens=text_tokens,
        )  # fmt: skip
        return {**found, "folder": str(folder)}, lambda: _show_attribution(host.slug, found, folder)

    common.run(job, as_json)


def _indices(text: str, words: str = "counted") -> tuple[int, ...]:
    from resa_lens.errors import BadInputError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise BadInputError(
            f'features {text!r} are no indices; use {words} or for example "3,17,40"'
        ) from error


def _numbers(text: str) -> tuple[float, ...]:
    from resa_lens.errors import BadInputError

    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise BadInputError(f'doses {text!r} are no numbers; use for example "0.5,1,2"') from error


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _layer(text: str, n_layers: int) -> int | None:
    from resa_lens.hookpoints import parse_layer

    return None if text == "auto" else parse_layer(text, n_layers)


def _saes(
    ctx: Any,
    host: Any,
    at: int | None,
    sae: Any,
    corpus: Any,
    given: str | None,
    allow_mismatch: bool,
) -> Any:
    """Return the SAEs: of the one layer where no other is looked at, else of the default ones."""
    from resa_lens.hookpoints import trainable_layers
    from resa_lens.pipeline.sae_training import saes_for

    layers = [at] if at is not None else trainable_layers(host.n_layers)
    return saes_for(
        ctx, host, layers, sae, corpus, given,
        allow_mismatch=allow_mismatch, only=None if at is None else [at],
    )  # fmt: skip


def _points(value: float | None, signed: bool = True) -> str:
    return "" if value is None else f"{100 * value:{'+' if signed else ''}.1f}"


def _show_ablation(name: str, found: dict[str, Any], folder: Any) -> None:
    base = found["base"]
    rows = common.table(
        f"{name}, {found['where']}, {found['site']}: {found['kind']} {len(found['features'])} "
        f"features at {', '.join(found['phases'])} tokens",
        "strength", "accuracy %", "effect", "95 %", "p", "random features", "beyond them", "95 %",
        "p", "tokens", "finished %",
    )  # fmt: skip
    rows.add_row(
        "0", _points(base["accuracy"], False), *[""] * 7, f"{base['tokens']:.1f}",
        _points(base["finished"], False),
    )  # fmt: skip
    for row in found["doses"]:
        effect, beside = row["effect"], row["control"]
        cells = ["", "", "", ""]
        if beside:
            more = beside["beyond"]
            cells = [
                _points(beside["effect"]["difference"]), _points(more["difference"]),
                " to ".join(_points(x) for x in more["ci"]), f"{more['p_value']:.3g}",
            ]  # fmt: skip
        rows.add_row(
            f"{row['strength']:g}", _points(row["accuracy"], False),
            _points(effect["difference"]), " to ".join(_points(x) for x in effect["ci"]),
            f"{effect['p_value']:.3g}", *cells,
            f"{row['tokens']['mean']:.1f}", _points(row["finished"]["share"], False),
        )  # fmt: skip
    masses = [c["mass"]["all"] for c in found["controls"] if c["mass"]["all"] is not None]
    sets = len(found["controls"])
    common.show_all(
        rows,
        f"strength {found['strength']:g}: effect {_points(found['effect'])} points, random "
        f"features {_points(found['control'])} ({sets} sets), p {found['p_value']:.3g} over "
        f"{found['n']} questions and the sets, rank p {found['rank_p']:.3g} (never below "
        f"{1 / (1 + sets):.2g})",
        f"{found['note']}; a run like this finds {_points(found['detectable'], False)} points in "
        "80 % of cases",
        f"activation mass of the random sets over that of the features: {min(masses):.2f} to "
        f"{max(masses):.2f}"
        if masses
        else "the features have no activation mass at these tokens",
        f"in {folder}; figure: dose_response.html",
    )


def _show_attribution(name: str, found: dict[str, Any], folder: Any) -> None:
    rows = common.table(
        f"{name}, {found['where']}, {found['site']}: change of the {found['metric']} without a "
        "feature, 1e-3 nats",
        "feature", "active tokens", "documents", "gradient", "patching", "95 %", "p", "Holm",
    )  # fmt: skip
    for effect in found["effects"]:
        rows.add_row(
            str(effect["feature"]), str(effect["active"]), str(effect["documents"]),
            f"{1000 * effect['gradient']:+.4f}", f"{1000 * effect['patching']:+.4f}",
            " to ".join(f"{1000 * x:+.3f}" for x in effect["ci"]), f"{effect['p_value']:.2g}",
            f"{effect['p_corrected']:.2g}",
        )  # fmt: skip
    agreed = found["agreement"]
    ranks = (
        "too few features for a rank correlation"
        if agreed["spearman"] is None
        else f"Spearman {agreed['spearman']:.3f}, p {agreed['p_value']:.2g}, n {agreed['n']}"
    )
    signs = (
        ""
        if agreed["signs"] is None
        else f"; same sign in {100 * agreed['signs']:.0f} % of {agreed['signs_n']} "
        f"({100 * agreed['signs_ci'][0]:.0f} to {100 * agreed['signs_ci'][1]:.0f} %)"
    )
    common.show_all(
        rows,
        f"gradient and patching: {ranks}{signs}",
        f"{found['documents']} documents, {found['tokens']} tokens, {found['metric']} "
        f"{found['loss']:.4f} as it is; in {folder}",
    )
