"""The page "Layers": which layers carry the features, and how far that is to be believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import streamlit as st

from resa_lens import layer_plots, plots
from resa_lens.app import data, empty, layers_data, layers_saes, layers_sweep, links, stages
from resa_lens.app.data import Artifact, Counts, Listing, StoredRecommendation
from resa_lens.app.widgets import figure, problem, problems, table
from resa_lens.errors import BadInputError
from resa_lens.hookpoints import describe_layer
from resa_lens.layers import SUPPORTED, WEAK, MixtureFit
from resa_lens.pipeline.sweep_tables import Sweep
from resa_lens.score_plots import sweep_figure

RULES = tuple(plots.RULE_NAMES)


def show(listing: Listing) -> None:
    """Draw the page."""
    problems(listing.problems)
    slugs = layers_data.models_of(listing)
    if not listing.of("counts"):
        empty.lacking(listing, "No feature counts", "recommend-layers")
    if not slugs:
        return
    columns = st.columns([2, 3, 3], vertical_alignment="bottom")
    slug = str(columns[0].selectbox("Model", slugs, key="model", **links.BOUND))
    run = _chosen(
        columns[1], "Counts", "counts", [r for r in listing.of("counts") if r.slug == slug]
    )
    counts = _checked_counts(run)
    site = counts.site if counts else None
    swept = _chosen(columns[2], "Sweep", "sweep", layers_data.sweeps_of(listing, slug, site))
    sweep = _read_sweep(swept)
    one_based = links.one_based()
    made, rule = None, RULES[0]
    if run and counts:
        made, rule = _recommendation(listing, run, counts)
    verdicts = _read_verdicts(listing, run)
    # Each in a place of its own: what a click adds to one section closes no table of another.
    with st.container():
        _by_layer(counts, made, verdicts, sweep, one_based)
    with st.container():
        if swept and sweep:
            layers_sweep.show(swept, sweep, layers_data.same_counts(swept, run))
    with st.container():
        if counts:
            _mixture(counts, made, rule, one_based)
    with st.container():
        if counts and verdicts:
            made_of = str(run.manifest.config.get("saes")) if run else ""
            activity = data.activity_of(listing, made_of)
            layers = [row.layer for row in counts.layers]
            layers_saes.verdicts(verdicts, layers, one_based, activity)
    with st.container():
        layers_saes.quality(listing, slug, run, sweep, one_based)
    with st.container():
        _paper(counts, rule, one_based)
    with st.container():
        weights = layers_data.weights_of(listing, slug)
        if weights:
            _scores(listing, weights)


def _chosen(place: Any, label: str, key: str, held: Sequence[Artifact]) -> Artifact | None:
    """Choose among artifacts by their paths, as they stand in the address; the first by default."""
    if not held:
        place.caption(f"{label}: none of this model")
        return None
    by_path = {artifact.relative: artifact for artifact in held}
    return by_path[str(place.selectbox(label, list(by_path), key=key, **links.BOUND))]


def _checked_counts(run: Artifact | None) -> Counts | None:
    if run is None:
        return None
    try:
        return data.checked(Counts, run.manifest.results, run.path)
    except BadInputError as error:
        problem(str(error), data.DEMO)
        return None


def _read_sweep(swept: Artifact | None) -> Sweep | None:
    try:
        return layers_data.read_sweep(swept) if swept else None
    except BadInputError as error:
        problem(str(error))
        return None


def _read_verdicts(listing: Listing, run: Artifact | None) -> layers_data.Verdicts | None:
    found = layers_data.verdicts_of(listing, run) if run else None
    try:
        return layers_data.read_verdicts(found) if found else None
    except BadInputError as error:
        problem(str(error))
        return None


def _recommendation(
    listing: Listing, run: Artifact, counts: Counts
) -> tuple[StoredRecommendation | None, str]:
    """Choose and show the recommendation made of the counts; returns it with its rule."""
    found = data.recommendations(listing, run)
    if not found:
        st.subheader("Recommendation")
        problem(
            "No recommendation was made of these counts yet; this command makes one:",
            stages.command_of(listing, run.weights, "recommend-layers"),
        )
        return None, RULES[0]
    chosen = found[0]
    if len(found) > 1:
        chosen = _chosen(st, "Recommendation", "recommendation", found) or chosen
        st.text(_choice(chosen))
    rule = str(chosen.manifest.config.get("rule", RULES[0]))
    rule = rule if rule in RULES else RULES[0]
    try:
        made = data.read(StoredRecommendation, chosen.path / "recommendation.json")
        effects = layers_data.effects_of(chosen.manifest.config)
    except BadInputError as error:
        problem(str(error))
        return None, rule
    _verdict(made, rule)
    _evidence(made, chosen, effects)
    return made, rule


def _choice(found: Artifact) -> str:
    config = found.manifest.config
    parts = [f"{key} {config.get(key)}" for key in ("selector", "rule", "recipe")]
    return f"{', '.join(parts)}, made {found.manifest.created[:16].replace('T', ' ')} UTC"


def _verdict(made: StoredRecommendation, rule: str) -> None:
    """The recommendation; only a supported one is called so."""
    with st.container(border=True):
        if made.verdict == SUPPORTED:
            st.badge("supported", icon=":material/check_circle:", color="green")
        elif made.verdict == WEAK:
            st.badge("weak", icon=":material/help:", color="orange")
        else:
            st.badge("not supported", icon=":material/warning:", color="red")
        names = [describe_layer(layer, made.n_layers) for layer in made.recommended]
        lead = "Recommended" if made.verdict == SUPPORTED else "Not a finding, only a place to try"
        st.subheader(lead, anchor=False)
        st.text("; ".join(names))
        st.text(f"Verdict: {made.verdict} (selector {made.selector}, rule {rule})")
        st.text(f"Why: {made.reason}")
        st.text(f"Next step: {made.next_step}")


def _evidence(
    made: StoredRecommendation,
    chosen: Artifact,
    effects: Mapping[int, tuple[float, float | None, float | None]],
) -> None:
    """What the selector read, where that was not the counts."""
    asked = chosen.manifest.config.get("selector")
    if asked in ("mixture", "most-features", "middle"):
        return
    if not effects:
        st.text(
            f"Selector {asked} read more than the counts below; its other values are not kept with "
            "the recommendation."
        )
        return
    shift = int(links.one_based())
    figure(
        layer_plots.effects_figure(effects, made.recommended, one_based=bool(shift)),
        "figure-effects",
    )
    with st.expander("Table of effects"):
        rows = [
            {
                "layer": layer,
                "layer_1_indexed": layer + 1,
                "effect, nats": value,
                "low": low,
                "high": high,
            }
            for layer, (value, low, high) in effects.items()
        ]
        table(rows, "causal_effects", dict.fromkeys(("effect, nats", "low", "high"), "%.6f"))


def _by_layer(
    counts: Counts | None,
    made: StoredRecommendation | None,
    verdicts: layers_data.Verdicts | None,
    sweep: Sweep | None,
    one_based: bool,
) -> None:
    """Counts and, where a sweep says it, the tuned accuracy on the same axis."""
    if counts is None and sweep is None:
        return
    st.subheader("By layer" if sweep else "Feature counts", anchor=False)
    held = {}
    if counts:
        held = {rule: counts.table(rule) for rule in RULES}
    elif sweep:
        held = {rule: {k: int(v) for k, v in t.items()} for rule, t in sweep.counts.items()}
    drawn = plots.counts_figure(
        held,
        recommended=made.recommended if made else (),
        verdict=made.verdict if made else None,
        null=verdicts.null() if verdicts else None,
        one_based=one_based,
    )
    if sweep:
        layers = sorted({k for t in held.values() for k in t} | {r["layer"] for r in sweep.layers})
        scores = sweep_figure(
            sweep.layers,
            sweep.jobs,
            sweep.controls,
            sweep.base,
            one_based=one_based,
            last=layers[-1],
        )
        drawn = layer_plots.on_one_axis(
            drawn,
            scores,
            layers,
            title="Features and tuned accuracy by layer",
            one_based=one_based,
        )
    figure(drawn, "figure-counts")
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
    with st.expander("Table of counts"):
        layers = sorted({layer for column in held.values() for layer in column})
        rows = [
            {
                "layer": layer,
                "layer_1_indexed": layer + 1,
                **{rule: column.get(layer) for rule, column in held.items()},
            }
            for layer in layers
        ]
        table(rows, "feature_counts", {})


def _mixture(counts: Counts, made: StoredRecommendation | None, rule: str, one_based: bool) -> None:
    st.subheader("Mixture over layers", anchor=False)
    chosen = st.segmented_control(
        "Rule", RULES, default=rule, required=True, key=f"rule-{rule}", **links.BOUND
    )
    try:
        fit = _fit(counts, made, rule, str(chosen))
    except BadInputError as error:
        problem(str(error))
        return
    figure(plots.mixture_figure(fit, one_based=one_based), "figure-mixture")
    if chosen != rule:
        st.caption(f'The recommendation follows rule "{rule}"; this rule only stands beside it.')
    st.text(f"Verdict: {fit.verdict}\nWhy: {fit.reason}\nNext step: {fit.next_step}")
    if fit.components:
        shift = int(one_based)
        rows = []
        for index, part in enumerate(fit.components):
            interval = fit.intervals[index] if index < len(fit.intervals) else None
            row: dict[str, object] = {
                f"mean ({1 if one_based else 0}-based)": part.mean + shift,
                "mean, 95 %": _interval(interval.mean, shift) if interval else "",
                "weight": part.weight,
                "weight, 95 %": _interval(interval.weight) if interval else "",
                "sd": part.std,
            }
            rows.append(row)
        numbers = [key for key in rows[0] if "95" not in key]
        table(rows, "mixture", dict.fromkeys(numbers, "%.2f"))


def _interval(pair: tuple[float, float], shift: int = 0) -> str:
    return f"{pair[0] + shift:.2f} to {pair[1] + shift:.2f}"


def _fit(counts: Counts, made: StoredRecommendation | None, rule: str, chosen: str) -> MixtureFit:
    """The recommendation's own fit where it has one for the rule, else a cached one."""
    if made and made.fit and chosen == rule:
        return made.fit
    held = counts.table(chosen)
    recipe = made.fit.recipe if made and made.fit else "robust"
    with st.spinner("Fitting the mixture and its nulls"):
        return data.fitted(tuple(held), tuple(map(float, held.values())), recipe, 0)


