"""What the prompt lab reads and asks: models and SAEs at hand, counted features, requests."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import streamlit as st
from pydantic import BaseModel, Field

from resa_lens.app import data, jobs
from resa_lens.app.listing import Artifact, Listing
from resa_lens.app.widgets import problem
from resa_lens.errors import BadInputError
from resa_lens.resources import data_path
from resa_lens.tables import read_rows

BUNDLED = ("tiny-reasoner", "tiny-reasoner-rl")
QUESTIONS, LEVELS = "tiny/test.jsonl", (1, 2, 3)
RULES = ("either", "any", "all")


class StoredLayer(BaseModel):
    """A layer of an SAE run."""

    layer: int


class StoredSaes(BaseModel):
    """Results of an SAE run's manifest, as far as the lab needs them."""

    layers: list[StoredLayer] = Field(min_length=1)
    site: str


class CountedLayer(BaseModel):
    """The features of one layer that each rule counts."""

    layer: int
    features: dict[str, list[int]]


class StoredCounts(BaseModel):
    """features.json of a counts run."""

    layers: list[CountedLayer]

    def of(self, rule: str) -> dict[int, list[int]]:
        """{0-based layer: features}, without layers that have none."""
        held = {row.layer: row.features.get(rule, []) for row in self.layers}
        return {layer: features for layer, features in held.items() if features}


@dataclass(frozen=True)
class Saes:
    """SAEs of the workspace that fit the loaded model."""

    artifact: Artifact
    root: Path
    layers: tuple[int, ...]
    site: str

    def request(self) -> dict[str, str]:
        """As the worker takes them."""
        return {"root": str(self.root), "folder": str(self.artifact.path)}


def models(listing: Listing) -> dict[str, str]:
    """The models at hand, by the name that is shown: what the worker is to load."""
    found = {name: name for name in BUNDLED}
    for artifact in listing.artifacts:
        name = artifact.manifest.results.get("model")
        if artifact.manifest.kind in ("adapter", "model"):
            found[artifact.relative] = str(artifact.path)
        elif artifact.manifest.kind not in ("saes", "counts") or not isinstance(name, str):
            continue
        # Models that a run made for itself, as falsification's random ones, are gone with it.
        elif "/" in name or _is_here(name):
            found[name] = name
    return found


def _is_here(name: str) -> bool:
    try:
        return Path(name).exists()
    except OSError:  # no name that a file can have
        return False


def saes(listing: Listing, weights: Sequence[str | None]) -> tuple[list[Saes], list[str]]:
    """The SAEs that were trained on some weights, the newest first, and problems with others."""
    found, problems = [], []
    for artifact in listing.of("saes"):
        if artifact.weights not in weights:
            continue
        try:
            held = data.checked(StoredSaes, artifact.manifest.results, artifact.path)
        except BadInputError as error:
            problems.append(str(error))
            continue
        layers = tuple(sorted(row.layer for row in held.layers))
        found.append(Saes(artifact, listing.root, layers, held.site))
    # Those that were counted come first: more is known of them.
    found.sort(key=lambda each: _counts_of(listing, each) is None)
    return found, problems


def _counts_of(listing: Listing, chosen: Saes) -> Artifact | None:
    for artifact in listing.of("counts"):
        config = artifact.manifest.config
        if config.get("saes") == chosen.artifact.relative and not config.get("control"):
            return artifact
    return None


def counted(listing: Listing, chosen: Saes) -> StoredCounts | None:
    """The newest counts of some SAEs, or None.

    Raises:
        BadInputError: they are damaged.
    """
    found = _counts_of(listing, chosen)
    return None if found is None else data.read(StoredCounts, found.path / "features.json")


def activity_of(listing: Listing, chosen: Saes) -> str | None:
    """The activity run of some SAEs, by which a feature's page is found."""
    relative = chosen.artifact.relative
    runs = listing.of("activity")
    return next((a.relative for a in runs if a.manifest.config.get("saes") == relative), None)


@st.cache_data(show_spinner=False)
def questions() -> list[dict[str, Any]]:
    """The bundled test questions of the levels the model was made for, in an order without order.

    Each as evaluation names it: id, question, answer, family and level.

    Raises:
        BadInputError: this installation lacks them.
    """
    file = data_path(QUESTIONS)
    rows = [
        {"id": f"{file.stem}-{index}", **{k: row[k] for k in ("question", "answer")},
         "family": row["family"], "level": row["level"]}
        for index, row in enumerate(read_rows(file))
        if row["level"] in LEVELS
    ]  # fmt: skip
    random.Random(0).shuffle(rows)
    return rows


def question(text: str) -> dict[str, Any] | None:
    """The bundled question of this text, where it is one."""
    return next((row for row in questions() if row["question"] == text.strip()), None)


def said(document: dict[str, Any], question: dict[str, Any] | None) -> str:
    """Return the parsed answer in a line, and whether it is right where that is known."""
    answer = "no answer found" if document["answer"] is None else f"Answer: {document['answer']}"
    if question is not None:
        right = "right" if document["correct"] else f"wrong, it is {question['answer']}"
        answer += f" ({right})"
    return answer if document["finished"] else f"{answer}; cut at the longest length"


# Requests to the worker


@dataclass
class Asked:
    """A request, and the work on it."""

    request: dict[str, Any]
    job: jobs.Job


def _slots() -> dict[str, Asked]:
    return st.session_state.setdefault("lab-requests", {})


def send(slot: str, do: str, request: dict[str, Any]) -> None:
    """Ask the worker anew, in place of what was asked from this slot before."""
    forget(slot)
    _slots()[slot] = Asked(request, jobs.worker().ask(do, **request))
    _slots()[slot].job.wait(jobs.SOON_S)


def sent(slot: str) -> Asked | None:
    """What was asked last."""
    return _slots().get(slot)


def forget(slot: str) -> None:
    """Drop what was asked; the worker need not begin it."""
    held = _slots().pop(slot, None)
    if held is not None and not held.job.done:
        jobs.worker().drop(held.job)


def follow(slot: str, do: str, request: dict[str, Any]) -> dict[str, Any] | None:
    """Ask the worker for what the view needs, once for each request; see `outcome`."""
    held = sent(slot)
    if held is None or held.request != request:
        send(slot, do, request)
    return outcome(slot, again=lambda: forget(slot))


def outcome(slot: str, again: Callable[[], None] | None = None) -> dict[str, Any] | None:
    """The result of what was asked; until it is there, or where there is none, that is drawn.

    Args:
        slot: where it was sent from.
        again: what a button "Try again" does before the page is drawn anew; none by default.
    """
    held = sent(slot)
    if held is None:
        return None
    job = held.job
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
    """Whether the worker is at something."""
    return any(not held.job.done for held in _slots().values())
