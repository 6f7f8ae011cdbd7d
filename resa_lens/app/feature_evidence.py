"""What was found out about a feature: its scores, its trials, and what the model does without it.

Where something was not measured, the command that measures it stands there.
"""

from __future__ import annotations

from typing import Any

import streamlit as st

from resa_lens import feature_plots, plots
from resa_lens.app.data import Artifact, Listing
from resa_lens.app.features_data import (
    Source,
    ablations_of,
    attributions_of,
    command,
    effects_of,
    mapping,
    scores_of,
    stored,
    verdict_of,
)
from resa_lens.app.features_stored import (
    Ablation,
    Attribution,
    CountedFeatures,
    ScoreSummary,
    StoredVerdict,
)
from resa_lens.app.tokens import plain
from resa_lens.app.widgets import figure, table
from resa_lens.errors import BadInputError

FIRES = 0.5
"""Share of trials from which a feature counts as firing, where the run does not say."""
SHOWN_RUNS = 5
"""Ablations and attributions that are shown of one feature."""


def missing(text: str, line: str) -> None:
    """Say that something was not measured, and by which command it is."""
    st.text(text)
    st.code(line, language="bash", wrap_lines=True)


def rules_of(source: Source, layer: int, feature: int) -> list[str]:
    """Return the rules that count a feature.

    Raises:
        BadInputError: the counts are missing or damaged.
    """
    if source.counts is None:
        return []
    counted = stored(CountedFeatures, source.counts.path / "features.json")
    return [rule for rule in counted.rules_of(layer, feature) if rule in plots.RULE_NAMES]


def scores(listing: Listing, source: Source, layer: int, feature: int) -> None:
    """Draw a feature's scores between reasoning text and other text.

    Raises:
        BadInputError: a file is missing or damaged.
    """
    if not source.scores:
        missing(
            "Features were not scored; this command does it for all of them:",
            command(listing, source, "score-features"),
        )
        return
    rows: list[dict[str, Any]] = []
    said: list[str] = []
    for run in source.scores:
        summary = stored(ScoreSummary, run.path / "summary.json")
        tested = {held.score: held.tested for held in summary.scores}
        for row in scores_of(run, layer, feature):
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
        said.append(f"{run.path.name}: {text}.")
    if not rows:
        st.text("It is active nowhere in the text that was scored, so it has no score.")
        return
    names = ("value", "by chance", "p", "q")
    numbers: dict[str, str] = dict.fromkeys(names, "%.3g")
    table(rows, "scores", numbers)
    st.caption(
        "By chance: what the score's permutation null expects. q: p corrected for all features "
        "tested. 95 %: kept for the best features of each score alone."
    )
    st.text(plain("\n".join(said)))


def falsification(listing: Listing, source: Source, layer: int, feature: int) -> None:
    """Draw how a counted feature answered to the trials, beside a model with random weights.

    Raises:
        BadInputError: a file is missing or damaged.
    """
    if source.counts is None:
        missing(
            "Features were not counted with these SAEs; only counted ones are put to the test:",
            command(listing, source, "falsify"),
        )
        return
    rules = rules_of(source, layer, feature)
    found = verdict_of(source, layer, feature)
    if found is None and not rules:
        st.text(
            "No rule counts it: on the prompt it is not active at the think tags alone. Only "
            "counted features are put to the test."
        )
        return
    if found is None:
        missing(
            f"Counted by {', '.join(rules)}, but not put to the test; this command does it:",
            command(listing, source, "falsify"),
        )
        return
    config = source.verdicts.manifest.config if source.verdicts else {}
    fires = mapping(config.get("falsify")).get("fires")
    fires = fires if isinstance(fires, int | float) else FIRES
    shares = {
        kind: (held.fired, held.n, held.ci)
        for kind, held in found.shares.items()
        if kind in feature_plots.TRIALS
    }
    figure(feature_plots.trials_figure(shares, fires), "figure-trials")
    st.text(plain(_beside(found)))
    with st.expander("Table of trials"):
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
        table(rows, "trials", {"low, %": "%.1f", "high, %": "%.1f"})


def _beside(found: StoredVerdict) -> str:
    """The rest of a verdict's evidence, one line each."""
    lines = [
        f"Counted by: {', '.join(found.rules)}; at the tags: {', '.join(found.places)}.",
        f"Falls at: {', '.join(found.failed) or 'no test'}.",
        "Tags put into plain texts against the same texts without: p = "
        f"{found.injection_p:.2g} (McNemar, corrected for all features).",
    ]
    if (null := found.random_weights) is not None:
        lines.append(
            f"A model with random weights: rule {found.rule} counts {null.counted} of its "
            f"{null.active} active features at this layer, and {null.passing} of these pass the "
            "tests on texts."
        )
    else:
        lines.append("No model with random weights stands beside it (resa-lens falsify).")
    if (twin := found.other_seed) is not None:
        known = twin.correlation is not None
        answers = f", answers correlate at most {twin.correlation:.2f}" if known else ""
        beside = "" if twin.elsewhere is None else f" ({twin.elsewhere:.2f} at its other layers)"
        lines.append(
            f"The SAE of another seed {'has' if twin.found else 'has not'} one like it: largest "
            f"cosine {twin.cosine:.2f} (feature {twin.feature}){answers}{beside}."
        )
    else:
        lines.append("It was not looked for in an SAE of another seed.")
    return "\n".join(lines)


