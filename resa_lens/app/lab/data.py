"""What the prompt lab reads and asks: models and SAEs at hand, counted features, requests."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import streamlit as st
from numpy.typing import NDArray

from resa_lens.app.lab import jobs
from resa_lens.app.widgets import problem
from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.kinds.adapter import Adapter
from resa_lens.artifacts.kinds.counts import Counts
from resa_lens.artifacts.kinds.model import MergedModel
from resa_lens.artifacts.kinds.saes import Saes
from resa_lens.artifacts.listing import Listing
from resa_lens.evals.tasks import load_tasks

BUNDLED = ("tiny-reasoner", "tiny-reasoner-rl")


def models(listing: Listing) -> dict[str, str]:
    """Return the models at hand, by the name that is shown: what the worker is to load."""
    names = {name: name for name in BUNDLED}
    for artifact in listing.artifacts:
        if artifact.kind in (Adapter, MergedModel):
            names[artifact.relative] = str(artifact.path)
        elif artifact.kind in (Saes, Counts):
            name = artifact.results.model
            # Models that a run made for itself, as falsification's random ones, are gone with it.
            if "/" in name or _is_here(name):
                names[name] = name
    return names


def _is_here(name: str) -> bool:
    try:
        return Path(name).exists()
    except OSError:  # no name that a file can have
        return False


def saes(listing: Listing, weights: Sequence[str | None]) -> list[Artifact]:
    """Return the SAEs that were trained on some weights: counted ones first, then the newest."""
    runs = [artifact for artifact in listing.of(Saes) if artifact.weights in weights]
    return sorted(runs, key=lambda run: counts_of(listing, run) is None)


def place(listing: Listing, run: Artifact) -> dict[str, str]:
    """Return where SAEs lie, as the worker takes them."""
    return {"root": str(listing.root), "folder": str(run.path)}


def counts_of(listing: Listing, run: Artifact) -> Artifact | None:
    """Return the newest counts of some SAEs, or None."""
    counts = listing.made_of(run, Counts)
    return next((artifact for artifact in counts if not artifact.results.control), None)


@st.cache_data(show_spinner=False)
def questions() -> list[dict[str, Any]]:
    """Return the bundled test questions as evaluation asks them, in an order without order.

    Raises:
        BadInputError: this installation lacks them.
    """
    rows = [asdict(item) for item in load_tasks("tiny")]
    random.Random(0).shuffle(rows)
    return rows


def question(text: str) -> dict[str, Any] | None:
    """Return the bundled question of this text, where it is one."""
    return next((row for row in questions() if row["question"] == text.strip()), None)


def acts(result: dict[str, Any]) -> pd.DataFrame:
    """Return a layer's active features, as the worker gives them, a row for each token's."""
    starts = np.array(result["starts"])
    return pd.DataFrame(
        {
            "token": np.repeat(np.arange(starts.size - 1), np.diff(starts)),
            "feature": np.array(result["features"], dtype=int),
            "value": np.array(result["values"], dtype=float),
        }
    )


def by_token(rows: pd.DataFrame, feature: int, count: int) -> tuple[NDArray[np.float64], int]:
    """Return a feature's activation at each of so many tokens, and at how many it is active."""
    own, values = rows[rows["feature"] == feature], np.zeros(count)
    values[own["token"]] = own["value"]
    return values, len(own)


def answer_line(document: dict[str, Any], question: dict[str, Any] | None) -> str:
    """Return the parsed answer in a line, and whether it is right where that is known."""
    answer = "no answer found" if document["answer"] is None else f"Answer: {document['answer']}"
    if question is not None:
        right = "right" if document["correct"] else f"wrong, it is {question['answer']}"
        answer += f" ({right})"
    return answer if document["finished"] else f"{answer}; cut at the longest length"


# Requests to the worker: of each kind the last one, as its job


def _jobs() -> dict[str, jobs.Job]:
    return st.session_state.setdefault("lab-requests", {})


def send(do: str, request: dict[str, Any], slot: str = "") -> None:
    """Ask the worker anew, in place of what was asked of it before for a slot; `do` by default."""
    slot = slot or do
    forget(slot)
    _jobs()[slot] = jobs.worker().ask(do, **request)
    _jobs()[slot].wait(jobs.SOON_S)


def sent(slot: str) -> jobs.Job | None:
    """Return the last request."""
    return _jobs().get(slot)


def forget(slot: str) -> None:
    """Drop what was asked; the worker need not begin it."""
    job = _jobs().pop(slot, None)
    if job is not None and not job.done:
        jobs.worker().drop(job)


def follow(do: str, request: dict[str, Any], slot: str = "") -> dict[str, Any] | None:
    """Ask the worker for what the view needs, once for each request; see `outcome`."""
    slot = slot or do
    job = sent(slot)
    if job is None or job.request != request:
        send(do, request, slot)
    return outcome(slot, again=lambda: forget(slot))


def outcome(slot: str, again: Callable[[], None] | None = None) -> dict[str, Any] | None:
    """Return the result of a request; until it is there, or where there is none, that is drawn.

    Args:
        slot: of the request.
        again: what a button "Try again" does before the page is drawn anew; none by default.
    """
    job = sent(slot)
    if job is None:
        return None
    if not job.done:
        jobs.show_progress(job, slot)
        return None
    if job.result is not None:
        return job.result
    if job.stopped:
        st.text("Stopped.")
    else:
        problem(job.error or "the work gave no result; try again")
    if again is not None:
        st.button("Try again", key=f"again-{slot}", on_click=again)
    return None


def busy() -> bool:
    """Return whether the worker is at something."""
    return any(not job.done for job in _jobs().values())
