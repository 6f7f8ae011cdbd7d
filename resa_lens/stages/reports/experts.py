"""Experts measured, ranked and changed, in tables and sentences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from resa_lens.figures.grids import cell, grid

LISTED = 10


def routing(name: str, values: dict[str, Any]) -> Iterator[Any]:
    """Yield the routers, and the experts whose use differs most between the phases."""
    yield grid(f"{name}: routers", values["routers"], {
        "layer": "{layer}", "experts": "{experts}", "a token": "{k}", "<rule": "{rule}",
        "off by": "{error:.1g}", "said by the token %": "{predicted_by_token:*.0f}",
        "least": "{least:.2f}", "most": "{most:.2f}",
    })  # fmt: skip
    phases = [p for p in ("prompt", "think", "answer") if p in values["tokens"]]
    rows = sorted(values["experts"], key=lambda row: -_spread(row, phases))[:LISTED]
    columns: dict[str, Any] = {"layer": "{layer}", "expert": "{expert}"}
    columns |= {f"{p} %": f"{{scores.use.{p}:*.1f}}" for p in phases}
    columns |= {f"mass, {p}": f"{{scores.mass.{p}:.3f}}" for p in phases}
    yield grid("experts whose use differs most between phases", rows, columns)
    yield (
        f"{values['documents']['all']} documents, {values['tokens']['all']} tokens; least and most "
        f"of the even share; unit {values['unit']}; in {values['folder']}"
    )


def _spread(row: dict[str, Any], phases: list[str]) -> float:
    use = [row["scores"]["use"][phase] for phase in phases]
    return max(use) - min(use)


def ranking(name: str, values: dict[str, Any], top: int) -> Iterator[Any]:
    """Yield the best experts with their nulls, and what the nulls say."""
    columns: dict[str, Any] = {"layer": "{layer}", "expert": "{expert}"}
    columns |= {measure: f"{{scores.{measure}:+.3f}}" for measure in values["experts"][0]["scores"]}
    columns |= {"p, labels": "{p_value:.2g}", "Holm": "{p_holm:.2g}", "p, tokens": "{type_p:.2g}"}
    yield grid(
        f"{name}: experts for {values['target']}, by {values['by']}", values["experts"][:top],
        columns,
    )  # fmt: skip
    null = values["null"]
    labels, half, matched = null["exchanged_labels"], null["split_half"], null["token_matched"]
    yield (
        f"labels exchanged between documents: {labels['called']} of {labels['of']} experts differ "
        f"(Holm); halves agree with {half['spearman']:.2f}. Words route, so these say little"
    )
    if types := null["token_types"]:
        yield (
            f"ordinary token types in its place: {types['reached_by']} of {len(types['types'])} "
            f"have an expert as specific (p {types['p_value']:.2g}); {types['called']} experts are "
            "beyond 95 % of them"
        )
    if matched["spearman"] is not None:
        yield (
            f"equal tokens compared alone: rank correlation {matched['spearman']:.2f} with the "
            f"plain difference, {matched['same_of_best']} of the best {matched['of']} the same"
        )
    yield from values["notes"]
    yield f"{values['documents']} documents, {values['tokens']} tokens; in {values['folder']}"


def steering(name: str, values: dict[str, Any]) -> Iterator[Any]:
    """Yield the chosen experts, dose and response, and what random experts do."""
    listed = ", ".join(f"{row['layer']}:{row['expert']}" for row in values["experts"])
    beta = f" x {values['beta']:g}" if values["how"] == "scale" else ""
    yield f"{name}: {values['how']}{beta} of {listed}, at {values['where']} tokens"
    yield grid("change by number of experts", values["doses"], {
        "experts": "{experts}", "thoughts, nats": "{loss.think.change:+.4f}",
        "95 %": "{loss.think.ci:+.4f}", "prompt": "{loss.prompt.change:+.4f}",
        "answer": "{loss.answer.change:+.4f}", "accuracy %": "{accuracy:*.1f}",
        "change": "{effect.difference:*+.1f}", "95 % of it": "{effect.ci:*+.1f}",
        "tokens": "{tokens.mean:.1f}", "finished %": "{finished.share:*.1f}",
    })  # fmt: skip
    random, types = values["null"]["random"], values["null"]["types"]
    uses = [one["use"] for one in random]
    yield (
        f"loss of thoughts {cell('{effect:+.4f}', values)} nats a token; {len(random)} random sets "
        f"{values['control']:+.4f} on average, rank p {values['p_value']:.3g} (never below "
        f"{1 / (1 + len(random)):.2g}); use {values['use']:.2f} slots a token, theirs "
        f"{min(uses):.2f} to {max(uses):.2f}"
    )
    if types:
        reached = [one for one in types if (one["change"] or 0) >= values["effect"]]
        names = ", ".join(repr(one["type"]) for one in reached[:5])
        yield (
            f"best experts of {len(types)} ordinary token types: {len(reached)} change it as much"
            + (f" ({names})" if names else "")
        )
    accuracy, base = values["accuracy"], values["accuracy"]["base"]
    text = (
        f"accuracy {cell('{accuracy:*.1f}', base)} % becomes {cell('{accuracy:*.1f}', accuracy)} % "
        f"({cell('{effect.difference:*+.1f}', accuracy)} points, p "
        f"{accuracy['effect']['p_value']:.2g}, n = {accuracy['n']})"
    )
    if control := accuracy["control"]:
        text += (
            f"; {control['sets']} random sets {cell('{effect.difference:*+.1f}', control)} on "
            f"average, rank p {control['rank_p']:.3g} (never below {1 / (1 + control['sets']):.2g})"
        )
    yield text
    yield from values["notes"]
    yield (
        f"ranked on {values['ranking_documents']} documents, judged on {values['documents']} "
        f"others and {values['questions']} questions; in {values['folder']}"
    )
