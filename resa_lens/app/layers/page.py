"""The page "Layers": which layers carry the features, and how far that is to be believed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from typing import Any

import streamlit as st

from resa_lens.app import answers, data, empty, links
from resa_lens.app.layers import insertion as layers_insertion
from resa_lens.app.layers import saes as layers_saes
from resa_lens.app.layers import sweep as layers_sweep
from resa_lens.app.widgets import (
    choose,
    figure,
    layer_columns,
    part,
    problem,
    problems,
    readable,
    share_columns,
    table,
    views,
)
from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.commands import command_of
from resa_lens.artifacts.kinds import counts as counts_kind
from resa_lens.artifacts.kinds.adapter import Adapter
from resa_lens.artifacts.kinds.counts import RULES, Counts
from resa_lens.artifacts.kinds.falsification import Falsification, Verdicts
from resa_lens.artifacts.kinds.insertion import Insertion
from resa_lens.artifacts.kinds.recommendation import Recommendation, StoredRecommendation
from resa_lens.artifacts.kinds.saes import Saes
from resa_lens.artifacts.kinds.sweep import SWEEP, Sweep, SweepTables
from resa_lens.artifacts.listing import Listing, is_parent
from resa_lens.figures import layers as layer_plots
from resa_lens.figures import plots
from resa_lens.figures.scores import sweep_figure
from resa_lens.layers import FLAT, SUPPORTED, TREND, WEAK, MixtureFit, read_table
from resa_lens.models.hookpoints import describe_layer
from resa_lens.resources import data_path
from resa_lens.stages.comparison import points, span
from resa_lens.stats.resampling import student_interval
from resa_lens.texts.tables import read_rows

PAPER_TABLE = "paper/table6_hookpoints.csv"
PAPER_MODELS = "paper/tables3_4_5_models.csv"
PAPER_LAYERS = 28
LAYERS, TUNED, QUALITY, PAPER = "By layer", "Tuned and inserted", "SAE quality", "The paper"
"""Views of the page."""
BADGES: dict[str, tuple[str, str, Any]] = {
    SUPPORTED: ("supported", ":material/check_circle:", "green"),
    TREND: ("a trend, no lumps", ":material/trending_up:", "orange"),
    WEAK: ("weak", ":material/help:", "orange"),
    FLAT: ("not supported", ":material/warning:", "red"),
}
CountResults = counts_kind.Results


def show(listing: Listing) -> None:
    """Draw the page."""
    problems(listing.problems)
    models = _models_of(listing)
    if not listing.of(Counts):
        empty.lacking(listing, "No feature counts", "recommend-layers")
    if not models:
        return
    columns = st.columns([2, 3, 3], vertical_alignment="bottom")
    if wrong := links.check("model", models, "model"):
        problem(f"{wrong} Another one is shown.")
    slug = str(columns[0].selectbox("Model", list(models), **links.bound("model")))
    links.about("Layers", slug)
    runs = [run for run in listing.of(Counts) if run.slug == slug]
    run = _choose(columns[1], "Counts", "counts", runs)
    counts: CountResults | None = run.results if run else None
    sweeps = _sweeps_of(listing, slug, counts.site if counts else None)
    swept = _choose(columns[2], "Sweep", "sweep", sweeps)
    sweep = readable(data.read, swept, SWEEP, SweepTables) if swept else None
    verdicts, recommendation, rule, first = None, None, RULES[0], RULES[0]
    if run:
        recommendation, rule = _recommendation(listing, run)
        if falsifications := listing.made_of(run, Falsification):
            verdicts = readable(data.read, falsifications[0], "verdicts.json", Verdicts)
    layers: list[Callable[[], None]] = [partial(_by_layer, counts, recommendation, verdicts, sweep)]
    tuned: list[Callable[[], None]] = [partial(layers_insertion.show, listing, slug)]
    if swept and sweep:
        own = run is not None and is_parent(run, swept)
        tuned.insert(0, partial(layers_sweep.show, swept, sweep, own))
    if counts:
        first = next((name for name in (rule, *RULES) if any(counts.table(name).values())), rule)
        layers.append(partial(_mixture, counts, recommendation, rule, first))
    if run and counts and verdicts:
        measured = [row.layer for row in counts.layers]
        address = data.features_of(listing, data.saes_path(run))
        layers.append(partial(layers_saes.verdicts, verdicts, measured, address))
    tuned.append(partial(_scores, listing, models[slug]))
    quality = partial(layers_saes.quality, listing, slug, models[slug], run, sweep)
    paper = partial(_paper, counts, first)
    views({LAYERS: layers, TUNED: tuned, QUALITY: [quality], PAPER: [paper]}, "view")


def _models_of(listing: Listing) -> dict[str, str]:
    """Return {slug: weights} of the models with something by layer, those with counts first."""
    models: dict[str, str] = {}
    for kind in (Counts, Saes, Sweep, Insertion):
        for artifact in listing.of(kind):
            slug = artifact.settings.target if kind is Sweep else artifact.slug
            models.setdefault(slug, artifact.weights)
    return models


def _sweeps_of(listing: Listing, slug: str, site: str | None = None) -> list[Artifact]:
    """Return the sweeps that tuned a model or used its SAEs: its site's first, then by layers."""

    def rank(sweep: Artifact) -> tuple[bool, bool, int]:
        elsewhere = site is not None and sweep.results.site != site
        return elsewhere, sweep.settings.source != slug, -len(sweep.settings.sweep.layers)

    sweeps = listing.of(Sweep)
    return sorted((s for s in sweeps if slug in (s.settings.target, s.settings.source)), key=rank)


