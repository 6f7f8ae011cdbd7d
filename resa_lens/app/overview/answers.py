"""The first screen: one sentence, four numbers with their intervals, and what to do next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import streamlit as st

from resa_lens.app import data, links
from resa_lens.app.widgets import missing, plain, readable
from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.checklist import DONE, checklist
from resa_lens.artifacts.commands import Model
from resa_lens.artifacts.kinds.adapter import Adapter
from resa_lens.artifacts.kinds.eval import Eval, EvalScores, is_adapted
from resa_lens.artifacts.kinds.falsification import Falsification
from resa_lens.artifacts.kinds.recommendation import Recommendation, StoredRecommendation
from resa_lens.artifacts.kinds.sweep import Sweep
from resa_lens.artifacts.listing import Listing, Tuning
from resa_lens.errors import BadInputError
from resa_lens.layers import SUPPORTED
from resa_lens.models.hookpoints import describe_layer

_ABOVE, _BELOW = "above the untuned model", "below the untuned model"
_SAME = "no change beyond chance"
_CHANGES = {_ABOVE: "helps", _BELOW: "harms", _SAME: "changes nothing beyond chance"}


@dataclass(frozen=True)
class _Number:
    """One of the four."""

    label: str
    value: str
    notes: tuple[str, ...]
    """Its interval, n and p; or why there is none."""
    words: str = ""
    """Of the sentence."""
    page: str = links.SCORES
    address: dict[str, str] = field(default_factory=dict)
    link: str = ""
    """Label of the link to the page; the page's title by default."""
    more: str = ""
    """What stands behind it, folded away."""


def show(listing: Listing, model: Model) -> None:
    """Draw the answers about a model."""
    recommendations = listing.of(Recommendation, model.weights)
    newest = recommendations[0] if recommendations else None
    numbers = (_accuracy(listing, model), _standing(listing, model), *_tuning(listing, model))
    words = [_layers(newest), *(number.words for number in numbers)]
    *most, last = filter(None, words)
    sentence = f"{', '.join(most)} and {last}" if most else last
    st.subheader(plain(f"{model.short}: {sentence}."), anchor=False)
    st.text(_facts(listing, model))
    for column, number in zip(st.columns(4), numbers, strict=True):
        with column.container(border=True, height="stretch"):
            st.metric(number.label, number.value)
            for note in number.notes:
                st.text(note)
            links.to(number.page, number.link, **number.address)
    for number in numbers:
        if number.more:
            with st.expander("How the counted features were judged"):
                st.text(number.more)
    _next(listing, model, newest)


def _facts(listing: Listing, model: Model) -> str:
    artifacts = [a for a in listing.artifacts if a.weights == model.weights]
    depths = [depth for a in artifacts if (depth := getattr(a.results, "n_layers", None))]
    depth = [f"{depths[0]} layers"] if depths else []
    return "; ".join([*depth, f"weights {model.weights[:8]}, {len(artifacts)} artifact(s)"])


def _layers(newest: Artifact | None) -> str:
    if newest is None:
        return "layers are not ranked yet"
    if newest.results.verdict != SUPPORTED:
        return "no layer stands out by its features at the think tags"
    return f"{_places(newest)} stands out by its features at the think tags"


def _places(newest: Artifact) -> str:
    results = newest.results
    return "; ".join(describe_layer(layer, results.n_layers) for layer in results.recommended)


def _accuracy(listing: Listing, model: Model) -> _Number:
    """Of the untuned model: before the newest tuning, else of its newest evaluation."""
    label = "Accuracy, untuned"
    own = [a for a in listing.of(Eval, model.weights) if not is_adapted(a)]
    bases = [tuning.base for tuning in listing.tunings(model.weights)]
    if not (scored := [*bases, *own]):
        return _Number(label, "none", ("It was not scored yet.",))
    scores: EvalScores = scored[0].results
    low, high = (100 * end for end in scores.ci)
    notes = (f"95 % {low:.1f} to {high:.1f} %", f"n = {scores.n:,}")
    return _Number(label, f"{100 * scores.accuracy:.1f} %", notes)


