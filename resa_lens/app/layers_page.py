"""The page "Layers": which layers carry the features, and how far that is to be believed."""

from __future__ import annotations

import streamlit as st

from resa_lens import plots
from resa_lens.app import data, links
from resa_lens.app.data import Artifact, Counts, Listing, StoredRecommendation
from resa_lens.app.widgets import figure, problem, table
from resa_lens.errors import BadInputError
from resa_lens.hookpoints import describe_layer
from resa_lens.layers import SUPPORTED, WEAK, MixtureFit

RULES = tuple(plots.RULE_NAMES)


def show(listing: Listing) -> None:
    """Draw the page."""
    for text in listing.problems:
        problem(text)
    runs = listing.of("counts")
    if not runs:
        _nothing(listing)
        return
    slugs = list(dict.fromkeys(run.slug for run in runs))
    columns = st.columns([2, 3], vertical_alignment="bottom")
    slug = columns[0].selectbox("Model", slugs, key="model")
    of_model = [run for run in runs if run.slug == slug]
    place = columns[1].selectbox(
        "Counts", range(len(of_model)), format_func=lambda i: of_model[i].label(), key="counts"
    )
    one_based = links.one_based()
    run = of_model[place]
    try:
        counts = data.checked(Counts, run.manifest.results, run.path)
    except BadInputError as error:
        problem(str(error), data.DEMO)
        return
    made, rule = _recommendation(listing, run, counts)
    # Each in a place of its own: what a click adds to one section closes no table of another.
    with st.container():
        _counts(counts, made, one_based)
    with st.container():
        _mixture(counts, made, rule, one_based)
    with st.container():
        _quality(listing, run, one_based)
    with st.container():
        _paper(counts, rule, one_based)
    with st.container():
        _scores(listing, run)


def _nothing(listing: Listing) -> None:
    if not listing.exists:
        text = f"There is no workspace at {listing.root}."
    elif listing.unfinished:
        text = (
            f"{listing.unfinished} unfinished folder(s): a run is at work there or was killed. "
            "Nothing is complete enough to show; the same command again goes on."
        )
    elif listing.artifacts:
        held = ", ".join(sorted({a.manifest.kind for a in listing.artifacts}))
        text = f"No feature counts in {listing.root} yet; it holds: {held}."
    else:
        text = f"{listing.root} holds no finished run that this version can read."
    command = "resa-lens recommend-layers" if listing.of("saes") else data.DEMO
    problem(f"{text} This command makes what is missing:", f"{command} --workspace {listing.root}")


def _recommendation(
    listing: Listing, run: Artifact, counts: Counts
) -> tuple[StoredRecommendation | None, str]:
    """Choose and show the recommendation made of the counts; returns it with its rule."""
    found = data.recommendations(listing, run)
    if not found:
        st.subheader("Recommendation")
        problem(
            "No recommendation was made of these counts yet; this command makes one:",
            f"resa-lens recommend-layers --model {counts.model} --workspace {listing.root}",
        )
        return None, RULES[0]
    place = 0
    if len(found) > 1:
        place = st.selectbox(
            "Recommendation",
            range(len(found)),
            format_func=lambda i: _choice(found[i]),
            key="recommendation",
        )
    rule = str(found[place].manifest.config.get("rule", RULES[0]))
    try:
        made = data.read(StoredRecommendation, found[place].path / "recommendation.json")
    except BadInputError as error:
        problem(str(error))
        return None, rule if rule in RULES else RULES[0]
    _verdict(made, rule)
    return made, rule if rule in RULES else RULES[0]


def _choice(found: Artifact) -> str:
    config = found.manifest.config
    parts = [f"{key} {config.get(key)}" for key in ("selector", "rule", "recipe")]
    return f"{', '.join(parts)}: {found.label()}"


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


def _counts(counts: Counts, made: StoredRecommendation | None, one_based: bool) -> None:
    st.subheader("Feature counts", anchor=False)
    figure(
        plots.counts_figure(
            {rule: counts.table(rule) for rule in RULES},
            recommended=made.recommended if made else (),
            verdict=made.verdict if made else None,
            one_based=one_based,
        ),
        "figure-counts",
    )
    st.caption(
        "Features that are active at the think tags and at no other token of the prompt. Only the "
        "rule of the recommendation decides; the others stand beside it."
    )
    with st.expander("Table of counts"):
        rows = [
            {
                "layer": row.layer,
                "layer_1_indexed": row.layer + 1,
                **{rule: counts.table(rule)[row.layer] for rule in RULES},
            }
            for row in counts.layers
        ]
        table(rows, "feature_counts", {})


def _mixture(counts: Counts, made: StoredRecommendation | None, rule: str, one_based: bool) -> None:
    st.subheader("Mixture over layers", anchor=False)
    chosen = st.segmented_control("Rule", RULES, default=rule, required=True, key=f"rule-{rule}")
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


def _quality(listing: Listing, run: Artifact, one_based: bool) -> None:
    st.subheader("SAE quality", anchor=False)
    saes = data.saes_of(listing, run)
    if saes is None:
        problem(
            f"The SAEs of these counts, {run.manifest.config.get('saes')}, are not in this "
            "workspace. This command trains some:",
            f"resa-lens train-saes --workspace {listing.root}",
        )
        return
    try:
        held = data.checked(data.Saes, saes.manifest.results, saes.path).layers
    except BadInputError as error:
        problem(str(error))
        return
    made = plots.quality_figure({row.layer: row.fvu for row in held}, one_based=one_based)
    figure(made, "figure-quality")
    st.caption("0 is a perfect reconstruction; 1 is no better than the mean activation.")
    with st.expander("Table of SAEs"):
        rows = [
            {
                "layer": row.layer,
                "layer_1_indexed": row.layer + 1,
                "FVU": row.fvu,
                "L0": row.l0,
                "dead share": row.dead_share,
            }
            for row in held
        ]
        table(rows, "sae_quality", {"FVU": "%.4f", "L0": "%.1f", "dead share": "%.3f"})


def _paper(counts: Counts, rule: str, one_based: bool) -> None:
    st.subheader("Beside the paper", anchor=False)
    try:
        paper = data.paper_table()
    except BadInputError as error:
        problem(str(error))
        return
    ours, theirs = st.columns(2)
    with ours:
        shown = {rule: counts.table(rule)}
        title = f"This model, {counts.n_layers} layers"
        figure(plots.counts_figure(shown, one_based=one_based, title=title), "figure-ours")
    with theirs:
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
        own = counts.table(rule)
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


def _scores(listing: Listing, run: Artifact) -> None:
    st.subheader("Scores before and after", anchor=False)
    found = data.tunings(listing, run.weights)
    if not found:
        problem(
            "No adapter of this model was scored beside its base yet. This command does both:",
            f"resa-lens tune --layer auto --workspace {listing.root}",
        )
        return
    place = 0
    if len(found) > 1:
        place = st.selectbox(
            "Adapter",
            range(len(found)),
            format_func=lambda i: found[i].adapter.label(),
            key="adapter",
        )
    tuning = found[place]
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
