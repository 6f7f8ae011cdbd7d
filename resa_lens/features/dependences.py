"""What a counted feature depends on, and the one word that this comes to.

A dependence is asked by taking one thing away: in which share of such trials does the feature still
fire?  Where Wilson's 95 % interval of the share lies above `fires` it does without (needs: no);
where it lies below SILENT of that, it is silent (needs: yes); in between it is undetermined.

    dependence      trials      what is taken away
    tag             plain       the tag, in plain text: the same places before it comes
    tag in prompts  untagged    the tag, in prompts that ask for reasoning: a word in its place
    prompt          injected    the prompt around the tag: the tag in plain text
    words           words       the prompt's words: others in their places
    order           shuffled    the order of the prompt's words
    wording         paraphrase  this prompt's wording
    spelling        neutral     the tag's spelling: other delimiters, in prompts about reasoning
    reasoning       format      that too: other delimiters where nothing speaks of reasoning
    phase           thought     the border of a thought: places within it
    seed            all         the seed of the SAE: another one's nearest feature (counterparts.py)

`words.WORDS` is the table of words, `word_of` the rule that chooses one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resa_lens import stats
from resa_lens.features.counterparts import Counterpart
from resa_lens.features.words import (
    ARTEFACT,
    CONCEPT,
    DELIMITER,
    DETECTOR,
    NEEDS,
    NO,
    SEED,
    SILENT,
    STANDS,
    SURVIVES,
    UNDETERMINED,
    VOCABULARY,
    WORDS,
    YES,
)
from resa_lens.stats import Interval

OTHER_SEED = "other seed"
TRIALS = {
    "tag": "plain",
    "tag in prompts": "untagged",
    "prompt": "injected",
    "words": "words",
    "order": "shuffled",
    "wording": "paraphrase",
    "spelling": "neutral",
    "reasoning": "format",
    "phase": "thought",
}
"""The kind of trial that asks each dependence; the seed is asked of all."""
TESTS = {
    "injection": "injected",
    "shuffle": "shuffled",
    "plain": "plain",
    "untagged": "untagged",
    "words": "words",
    "neutral": "neutral",
    "format": "format",
    "paraphrase": "paraphrase",
}
"""Tests on texts by the kind of trial: a feature falls where it surely fires, at the paraphrases
where it is surely silent, and then at an SAE of another seed that surely has none like it."""


@dataclass(frozen=True)
class Share:
    """In how many trials of one kind a feature fired."""

    fired: int
    n: int
    share: float
    ci: Interval
    """Wilson's 95 % interval."""

    @classmethod
    def of(cls, fired: NDArray[np.bool_]) -> Share:
        """Count the trials [n]."""
        count = int(fired.sum())
        return cls(count, fired.size, count / fired.size, stats.wilson_interval(count, fired.size))

    def needs(self, fires: float) -> str:
        """Return whether what these trials lack is needed: yes, no or undetermined.

        Args:
            fires: the share from which a feature counts as firing.
        """
        if self.ci[0] > fires:
            return NO
        return YES if self.ci[1] < SILENT * fires else UNDETERMINED

    def __str__(self) -> str:
        """Write `fired of n`."""
        return f"{self.fired} of {self.n}"


Dependences = dict[str, dict[str, Any]]


def dependences(
    shares: Mapping[str, Share],
    by_place: Mapping[str, Share],
    twin: Counterpart | None,
    fires: float,
) -> Dependences:
    """Return what a feature needs: {dependence: {needs, trials, share, n, ci}}.

    Args:
        shares: by kind of trial; documents are missing where the prompt leaves no room.
        by_place: share of documents in which it fires at the opening and at the closing tag.
        twin: the nearest feature of another seed; None leaves the dependence out.
        fires: the share from which a feature counts as firing.
    """
    known: Dependences = {}
    for name, kind in TRIALS.items():
        if kind in shares:
            share = shares[kind]
            known[name] = {
                "needs": share.needs(fires),
                "trials": kind,
                "share": share.share,
                "n": share.n,
                "ci": share.ci,
            }
    # At least: a part of the plain text's share was there before the tag.
    injected, plain = shares["injected"], shares["plain"]
    if known["prompt"]["needs"] == NO and injected.ci[0] <= plain.ci[1]:
        known["prompt"]["needs"] = UNDETERMINED
    if "phase" in known:
        for place, share in by_place.items():
            known["phase"][place] = {"share": share.share, "n": share.n, "ci": share.ci}
    if twin is not None:
        share = twin.agreement
        known["seed"] = {
            "needs": twin.needs,
            "trials": "all",
            "share": None if share is None else share[0] / share[1],
            "n": None if share is None else share[1],
            "ci": None if share is None else stats.wilson_interval(*share),
            "correlation": twin.correlation,
            "correlation_ci": twin.correlation_ci,
        }
    return known


