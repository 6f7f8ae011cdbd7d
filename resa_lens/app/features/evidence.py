"""What was found out about a feature: its scores, its trials, and what the model does without it.

Where something was not measured, the command that measures it stands there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import streamlit as st

from resa_lens.app import data
from resa_lens.app.features.data import (
    SCORES,
    Source,
    command,
    effects_of,
    opened,
    verdict_of,
)
from resa_lens.app.widgets import figure, missing, part, table
from resa_lens.artifacts.kinds.ablation import AblationResults
from resa_lens.artifacts.kinds.attribution import AttributionResults
from resa_lens.artifacts.kinds.falsification import Dependence, Verdict
from resa_lens.artifacts.kinds.scores import ScoreSummary
from resa_lens.artifacts.listing import Listing
from resa_lens.features.battery import in_words
from resa_lens.features.words import NEEDS
from resa_lens.figures import features as feature_plots
from resa_lens.figures import plots
from resa_lens.figures.tokens import plain
from resa_lens.stages.comparison import span

SHOWN_RUNS = 5
"""Ablations and attributions that are shown of one feature."""


def show(listing: Listing, source: Source, layer: int, feature: int) -> None:
    """Draw what was found out about a feature; a part that cannot be read leaves the others."""
    for title, parts in (
        ("Scores between reasoning and other text", (_scores,)),
        ("What does it depend on?", (_falsification,)),
        ("What happens without it", (_ablations, _attributions)),
    ):
        with part(title):
            for draw in parts:
                draw(listing, source, layer, feature)


def _scores(listing: Listing, source: Source, layer: int, feature: int) -> None:
    if not source.scores:
        missing(
            "Features were not scored; this command does it for all of them:",
            command(listing, source, "score-features"),
        )
        return
    rows: list[dict[str, Any]] = []
    designs: list[str] = []
    for run in source.scores:
        summary = data.read(run, "summary.json", ScoreSummary)
        tested = {totals.score: totals.tested for totals in summary.scores}
        for row in opened(run, SCORES).find(layer, feature):
            ci = summary.interval(row["score"], layer, feature)
            rows.append(
                {
                    "score": plain(row["score"]),
                    "value": row["value"],
                    "by chance": row["null"],
                    "p": row["p"],
                    "q": row["q"],
                    "95 %": f"{ci[0]:.3g} to {ci[1]:.3g}" if ci else "",
                    "of features": tested.get(row["score"]),
                    "active tokens": row["active_tokens"],
                    "active documents": row["active_documents"],
                    "run": run.path.name,
                }
            )
        text = f"{summary.draws:,} draws of each null ({summary.design}), q by {summary.correction}"
        designs.append(f"{run.path.name}: {text}.")
    if not rows:
        st.text("It is active nowhere in the text that was scored, so it has no score.")
        return
    table(rows, "scores")
    st.caption(
        "By chance: what the score's permutation null expects. q: p corrected for all features "
        "tested. 95 %: kept for the best features of each score alone."
    )
    st.text(plain("\n".join(designs)))


def _falsification(listing: Listing, source: Source, layer: int, feature: int) -> None:
    """Draw how a counted feature answered to the trials, beside a model with random weights."""
    if source.counts is None:
        missing(
            "Features were not counted with these SAEs; only counted ones are put to the test:",
            command(listing, source, "falsify"),
        )
        return
    rules = source.counted().rules_of(layer, feature)
    verdict = verdict_of(source, layer, feature)
    if verdict is None and not rules:
        st.text(
            "No rule counts it: on the prompt it is not active at the think tags alone. Only "
            "counted features are put to the test."
        )
        return
    if verdict is None or source.verdicts is None:
        missing(
            f"Counted by {', '.join(rules)}, but not put to the test; this command does it:",
            command(listing, source, "falsify"),
        )
        return
    shares = {
        kind: (share.fired, share.n, share.ci)
        for kind, share in verdict.shares.items()
        if kind in feature_plots.TRIALS
    }
    fires = source.verdicts.settings.falsify.fires
    figure(feature_plots.trials_figure(shares, fires), "figure-trials")
    st.text(plain(_in_words(verdict)))
    rows = [
        {
            "kind": kind,
            "what": feature_plots.TRIALS[kind],
            "fires in": fired,
            "of": n,
            "low, %": 100 * low,
            "high, %": 100 * high,
        }
        for kind, (fired, n, (low, high)) in shares.items()
    ]
    table(rows, "trials", "Table of trials")
    if verdict.depends_on:
        table(_needs(verdict.depends_on), "dependences", "Table of dependences")
        st.caption(f"How often such verdicts err: {in_words()}.")


def _needs(depends_on: Mapping[str, Dependence]) -> list[dict[str, Any]]:
    """Return a row a dependence, with the shares of firing that decided it; of a phase a tag."""
    rows = []
    for name, item in depends_on.items():
        what = NEEDS.get(name, plain(name))
        shares = {what: item}
        if item.open and item.close:
            shares = {f"{what}: opening tag": item.open, f"{what}: closing tag": item.close}
        for label, share in shares.items():
            low, high = share.ci or (None, None)
            rows.append({
                "dependence": label, "needed": item.needs, "trials": item.trials,
                "fires in, %": _hundredfold(share.share), "of": share.n,
                "low, %": _hundredfold(low), "high, %": _hundredfold(high),
                "correlation": item.correlation,
            })  # fmt: skip
    return rows


def _hundredfold(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _in_words(verdict: Verdict) -> str:
    """Return the rest of a verdict's evidence, one line each."""
    lines = [
        *([f"It {verdict.sentence}."] if verdict.sentence else []),
        f"Counted by: {', '.join(verdict.rules)}; at the tags: {', '.join(verdict.places)}.",
        f"Falls at: {', '.join(verdict.failed) or 'no test'}.",
        "Tags put into plain texts against the same texts without: p = "
        f"{verdict.injection_p:.2g} (McNemar, corrected for all features).",
    ]
    if (null := verdict.random_weights) is not None:
        lines.append(
            f"A model with random weights: rule {verdict.rule} counts {null.counted} of its "
            f"{null.active} active features at this layer, and {null.passing} of these pass the "
            "tests on texts."
        )
    else:
        lines.append("No model with random weights stands beside it (resa-lens falsify).")
    if (twin := verdict.other_seed) is not None:
        known = twin.correlation is not None
        answers = f", answers correlate at most {twin.correlation:.2f}" if known else ""
        elsewhere = "" if twin.elsewhere is None else f" ({twin.elsewhere:.2f} at its other layers)"
        lines.append(
            f"The SAE of another seed {'has' if twin.found else 'has not'} one like it: largest "
            f"cosine {twin.cosine:.2f} (feature {twin.feature}){answers}{elsewhere}."
        )
    else:
        lines.append("It was not looked for in an SAE of another seed.")
    return "\n".join(lines)


