"""Coloured tokens that can be clicked, or walked through and chosen by keyboard."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import streamlit as st
from streamlit.components import v2

_CSS = """
.root { font-family: var(--st-font); color: var(--st-text-color) }
.tokens > span { cursor: pointer }
.tokens > span:hover, .tokens > span:focus { outline: 2px dashed currentColor; outline-offset: 1px }
"""
# Its markup comes from `figures.tokens`, where every token is escaped.
_JS = """
export default function ({ data, parentElement, setTriggerValue }) {
  const root = parentElement.querySelector(".root")
  if (root.markup !== data.markup) {
    root.markup = data.markup
    root.innerHTML = data.markup
  }
  root.setAttribute("role", "group")
  root.setAttribute("aria-label", data.label)
  const tokens = [...root.querySelectorAll(".tokens > span")]
  const reach = (at, focus) => {
    const here = Math.max(0, Math.min(tokens.length - 1, at))
    tokens.forEach((token, place) => { token.tabIndex = place === here ? 0 : -1 })
    if (focus) tokens[here].focus()
  }
  tokens.forEach((token) => token.setAttribute("role", "button"))
  if (tokens.length) reach(tokens.findIndex((token) => token.className === "peak"), false)
  const place = (event) => tokens.indexOf(event.target.closest(".tokens > span"))
  root.onclick = (event) => {
    if (place(event) >= 0) setTriggerValue("picked", place(event))
  }
  root.onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[event.key]
    if (step !== undefined) reach(place(event) + step, true)
    else if (event.key === "Enter" || event.key === " ") root.onclick(event)
    else return
    event.preventDefault()
  }
}
"""


@cache
def _component() -> Any:
    return v2.component("resa_lens_tokens", html='<div class="root"></div>', css=_CSS, js=_JS)


_FOCUS = """
export default function () {
  // Not where it would open a keyboard over the page.
  if (!matchMedia("(pointer: fine)").matches) return
  const until = performance.now() + 2000
  const look = () => {
    const box = document.querySelector("[data-testid='stTextArea'] textarea")
    if (box) box.select()
    else if (performance.now() < until) requestAnimationFrame(look)
  }
  look()
}
"""


@cache
def _cursor() -> Any:
    return v2.component("resa_lens_cursor", js=_FOCUS)


def cursor_in_prompt() -> None:
    """Put the cursor into the page's text area, its text marked: what is typed replaces it."""
    _cursor()(key="cursor-in-prompt")


def clickable(markup: str, key: str, picked: Callable[[int], None], label: str = "Tokens") -> None:
    """Draw tokens; a click on one, or Enter where the arrow keys led, runs the page again.

    Args:
        markup: one or several blocks of `figures.tokens.coloured`, and what stands around them.
        key: of the widget.
        picked: called before the page runs again with the number of the token, counted from 0
            through all blocks.
        label: what a screen reader says of all of it.
    """

    def take() -> None:
        number = getattr(st.session_state.get(key), "picked", None)
        if isinstance(number, int):
            picked(number)

    _component()(data={"markup": markup, "label": label}, key=key, on_picked_change=take)
