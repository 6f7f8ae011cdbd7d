"""The verdicts on counted features: which word says what, and what it does to the claim.

A word of class "refuted" says that a feature is not what it was counted for.  "described" says what
it answers to and refutes nothing: a feature that marks where reasoning begins answers to the tag in
any text, as a detector of the token does, and no text distinguishes the two; an intervention might
(`resa-lens ablate`).  A word "stands" where nothing refutes the feature and it needs more than the
tag.  "undetermined" says that the trials were too few, or the feature too unreliable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

YES, NO, UNDETERMINED = "yes", "no", "undetermined"
"""Whether a feature needs something."""
SILENT = 0.6
"""Of `FalsifyConfig.fires`: a feature whose interval ends below is silent in such trials.  As
`fires`, set on draws 0 to 9 of benchmarks/falsification_battery.py."""

DETECTOR, ARTEFACT, SURVIVES = "token detector", "prompt artefact", "survives"
VOCABULARY, CONCEPT = "prompt vocabulary x tag", "reasoning delimiter"
DELIMITER, SEED = "delimiter detector", "seed artefact"


class Word(NamedTuple):
    """A verdict: the class that it belongs to, and what it says."""

    group: str
    """stands, described, refuted or undetermined."""
    meaning: str


STANDS, DESCRIBED, REFUTED = "stands", "described", "refuted"
WORDS: dict[str, Word] = {
    ARTEFACT: Word(
        REFUTED,
        "it fires without any tag, needs this prompt's wording, or its places with whatever words",
    ),
    DELIMITER: Word(REFUTED, "any delimiter will do, also where nothing speaks of reasoning"),
    SEED: Word(REFUTED, "no text refutes it, but an SAE of another seed has none like it"),
    DETECTOR: Word(DESCRIBED, "the tag's token suffices, in any text"),
    VOCABULARY: Word(
        DESCRIBED, "it needs the tag among words that speak of reasoning, in whatever order"
    ),
    UNDETERMINED: Word(UNDETERMINED, "an interval that the word depends on crosses its bounds"),
    CONCEPT: Word(
        STANDS, "other delimiters will do too, but only where the prompt speaks of reasoning"
    ),
    SURVIVES: Word(
        STANDS, "it needs this tag in a prompt that asks for reasoning, in whatever wording"
    ),
}
"""Every word that a verdict may be, from what says least for a feature to what says most."""
VERDICTS = tuple(WORDS)

NEEDS = {
    "tag": "a tag",
    "tag in prompts": "a tag",
    "prompt": "a prompt around the tag",
    "words": "words that speak of reasoning",
    "order": "their order",
    "wording": "this prompt's wording",
    "spelling": "the tag's own spelling",
    "reasoning": "a prompt that speaks of reasoning",
    "phase": "the border of a thought",
    "seed": "the SAE's seed",
}
"""What a feature may depend on, as a sentence names it."""


def occurring(tallies: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the words that a counted feature has, by the tallies of the rules; in their order."""
    return [name for name in VERDICTS if any(tally["verdicts"].get(name) for tally in tallies)]