def _choose(place: Any, label: str, key: str, artifacts: Sequence[Artifact]) -> Artifact | None:
    """Choose among artifacts; one that the address names and is none of them is said."""
    if not artifacts:
        place.caption(f"{label}: none of this model")
        return None
    if wrong := links.check(key, [artifact.relative for artifact in artifacts], key):
        problem(f"{wrong} The newest one is shown.")
    return choose(place, label, key, artifacts)


def _recommendation(listing: Listing, run: Artifact) -> tuple[StoredRecommendation | None, str]:
    """Choose and show the recommendation made of the counts; returns it with its rule."""
    recommendations = listing.made_of(run, Recommendation)
    if not recommendations:
        st.subheader("Recommendation")
        problem(
            "No recommendation was made of these counts yet; this command makes one:",
            command_of(listing, run.weights, "recommend-layers"),
        )
        return None, RULES[0]
    artifact = recommendations[0]
    if len(recommendations) > 1:
        artifact = _choose(st, "Recommendation", "recommendation", recommendations) or artifact
        options = ("selector", "rule", "recipe")
        parts = [f"{option} {getattr(artifact.settings, option)}" for option in options]
        time = artifact.manifest.created[:16].replace("T", " ")
        st.text(f"{', '.join(parts)}, made {time} UTC")
    rule = artifact.settings.rule if artifact.settings.rule in RULES else RULES[0]
    recommendation = readable(data.read, artifact, "recommendation.json", StoredRecommendation)
    if recommendation:
        _verdict(recommendation, rule)
        _evidence(recommendation, artifact)
    return recommendation, rule


def _verdict(recommendation: StoredRecommendation, rule: str) -> None:
    """Draw the recommendation; only a supported one is called so."""
    supported = recommendation.verdict == SUPPORTED
    with st.container(border=True):
        label, icon, colour = BADGES.get(recommendation.verdict, BADGES[FLAT])
        st.badge(label, icon=icon, color=colour)
        lead = "Recommended" if supported else "Not a finding, only a place to try"
        st.subheader(lead, anchor=False)
        n_layers = recommendation.n_layers
        st.text("; ".join(describe_layer(layer, n_layers) for layer in recommendation.recommended))
        st.text(
            f"Verdict: {recommendation.verdict} (selector {recommendation.selector}, rule {rule})"
        )
        st.text(f"Why: {recommendation.reason}")
        st.text(f"Next step: {recommendation.next_step}")


def _evidence(recommendation: StoredRecommendation, artifact: Artifact) -> None:
    """Draw what the selector read, where that was not the counts."""
    settings = artifact.settings
    if settings.selector in ("mixture", "most-features", "middle"):
        return
    if not settings.causal:
        st.text(
            f"Selector {settings.selector} read more than the counts below; its other values are "
            "not kept with the recommendation."
        )
        return
    effects = {}
    for layer, effect in sorted(settings.causal.items()):
        parts = (effect,) if isinstance(effect, float | int) else effect
        effects[layer] = parts[0], *student_interval(*parts)
    drawing = layer_plots.effects_figure(
        effects, recommendation.recommended, one_based=links.one_based()
    )
    figure(drawing, "figure-effects")
    rows = [
        {**layer_columns(layer), "effect, nats": value, "low": low, "high": high}
        for layer, (value, low, high) in effects.items()
    ]
    table(rows, "causal_effects", "Table of effects")