def ablations(listing: Listing, source: Source, layer: int, feature: int) -> None:
    """Draw what the answers become without it, alone or with others.

    Raises:
        BadInputError: a file is missing or damaged.
    """
    runs = ablations_of(source, layer, feature)
    alone = ("--layer", str(layer), "--features", str(feature))
    if not runs:
        missing(
            "It was not ablated yet; this command answers questions with and without it, and "
            "without random features of equal activation mass:",
            command(listing, source, "ablate", *alone),
        )
        return
    made = [stored(Ablation, run.path / "results.json") for run in runs[:SHOWN_RUNS]]
    rows = [
        {
            "what": plain(_what(held)),
            "strength": held.strength,
            "accuracy, points": 100 * held.effect,
            "95 %": _points(held.effect_ci),
            "p": held.effect_p_value,
            "beyond random, points": 100 * held.beyond,
            "beyond, 95 %": _points(held.beyond_ci),
            "beyond, p": held.p_value,
            "questions": held.n,
            "random sets": len(held.controls),
        }
        for held in made
    ]
    formats = {"accuracy, points": "%+.1f", "beyond random, points": "%+.1f"}
    table(rows, "ablations", formats | dict.fromkeys(("p", "beyond, p"), "%.3g"))
    doses = made[0].doses
    try:
        drawn = plots.dose_response_figure(doses, "Dose and response")
    except (KeyError, TypeError) as error:
        raise BadInputError(
            f"{runs[0].path / 'results.json'} is damaged or of another version, at doses"
        ) from error
    drawn.update_layout(title_subtitle_text="95 % intervals over questions")
    figure(drawn, "figure-doses")
    st.text(plain(f"{_what(made[0])}; at strength {made[0].strength:g}: {made[0].note}."))
    if len(made[0].features) > 1:
        missing("Alone it was not ablated; this command does it:",
                 command(listing, source, "ablate", *alone))  # fmt: skip


def _what(held: Ablation) -> str:
    n = len(held.features)
    if n == 1:
        return f"{held.kind}, this feature alone"
    by = f" that rule {held.rule} counts" if held.rule else ""
    return f"{held.kind}, it and {n - 1} other{'s' if n > 2 else ''}{by}"


def _points(ci: tuple[float, float]) -> str:
    return f"{100 * ci[0]:+.1f} to {100 * ci[1]:+.1f}"


def attributions(listing: Listing, source: Source, layer: int, feature: int) -> None:
    """Draw what the loss becomes without it.

    Raises:
        BadInputError: a file is missing or damaged.
    """
    st.caption("Effect on the loss")
    rows, weighed = [], 0
    runs: list[Artifact] = attributions_of(source, layer)
    for run in runs[:SHOWN_RUNS]:
        held = stored(Attribution, run.path / "results.json")
        weighed += len(held.effects)
        rows += [
            {
                "measure": plain(held.metric),
                "gradient, 1e-3 nats": 1000 * effect.gradient,
                "patching, 1e-3 nats": 1000 * effect.patching,
                "95 %": f"{1000 * effect.ci[0]:+.3g} to {1000 * effect.ci[1]:+.3g}",
                "p": effect.p_value,
                "p, corrected": effect.p_corrected,
                "active tokens": effect.active,
                "documents": held.documents,
            }
            for effect in held.effects
            if effect.feature == feature
        ]
    if rows:
        nats = ("gradient, 1e-3 nats", "patching, 1e-3 nats")
        formats: dict[str, str] = dict.fromkeys(nats, "%+.3g")
        table(rows, "attributions", formats | dict.fromkeys(("p", "p, corrected"), "%.3g"))
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
    for held in effects_of(source, layer, feature):
        effect = held.layers.get(layer)
        if effect:
            st.text(
                f"With all {effect.features} features that rule {held.rule} counts at this layer "
                f"ablated the loss changes by {1000 * effect.target:+.3g}e-3 nats, with random "
                f"ones of equal mass by {1000 * effect.control:+.3g}e-3: "
                f"{1000 * effect.value:+.3g}e-3 beyond them (se {1000 * effect.se:.2g}e-3, "
                f"p = {effect.p_value:.2g}; {effect.n} documents, {effect.controls} sets)."
            )
