"""An answer token by token: the features of all layers at the one that is clicked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import streamlit as st

from resa_lens.app import links
from resa_lens.app.lab import data as lab_data
from resa_lens.app.lab import token as lab_token
from resa_lens.app.tokens import clickable
from resa_lens.app.widgets import problem
from resa_lens.artifacts.listing import Listing
from resa_lens.figures import tokens
from resa_lens.stages.scored_runs import Run
from resa_lens.texts import prompts

_OPEN, _PLACE = "answer-open", "answer-place"


def show(
    listing: Listing,
    runs: Mapping[str, Run],
    answers: Sequence[Mapping[str, Any] | None],
    question: str,
) -> None:
    """Draw the ways from a question into its answers' tokens, and the answer that was opened.

    Args:
        listing: the workspace.
        runs: evaluations, by the letter that is shown.
        answers: of each run: keys `question`, `prompt` and `generation`; None without texts.
        question: its id.
    """
    first = next(answer for answer in answers if answer)
    prompt, raw = str(first["question"]), False
    if first["prompt"] != prompts.question_prompt(prompt):
        prompt, raw = str(first["prompt"]), True
    with st.container(horizontal=True, vertical_alignment="center"):
        links.to_lab("Try it in the prompt lab", prompt, raw=raw)
        for letter, run, answer in zip(runs, runs.values(), answers, strict=True):
            if answer:
                st.button(
                    f"Features at the tokens of {letter}"
                    if len(runs) > 1
                    else "Features at tokens",
                    icon=":material/ads_click:",
                    key=f"read-{question}-{letter}",
                    type="tertiary",
                    on_click=_open,
                    args=((question, run.name),),
                )
    for run, answer in zip(runs.values(), answers, strict=True):
        if answer and st.session_state.get(_OPEN) == (question, run.name):
            with st.container(border=True):
                _tokens(listing, run, answer, prompt, raw)


def _open(place: tuple[str, str]) -> None:
    same = st.session_state.get(_OPEN) == place
    st.session_state[_OPEN] = None if same else place
    st.session_state.pop(_PLACE, None)


def _tokens(listing: Listing, run: Run, answer: Mapping[str, Any], prompt: str, raw: bool) -> None:
    name = run.artifact.results.model
    here = listing.at(name)
    model = str(here.path) if here else name
    request = {"prompt": str(answer["prompt"]), "written": str(answer["generation"])}
    result = lab_data.follow("read", {"model": model, **request}, "answer")
    if result is None:
        return
    facts, document = result["model"], result["document"]
    if run.weights not in (facts["weights"], facts["base"]):
        problem(
            f"{model} has other weights today than those that gave this answer, so its features "
            "are not looked for."
        )
        return
    place = st.session_state.get(_PLACE)
    markup = tokens.coloured(document["tokens"], phases=document["phases"], peak=place)
    clickable(markup, "answer-text", lambda at: st.session_state.update({_PLACE: at}), "Answer")
    st.html(tokens.legend())
    sets = lab_data.saes(listing, [facts["weights"], facts["base"]])
    if not sets:
        st.text("This workspace holds no SAEs of the model, so there are no features to look at.")
    elif place is None:
        st.caption("Click a token to see the features of all layers there.")
    else:
        off = lab_token.linked(model, prompt, raw=raw)
        lab_token.show(listing, sets[0], model, document, place, off=off, slot="answer-token")