def _paper(counts: Counts | None, rule: str, one_based: bool) -> None:
    st.subheader("Beside the paper", anchor=False)
    try:
        paper = data.paper_table()
    except BadInputError as error:
        problem(str(error))
        return
    ours, theirs = st.columns(2)
    if counts:
        with ours:
            shown = {rule: counts.table(rule)}
            title = f"This model, {counts.n_layers} layers"
            figure(plots.counts_figure(shown, one_based=one_based, title=title), "figure-ours")
    with theirs if counts else st.container():
        shown = {"paper": {layer: int(value) for layer, value in paper.counts.items()}}
        title = f"The paper's model, {data.PAPER_LAYERS} layers"
        figure(plots.counts_figure(shown, one_based=one_based, title=title), "figure-paper")
    made = plots.profile_figure(
        paper.scores,
        title="The paper's tuned models",
        y="mean of six benchmarks, %",
        baseline=paper.base,
        one_based=one_based,
    )
    figure(made, "figure-paper-scores")
    st.caption(
        "Table 6 of arXiv 2506.09967: one tuned model a layer, the best of four checkpoints; its "
        "layers are 1-based there. Different models: only the shapes can be compared."
    )
    with st.expander("Table 6 and ours"):
        own = counts.table(rule) if counts else {}
        rows = [
            {
                "layer": layer,
                "layer_1_indexed": layer + 1,
                "paper: features": value,
                "paper: score, %": paper.scores[layer],
                f"ours: {rule}": own.get(layer),
            }
            for layer, value in paper.counts.items()
        ]
        table(rows, "table6_and_ours", {"paper: score, %": "%.2f"})