def _most(tables: Mapping[str, Mapping[int, int]], n_layers: int) -> str:
    """Name the layer with most features, of the strictest rule that counts any."""
    for rule, by_layer in tables.items():
        if most := max(by_layer.values(), default=0):
            names = [describe_layer(layer, n_layers) for layer, n in by_layer.items() if n == most]
            return f"Most features by rule {rule}: {most}, at {'; '.join(names)}."
    return "No rule counts a feature at any layer."


def _by_layer(
    counts: CountResults | None,
    recommendation: StoredRecommendation | None,
    verdicts: Verdicts | None,
    sweep: SweepTables | None,
) -> None:
    """Draw counts and, where a sweep says it, the tuned accuracy on the same axis."""
    if counts:
        tables = {rule: counts.table(rule) for rule in RULES}
    elif sweep:
        tables = {rule: {k: int(v) for k, v in t.items()} for rule, t in sweep.counts.items()}
    else:
        return
    one_based = links.one_based()
    st.subheader("By layer" if sweep else "Feature counts", anchor=False)
    layers = sorted({layer for column in tables.values() for layer in column})
    drawing = plots.counts_figure(
        tables,
        recommended=recommendation.recommended if recommendation else (),
        verdict=recommendation.verdict if recommendation else FLAT,
        null=verdicts.null() if verdicts else None,
        one_based=one_based,
    )
    if sweep:
        axis = sorted({*layers, *(row["layer"] for row in sweep.layers)})
        scores = sweep_figure(
            sweep.layers, sweep.jobs, sweep.controls, sweep.base, one_based=one_based, last=axis[-1]
        )
        title = "Features and tuned accuracy by layer"
        drawing = layer_plots.on_one_axis(drawing, scores, axis, title=title, one_based=one_based)
    n_layers = counts.n_layers if counts else 1 + max(layers)
    st.text(_most(tables, n_layers))
    figure(drawing, "figure-counts")
    st.caption(
        "Features that are active at the think tags and at no other token of the prompt. Only the "
        "rule of the recommendation decides; the others stand beside it."
    )
    if verdicts:
        st.caption(
            "Purple: what the same rule counts in SAEs of the model with random weights, which "
            "have about as many active features, and the count's 95 % interval; shown where the "
            "rule counts a feature."
        )
    if sweep:
        st.caption(
            "Below: accuracy after tuning through each layer's SAE; error bars: its difference to "
            "the base model, 95 %, all layers' intervals together (controls: each alone). Grey: "
            "the base model and its own 95 % interval."
        )
    rows = [
        {**layer_columns(at), **{rule: column.get(at) for rule, column in tables.items()}}
        for at in layers
    ]
    table(rows, "feature_counts", "Table of counts")


def _mixture(
    counts: CountResults, recommendation: StoredRecommendation | None, rule: str, first: str
) -> None:
    """The fit of a rule's counts; at first of one that counts something, where one does."""
    with part("Mixture over layers"):
        choice = str(
            st.segmented_control(
                "Rule", RULES, default=first, required=True, **links.bound(f"rule-{rule}")
            )
        )
        fit = _fit(counts, recommendation, rule, choice)
        shift = int(links.one_based())
        figure(plots.mixture_figure(fit, one_based=links.one_based()), "figure-mixture")
        if choice != rule:
            empty_one = "" if any(counts.table(rule).values()) else ", which counts no feature"
            st.caption(
                f'The recommendation follows rule "{rule}"{empty_one}; this rule only stands '
                "beside it."
            )
        st.text(f"Verdict: {fit.verdict}\nWhy: {fit.reason}\nNext step: {fit.next_step}")
        if not fit.components:
            return
        rows = [
            {
                f"mean ({shift}-based)": component.mean + shift,
                "mean, 95 %": _interval(interval.mean, shift) if interval else "",
                "weight": component.weight,
                "weight, 95 %": _interval(interval.weight) if interval else "",
                "sd": component.std,
            }
            for component, interval in zip_longest(fit.components, fit.intervals)
        ]
        table(rows, "mixture")


def _interval(pair: tuple[float, float], shift: int = 0) -> str:
    return f"{pair[0] + shift:.2f} to {pair[1] + shift:.2f}"