def _ablations(listing: Listing, source: Source, layer: int, feature: int) -> None:
    """Draw what the answers become without it, alone or with others."""
    points = [(run, run.settings.ablation) for run in source.ablations]
    # The fewest others with it first.
    runs = sorted(
        (run for run, what in points if what.point.layer == layer and feature in what.features),
        key=lambda run: len(run.settings.ablation.features),
    )
    alone = ("--layer", str(layer), "--features", str(feature))
    if not runs:
        missing(
            "It was not ablated yet; this command answers questions with and without it, and "
            "without random features of equal activation mass:",
            command(listing, source, "ablate", *alone),
        )
        return
    results = [data.read(run, "results.json", AblationResults) for run in runs[:SHOWN_RUNS]]
    rows = [
        {
            "what": plain(_what(result)),
            "strength": result.strength,
            "accuracy, points": 100 * result.effect,
            "95 %": span(result.effect_ci),
            "p": result.effect_p_value,
            "beyond random, points": 100 * result.beyond,
            "beyond, 95 %": span(result.beyond_ci),
            "beyond, p": result.p_value,
            "questions": result.n,
            "random sets": len(result.controls),
        }
        for result in results
    ]
    table(rows, "ablations")
    first = results[0]
    drawing = plots.dose_response_figure(first.doses, "Dose and response")
    drawing.update_layout(title_subtitle_text="95 % intervals over questions")
    figure(drawing, "figure-doses")
    st.text(plain(f"{_what(first)}; at strength {first.strength:g}: {first.note}."))
    if len(first.features) > 1:
        missing("Alone it was not ablated; this command does it:",
                 command(listing, source, "ablate", *alone))  # fmt: skip


def _what(result: AblationResults) -> str:
    n = len(result.features)
    if n == 1:
        return f"{result.kind}, this feature alone"
    by = f" that rule {result.rule} counts" if result.rule else ""
    return f"{result.kind}, it and {n - 1} other{'s' if n > 2 else ''}{by}"


def _attributions(listing: Listing, source: Source, layer: int, feature: int) -> None:
    """Draw what the loss becomes without it."""
    st.caption("Effect on the loss")
    rows, weighed = [], 0
    runs = [run for run in source.attributions if run.results.layer == layer]
    for run in runs[:SHOWN_RUNS]:
        results = data.read(run, "results.json", AttributionResults)
        weighed += len(results.effects)
        rows += [
            {
                "measure": plain(results.metric),
                "gradient, 1e-3 nats": 1000 * effect.gradient,
                "patching, 1e-3 nats": 1000 * effect.patching,
                "95 %": f"{1000 * effect.ci[0]:+.3g} to {1000 * effect.ci[1]:+.3g}",
                "p": effect.p_value,
                "p, corrected": effect.p_corrected,
                "active tokens": effect.active,
                "documents": results.documents,
            }
            for effect in results.effects
            if effect.feature == feature
        ]
    if rows:
        table(rows, "attributions")
        st.caption(
            "What the loss changes by without it: predicted by gradient times activation, and "
            "measured by taking it away. Positive: the model is worse off without it."
        )
    else:
        among = f" It is not among the {weighed} features weighed so far." if weighed else ""
        missing(
            f"What the loss changes by without it was not measured.{among} This command does it:",
            command(
                listing, source, "attribute", "--layer", str(layer), "--features", str(feature)
            ),
        )
    for effects in effects_of(source, layer, feature):
        effect = effects.layers.get(layer)
        if effect:
            st.text(
                f"With all {effect.features} features that rule {effects.rule} counts at this "
                f"layer ablated the loss changes by {1000 * effect.target:+.3g}e-3 nats, with "
                f"random ones of equal mass by {1000 * effect.control:+.3g}e-3: "
                f"{1000 * effect.value:+.3g}e-3 beyond them (se {1000 * effect.se:.2g}e-3, "
                f"p = {effect.p_value:.2g}; {effect.n} documents, {effect.controls} sets)."
            )
