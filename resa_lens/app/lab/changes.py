"""The lower part of the prompt lab: the same prompt with features off, up, set or pushed along."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import streamlit as st

from resa_lens.app import links
from resa_lens.app.lab import data as lab_data
from resa_lens.app.lab import jobs, kept
from resa_lens.app.widgets import problem, readable, table
from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.listing import Listing
from resa_lens.errors import BadInputError
from resa_lens.figures import tokens
from resa_lens.texts.prompts import PHASES

KINDS = {
    "ablate": "strength 1 removes the features",
    "scale": "strength 1 doubles them, -1 removes them",
    "clamp": "strength 1 sets them to the value, active or not",
    "steer": "adds strength x value along their directions, wherever",
}
VALUED = ("clamp", "steer")
_NOW = "change-now"
"""In the session: the change is compared without another click."""
DRAWS = 5
"""Sets of random features; the rank of one among so many is never below 1 in 6."""


def show(
    listing: Listing,
    saes: Artifact,
    response: dict[str, Any],
    request: dict[str, Any],
    coloured: Mapping[int, list[int]],
) -> None:
    """Draw what is changed, and the two texts side by side.

    Args:
        listing: the workspace.
        saes: the SAEs.
        response: the worker's answer to the prompt.
        request: that it answers.
        coloured: the features that the text is coloured by: {layer: features}.
    """
    st.subheader("Switch features off, or up", anchor=False)
    text, how = _inputs(coloured)
    targets = readable(parse, text) or {}
    change = {
        **request,
        "saes": lab_data.place(listing, saes),
        "document": response["document"],
        "targets": {str(layer): features for layer, features in targets.items()},
        "how": how,
    }
    busy = lab_data.busy()
    with st.container(horizontal=True):
        one = st.button("Compare", type="primary", key="compare", disabled=not targets or busy)
        with_random = st.button(
            "Compare with random features too",
            key="compare-random",
            disabled=not targets or busy,
            help="As many random features, with about the same activation mass and as many active "
            "tokens on this very text",
        )
    if one or with_random or (st.session_state.pop(_NOW, False) and targets):
        lab_data.send("change", {**change, "draws": DRAWS if with_random else 0})
        st.rerun()
    sent = lab_data.sent("change")
    result = lab_data.outcome("change")
    if result is not None and sent is not None:
        if {**change, "draws": sent.request["draws"]} != sent.request:
            st.caption(
                "The settings above were changed since; the texts below are of those before."
            )
        compared(response, result, request, sent.request["draws"])
        kept.note(request, result["changed"]["document"], _in_words(sent.request))
    if targets:
        _measure(listing, saes, request, targets, how)


def _in_words(change: Mapping[str, Any]) -> str:
    features = [f"{layer}:{f}" for layer, some in change["targets"].items() for f in some]
    more = f" and {len(features) - 3} more" if len(features) > 3 else ""
    how = change["how"]
    return f"{how['kind']} {', '.join(features[:3])}{more} x {how['strength']:g}"


def switch_off(layer: int, feature: int) -> None:
    """Take a feature away and compare; a callback."""
    st.session_state["change"] = f"{layer}:{feature}"
    for key, value in (("how", "ablate"), ("strength", 1.0)):
        if st.session_state.get(key, value) != value:
            st.session_state[key] = value
    st.session_state[_NOW] = True
    st.toast(f"The text without {layer}:{feature} comes below", icon=":material/arrow_downward:")


def compared(
    response: dict[str, Any], result: dict[str, Any], request: dict[str, Any], draws: int
) -> None:
    """Draw a change, and what random features do beside it where that was asked and came out."""
    _side_by_side(response["document"], result["changed"], request)
    if lacking := result["random_lacking"]:
        problem(f"Without random features beside it: {lacking}")
    elif draws:
        _random(result)


def _inputs(coloured: Mapping[int, list[int]]) -> tuple[str, dict[str, Any]]:
    listed = ", ".join(f"{layer}:{f}" for layer in sorted(coloured) for f in coloured[layer])
    columns = st.columns([4, 1], vertical_alignment="bottom")
    text = columns[0].text_input(
        "Features, as layer:feature",
        placeholder="5:978, 5:490",
        help="Layers count from 0",
        **links.bound("change"),
    )
    columns[1].button(
        "Those coloured above",
        on_click=lambda: st.session_state.update(change=listed),
        disabled=not listed,
        key="take-coloured",
    )
    kind = st.radio("Change", list(KINDS), horizontal=True, **links.bound("how"))
    st.caption(f"{kind}: {KINDS[str(kind)]}. Strength 0 changes nothing.")
    columns = st.columns([1, 1, 2, 2], vertical_alignment="bottom")
    strength = columns[0].number_input(
        "Strength", -100.0, 100.0, 1.0, 0.25, **links.bound("strength")
    )
    value = columns[1].number_input(
        "Value",
        value=None,
        placeholder="mean",
        disabled=kind not in VALUED,
        help="Of clamp and steer; else each feature's mean over the tokens of this text where it "
        "is active",
        **links.bound("value"),
    )
    phases = columns[2].pills(
        "At the tokens of",
        PHASES,
        selection_mode="multi",
        default=PHASES,
        **links.bound("at"),
    )
    keep = columns[3].toggle(
        "Keep the error",
        True,
        help="What the SAE does not explain of the activation stays. Off: the SAE's "
        "reconstruction stands in its place, which changes the text by itself: look at strength 0",
        **links.bound("keep_error"),
    )
    return text or "", {
        "kind": str(kind),
        "strength": float(strength),
        "phases": [phase for phase in PHASES if phase in phases],
        "keep_error": bool(keep),
        "value": float(value) if value is not None and kind in VALUED else None,
    }


def parse(text: str) -> dict[int, list[int]]:
    """Read "4:17, 4:33, 6:2" as {layer: features}.

    Raises:
        BadInputError: another form.
    """
    targets: dict[int, list[int]] = {}
    for item in text.replace(";", ",").split(","):
        if not item.strip():
            continue
        pair = re.fullmatch(r"\s*(\d{1,4})\s*:\s*(\d{1,9})\s*", item)
        if pair is None:
            raise BadInputError(
                f"{item.strip()[:60]!r} is no feature; write layer:feature, for example 4:17, 4:33"
            )
        features = targets.setdefault(int(pair[1]), [])
        if int(pair[2]) not in features:
            features.append(int(pair[2]))
    return targets


def _side_by_side(plain: dict[str, Any], changed: dict[str, Any], request: dict[str, Any]) -> None:
    """Draw the two texts, stacked where there is no room beside."""
    first = changed["first"]
    if first is None:
        st.text("Both texts are the same, token for token.")
    else:
        st.text(f"The texts differ from written token {first} on (counted from 0; framed).")
    columns = st.columns(2)
    for column, title, document in (
        (columns[0], "Unchanged", plain),
        (columns[1], "Changed", changed["document"]),
    ):
        with column.container(border=True):
            st.text(f"{title}. {lab_data.answer_line(document, request['question'])}")
            written = slice(document["prompt_tokens"], None)
            words = document["tokens"][written]
            if words:
                st.html(tokens.coloured(words, phases=document["phases"][written], peak=first))
            else:
                st.text("nothing was written")
    moved = changed["moved"]
    parts = [f"{name} {moved[name]:+.3f}" for name in PHASES if name in moved]
    count = len(plain["ids"]) - plain["prompt_tokens"]
    st.text(
        f"Log-probability of the unchanged text under the change: {moved['all']:+.3f} nats over "
        f"{count} tokens" + (f" ({', '.join(parts)})" if parts else "")
    )


def _random(result: dict[str, Any]) -> None:
    """Draw what random features of about the same mass do."""
    rows, sets = [], result["random"]
    shift = int(links.one_based())
    for number, one in enumerate(sets, 1):
        document = one["document"]
        rows.append(
            {
                "random set": number,
                f"features (layers {shift}-based)": "; ".join(
                    f"layer {p['layer'] + shift}: {', '.join(map(str, p['features']))}"
                    for p in one["places"]
                ),
                "mass / named": min((p["mass"] for p in one["places"]), key=lambda m: -abs(m - 1)),
                "same text": one["first"] is None,
                "answer": document["answer"] or "",
                "log-prob. moved": one["moved"]["all"],
            }
        )
    moved = [abs(row["log-prob. moved"]) for row in rows]
    own = abs(result["changed"]["moved"]["all"])
    beyond = sum(own > other for other in moved)
    st.text(
        f"Random features, {len(sets)} different set(s) that come near in activation mass: "
        f"{sum(row['same text'] for row in rows)} leave the text as it is; the named ones move its "
        f"log-probability farther than {beyond} of them. By luck alone they would be the farthest "
        f"in 1 of {len(sets) + 1} cases."
    )
    table(rows, "lab_random_features")


def command(
    listing: Listing,
    saes: Artifact,
    request: dict[str, Any],
    layer: int,
    features: list[int],
    how: dict[str, Any],
) -> list[str]:
    """Return the command that measures the change at one layer over questions, with controls."""
    words = ["resa-lens", "ablate", "--model", request["model"], "--layer", str(layer)]
    words += ["--features", ",".join(map(str, features)), "--kind", how["kind"]]
    words += ["--strength", f"{how['strength']:g}", "--phases", ",".join(how["phases"])]
    words += [] if how["keep_error"] else ["--no-error"]
    words += [] if how["value"] is None else ["--value", f"{how['value']:g}"]
    words += ["--site", saes.results.site, "--saes", str(saes.path)]
    return [*words, "--workspace", str(listing.root)]


def _measure(
    listing: Listing,
    saes: Artifact,
    request: dict[str, Any],
    targets: Mapping[int, list[int]],
    how: dict[str, Any],
) -> None:
    """Say what one prompt is worth, and offer the measurement."""
    st.caption(
        "One prompt is an anecdote. This measures the change over 500 questions, at several "
        "strengths and beside random features, with intervals:"
    )
    if how["strength"] == 0 or not how["phases"]:
        st.text("Strength 0, or no phase, changes nothing: there is nothing to measure.")
        return
    layer = min(targets)
    if len(targets) > 1:
        layer = st.selectbox("Layer to measure, one at a time", sorted(targets), key="measure")
    words = command(listing, saes, request, int(layer), targets[int(layer)], how)
    jobs.run_command_panel(words, "ablate")
