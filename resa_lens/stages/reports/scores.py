"""Features by their scores and their likeness, in tables and sentences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from resa_lens.figures.grids import grid
from resa_lens.models.hookpoints import describe_layer

SHOWN = 20
"""Counted features in the terminal's table; the JSON and the file have all."""


BY = ("cosine", "cosine_firing", "correlation")


def scores(name: str, n_layers: int, values: dict[str, Any]) -> Iterator[Any]:
    """Yield the best features of each score."""
    for score in values["scores"]:
        yield grid(
            f"{score['score']} of {name}: {score['significant']} of {score['tested']} features "
            f"with q < 0.05 ({values['correction']})",
            score["top"], {
                "layer": lambda row: describe_layer(row["layer"], n_layers),
                "feature": "{feature}", "value": "{value:.4g}", "95 %": "{ci:.3g}",
                "null": "{null:.3g}", "p": "{p:.2g}", "q": "{q:.2g}",
                "tokens": "{active_tokens}", "documents": "{active_documents}",
            },
        )  # fmt: skip
        if "named" in score:
            yield (
                f"{score['score']} names {score['named']} of {score['tested']} features that are "
                "active on the prompt; tags at random places would name "
                f"{score['named_by_chance']:.3g}"
            )
        elif not score["significant"] and score["smallest_p"] * score["tested"] > 0.05:
            yield (
                f"{score['score']}: the smallest p is {score['smallest_p']:.2g} in "
                f"{score['tested']} tests; --draws above {values['draws']} may tell more"
            )
    yield from (f"left out: {reason}" for reason in values["left_out"].values())
    yield (
        f"{values['reasoning_tokens']} reasoning tokens in {values['reasoning_documents']} "
        f"documents against {values['other_tokens']} other in {values['other_documents']}; design "
        f"{values['design']}, {values['draws']} draws; every feature in {values['folder']}"
    )


def matches_of(name: str, values: dict[str, Any]) -> Iterator[Any]:
    """Yield how many features return in the other run, and which counted ones."""
    layers = values["layers"]
    parts = [
        {"name": row["name"], "by": by.replace("_", ", "), **row[by]}
        for row in layers for by in BY if row[by] is not None
    ]  # fmt: skip
    yield grid(f"Features of {name} that return (above {values['threshold']:g})", parts, {
        "layer": "{name}", "by": "{by}", "n": "{n}", "share %": "{share:*.1f}", "95 %": "{ci:*.1f}",
        "null %": "{null_share:*.2g}", "mean": "{mean:.3f}", "null mean": "{null_mean:.3f}",
    })  # fmt: skip
    methods = {row[by]["method"] for row in layers for by in BY if row[by]}
    yield f"matched by: {'; '.join(sorted(methods))}"
    if same := [
        f"layer {row['layer']}: {100 * agree['share']:.1f} % of {agree['n']} "
        f"(chance {100 * agree['chance']:.2g} %)"
        for row in layers
        if (agree := row["agreement"])
    ]:
        yield f"both name the same feature: {'; '.join(same)}"
    if followed := [{"name": row["name"], **item} for row in layers for item in row["features"]]:
        yield grid("Counted features, followed", followed[:SHOWN], {
            "layer": "{name}", "feature": "{feature}", "rule": "{rule}",
            "cosine": "{cosine:.3f}", "match": _match("cosine"),
            "counted there": _counted("cosine"), "correlation": "{correlation:.3f}",
            "its match": _match("correlation"), "counted": _counted("correlation"),
        })  # fmt: skip
    else:
        yield "no feature of RUN_A is counted by any rule"
    if len(followed) > SHOWN:
        yield f"and {len(followed) - SHOWN} more, in matches.json and with --json"
    yield from sorted({row["cosine_reason"] for row in layers if row["cosine_reason"]})
    yield f"every feature in {values['folder']}"


def _match(by: str) -> Callable[[Any], str]:
    return lambda row: "" if row[by] is None else str(row[f"{by}_match"])


def _counted(by: str) -> Callable[[Any], str]:
    return lambda row: "" if row[by] is None else "yes" if row[f"{by}_counted"] else "no"
