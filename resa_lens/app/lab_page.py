"""The page "Prompt lab": a prompt, what a model writes, its features, and the same with a change.

The model runs in the worker (jobs.py).  What a click asks for stays until the next click; what the
view needs of it is asked for as the view changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st

from resa_lens import prompts
from resa_lens.app import lab_changes, lab_data, links, stages, tokens
from resa_lens.app.lab_data import RULES, Saes
from resa_lens.app.listing import Listing
from resa_lens.app.widgets import frame, problem
from resa_lens.errors import BadInputError
from resa_lens.hookpoints import describe_layer

ONE, ALL, NONE = "one feature", "counted features", "phases only"
STRONGEST = 12
"""Features named at a token."""
LONGEST = 4096
"""New tokens at most: the page draws all of them."""


def show(listing: Listing) -> None:
    """Draw the page."""
    request = _inputs(listing)
    if st.button(
        "Generate",
        type="primary",
        icon=":material/play_arrow:",
        key="generate",
        disabled=lab_data.busy(),
        help="The first time the model is loaded, in a process of its own",
    ):
        for slot in ("layer", "sum", "change"):
            lab_data.forget(slot)
        lab_data.send("respond", "respond", request)
        st.rerun()  # the buttons above know now that work is under way
    made = lab_data.outcome("respond")
    asked = lab_data.sent("respond")
    if made is None or asked is None:
        return
    if asked.request != request:
        st.caption("The settings above were changed since; the text below is of those before.")
    _answer(made, asked.request)
    chosen = _saes(listing, made["model"], asked.request["model"])
    if chosen is None:
        document = made["document"]
        tokens.show(document["tokens"], [0.0] * len(document["ids"]), phases=document["phases"])
        tokens.legend()
        return
    if chosen.artifact.weights != made["model"]["weights"]:
        st.caption(
            "These SAEs were trained on the base of this adapter, not on what it makes of it."
        )
    with st.container():
        coloured = _features(listing, chosen, made, asked.request["model"])
    with st.container():
        lab_changes.show(listing, chosen, made, asked.request, coloured)


def _inputs(listing: Listing) -> dict[str, Any]:
    """Draw what is asked; returns the worker's request."""
    st.session_state.setdefault("prompt", lab_data.questions()[0]["question"])
    with st.container(horizontal=True, vertical_alignment="center"):
        st.button(
            "Another example",
            icon=":material/shuffle:",
            on_click=_another,
            key="another",
            help="A question of the bundled test set, with a known answer",
        )
        raw = st.toggle(
            "Raw prompt",
            key="raw",
            help="Off: the text is a question and stands in the project's question prompt, as in "
            "evaluation. On: the model reads the text as it is.",
            **links.BOUND,
        )
    label = "Prompt" if raw else "Question"
    text = st.text_area(label, key="prompt", max_chars=20_000, **links.BOUND) or ""
    named = lab_data.models(listing)
    columns = st.columns([4, 1, 1, 1], vertical_alignment="bottom")
    host = columns[0].selectbox(
        "Model",
        list(named),
        key="host",
        accept_new_options=True,
        help="One of this workspace, or type a folder, a hub id, a .gguf file or an adapter",
        **links.BOUND,
    )
    longest = columns[1].number_input(
        "New tokens", 1, LONGEST, 160, key="longest", help="At most", **links.BOUND
    )
    temperature = columns[2].number_input(
        "Temperature",
        0.0,
        2.0,
        0.0,
        0.1,
        key="temperature",
        help="0 takes the likeliest token each time",
        **links.BOUND,
    )
    seed = columns[3].number_input("Seed", 0, 2**31 - 1, 0, key="seed", **links.BOUND)
    known = None if raw else lab_data.question(text)
    with st.expander("What the model reads"):
        st.text(text if raw else prompts.question_prompt(text))
    return {
        "model": named.get(str(host), str(host or "")),
        "text": text,
        "raw": raw,
        "generation": {
            "max_new_tokens": int(longest),
            "temperature": round(float(temperature), 3),
            "seed": int(seed),
        },
        "question": known,
    }


def _another() -> None:
    held = lab_data.questions()
    place = st.session_state.get("example-number", 0) + 1
    st.session_state["example-number"] = place
    st.session_state["prompt"] = held[place % len(held)]["question"]
    if st.session_state.get("raw"):
        st.session_state["raw"] = False


