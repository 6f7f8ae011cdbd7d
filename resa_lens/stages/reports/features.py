"""Single features: their activity, and what tests made of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from resa_lens.figures.grids import cell, grid, table
from resa_lens.models.hookpoints import describe_layer

SHOWN = 20
"""Features in the terminal's table of falsify; the JSON and the file have all."""


def activity(values: dict[str, Any], model: Any) -> Iterator[Any]:
    """Yield the activity of features, layer by layer."""
    yield grid(f"Feature activity of {model.slug}, site {values['site']}", values["layers"], {
        "layer": lambda row: describe_layer(row["layer"], model.n_layers), "fire": "{alive}",
        "latents": "{latents}", "L0": "{l0:.1f}",
        "median density": lambda row: f"{row['density_quartiles'][1]:.2g}"
        if row["density_quartiles"] else "",
        "denser than 10 %": "{dense}", "twice as dense in thoughts": "{thinking}",
        "in prompts alone": "{prompt_only}",
    })  # fmt: skip
    tokens = ", ".join(f"{count} {phase}" for phase, count in values["tokens"].items())
    yield f"{values['documents']} documents; tokens: {tokens}; in {values['folder']}"
    yield "one feature: add --show LAYER:FEATURE"


def page_of(page: dict[str, Any], n_layers: int) -> Iterator[Any]:
    """Yield one feature: its density, its tokens, its strongest examples, what it raises."""
    from resa_lens.texts.phases import PHASES

    phases = [
        {"phase": phase, "fired": page[f"tokens_fired_{phase}"],
         **{name: page[f"{name}_{phase}"] for name in ("density", "mean", "max")}}
        for phase in PHASES
    ]  # fmt: skip
    yield grid(f"Feature {page['feature']} at {describe_layer(page['layer'], n_layers)}", phases, {
        "phase": "{phase}", "tokens fired": "{fired}", "density": "{density:.4g}",
        "mean": "{mean:.3g}", "max": "{max:.3g}",
    })  # fmt: skip
    yield cell(
        "density over all {density:.4g} (95 % over documents {density_ci:.4g}), in "
        "{documents_fired} documents",
        page,
    )
    if page.get("fires_on"):
        yield "fires on: " + ", ".join(
            f"{token!r} {100 * share:.3g} %"
            for token, share in zip(page["fires_on"], page["fires_on_share"], strict=True)
        )
    # Its tables need NumPy, which no --help should wait for.
    from resa_lens.artifacts.feature_tables import STRONGEST

    strongest = [row for row in page["examples"] if row["interval"] == STRONGEST]
    yield grid("Strongest examples", strongest, {
        "value": "{value:.3g}", "phase": "{phase}", "document": "{document}",
        "<around the peak": _around,
    })  # fmt: skip
    yield f"raises: {', '.join(map(repr, page['top_tokens']))}"
    yield f"lowers: {', '.join(map(repr, page['bottom_tokens']))}"
    nearest = zip(page["nearest"], page["nearest_cosines"], strict=True)
    yield "nearest directions: " + ", ".join(f"{f} ({c:.2f})" for f, c in nearest)


def _around(row: dict[str, Any]) -> str:
    at = row["position"] - row["start"]
    text = "".join(f">>{t}<<" if i == at else t for i, t in enumerate(row["tokens"]))
    return repr(text)[1:-1]


def verdicts_of(values: dict[str, Any], name: str, n_layers: int) -> Iterator[Any]:
    """Yield the verdicts on counted features, one by one, by layer and by rule."""
    from resa_lens.features.battery import in_words
    from resa_lens.features.words import VERDICTS, WORDS, occurring

    kinds = ("injected", "plain", "shuffled", "paraphrase", "neutral", "format")
    # What stands is what a reader looks for, then what falls at the fewest tests.
    ordered = sorted(
        values["features"], key=lambda f: (-VERDICTS.index(f["verdict"]), len(f["failed"]))
    )
    if ordered:
        kind = "{{shares.{0}.fired}}/{{shares.{0}.n}}"
        title = f"Counted features of {name}, site {values['site']} (layers 0-based)"
        yield grid(title, ordered[:SHOWN], {
            "layer": "{layer}", "feature": "{feature}", "rule": "{rule}",
            **{test: kind.format(test) for test in kinds},
            "other seed": lambda row: "" if (twin := row["other_seed"]) is None
            else "found" if twin["found"] else "not found",
            "verdict": "{verdict}",
        })  # fmt: skip
        if len(ordered) > SHOWN:
            yield f"and {len(ordered) - SHOWN} more in {values['folder']}"
        layers = sorted({item["layer"] for item in ordered})
        verdicts = [[f["verdict"] for f in ordered if f["layer"] == layer] for layer in layers]
        words = [name for name in VERDICTS if any(f["verdict"] == name for f in ordered)]
        yield table("By layer", "layer", "counted", *words, rows=[
            (describe_layer(layer, n_layers), len(here), *map(here.count, words))
            for layer, here in zip(layers, verdicts, strict=True)
        ])  # fmt: skip
    yield grid("By rule", values["summary"]["rules"], {
        "rule": "{rule}", "counted": "{counted}",
        **{v: lambda row, v=v: row["verdicts"][v] for v in occurring(values["summary"]["rules"])},
        "stand, 95 %": lambda row: cell("{ci:*.1f}", row) if row["counted"] else "",
        "stand by the texts": "{by_texts} of {active}",
        "random weights": "{null_by_texts} of {null_active}",
        "p": lambda row: "" if row["null_by_texts"] is None else f"{row['p_value']:.2g}",
    })  # fmt: skip
    yield from (f"{name}: {WORDS[name].meaning}" for name in occurring(values["summary"]["rules"]))
    yield from (f"left out: {reason}" for reason in values["skipped"])
    yield values["summary"]["reason"]
    yield f"how often such verdicts err: {in_words()}"
    yield f"in {values['folder']}; figure: verdicts.html"
