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

from resa_lens.app import data, links
from resa_lens.app.lab import changes as lab_changes
from resa_lens.app.lab import data as lab_data
from resa_lens.app.lab import kept
from resa_lens.app.lab import token as lab_token
from resa_lens.app.tokens import clickable, cursor_in_prompt
from resa_lens.app.widgets import choose, part, problem, problems, table
from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.commands import line, model_of, models, sae_options, workspace_option
from resa_lens.artifacts.kinds.counts import RULES, Features
from resa_lens.artifacts.listing import Listing
from resa_lens.figures import tokens
from resa_lens.models.hookpoints import describe_layer
from resa_lens.texts import prompts

ONE, ALL, NONE = "one feature", "counted features", "phases only"
LIGHT_BYTES = 2**30
"""Of SAEs whose features at a token are looked up without a click: each layer's is read."""
MOST_CHARACTERS = 20_000
"""Of a prompt: the address holds it."""
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
        lab_data.send("respond", request)
        st.rerun()  # the buttons above know now that work is under way
    if lab_data.sent("respond") is None:
        cursor_in_prompt()
    response = lab_data.outcome("respond")
    sent = lab_data.sent("respond")
    if response is None or sent is None:
        return
    if sent.request != request:
        st.caption("The settings above were changed since; the text below is of those before.")
    _answer(response, sent.request)
    kept.note(sent.request, response["document"])
    saes = _saes(listing, response["model"], sent.request["model"])
    if saes is None:
        document = response["document"]
        st.html(tokens.coloured(document["tokens"], phases=document["phases"]))
        st.html(tokens.legend())
        return
    if saes.weights != response["model"]["weights"]:
        st.caption(
            "These SAEs were trained on the base of this adapter, not on what it makes of it."
        )
    with st.container():
        coloured = _features(listing, saes, response, sent.request["model"])
    with st.container():
        lab_changes.show(listing, saes, response, sent.request, coloured)
    with st.container():
        kept.show(listing, saes, coloured)