def _answer(made: dict[str, Any], request: dict[str, Any]) -> None:
    model, document = made["model"], made["document"]
    st.text(
        f"{model['slug']}: {model['layers']} layers x {model['width']}, {model['dtype']} on "
        f"{model['device']}; {document['prompt_tokens']} tokens read, "
        f"{len(document['ids']) - document['prompt_tokens']} written"
    )
    for note in model["notes"]:
        st.text(note)
    st.text(lab_data.said(document, request["question"]))


def _command(what: str, model: str, listing: Listing, options: Sequence[str] = ()) -> str:
    return stages.line(what, "--model", model, *options, *stages.workspace_option(listing))


def _saes(listing: Listing, model: dict[str, Any], name: str) -> Saes | None:
    """Choose among the SAEs of the loaded model."""
    found, problems = lab_data.saes(listing, [model["weights"], model["base"]])
    for text in problems:
        problem(text)
    if not found:
        problem(
            f"{listing.root} holds no SAEs of {model['name']}, so there are no features to look "
            "at. This command trains some:",
            _command("train-saes", name, listing),
        )
        return None
    by_name = {each.artifact.relative: each for each in found}
    if st.session_state.get("saes") not in by_name:
        st.session_state.pop("saes", None)
    if len(found) == 1:
        return found[0]
    relative = st.selectbox(
        "SAEs", list(by_name), key="saes", help="Of this model's weights", **links.BOUND
    )
    return by_name[str(relative)]


def _whole(key: str, most: int | None = None) -> None:
    """Let a number in the session be one: another page may have a widget of this name."""
    held = st.session_state.get(key)
    if held is None:
        return
    try:
        number = int(str(held))
    except ValueError:
        number = -1
    if number < 0 or (most is not None and number > most):
        del st.session_state[key]
    elif number != held:
        st.session_state[key] = number


