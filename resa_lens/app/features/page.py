"""The page "Features": a table of them, and in its place one feature's page where one is chosen."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import streamlit as st

from resa_lens.app import empty, links
from resa_lens.app.features import lists, notes
from resa_lens.app.features import view as feature_view
from resa_lens.app.features.data import Source, command, place_of, sources
from resa_lens.app.features.table import (
    EVERY,
    LISTED,
    ORDERS,
    PAGE,
    THINKING,
    UNTESTED,
    VERDICTS,
    Query,
    Selection,
    as_csv,
    counted_at_all,
    neighbours,
    page_of,
    score_names,
    select,
)
from resa_lens.app.widgets import (
    download,
    figure,
    missing,
    paged,
    part,
    problem,
    problems,
    readable,
    table,
)
from resa_lens.artifacts.kinds.counts import RULES
from resa_lens.artifacts.listing import Listing, name_of
from resa_lens.errors import BadInputError
from resa_lens.features.words import WORDS
from resa_lens.figures.features import densities_figure
from resa_lens.figures.plots import RULE_NAMES
from resa_lens.figures.tokens import plain
from resa_lens.models.hookpoints import describe_layer, parse_layer
from resa_lens.texts.prompts import PHASES

NO_SCORE, ALL = "none", -1
AT = "show"
"""LAYER:FEATURE in the address, for links; turned into layer and feature."""
DENSITIES = ("0", "1e-5", "1e-4", "0.001", "0.01", "0.1", "1")
AUTO = "what fits the filters"
MORE = ("score", "significant", "sort", "reverse", "density")
"""Keys of the filters that are folded away."""
_LAYER, _TABLE, _OPEN = "features-layer", "features-table", "features-open"
_BACK, _ORDER, _WRONG = "features-back", "features-order", "features-wrong"


def show(listing: Listing) -> None:
    """Draw the page."""
    problems(listing.problems)
    runs = sources(listing)
    if not runs:
        empty.lacking(listing, "No features were counted or measured", "activity")
        return
    source = _source(runs)
    place = _place(source)
    if place is None:
        _table(listing, source)
    else:
        _navigation(source, place)
        feature_view.show(listing, source, *place, go=_open)


def _source(runs: list[Source]) -> Source:
    """Choose among the runs, where there are several."""
    by_key = {source.key: source for source in runs}
    if wrong := links.check("run", by_key, "run"):
        problem(f"{wrong} The newest one is shown.")
    if len(by_key) == 1:
        return runs[0]
    names = {source.key: _run_name(source) for source in runs}
    return by_key[str(links.choice(st, "Run", "run", names))]


def _run_name(source: Source) -> str:
    artifact = source.activity or source.counts
    tail = "" if artifact is None else f": {name_of(artifact)}"
    what = "activity" if source.activity else "counts alone"
    return f"{plain(source.model)}, {plain(source.site)}, {what}{tail}"


# The address: which layer, and which feature


def _place(source: Source) -> tuple[int, int] | None:
    """The feature that the address names."""
    if AT in st.query_params:
        # A page with boxes of its own named layer and feature cannot link by these names: streamlit
        # drops from a link what the page that is left had bound.
        layer, _, feature = st.query_params[AT].partition(":")
        del st.query_params[AT]
        st.query_params.update({"layer": layer, "feature": feature})
    if "feature" not in st.query_params:
        return None
    text = f"{st.query_params.get('layer', '')}:{st.query_params['feature']}"
    return readable(place_of, text, source)


def _open(layer: int, feature: int, run: str = "") -> None:
    """Put a feature into the address, of another run where it is named; a callback."""
    if "feature" not in st.query_params:
        st.session_state[_BACK] = st.query_params.get("layer")
    # Both at once: they are one step of the browser's history.
    other = {"run": run} if run else {}
    st.query_params.update({**other, "layer": str(layer), "feature": str(feature)})


def _back() -> None:
    """Back to the list as it was; a callback."""
    # One that came by a link finds the feature's layer, or the list that the link holds.
    linked = None if lists.LIST in st.query_params else st.query_params.get("layer")
    layer = st.session_state.pop(_BACK, linked)
    del st.query_params["feature"]
    if layer != st.query_params.get("layer"):
        _set_layer(layer)


def _set_layer(layer: str | None) -> None:
    if layer is not None:
        st.query_params["layer"] = layer
    elif "layer" in st.query_params:
        del st.query_params["layer"]


def _navigation(source: Source, place: tuple[int, int]) -> None:
    run, query = st.session_state.get(_ORDER, ("", None))
    before = after = None
    listed = False
    # What is wrong with the table is said below.
    with contextlib.suppress(BadInputError):
        before, after, listed = neighbours(source, *place, query if run == source.key else None)
    where = "in the list" if listed else "of this layer"
    with st.container(horizontal=True, vertical_alignment="center"):
        st.button("Back to the list", icon=":material/arrow_back:", on_click=_back, key="to-list")
        for name, icon, to, key in (
            ("Previous", ":material/chevron_left:", before, "P"),
            ("Next", ":material/chevron_right:", after, "N"),
        ):
            st.button(
                name,
                icon=icon,
                on_click=_open,
                args=to,
                disabled=to is None,
                key=f"to-{name.lower()}",
                help=f"{name} feature {where}",
                shortcut=key,
            )
        address = dict(zip(("layer", "feature"), place, strict=True))
        links.to(links.LAB, "Try it in the prompt lab", **address)


# The table


def _table(listing: Listing, source: Source) -> None:
    _about(listing, source)
    with part():
        listed = lists.of_address(source)
        if listed is not None:
            lists.about(listed)
        query = _query(source, listed.places if listed else ())
        selection = select(source, query)
        st.session_state[_ORDER] = source.key, query
        notes.listed(source, query.find, _open)
        with st.container(horizontal=True, vertical_alignment="center"):
            st.text(f"{selection.matching:,} of {selection.total:,} features match.")
            lists.offer(source, selection)
        for note in selection.notes:
            st.caption(note)
        if selection.matching:
            _rows(source, selection, query)
        else:
            _no_match(listing, source, query)


def _about(listing: Listing, source: Source) -> None:
    """Say what the table is of, and what is missing."""
    if source.activity is None:
        st.text(f"{plain(source.model)}, site {plain(source.site)}: counted features.")
        missing(
            "How often, how strongly and where they fire was not measured; this command does it:",
            command(listing, source, "activity"),
        )
        return
    parts = ", ".join(f"{count:,} {plain(phase)}" for phase, count in source.tokens.items())
    st.text(
        f"{plain(source.model)}, site {plain(source.site)}, {len(source.layers)} layers. Activity "
        f"over {source.documents:,} documents; tokens: {parts}."
    )


def _choice(label: str, options: Sequence[str], key: str, **how: Any) -> str:
    return str(st.selectbox(label, options, width=170, **how, **links.bound(key, lists.PAGES)))


def _query(source: Source, only: tuple[tuple[int, int], ...]) -> Query:
    """The filters; a list of features is shown as it is until one is chosen."""
    counted = counted_at_all(source)
    layer = readable(_layer, source)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        _layer_filter(source, layer)
        rule = _choice(
            "Counted by rule",
            (EVERY, *RULES),
            "rule",
            index=1 + RULES.index("either") if counted and not only else 0,
            help="A feature is counted where it is active at the think tags of the prompt and at "
            "none of its other tokens: " + "; ".join(f"{RULE_NAMES[rule]}" for rule in RULES),
        )
        phase = _choice(
            "Where it fires",
            (EVERY, THINKING, *PHASES),
            "phase",
            index=0 if counted or only else 1,
            format_func=lambda p: f"densest in {p}" if p in PHASES else p,
        )
        verdict = _choice(
            "Verdict of falsification",
            (EVERY, *VERDICTS, UNTESTED),
            "verdict",
            help="What a counted feature depends on, in one word. "
            + " ".join(f"{name}: {word.meaning}." for name, word in WORDS.items()),
        )
        text = st.text_input(
            "Find in tokens",
            width=170,
            placeholder="for example therefore",
            help="In the tokens that a feature raises (its logit lens), in the text around its "
            "strongest activations, and in your labels.",
            **links.bound("find", lists.PAGES),
        )
        st.text_input(
            "Open LAYER:FEATURE",
            key=_OPEN,
            width=170,
            placeholder="5:62 or 6th:62",
            on_change=_open_typed,
            args=(source,),
        )
    if wrong := st.session_state.pop(_WRONG, None):
        problem(wrong)
    # Open where something in it is chosen, so that no filter is out of sight.
    used = any(key in st.query_params for key in MORE)
    with st.expander("Score, density and order", expanded=used):
        more = _more(source, rule, listed=bool(only))
    return Query(layer, rule, phase, verdict, find=text or "", only=only or None, **more)


def _layer(source: Source) -> int | None:
    """The layer of the address: 5 is 0-based, 6th is not.

    Raises:
        BadInputError: it is none, or nothing was measured there.
    """
    text = st.query_params.get("layer")
    layer = None if text is None else parse_layer(text, source.n_layers)
    if layer is None or layer in source.latents:
        return layer
    where = describe_layer(layer, source.n_layers)
    raise BadInputError(f"Nothing was measured at {where}; all layers are shown.")


def _layer_filter(source: Source, layer: int | None) -> None:
    """The box shows the layer as the page counts."""
    st.session_state[_LAYER] = ALL if layer is None else layer
    shift = int(links.one_based())
    st.selectbox(
        "Layer, counted from 1" if shift else "Layer, counted from 0",
        (ALL, *source.layers),
        format_func=lambda n: "all layers" if n == ALL else str(n + shift),
        key=_LAYER,
        width=170,
        on_change=_layer_picked,
    )


def _layer_picked() -> None:
    layer = st.session_state[_LAYER]
    links.first_page(lists.PAGES)
    _set_layer(None if layer == ALL else str(layer))


def _open_typed(source: Source) -> None:
    text = st.session_state[_OPEN].strip()
    if text:
        try:
            _open(*place_of(text, source))
        except BadInputError as error:
            st.session_state[_WRONG] = str(error)


def _more(source: Source, rule: str, *, listed: bool) -> dict[str, Any]:
    """Less common filters, and the order."""
    names = readable(score_names, source) or ()
    with st.container(horizontal=True, vertical_alignment="bottom"):
        score = _choice(
            "Score",
            (NO_SCORE, *names),
            "score",
            help="How a feature differs between reasoning text and other text.",
        )
        significant = st.toggle(
            "Significant only",
            disabled=score == NO_SCORE,
            help="q below 0.05: the p-value of its permutation null, corrected for all features "
            "that were tested.",
            **links.bound("significant", lists.PAGES),
        )
        order = _choice(
            "Sort by", (AUTO, *ORDERS), "sort", format_func=lambda n: str(ORDERS.get(n, n))
        )
        reverse = st.toggle("In reverse", **links.bound("reverse", lists.PAGES))
        low, high = st.select_slider(
            "Density, share of tokens",
            DENSITIES,
            value=(DENSITIES[0], DENSITIES[-1]),
            width=170,
            **links.bound("density", lists.PAGES),
        )
    scored = score != NO_SCORE
    if order == AUTO:
        fitting = LISTED if listed else "verdict" if rule in RULES else "thoughts"
        order = "score" if scored else fitting
    return {
        "score": score if scored else None,
        "significant": significant and scored,
        "density": (float(low), float(high)),
        "order": order,
        "reverse": reverse,
    }


def _no_match(listing: Listing, source: Source, query: Query) -> None:
    if source.counts is None and (query.rule in RULES or query.verdict != EVERY):
        missing(
            "No features were counted with these SAEs; this command counts them:",
            command(listing, source, "count-features"),
        )
    elif source.verdicts is None and query.verdict in VERDICTS:
        missing(
            "The counted features were not put to the test; this command does it:",
            command(listing, source, "falsify"),
        )
    else:
        st.caption("Widen a filter to see more.")


def _rows(source: Source, selection: Selection, query: Query) -> None:
    """The table; a row that is chosen opens its feature."""
    shift = int(links.one_based())
    rows = page_of(source, query, paged(selection.matching, PAGE, lists.PAGES).start)
    visible = rows.assign(layer=rows["layer"] + shift)
    column = "layer (1-based)" if shift else "layer (0-based)"
    visible = visible.rename(columns={"layer": column, "score": query.score or "score"})

    def picked(place: int) -> None:
        _open(int(rows["layer"].iloc[place]), int(rows["feature"].iloc[place]))

    st.caption("Click a row to open its feature, or choose it by Shift and the space bar.")
    table(
        visible,
        "features",
        key=_TABLE,
        picked=picked,
        height=600 if len(visible) > 15 else "content",
        column_config={
            "raises": st.column_config.TextColumn(width="large"),
            "feature": st.column_config.NumberColumn(format="%d"),
        },
        alt="Features that match the filters",
    )
    st.caption(
        "In thoughts: density in thoughts over that plus the density elsewhere; 0.5 is no "
        "preference, above 0.67 it is twice as dense in thoughts. Raises: the tokens that its "
        "decoder direction makes likelier (␣ is a space)."
    )
    if selection.matching > PAGE:
        label = f"Download all {selection.matching:,} that match"
        download(label, lambda: as_csv(selection), "features_all.csv", key="download-all-features")
    if source.activity is not None:
        densities = selection.rows["density"].to_numpy()[selection.index]
        figure(densities_figure(densities), "figure-densities")
