"""Commands about single features: score-features, match-features."""

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

SHOWN = 20
"""Counted features in the terminal's table; the JSON and the file have all."""


BY = ("cosine", "cosine_firing", "correlation")


def score_features(
    model: ModelOption = "tiny-reasoner",
    score: Annotated[
        list[str] | None,
        typer.Option(
            help="all, any, either, reason_score, cohens_d, auc or frequency_ratio; may be given "
            "more than once; by default all that the text allows."
        ),
    ] = None,
    layers: LayersOption = None,
    site: SiteOption = "mlp_out",
    saes: SaesOption = None,
    data: DataOption = "tiny",
    other_data: Annotated[
        str | None,
        typer.Option(
            help="Other text: a data source, whose questions stand with their answers alone, or "
            "no-steps (half of --data without its steps); by default the prompt and answer of the "
            "same documents."
        ),
    ] = None,
    text_tokens: Annotated[
        int | None, typer.Option(help="Tokens of the documents [16384].", min=1)
    ] = None,
    words: Annotated[
        str | None,
        typer.Option(
            help='Reasoning words of reason_score, by commas: "wait,however"; by default ten '
            "English ones, and = and ; for the bundled questions."
        ),
    ] = None,
    prompt: Annotated[
        str, typer.Option(help="Of the rules all, any, either: r1, steps, short, a text or @file.")
    ] = "r1",
    draws: Annotated[int, typer.Option(help="Draws of each null.", min=20)] = 1000,
    correction: Annotated[
        str, typer.Option(help="bh (false discovery rate) or holm (any false call).")
    ] = "bh",
    top: Annotated[int, typer.Option(help="Features shown of each score.", min=1)] = 20,
    tokens: TokensOption = None,
    latents: LatentsOption = None,
    k: TopkOption = 32,
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
    """Score every feature between reasoning text and other text, with permutation p-values.

    Example: resa-lens score-features --model tiny-reasoner --score cohens_d --score auc --top 10
    """

    def job() -> tuple[dict[str, Any], Any]:
        from resa_lens.corpora import CorpusConfig
        from resa_lens.features.exclusive import CountConfig
        from resa_lens.features.scores import check_scores
        from resa_lens.hookpoints import parse_layers
        from resa_lens.pipeline.feature_scores import TOKENS, ScoreConfig, check_text, score_run
        from resa_lens.pipeline.sae_training import saes_for
        from resa_lens.saes.train import SaeConfig

        check_scores(score or ())
        corpus = CorpusConfig(source=data, seed=seed)
        check_text(corpus, other_data)
        ctx = common.context(workspace, seed, device, dtype, force, threads)
        host = ctx.model(model)
        chosen = parse_layers(layers, host.n_layers)
        run = saes_for(
            ctx, host, chosen, SaeConfig(site, latents, k, tokens=tokens, seed=seed), corpus, saes,
            allow_mismatch=allow_site_mismatch, only=None if layers is None else chosen,
        )  # fmt: skip
        config = ScoreConfig(
            scores=tuple(score) if score else None,
            other=other_data,
            tokens=text_tokens or TOKENS,
            words=None
            if words is None
            else tuple(w for w in map(str.strip, words.split(",")) if w),
            draws=draws,
            correction=correction,
            top=top,
            count=CountConfig(prompt),
        )
        folder, found = score_run(
            ctx, host, run, corpus, config, None if saes and layers is None else chosen
        )
        values = {"model": host.name, "site": site, **found, "folder": str(folder)}
        return values, lambda: _show_scores(host.slug, host.n_layers, values)

    common.run(job, as_json)


def _show_scores(name: str, n_layers: int, found: dict[str, Any]) -> None:
    from resa_lens.hookpoints import describe_layer

    parts: list[Any] = []
    for score in found["scores"]:
        made = common.table(
            f"{score['score']} of {name}: {score['significant']} of {score['tested']} features "
            f"with q < 0.05 ({found['correction']})",
            "layer", "feature", "value", "95 %", "null", "p", "q", "tokens", "documents",
        )  # fmt: skip
        for row in score["top"]:
            ci = row["ci"]
            made.add_row(
                describe_layer(row["layer"], n_layers),
                str(row["feature"]),
                f"{row['value']:.4g}",
                f"{ci[0]:.3g} to {ci[1]:.3g}" if ci else "",
                f"{row['null']:.3g}",
                f"{row['p']:.2g}",
                f"{row['q']:.2g}",
                str(row["active_tokens"]),
                str(row["active_documents"]),
            )
        parts.append(made)
        if "named" in score:
            parts.append(
                f"{score['score']} names {score['named']} of {score['tested']} features that are "
                "active on the prompt; tags at random places would name "
                f"{score['named_by_chance']:.3g}"
            )
        elif not score["significant"] and score["smallest_p"] * score["tested"] > 0.05:
            parts.append(
                f"{score['score']}: the smallest p is {score['smallest_p']:.2g} in "
                f"{score['tested']} tests; --draws above {found['draws']} may tell more"
            )
    parts += [f"left out: {reason}" for reason in found["left_out"].values()]
    common.show_all(
        *parts,
        f"{found['reasoning_tokens']} reasoning tokens in {found['reasoning_documents']} documents "
        f"against {found['other_tokens']} other in {found['other_documents']}; design "
        f"{found['design']}, {found['draws']} draws; every feature in {found['folder']}",
    )


def match_features(
    run_a: Annotated[
        str, typer.Argument(help="A folder of SAEs, a run's name in the workspace, or seed:0.")
    ],
    run_b: Annotated[str, typer.Argument(help="The SAEs in which RUN_A's features are sought.")],
    model: ModelOption = "tiny-reasoner",
    model_b: Annotated[
        str | None,
        typer.Option(help="The model of RUN_B, of the same tokenizer; by default that of RUN_A."),
    ] = None,
    layers: LayersOption = None,
    site: SiteOption = "mlp_out",
    data: DataOption = "tiny",
    text_tokens: Annotated[
        int | None, typer.Option(help="Tokens of the shared documents [16384].", min=1)
    ] = None,
    threshold: Annotated[
        float, typer.Option(help="A feature is found where its match is above it.")
    ] = 0.7,
    prompt: Annotated[
        str,
        typer.Option(help="Whose counted features are followed: r1, steps, short, text or @file."),
    ] = "r1",
    workspace: WorkspaceOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    threads: ThreadsOption = None,
    force: ForceOption = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Look for one run's features in another's, by direction and by activation, with nulls.

    Example: resa-lens match-features seed:0 seed:1 --model tiny-reasoner --layers 5,6
    """

    def job() -> tuple[dict[str, Any], Any]:
        from resa_lens.corpora import CorpusConfig
        from resa_lens.features.exclusive import CountConfig, tag_prompt
        from resa_lens.features.matching import check_threshold
        from resa_lens.hookpoints import parse_layers
        from resa_lens.pipeline.matching import TOKENS, MatchConfig, Side, match_run, open_run

        check_threshold(threshold)
        ctx = common.context(workspace, seed, device, dtype, force, threads)
        host = ctx.model(model)
        other = host if model_b is None else ctx.model(model_b)
        count = CountConfig(prompt)
        tag_prompt(host, count)
        chosen = None if layers is None else parse_layers(layers, host.n_layers)
        first, second = (
            Side(m, open_run(ctx, m, name, site, chosen))
            for m, name in ((host, run_a), (other, run_b))
        )
        config = MatchConfig(threshold, text_tokens or TOKENS, count)
        folder, rows = match_run(
            ctx, first, second, CorpusConfig(source=data, seed=seed), config, chosen
        )
        values = {
            "run_a": str(first.run.folder), "run_b": str(second.run.folder), "model": host.name,
            "model_b": other.name, "site": site, "threshold": threshold, "layers": rows,
            "folder": str(folder),
        }  # fmt: skip
        return values, lambda: _show_matches(host.slug, values)

    common.run(job, as_json)


def _show_matches(name: str, found: dict[str, Any]) -> None:
    made = common.table(
        f"Features of {name} found again (above {found['threshold']:g})",
        "layer", "by", "n", "share %", "95 %", "null %", "mean", "null mean",
    )  # fmt: skip
    for row in found["layers"]:
        for by in BY:
            if (part := row[by]) is None:
                continue
            made.add_row(
                row["name"],
                by.replace("_", ", "),
                str(part["n"]),
                f"{100 * part['share']:.1f}",
                f"{100 * part['ci'][0]:.1f} to {100 * part['ci'][1]:.1f}",
                f"{100 * part['null_share']:.2g}",
                f"{part['mean']:.3f}",
                f"{part['null_mean']:.3f}",
            )
    followed = common.table(
        "Counted features, followed",
        "layer", "feature", "rule", "cosine", "match", "counted there",
        "correlation", "match", "counted there",
    )  # fmt: skip
    for row in found["layers"]:
        for item in row["features"][: SHOWN - followed.row_count]:
            cells = []
            for by in ("cosine", "correlation"):
                keys = (by, f"{by}_match", f"{by}_counted")
                value, match, counted = (item[key] for key in keys)
                none = value is None
                cells += ["" if none else f"{value:.3f}", "" if none else str(match)]
                cells.append("" if none else "yes" if counted else "no")
            followed.add_row(row["name"], str(item["feature"]), item["rule"], *cells)
    methods = {row[by]["method"] for row in found["layers"] for by in BY if row[by]}
    same = [
        f"layer {row['layer']}: {100 * agree['share']:.1f} % of {agree['n']} "
        f"(chance {100 * agree['chance']:.2g} %)"
        for row in found["layers"]
        if (agree := row["agreement"])
    ]
    more = sum(len(row["features"]) for row in found["layers"]) - followed.row_count
    reasons = sorted({row["cosine_reason"] for row in found["layers"] if row["cosine_reason"]})
    common.show_all(
        made,
        f"matched by: {'; '.join(sorted(methods))}",
        *([f"both name the same feature: {'; '.join(same)}"] if same else []),
        *([followed] if followed.row_count else ["no feature of RUN_A is counted by any rule"]),
        *([f"and {more} more, in matches.json and with --json"] if more else []),
        *reasons,
        f"every feature in {found['folder']}",
    )