def _fit(
    counts: CountResults, recommendation: StoredRecommendation | None, rule: str, shown: str
) -> MixtureFit:
    """Return the recommendation's own fit where it has one for the rule, else a cached one."""
    own = recommendation.fit if recommendation else None
    if own and shown == rule:
        return own
    with st.spinner("Fitting the mixture and its nulls"):
        return _fitted(counts.table(shown), own.recipe if own else "robust")


@st.cache_data(show_spinner=False, max_entries=200)
def _fitted(column: Mapping[int, float], recipe: str) -> MixtureFit:
    """Fit a mixture over layers, once for each profile."""
    from resa_lens.layers.mixture import fit_mixture

    return fit_mixture(column, recipe=recipe)


@st.cache_data(show_spinner=False)
def _paper_table() -> tuple[dict[int, float], dict[int, float], float]:
    """The paper's Table 6, one tuned model a layer, and its base model.

    Returns:
        {0-based layer: features}, {0-based layer: mean of six benchmarks, %}, and that mean of the
        base model (Table 3).
    """
    file = data_path(PAPER_TABLE)
    base = next(iter(read_rows(data_path(PAPER_MODELS))))["average"]
    return read_table(file, "feature_count"), read_table(file, "average"), float(base)


def _paper(counts: CountResults | None, rule: str) -> None:
    with part("Beside the paper"):
        features, scores, base = _paper_table()
        one_based = links.one_based()
        own = counts.table(rule) if counts else {}
        ours, theirs = st.columns(2)
        if counts:
            title = f"This model, {counts.n_layers} layers"
            with ours:
                drawing = plots.counts_figure({rule: own}, one_based=one_based, title=title)
                figure(drawing, "figure-ours")
        with theirs if counts else st.container():
            column = {"paper": {layer: int(value) for layer, value in features.items()}}
            title = f"The paper's model, {PAPER_LAYERS} layers"
            drawing = plots.counts_figure(column, one_based=one_based, title=title)
            figure(drawing, "figure-paper")
        drawing = plots.profile_figure(
            scores,
            title="The paper's tuned models",
            y="mean of six benchmarks, %",
            baseline=base,
            one_based=one_based,
        )
        figure(drawing, "figure-paper-scores")
        st.caption(
            "Table 6 of arXiv 2506.09967: one tuned model a layer, the best of four checkpoints; "
            "its layers are 1-based there. Different models: only the shapes can be compared."
        )
        rows = [
            {
                **layer_columns(layer),
                "paper: features": value,
                "paper: score, %": scores[layer],
                f"ours: {rule}": own.get(layer),
            }
            for layer, value in features.items()
        ]
        table(rows, "table6_and_ours", "Table 6 and ours")


def _scores(listing: Listing, weights: str) -> None:
    with part("Scores before and after"):
        # What was tuned through an SAE before its controls.
        tunings = sorted(listing.tunings(weights), key=lambda t: t.control is not None)
        if not tunings:
            problem(
                "No adapter of this model was scored beside its base yet. This command does both:",
                command_of(listing, weights, "tune", "--layer", "auto"),
            )
            return
        tuning = tunings[0]
        if len(tunings) > 1:
            adapter = _choose(st, "Adapter", "adapter", [t.adapter for t in tunings])
            tuning = next(t for t in tunings if t.adapter is adapter)
        paired = answers.comparison(tuning)
        st.text(Adapter.through(tuning.adapter))
        groups = {"base": tuning.base.results.groups(), "tuned": tuning.tuned.results.groups()}
        figure(plots.scores_figure(groups), "figure-scores")
        changed = (
            "changed no answer"
            if paired.changed == 0
            else f"{paired.changed} answers changed: {paired.gained} gained, {paired.lost} lost"
        )
        st.text(
            f"Tuned minus base: {points(paired.difference)} points (95 % {span(paired.ci)}), "
            f"p = {paired.p_value:.3g}; {changed}; n = {paired.n}"
        )
        links.to(
            links.SCORES,
            "Compare the answers themselves",
            left=tuning.base.relative,
            right=tuning.tuned.relative,
        )
        rows = [
            {"run": run, "group": group, **share_columns("accuracy", "%", accuracy, ci), "n": n}
            for run, scores in groups.items()
            for group, (accuracy, ci, n) in scores.items()
        ]
        table(rows, "scores", "Table of scores")
