"""What is measured, ranked and changed of experts: the configurations alone."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from resa_lens.config import Config, data_source, setting
from resa_lens.errors import BadInputError
from resa_lens.evals.config import EvalConfig
from resa_lens.texts.prompts import PHASES, TAGS

How = Literal["reroute", "zero", "zero-renorm", "on", "scale"]
HOWS: tuple[str, ...] = get_args(How)
By = Literal["npmi", "rd", "rd-matched", "ftri"]
Unit = Literal["mean", "sum"]
Where = Literal["all", "think", "prompt", "answer"]
CLASS_NAMES = ("families", "steps", "right")
"""Classes of documents by name: question families, with steps or at once, right or wrong."""
LEAST_DOCUMENTS = 20
"""Documents that a class, or a target, needs at least."""
LEAST_TYPES = 20
"""Ordinary token types that a tag is compared with, at least."""
LEAST_RANDOM = 19
"""Random sets without which no p-value reaches 0.05."""
MISMATCH = 0.2
"""Largest difference of the use of a random set, relative to that of the chosen experts."""


def parse_experts(text: str) -> dict[int, tuple[int, ...]]:
    """Return experts by 0-based layer from "5:9,2:3".

    Raises:
        BadInputError: another form, or one that stands twice.
    """
    chosen: dict[int, list[int]] = {}
    for word in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5}):(\d{1,5})\s*", word)
        if match is None:
            raise BadInputError(f'expert {word.strip()!a:.40} is none; write layer:expert, "5:9"')
        layer, expert = int(match[1]), int(match[2])
        if expert in chosen.setdefault(layer, []):
            raise BadInputError(f"expert {layer}:{expert} stands twice; name each once")
        chosen[layer].append(expert)
    return {layer: tuple(experts) for layer, experts in chosen.items()}


def check_experts(text: str) -> None:
    """Raise BadInputError where a text names no experts."""
    parse_experts(text)


def class_files(text: str) -> tuple[str, str] | None:
    """Return the two files whose documents are the classes; None for classes by name."""
    if text in CLASS_NAMES:
        return None
    first, comma, second = text.partition(",")
    return (first.strip(), second.strip()) if comma else None


def check_classes(text: str) -> None:
    """Raise BadInputError where classes are neither known by name nor two files that are there."""
    if text in CLASS_NAMES:
        return
    pair = class_files(text)
    known = ", ".join(CLASS_NAMES)
    if pair is None or not all(pair) or "," in pair[1]:
        raise BadInputError(f"classes {text!a:.60} are unknown; use {known}, or FILE,FILE")
    for file in pair:
        if len(file) > 4096 or not Path(file).exists():
            raise BadInputError(f"classes {text!a:.60}: {file!a:.60} is no file; use {known}")


@dataclass(frozen=True)
class UseConfig(Config):
    """On which tokens the use of experts is counted."""

    tokens: int = setting(16_384, "Tokens of the documents that are looked at.", "--text-tokens",
                          min=1)  # fmt: skip
    unit: Unit = setting(
        "mean", "A document's map of use: the mean over its tokens, or their sum, which grows with "
        "its length.",
    )  # fmt: skip
    generations: int = setting(
        0, "Look at the model's own answers to so many questions.", min=0, max=10**7
    )
    max_new_tokens: int = setting(160, "Longest answer, in tokens.", min=1, max=2**20)


@dataclass(frozen=True)
class RankConfig(Config):
    """What experts are ranked for, by what, and beside which nulls."""

    by: By | None = setting(
        None,
        "npmi (expert and target), rd (risk difference), rd-matched (of equal tokens alone), ftri "
        "(of mean maps); npmi for a tag, rd for a phase, ftri for a class by default.",
    )
    target: str | None = setting(
        None, "What experts are ranked for: a tag or token, prompt, think or answer, or a class of "
        "--classes; <think>, or the first class, by default.",
    )  # fmt: skip
    classes: str | None = data_source(
        None, "Contrast of documents: families, steps (with steps or at once), right (own answers "
        "right or wrong), or two files by a comma.", check=check_classes,
    )  # fmt: skip
    types: int = setting(
        25, "Ordinary token types of like frequency that stand in a tag's place.", min=LEAST_TYPES,
        max=10_000,
    )  # fmt: skip
    draws: int = setting(9999, "Draws of the null of exchanged labels.", min=99, max=10**6)
    top: int = setting(10, "Experts that are named.", min=1, max=10**6)
    use: UseConfig = field(default_factory=UseConfig)
    seed: int = setting(0, "Seed of everything that is drawn.", min=0, max=2**32 - 1)

    @property
    def measure(self) -> By:
        """What ranks: `by`, or what suits the target."""
        if self.by:
            return self.by
        if self.target in PHASES:
            return "rd"
        tag = not self.classes if self.target is None else self.target in TAGS
        return "ftri" if self.classes and not tag else "npmi"


@dataclass(frozen=True)
class SteerConfig(Config):
    """Which experts are changed, how and where, and what they are compared with."""

    experts: str | None = setting(
        None, 'Experts that are changed, "5:9,2:3" (layer:expert); by default the --top of the '
        "ranking.", check=check_experts,
    )  # fmt: skip
    how: How = setting("reroute", "What is done to the experts.")
    beta: float = setting(1.0, "Factor on their weight, with --how scale.", min=0, max=10**6)
    where: Where = setting("all", "Tokens at which they are changed.")
    sizes: tuple[int, ...] | None = setting(
        None, "Numbers of experts of the curve, the first in the ranking; powers of two by "
        "default.", min=1, max=10**6,
    )  # fmt: skip
    random: int = setting(19, "Random sets matched in use.", min=LEAST_RANDOM, max=10_000)
    answer_sets: int = setting(
        19, "Random sets that answer the questions too; the others are for the loss.", min=0,
        max=10_000,
    )  # fmt: skip
    rank: RankConfig = field(default_factory=lambda: RankConfig(top=4))
    eval: EvalConfig = field(default_factory=lambda: EvalConfig(limit=500))
    seed: int = setting(0, "Seed of everything that is drawn.", min=0, max=2**32 - 1)

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            BadInputError: a value out of its range, or a beta that would do nothing.
        """
        super().__post_init__()
        if self.how != "scale" and self.beta != 1:
            raise BadInputError(f"beta {self.beta:g} is of --how scale; how is {self.how}")
        if self.how == "scale" and self.beta == 1:
            raise BadInputError("--how scale with beta 1 changes nothing; give another --beta")

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases at whose tokens experts are changed."""
        return PHASES if self.where == "all" else (self.where,)
