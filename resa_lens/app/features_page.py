"""The page "Features": a table of them, and in its place one feature's page where one is chosen."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import streamlit as st

from resa_lens.app import empty, feature_view, links
from resa_lens.app.data import Listing
from resa_lens.app.feature_evidence import missing
from resa_lens.app.features_data import Source, command, sources
from resa_lens.app.features_table import (
    EVERY,
    ORDERS,
    PAGE,
    RULES,
    THINKING,
    UNTESTED,
    VERDICTS,
    Found,
    Query,
    as_csv,
    beside,
    counted_at_all,
    score_names,
    select,
)
from resa_lens.app.tokens import plain
from resa_lens.app.widgets import frame, problem, problems
from resa_lens.errors import BadInputError
from resa_lens.hookpoints import describe_layer, parse_layer
from resa_lens.plots import RULE_NAMES
from resa_lens.prompts import PHASES

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
    found, damaged = sources(listing)
    problems([*listing.problems, *damaged])
    if not found:
        empty.lacking(listing, "No features were counted or measured", "activity")
        return
    source = _source(found)
    chosen = _chosen(source)
    if chosen is None:
        _table(listing, source)
    else:
        _navigation(source, chosen)
        feature_view.show(listing, source, *chosen, go=_open)


def _source(found: list[Source]) -> Source:
    """Choose among the runs, where there are several."""
    held = {source.key: source for source in found}
    asked = st.query_params.get("run")
    if asked and asked not in held:
        problem(f"The run {asked} is not in this workspace; the newest one is shown.")
    if len(held) == 1:
        return found[0]
    # The address holds the path, so it is also what is shown.
    return held[str(st.selectbox("Run", list(held), key="run", **links.BOUND))]


# The address: which layer, and which feature


def _chosen(source: Source) -> tuple[int, int] | None:
    """The feature that the address names."""
    if AT in st.query_params:
        # A page with boxes of its own named layer and feature cannot link by these names: streamlit
        # drops from a link what the page that is left had bound.
        layer, _, feature = st.query_params[AT].partition(":")
        del st.query_params[AT]
        st.query_params.update({"layer": layer, "feature": feature})
    if "feature" not in st.query_params:
        return None
    asked = f"{st.query_params.get('layer', '')}:{st.query_params['feature']}"
    try:
        return _parse(asked, source)
    except BadInputError as error:
        problem(str(error))
        return None


def _parse(text: str, source: Source) -> tuple[int, int]:
    """Read LAYER:FEATURE, the layer 0-based or as in 13th.

    Raises:
        BadInputError: it has no such form, or there is no such layer or feature.
    """
    layer, _, feature = text.partition(":")
    if not re.fullmatch(r"\s*\d{1,9}\s*", feature, re.ASCII):
        raise BadInputError(
            f"feature {text!r} is none; write LAYER:FEATURE, for example 5:62 or 6th:62"
        )
    found = parse_layer(layer, source.n_layers), int(feature)
    latents = source.latents.get(found[0], 0)
    if latents and found[1] >= latents:
        raise BadInputError(
            f"feature {found[1]} at {describe_layer(found[0], source.n_layers)} is out of range: "
            f"its SAE has latents 0 to {latents - 1}"
        )
    return found


def _open(layer: int, feature: int) -> None:
    """Put a feature into the address; a callback."""
    if "feature" not in st.query_params:
        st.session_state[_BACK] = st.query_params.get("layer")
    # Both at once: they are one step of the browser's history.
    st.query_params.update({"layer": str(layer), "feature": str(feature)})


def _back() -> None:
    """Back to the list as it was; a callback."""
    # One that came by a link finds the feature's layer.
    layer = st.session_state.pop(_BACK, st.query_params.get("layer"))
    del st.query_params["feature"]
    if layer != st.query_params.get("layer"):
        _set_layer(layer)


def _set_layer(layer: str | None) -> None:
    if layer is not None:
        st.query_params["layer"] = layer
    elif "layer" in st.query_params:
        del st.query_params["layer"]


def _navigation(source: Source, chosen: tuple[int, int]) -> None:
    order = st.session_state.get(_ORDER, ())
    where = "in the list" if chosen in order else "of this layer"
    around: tuple[tuple[int, int] | None, tuple[int, int] | None] = None, None
    # What is wrong with the table is said below.
    with contextlib.suppress(BadInputError):
        around = beside(source, *chosen, order)
    with st.container(horizontal=True, vertical_alignment="center"):
        st.button("Back to the list", icon=":material/arrow_back:", on_click=_back, key="to-list")
        for name, icon, to, key in (
            ("Previous", ":material/chevron_left:", around[0], "P"),
            ("Next", ":material/chevron_right:", around[1], "N"),
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
        layer, feature = chosen
        links.to(
            links.LAB,
            "Try it in the prompt lab",
            icon=":material/science:",
            layer=layer,
            feature=feature,
        )


# The table


def _table(listing: Listing, source: Source) -> None:
    _about(listing, source)
    try:
        query = _query(source)
        found = select(source, query)
    except BadInputError as error:
        problem(str(error))
        return
    st.session_state[_ORDER] = found.order
    more = f"; the first {PAGE:,} of them are below" if found.matching > PAGE else ""
    st.text(f"{found.matching:,} of {found.total:,} features match{more}.")
    for note in found.notes:
        st.caption(note)
    if not found.matching:
        _no_match(listing, source, query)
        return
    _rows(found, query)


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


def _query(source: Source) -> Query:
    """The filters."""
    counted = counted_at_all(source)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        layer = _layer_filter(source)
        rule = st.selectbox(
            "Counted by rule",
            (EVERY, *RULES),
            index=1 + RULES.index("either") if counted else 0,
            key="rule",
            width=170,
            help="A feature is counted where it is active at the think tags of the prompt and at "
            "none of its other tokens: " + "; ".join(f"{RULE_NAMES[rule]}" for rule in RULES),
            **links.BOUND,
        )
        phase = st.selectbox(
            "Where it fires",
            (EVERY, THINKING, *PHASES),
            index=0 if counted else 1,
            format_func=lambda p: f"densest in {p}" if p in PHASES else p,
            key="phase",
            width=170,
            **links.BOUND,
        )
        verdict = st.selectbox(
            "Verdict of falsification",
            (EVERY, *VERDICTS, UNTESTED),
            key="verdict",
            width=170,
            help="Counted features are put to the test: one that fires at the tags in any text is "
            "a token detector, one that needs this very prompt an artefact of it.",
            **links.BOUND,
        )
        text = st.text_input(
            "Find in tokens",
            key="find",
            width=170,
            placeholder="for example therefore",
            help="In the tokens that a feature raises (its logit lens) and in the text around its "
            "strongest activations.",
            **links.BOUND,
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
        score, significant, density, order, reverse = _more(source)
    score = None if score == NO_SCORE else score
    if order == AUTO:
        order = "score" if score else "verdict" if rule in RULES else "thoughts"
    return Query(
        layer=layer,
        rule=str(rule),
        phase=str(phase),
        verdict=str(verdict),
        score=score,
        significant=significant and score is not None,
        find=text or "",
        density=density,
        order=order,
        reverse=reverse,
    )


def _layer_filter(source: Source) -> int | None:
    """The layer of the address: 5 is 0-based, 6th is not; the box is shown as the page counts."""
    asked, wrong = st.query_params.get("layer"), None
    layer = None
    if asked is not None:
        try:
            layer = parse_layer(asked, source.n_layers)
        except BadInputError as error:
            wrong = str(error)
        else:
            if layer not in source.latents:
                where = describe_layer(layer, source.n_layers)
                wrong = f"Nothing was measured at {where}; all layers are shown."
                layer = None
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
    if wrong:
        st.session_state[_WRONG] = wrong
    return layer


def _layer_picked() -> None:
    layer = st.session_state[_LAYER]
    _set_layer(None if layer == ALL else str(layer))


def _open_typed(source: Source) -> None:
    text = st.session_state[_OPEN].strip()
    if text:
        try:
            _open(*_parse(text, source))
        except BadInputError as error:
            st.session_state[_WRONG] = str(error)


def _more(source: Source) -> tuple[str, bool, tuple[float, float], str, bool]:
    """Less common filters, and the order."""
    names: list[str] = []
    try:
        names = list(score_names(source))
    except BadInputError as error:
        problem(str(error))
    with st.container(horizontal=True, vertical_alignment="bottom"):
        score = st.selectbox(
            "Score", (NO_SCORE, *names), key="score", width=170,
            help="How a feature differs between reasoning text and other text.", **links.BOUND,
        )  # fmt: skip
        significant = st.toggle(
            "Significant only",
            key="significant",
            disabled=score == NO_SCORE,
            help="q below 0.05: the p-value of its permutation null, corrected for all features "
            "that were tested.",
            **links.BOUND,
        )
        order = st.selectbox(
            "Sort by",
            (AUTO, *ORDERS),
            format_func=lambda name: str(ORDERS.get(name, name)),
            key="sort",
            width=170,
            **links.BOUND,
        )
        reverse = st.toggle("In reverse", key="reverse", **links.BOUND)
        low, high = st.select_slider(
            "Density, share of tokens",
            DENSITIES,
            value=(DENSITIES[0], DENSITIES[-1]),
            key="density",
            width=170,
            **links.BOUND,
        )
    return str(score), significant, (float(low), float(high)), str(order), reverse


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


def _rows(found: Found, query: Query) -> None:
    """The table; a row that is chosen opens its feature."""
    shift = int(links.one_based())
    shown = found.shown.assign(layer=found.shown["layer"] + shift)
    column = "layer (1-based)" if shift else "layer (0-based)"
    shown = shown.rename(columns={"layer": column, "score": query.score or "score"})

    def picked() -> None:
        state: Any = st.session_state.get(_TABLE)
        rows = state["selection"]["rows"] if state else []
        if rows and rows[0] < len(found.order):
            _open(*found.order[rows[0]])

    st.caption(
        "Choose a row by the box at its left, or by Shift and the space bar, to open its feature."
    )
    frame(
        shown,
        "features",
        {
            "density, %": "%.3f",
            "in thoughts": "%.2f",
            "strongest": "%.3g",
            query.score or "score": "%.3g",
            "p": "%.2g",
            "q": "%.2g",
        },
        key=_TABLE,
        on_select=picked,
        selection_mode="single-row",
        height=600 if len(shown) > 15 else "content",
        column_config=_columns(),
        alt="Features that match the filters",
    )
    st.caption(
        "In thoughts: density in thoughts over that plus the density elsewhere; 0.5 is no "
        "preference, above 0.67 it is twice as dense in thoughts. Raises: the tokens that its "
        "decoder direction makes likelier (␣ is a space)."
    )
    if found.matching > PAGE:
        st.download_button(
            f"Download all {found.matching:,} that match",
            lambda: as_csv(found),
            file_name="features_all.csv",
            mime="text/csv",
            icon=":material/download:",
            type="tertiary",
            on_click="ignore",
            key="download-all-features",
        )


def _columns() -> dict[str, Any]:
    return {
        "raises": st.column_config.TextColumn(width="large"),
        "feature": st.column_config.NumberColumn(format="%d"),
    }
