"""Features changed or weighed in the running model, in tables and sentences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from resa_lens.figures.grids import cell, grid
from resa_lens.models.hookpoints import describe_layer


def ablation(name: str, values: dict[str, Any]) -> Iterator[Any]:
    """Yield effect by strength, and what random features do."""
    base, controls = values["base"], values["controls"]
    title = (
        f"{name}, {values['where']}, {values['site']}: {values['kind']} {len(values['features'])} "
        f"features at {', '.join(values['phases'])} tokens"
    )
    plain = {
        "strength": 0.0, "accuracy": base["accuracy"], "effect": None, "control": None,
        "tokens": {"mean": base["tokens"]}, "finished": {"share": base["finished"]},
    }  # fmt: skip
    yield grid(title, [plain, *values["doses"]], {
        "strength": "{strength:g}", "accuracy %": "{accuracy:*.1f}",
        "effect": "{effect.difference:*+.1f}", "95 %": "{effect.ci:*+.1f}",
        "p": "{effect.p_value:.3g}", "random features": "{control.effect.difference:*+.1f}",
        "beyond them": "{control.beyond.difference:*+.1f}",
        "95 % beyond": "{control.beyond.ci:*+.1f}", "p beyond": "{control.beyond.p_value:.3g}",
        "tokens": "{tokens.mean:.1f}", "finished %": "{finished.share:*.1f}",
    })  # fmt: skip
    sets = len(controls)
    yield (
        f"strength {values['strength']:g}: effect {cell('{effect:*+.1f}', values)} points, random "
        f"features {cell('{control:*+.1f}', values)} ({sets} sets), p {values['p_value']:.3g} over "
        f"{values['n']} questions and the sets, rank p {values['rank_p']:.3g} (never below "
        f"{1 / (1 + sets):.2g})"
    )
    yield (
        f"{values['note']}; a run like this finds {cell('{detectable:*.1f}', values)} points in "
        "80 % of cases"
    )
    masses = [c["mass"]["all"] for c in controls if c["mass"]["all"] is not None]
    yield (
        f"activation mass of the random sets over that of the features: {min(masses):.2f} to "
        f"{max(masses):.2f}"
        if masses
        else "the features have no activation mass at these tokens"
    )
    yield f"in {values['folder']}; figure: dose_response.html"


def insertion(name: str, n_layers: int, values: dict[str, Any]) -> Iterator[Any]:
    """Yield what inserted SAEs and their controls do to the answers, layer by layer."""
    base = values["base"]
    yield (
        f"{name} as it is: {cell('{accuracy:*.1f}', base)} % right "
        f"({cell('{ci:*.1f}', base)}, 95 %), n = {base['n']}; SAEs of {values['source']}"
    )
    for row in values["layers"]:
        arms = {**row["inserted"], **{
            f"{kind} ablation": cost["accuracy"] for kind, cost in row["ablation"].items()
            if cost["accuracy"]
        }}  # fmt: skip
        title = f"{describe_layer(row['layer'], n_layers)}, {values['site']}: in its place"
        yield grid(title, [{"arm": arm, **figures} for arm, figures in arms.items()], {
            "": "{arm}", "accuracy %": "{accuracy:*.1f}", "95 %": "{ci:*.1f}",
            "change": "{difference:*+.1f}", "95 % of it": "{difference_ci:*+.1f}",
            "p": "{p_value:.3g}",
        })  # fmt: skip
        shares = ", ".join(
            f"{phase} {value:.3g}" for phase, value in row["fvu"].items() if value is not None
        )
        yield f"{row['verdict']}: {row['reason']}; FVU: {shares}"
    yield f"in {values['folder']}"


def attribution(name: str, values: dict[str, Any]) -> Iterator[Any]:
    """Yield features by their effect on the loss, and whether both measures agree."""
    nats = ("gradient", "patching", "ci")
    rows = [
        {**effect, **{key: [1000 * v for v in value] if key == "ci" else 1000 * value
                      for key in nats if (value := effect[key]) is not None}}
        for effect in values["effects"]
    ]  # fmt: skip
    title = f"{name}, {values['where']}, {values['site']}: change of the {values['metric']}"
    yield grid(f"{title} without a feature, 1e-3 nats", rows, {
        "feature": "{feature}", "active tokens": "{active}", "documents": "{documents}",
        "gradient": "{gradient:+.4f}", "patching": "{patching:+.4f}", "95 %": "{ci:+.3f}",
        "p": "{p_value:.2g}", "Holm": "{p_corrected:.2g}",
    })  # fmt: skip
    agree = values["agreement"]
    text = "too few features for a rank correlation"
    if agree["spearman"] is not None:
        text = f"Spearman {agree['spearman']:.3f}, p {agree['p_value']:.2g}, n {agree['n']}"
    if agree["signs"] is not None:
        text += (
            f"; same sign in {100 * agree['signs']:.0f} % of {agree['signs_n']} "
            f"({cell('{signs_ci:*.0f}', agree)} %)"
        )
    yield f"gradient and patching: {text}"
    yield (
        f"{values['documents']} documents, {values['tokens']} tokens, {values['metric']} "
        f"{values['loss']:.4f} as it is; in {values['folder']}"
    )
