"""SAEs, counts and recommendations, in tables and sentences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from resa_lens.features.config import RULES
from resa_lens.figures.grids import grid
from resa_lens.models.hookpoints import describe_layer

if TYPE_CHECKING:
    from resa_lens.features.exclusive import FeatureCounts
    from resa_lens.layers.selectors import Recommendation
    from resa_lens.layers.stability import Stability as Result


def training(title: str, n_layers: int, values: dict[str, Any]) -> Iterator[Any]:
    """Yield the quality of SAEs, and whether their features return with other seeds."""
    rows = [{**row["quality"].get("all", {}), **row} for row in values["saes"]]
    changes = ("loss_change", "loss_change_se", "kl", "loss_recovered")
    yield grid(title, [dict.fromkeys(changes) | row for row in rows], {
        "layer": lambda row: describe_layer(row["layer"], n_layers), "FVU": "{fvu:.4f}",
        "with BOS, EOS": "{fvu_special:.4f}", "L0": "{l0:.1f}", "dead": "{dead_share:*.1f} %",
        "loss change": lambda row: _with_error(row["loss_change"], row["loss_change_se"]),
        "KL": "{kl:.4f}", "recovered": "{loss_recovered:.3f}",
    })  # fmt: skip
    if values["stability"]:
        seeds = len(values["seeds"])
        yield grid(
            f"Decoder directions that return, {seeds} seeds (cosine above 0.7)",
            values["stability"], {
                "layer": "{name}", "share": "{share:*.1f} %", "random directions": "{null:*.2g} %",
                "n": "{n}",
            },
        )  # fmt: skip
    report = f", report in {values['report']}" if values["report"] else ""
    yield f"{values['tokens']} tokens, {values['seconds']:.0f} s; in {values['folder']}{report}"


def _with_error(change: float | None, error: float | None) -> str:
    shown = "" if change is None else f"{change:+.4f}"
    return f"{shown} ± {error:.4f}" if shown and error else shown


def counts(title: str, n_layers: int, result: FeatureCounts, folder: str) -> Iterator[Any]:
    """Yield what each rule counts by layer, and where the tags stand in the prompt."""
    yield grid(f"Exclusive features of {title}", result.layers, {
        "layer": lambda row: describe_layer(row.layer, n_layers),
        **{rule: lambda row, rule=rule: len(row.features[rule]) for rule in RULES},
        "active": "{active}",
    })  # fmt: skip
    spans, config = result.prompt, result.config
    yield (
        f"{len(spans.open_spans)} occurrences of {config.open_tag} at tokens "
        f"{[list(s) for s in spans.open_spans]}, {len(spans.close_spans)} of {config.close_tag} at "
        f"{[list(s) for s in spans.close_spans]}; in {folder}"
    )
    yield from _shared(result)


def _shared(counts: FeatureCounts) -> Iterator[str]:
    """Say how many features rest on tokens of both tags, which count for neither."""
    if shared := counts.prompt.shared:
        names = ", ".join(repr(counts.prompt.tokens[position]) for position in shared)
        rest = ", ".join(
            f"{sum(item.shared[rule] for item in counts.layers)} features by rule {rule}"
            for rule in counts.layers[0].shared
        )
        yield (
            f"tokens {list(shared)} ({names}) are of two tags and count for neither; {rest} rest "
            "on them alone and are left out"
        )


def recommendation(
    title: str, result: Recommendation, falsified: dict[str, Any] | None
) -> Iterator[Any]:
    """Yield the counts that a recommendation rests on, and its verdict."""
    marks = {x: f"recommended ({rank})" for rank, x in enumerate(result.recommended, 1)}
    yield grid(title, result.layers.items(), {
        "layer": lambda row: describe_layer(row[0], result.n_layers),
        "features": lambda row: f"{row[1]:g}", "": lambda row: marks.get(row[0], ""),
    })  # fmt: skip
    best = describe_layer(result.recommended[0], result.n_layers)
    yield f"recommended: {best}, selector {result.selector}"
    yield f"verdict: {result.verdict}"
    yield result.reason
    if counted := int(sum(result.layers.values())):
        yield (
            f"the {counted} counted features were not tested: resa-lens falsify"
            if falsified is None
            else f"falsification left {falsified['survivors']} of the {counted} counted features"
        )
    yield result.next_step


def stability(title: str, result: Result) -> Iterator[Any]:
    """Yield the recommendations of all tables, and what they agree in."""
    yield grid(title, result.tables, {
        "table": "{name}", "features": "{n:g}", "verdict": "{verdict}",
        "recommended (0-based)": lambda row: ", ".join(map(str, row.recommended))
        if row.answered else "none: the middle",
    })  # fmt: skip
    factors = [(f"{item.factor} alone", item) for item in result.factors]
    factors += [(result.between.factor, result.between)] if result.between else []
    yield grid("Pairs of tables that differ in", (
        {"factor": factor, "of": item} for factor, item in factors
    ), {
        "": "{factor}", "pairs": "{of.pairs}", "mean Spearman": "{of.spearman:+.2f}",
        "p": "{of.spearman_p:.3g}", "same first layer": "{of.same_first} of {of.answered}",
        "by chance": "{of.chance:*.0f} %",
    })  # fmt: skip
    yield "tables of one SAE share its features: only those of several seeds are independent"
    chances = [p.alignment_p for p in result.pairs if p.alignment_p is not None]
    yield (
        f"alignment: {len(chances)} of {len(result.pairs)} pairs have as many components each; in "
        f"{sum(p <= 0.05 for p in chances)} their means lie closer than in 95 % of shuffles"
    )
    yield f"verdict: {result.verdict}"
    yield result.reason
    yield result.next_step