def failed_tests(depends_on: Dependences) -> tuple[str, ...]:
    """Return every test at which a feature surely falls, in the order of `TESTS`."""
    needs = {item["trials"]: item["needs"] for item in depends_on.values()}
    falls = [
        test for test, kind in TESTS.items() if needs[kind] == (YES if kind == "paraphrase" else NO)
    ]
    if needs.get("all") == YES:
        falls.append(OTHER_SEED)
    return tuple(falls)


def word_of(depends_on: Dependences, *, seed: bool = True) -> str:
    """Return the word of `WORDS` that the dependences come to.

    The first row that holds is the word; every row needs its answers to be sure.

        tag or tag in prompts: no                                      prompt artefact
        reasoning: no                                                  delimiter detector
        spelling: no, and all of the above surely otherwise            reasoning delimiter
        prompt: no                                                     token detector
        wording: yes                                                   prompt artefact
        prompt: yes, words: no                                         prompt artefact
        all of the above surely otherwise, order: no                   prompt vocabulary x tag
        and order: yes                                                 survives
        anything else                                                  undetermined

    Of what would stand (reasoning delimiter, survives) the seed decides last.

    Args:
        depends_on: of `dependences`.
        seed: whether the dependence on the SAE's seed takes part.
    """
    needs = {name: item["needs"] for name, item in depends_on.items()}
    word = _word_by_texts(needs)
    if seed and WORDS[word].group == STANDS and needs.get("seed", NO) != NO:
        return SEED if needs["seed"] == YES else UNDETERMINED
    return word


def _word_by_texts(needs: Mapping[str, str]) -> str:
    if NO in (needs["tag"], needs["tag in prompts"]):
        return ARTEFACT
    if needs["reasoning"] == NO:
        return DELIMITER
    tagged = needs["tag"] == needs["tag in prompts"] == needs["reasoning"] == YES
    if tagged and needs["spelling"] == NO and needs["wording"] == NO:
        return CONCEPT
    if needs["prompt"] == NO:
        return DETECTOR
    if needs["wording"] == YES or (needs["prompt"] == YES and needs["words"] == NO):
        return ARTEFACT
    sure = tagged and needs["spelling"] == needs["prompt"] == needs["words"] == YES
    if not sure or needs["wording"] == UNDETERMINED or needs["order"] == UNDETERMINED:
        return UNDETERMINED
    return VOCABULARY if needs["order"] == NO else SURVIVES


def sentence(depends_on: Dependences) -> str:
    """Say what a feature needs and what it does without, without a full stop."""
    needs = {name: item["needs"] for name, item in depends_on.items()}
    parts = []
    if NO in (needs["tag"], needs["tag in prompts"]):
        where = [
            place
            for name, place in (("tag", "plain text"), ("tag in prompts", "prompts"))
            if needs[name] == NO
        ]
        return f"needs no tag: it fires without one, in {' and in '.join(where)}"
    if needs["prompt"] == NO:
        parts.append("needs the tag's token; any text will do")
    else:
        surely = [NEEDS[n] for n in ("prompt", "words", "order", "wording") if needs[n] == YES]
        parts.append(f"needs {_listed(['the tag', *surely])}")
        if needs["words"] == NO:
            parts.append("other words in their places will do")
        if needs["order"] == NO:
            parts.append("their order does not matter")
        if needs["wording"] == NO:
            parts.append("other prompts that ask for reasoning will do")
    if needs["reasoning"] == NO:
        parts.append("any other delimiter will do")
    elif needs["spelling"] == NO:
        parts.append("other delimiters will do where the prompt speaks of reasoning")
    elif needs["spelling"] == YES:
        parts.append("no other delimiter will do")
    if needs.get("phase") == NO:
        parts.append("it fires within thoughts too")
    if needs.get("seed") == YES:
        parts.append("needs this SAE: another seed's has none like it")
    unsure = dict.fromkeys(NEEDS[n] for n in needs if needs[n] == UNDETERMINED)
    if unsure:
        parts.append(f"undetermined: {_listed(list(unsure))}")
    return "; ".join(parts)


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def reason_of(word: str, depends_on: Dependences, shares: Mapping[str, Share]) -> str:
    """Return the sentence of a verdict with the shares that decide it."""
    deciding = {
        DETECTOR: ("injected", "plain"),
        VOCABULARY: ("shuffled", "injected", "paraphrase"),
        DELIMITER: ("format", "neutral"),
        CONCEPT: ("neutral", "format", "paraphrase"),
        ARTEFACT: ("paraphrase", "plain", "untagged", "words"),
    }.get(word, ("paraphrase", "injected", "shuffled", "neutral"))
    numbers = ", ".join(f"{kind} {shares[kind]}" for kind in deciding)
    return f"{sentence(depends_on)} ({numbers})"