def _features(
    listing: Listing, chosen: Saes, made: dict[str, Any], model: str
) -> dict[int, list[int]]:
    """Colour the text and name the strongest features at a token; returns what is coloured."""
    document, n_layers = made["document"], made["model"]["layers"]
    st.subheader("Features in this text", anchor=False)
    columns = st.columns([3, 1, 1], vertical_alignment="bottom")
    _whole("layer", n_layers - 1)
    _whole("feature")
    colour = columns[0].radio(
        "Colour by", (ONE, ALL, NONE), key="colour", horizontal=True, **links.BOUND
    )
    middle = chosen.layers[len(chosen.layers) // 2]
    given = columns[1].number_input(
        "Layer",
        0,
        n_layers - 1,
        None,
        step=1,
        key="layer",
        placeholder=str(middle),
        help="Counted from 0",
        **links.BOUND,
    )
    layer = middle if given is None else int(given)
    number = columns[2].number_input(
        "Feature",
        0,
        None,
        None,
        step=1,
        key="feature",
        placeholder="strongest",
        disabled=colour != ONE,
        **links.BOUND,
    )
    if layer not in chosen.layers:
        problem(
            f"There is no SAE at {describe_layer(layer, n_layers)}; these layers have one: "
            f"{', '.join(map(str, chosen.layers))} (0-based)."
        )
        return {}
    asked = {"model": model, "saes": chosen.request(), "ids": document["ids"]}
    acts = lab_data.follow("layer", "layer", {**asked, "layer": layer})
    if acts is None:
        return {}
    coloured: dict[int, list[int]] = {}
    values = np.zeros(len(document["ids"]))
    if colour == ONE:
        feature, text = _one(acts, number)
        if feature is not None:
            coloured = {layer: [feature]}
            values = _values(acts, feature)
            text += (
                f"; active at {int((values > 0).sum())} of {len(values)} tokens, at most "
                f"{values.max():.3g}"
            )
        st.text(f"{describe_layer(layer, n_layers)}: {text}")
    elif colour == ALL:
        coloured, summed = _counted(listing, chosen, asked)
        values = values if summed is None else summed
    place = _token(document)
    tokens.show(document["tokens"], values.tolist(), phases=document["phases"], peak=place)
    tokens.legend()
    _strongest(listing, chosen, acts, document, layer, n_layers, place)
    with st.expander("Table of tokens"):
        rows = {
            "position": list(range(len(values))),
            "token": document["tokens"],
            "phase": document["phases"],
            "activation": values,
        }
        frame(pd.DataFrame(rows), "lab_tokens", {"activation": "%.4g"})
    return coloured


def _one(acts: dict[str, Any], number: int | None) -> tuple[int | None, str]:
    """The feature to colour by, and what is said of it."""
    if number is not None:
        if int(number) < acts["size"]:
            return int(number), f"feature {int(number)}"
        return None, f"no feature {int(number)}; this SAE has features 0 to {acts['size'] - 1}"
    if not acts["values"]:
        return None, "no feature is active in this text"
    strongest = acts["features"][int(np.argmax(acts["values"]))]
    return strongest, f"feature {strongest}, which has the largest activation in this text"


def _values(acts: dict[str, Any], feature: int) -> np.ndarray:
    """A feature's activation at every token."""
    starts = np.array(acts["starts"])
    rows = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    at = np.array(acts["features"], dtype=int) == feature
    made = np.zeros(len(starts) - 1)
    np.add.at(made, rows[at], np.array(acts["values"], dtype=float)[at])
    return made


def _counted(
    listing: Listing, chosen: Saes, asked: dict[str, Any]
) -> tuple[dict[int, list[int]], np.ndarray | None]:
    """The counted features of a rule, and the sum of their activations."""
    try:
        stored = lab_data.counted(listing, chosen)
    except BadInputError as error:
        problem(str(error))
        return {}, None
    if stored is None:
        base = stages.model_of(chosen.artifact, stages.models(listing))
        options = stages.kept(chosen.artifact.manifest.command)
        problem(
            "The features of these SAEs were not counted yet. This command does it:",
            # An adapter's SAEs are its base's: they are counted there.
            _command("count-features", base.name if base else asked["model"], listing, options),
        )
        return {}, None
    rule = st.segmented_control(
        "Counted by rule",
        RULES,
        default=RULES[0],
        required=True,
        key="lab-rule",
        help="either: active at a think tag and at no other token of the system prompt; any: at "
        "one or more of each tag; all: at every one",
        **links.BOUND,
    )
    wanted = stored.of(str(rule))
    number = sum(map(len, wanted.values()))
    if not number:
        st.text(f"Rule {rule} counts no feature in these SAEs.")
        return {}, None
    listed = "; ".join(f"layer {at}: {', '.join(map(str, wanted[at]))}" for at in sorted(wanted))
    st.text(f"Sum of the activations of {number} features in {len(wanted)} layers (0-based).")
    with st.expander("Which they are"):
        st.text(listed)
    summed = lab_data.follow("sum", "sum", {**asked, "wanted": {str(k): wanted[k] for k in wanted}})
    return wanted, None if summed is None else np.array(summed["values"], dtype=float)


def _token(document: dict[str, Any]) -> int:
    last = len(document["ids"]) - 1
    _whole("token", last)
    start = min(document["prompt_tokens"], last)
    if last < 1:
        return 0
    return st.slider(
        "Token to look at", 0, last, start, key="token", help="Framed below", **links.BOUND
    )


def _strongest(
    listing: Listing,
    chosen: Saes,
    acts: dict[str, Any],
    document: dict[str, Any],
    layer: int,
    n_layers: int,
    place: int,
) -> None:
    """Name the strongest features of a layer at a token, each a link to its page."""
    part = slice(acts["starts"][place], acts["starts"][place + 1])
    held = sorted(zip(acts["values"][part], acts["features"][part], strict=True), reverse=True)
    token = tokens.visible(document["tokens"][place])
    st.text(
        f"At token {place} {token} ({document['phases'][place]}), "
        f"{describe_layer(layer, n_layers)}: {len(held)} features are active"
        + (f"; the strongest {STRONGEST}" if len(held) > STRONGEST else "")
        + ", as feature: activation"
    )
    run = lab_data.activity_of(listing, chosen)
    with st.container(horizontal=True, gap="small"):
        for value, feature in held[:STRONGEST]:
            links.to(
                links.FEATURES,
                f"{feature}: {value:.3g}",
                # In one: streamlit leaves out of a link what the page with the link binds itself.
                show=f"{layer}:{feature}",
                **({"run": run} if run else {}),
            )