def _scores(listing: Listing, weights: str) -> None:
    st.subheader("Scores before and after", anchor=False)
    found = data.tunings(listing, weights)
    if not found:
        problem(
            "No adapter of this model was scored beside its base yet. This command does both:",
            stages.command_of(listing, weights, "tune", "--layer", "auto"),
        )
        return
    # What was tuned through an SAE before its controls.
    found.sort(key=lambda pair: pair.adapter.manifest.config.get("control") is not None)
    tuning = found[0]
    if len(found) > 1:
        chosen = _chosen(st, "Adapter", "adapter", [pair.adapter for pair in found])
        tuning = next(pair for pair in found if pair.adapter is chosen)
    try:
        adapter = data.checked(
            data.AdapterResults, tuning.adapter.manifest.results, tuning.adapter.path
        )
        scores = {
            name: data.read(data.Scores, artifact.path / "results.json")
            for name, artifact in (("base", tuning.base), ("tuned", tuning.tuned))
        }
        paired = data.comparison(tuning)
    except BadInputError as error:
        problem(str(error))
        return
    st.text(adapter.what(tuning.adapter.manifest.config.get("control")))
    groups = {name: score.groups() for name, score in scores.items()}
    figure(plots.scores_figure(groups), "figure-scores")
    low, high = paired.ci
    changed = (
        "changed no answer"
        if paired.changed == 0
        else f"{paired.changed} answers changed: {paired.gained} gained, {paired.lost} lost"
    )
    st.text(
        f"Tuned minus base: {100 * paired.difference:+.1f} points (95 % {100 * low:+.1f} to "
        f"{100 * high:+.1f}), p = {paired.p_value:.3g}; {changed}; n = {paired.n}"
    )
    links.to(
        links.SCORES,
        "Compare the answers themselves",
        icon=":material/query_stats:",
        left=tuning.base.relative,
        right=tuning.tuned.relative,
    )
    with st.expander("Table of scores"):
        rows = [
            {
                "run": name,
                "group": group,
                "accuracy, %": 100 * accuracy,
                "low, %": 100 * ci[0],
                "high, %": 100 * ci[1],
                "n": n,
            }
            for name, scored in groups.items()
            for group, (accuracy, ci, n) in scored.items()
        ]
        table(rows, "scores", dict.fromkeys(("accuracy, %", "low, %", "high, %"), "%.1f"))