def _standing(listing: Listing, model: Model) -> _Number:
    label = "Features that stand"
    tests = listing.of(Falsification, model.weights)
    if not tests:
        return _Number(label, "none", ("Not tested yet.",), page=links.FEATURES)
    summary = tests[0].results.summary
    tally, address = summary.weakest, data.features_of(listing, data.saes_path(tests[0]))
    if not tally.counted:
        return _Number(
            label, "none", ("None is counted.",), "no feature is counted", links.FEATURES, address
        )
    low, high = (100 * bound for bound in tally.ci)
    several = "stand" if tally.survivors > 1 else "stands"
    words = f"{tally.survivors or 'none'} of {tally.counted} counted features {several}"
    notes = (f"95 % {low:.0f} to {high:.0f} %", f"counted by rule {tally.rule}")
    value = f"{tally.survivors} of {tally.counted}"
    return _Number(label, value, notes, words, links.FEATURES, address, more=summary.reason)


def _tuning(listing: Listing, model: Model) -> tuple[_Number, _Number]:
    """Return what tuning did, and what it did beyond a control."""
    from resa_lens.app import answers
    from resa_lens.stages.comparison import points, span

    labels = "Tuned minus untuned", "Tuned minus control"
    tunings = listing.tunings(model.weights)
    through = [t for t in tunings if not t.control]
    # On the same questions as what they stand beside.
    base = through[0].base.relative if through else None
    controls = [t for t in tunings if t.control and base in (None, t.base.relative)]
    sweeps = listing.of(Sweep, model.weights)
    onward: dict[str, Any] = {}
    if sweeps:
        address = {"model": model.slug, "view": "Tuned and inserted"}
        onward = {"page": links.LAYERS, "address": address, "link": f"Sweeps: {len(sweeps)}"}
    if not through:
        reason = "No adapter is scored beside its base yet."
        tuned = _Number(labels[0], "none", (reason,))
        return tuned, _Number(labels[1], "none", (), **onward)
    place = Adapter.detail(through[0].adapter, one_based=links.one_based())
    newest = f", the newest of {len(through)}" if through[1:] else ""
    where = f"tuned at {place}{newest}" if place else f"without an SAE{newest}"
    try:
        paired = answers.comparison(through[0])
        notes = (
            f"95 % {span(paired.ci)}",
            f"{_helped(paired.ci)}; p = {paired.p_value:.2g}, n = {paired.n:,}",
            where,
        )
        words = f"tuning through an SAE {_CHANGES[_helped(paired.ci)]}"
        tuned = _Number(labels[0], f"{points(paired.difference)} points", notes, words)
        if not controls:
            beyond = _Number(labels[1], "none", ("No control is scored yet.",), **onward)
            return tuned, beyond
        control = controls[0]
        # Against the control itself: both may have moved from the base alike.
        against = Tuning(through[0].adapter, control.tuned, through[0].tuned)
        paired, alone = answers.comparison(against), answers.comparison(control)
        notes = (
            f"95 % {span(paired.ci)}; p = {paired.p_value:.2g}",
            f"control {control.control}: {points(alone.difference)} ({span(alone.ci)})",
        )
        value = f"{points(paired.difference)} points"
        return tuned, _Number(f"Tuned minus {control.control}", value, notes, **onward)
    except BadInputError as error:
        return _Number(labels[0], "none", (str(error),)), _Number(labels[1], "none", ())


def _helped(interval: tuple[float, float]) -> str:
    low, high = interval
    if low > 0:
        return _ABOVE
    return _BELOW if high < 0 else _SAME


def _next(listing: Listing, model: Model, newest: Artifact | None) -> None:
    """What to do next: what the recommendation says, and the first stage that lacks."""
    st.subheader("What to do next", anchor=False)
    if newest is not None:
        lead = "Layers that stand out" if newest.results.verdict == SUPPORTED else "A place to try"
        verdict = f"verdict: {newest.results.verdict}, rule {newest.settings.rule}"
        st.text(f"{lead}: {_places(newest)} ({verdict}).")
        stored = readable(data.read, newest, "recommendation.json", StoredRecommendation)
        if stored:
            st.text(stored.next_step)
    with st.container(horizontal=True):
        if newest is not None:
            links.to(links.LAYERS, model=model.slug)
        links.to(links.LAB)
    steps = [s for s in checklist(listing, model) if s.state != DONE]
    if steps:
        missing(f"{steps[0].name}: {steps[0].state}. This command makes {steps[0].what}:",
                steps[0].command)  # fmt: skip