def _inputs(listing: Listing) -> dict[str, Any]:
    """Draw the settings; returns the worker's request."""
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
            help="Off: the text is a question and stands in the project's question prompt, as in "
            "evaluation. On: the model reads the text as it is.",
            **links.bound("raw"),
        )
    label = "Prompt" if raw else "Question"
    # The browser would drop what is more without a word.
    text = st.text_area(label, **links.bound("prompt")) or ""
    if len(text) > MOST_CHARACTERS:
        problem(
            f"The text has {len(text):,} characters, and at most {MOST_CHARACTERS:,} are read: its "
            "end is left out."
        )
        text = text[:MOST_CHARACTERS]
    by_name = lab_data.models(listing)
    columns = st.columns([4, 1, 1, 1], vertical_alignment="bottom")
    host = columns[0].selectbox(
        "Model",
        list(by_name),
        accept_new_options=True,
        help="One of this workspace, or type a folder, a hub id, a .gguf file or an adapter",
        **links.bound("host"),
    )
    longest = columns[1].number_input(
        "New tokens", 1, LONGEST, 160, help="At most", **links.bound("longest")
    )
    temperature = columns[2].number_input(
        "Temperature",
        0.0,
        2.0,
        0.0,
        0.1,
        help="0 takes the likeliest token each time",
        **links.bound("temperature"),
    )
    seed = columns[3].number_input("Seed", 0, 2**31 - 1, 0, **links.bound("seed"))
    known = None if raw else lab_data.question(text)
    with st.expander("What the model reads"):
        st.text(text if raw else prompts.question_prompt(text))
    return {
        "model": by_name.get(str(host), str(host or "")),
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
    questions = lab_data.questions()
    place = st.session_state.get("example-number", 0) + 1
    st.session_state["example-number"] = place
    st.session_state["prompt"] = questions[place % len(questions)]["question"]
    if st.session_state.get("raw"):
        st.session_state["raw"] = False


def _answer(response: dict[str, Any], request: dict[str, Any]) -> None:
    model, document = response["model"], response["document"]
    st.text(
        f"{model['slug']}: {model['layers']} layers x {model['width']}, {model['dtype']} on "
        f"{model['device']}; {document['prompt_tokens']} tokens read, "
        f"{len(document['ids']) - document['prompt_tokens']} written"
    )
    for note in model["notes"]:
        st.text(note)
    st.text(lab_data.answer_line(document, request["question"]))


def _command(what: str, model: str, listing: Listing, options: Sequence[str] = ()) -> str:
    return line(what, "--model", model, *options, *workspace_option(listing))


def _saes(listing: Listing, model: dict[str, Any], name: str) -> Artifact | None:
    """Choose among the SAEs of the loaded model."""
    problems(listing.problems)
    runs = lab_data.saes(listing, [model["weights"], model["base"]])
    if not runs:
        problem(
            f"{listing.root} holds no SAEs of {model['name']}, so there are no features to look "
            "at. This command trains some:",
            _command("train-saes", name, listing),
        )
        return None
    if len(runs) == 1:
        return runs[0]
    return choose(st, "SAEs", "saes", runs, help="Of this model's weights")


def _whole(key: str, most: int | None = None) -> None:
    """Let a number in the session be one: another page may have a widget of this name."""
    text = str(st.session_state.get(key))
    if text.isdecimal() and (most is None or int(text) <= most):
        st.session_state[key] = int(text)
    else:
        st.session_state.pop(key, None)


def _features(
    listing: Listing, saes: Artifact, response: dict[str, Any], model: str
) -> dict[int, list[int]]:
    """Colour the text and name the strongest features at a token; returns what is coloured."""
    document, n_layers = response["document"], response["model"]["layers"]
    layers = sorted(row.layer for row in saes.results.layers)
    st.subheader("Features in this text", anchor=False)
    columns = st.columns([3, 1, 1], vertical_alignment="bottom")
    _whole("layer", n_layers - 1)
    _whole("feature")
    colour = columns[0].radio(
        "Colour by", (ONE, ALL, NONE), horizontal=True, **links.bound("colour")
    )
    middle = layers[len(layers) // 2]
    choice = columns[1].number_input(
        "Layer",
        0,
        n_layers - 1,
        None,
        step=1,
        placeholder=str(middle),
        help="Counted from 0",
        **links.bound("layer"),
    )
    layer = middle if choice is None else int(choice)
    number = columns[2].number_input(
        "Feature",
        0,
        None,
        None,
        step=1,
        placeholder="strongest",
        disabled=colour != ONE,
        **links.bound("feature"),
    )
    if layer not in layers:
        problem(
            f"There is no SAE at {describe_layer(layer, n_layers)}; these layers have one: "
            f"{', '.join(map(str, layers))} (0-based)."
        )
        return {}
    request = {"model": model, "saes": lab_data.place(listing, saes), "ids": document["ids"]}
    result = lab_data.follow("layer", {**request, "layer": layer})
    if result is None:
        return {}
    count, acts = len(document["ids"]), lab_data.acts(result)
    coloured: dict[int, list[int]] = {}
    values = np.zeros(count)
    if colour == ONE:
        feature, text = _one(acts, number, result["size"])
        if feature is not None:
            coloured = {layer: [feature]}
            values, active = lab_data.by_token(acts, feature, count)
            text += f"; active at {active} of {count} tokens, at most {values.max():.3g}"
        st.text(f"{describe_layer(layer, n_layers)}: {text}")
    elif colour == ALL:
        with part():
            coloured, values = _counted(listing, saes, request, values)
    place = _token(document)
    phases = document["phases"]
    st.caption(
        "Click a token to see the features of all layers there; arrow keys and Enter do too."
    )
    markup = tokens.coloured(document["tokens"], values.tolist(), phases=phases, peak=place)
    clickable(markup, "lab-text", lambda at: st.session_state.update(token=at))
    st.html(tokens.legend())
    # Of all encoders in float32.
    size = 4 * len(layers) * saes.settings.sae.latents * response["model"]["width"]
    if "token" in st.query_params or size <= LIGHT_BYTES:
        lab_token.show(listing, saes, model, document, place, off=_switch_off)
    rows = {
        "position": list(range(count)),
        "token": document["tokens"],
        "phase": document["phases"],
        "activation": values,
    }
    table(pd.DataFrame(rows), "lab_tokens", "Table of tokens")
    return coloured


def _one(acts: pd.DataFrame, number: int | None, size: int) -> tuple[int | None, str]:
    """The feature to colour by, and what is said of it."""
    if number is not None:
        if int(number) < size:
            return int(number), f"feature {int(number)}"
        return None, f"no feature {int(number)}; this SAE has features 0 to {size - 1}"
    if acts.empty:
        return None, "no feature is active in this text"
    strongest = int(acts["feature"].iloc[acts["value"].argmax()])
    return strongest, f"feature {strongest}, which has the largest activation in this text"


def _counted(
    listing: Listing, saes: Artifact, request: dict[str, Any], none: np.ndarray
) -> tuple[dict[int, list[int]], np.ndarray]:
    """The counted features of a rule, and the sum of their activations, `none` without any."""
    run = lab_data.counts_of(listing, saes)
    if run is None:
        base = model_of(saes, models(listing))
        options = sae_options(saes)
        problem(
            "The features of these SAEs were not counted yet. This command does it:",
            # An adapter's SAEs are its base's: they are counted there.
            _command("count-features", base.name if base else request["model"], listing, options),
        )
        return {}, none
    rule = st.segmented_control(
        "Counted by rule",
        RULES[::-1],
        default=RULES[-1],
        required=True,
        help="either: active at a think tag and at no other token of the system prompt; any: at "
        "one or more of each tag; all: at every one",
        **links.bound("lab-rule"),
    )
    targets = data.read(run, "features.json", Features).by_layer(str(rule))
    number = sum(map(len, targets.values()))
    if not number:
        st.text(f"Rule {rule} counts no feature in these SAEs.")
        return {}, none
    listed = "; ".join(f"layer {at}: {', '.join(map(str, targets[at]))}" for at in sorted(targets))
    st.text(f"Sum of the activations of {number} features in {len(targets)} layers (0-based).")
    with st.expander("Which they are"):
        st.text(listed)
    by_layer = {str(layer): features for layer, features in targets.items()}
    summed = lab_data.follow("sum", {**request, "targets": by_layer})
    return targets, none if summed is None else np.array(summed["values"], dtype=float)


def _token(document: dict[str, Any]) -> int:
    last = len(document["ids"]) - 1
    _whole("token", last)
    start = min(document["prompt_tokens"], last)
    if last < 1:
        return 0
    chosen = {} if "token" in st.session_state else {"value": start}
    return st.slider(
        "Token to look at", 0, last, **chosen, help="Framed below", **links.bound("token")
    )


def _switch_off(layer: int, feature: int) -> None:
    st.button(
        "Switch off",
        key=f"off-{layer}-{feature}",
        type="tertiary",
        icon=":material/toggle_off:",
        help="The same prompt without it, beside the text above",
        on_click=lab_changes.switch_off,
        args=(layer, feature),
        disabled=lab_data.busy(),
    )
