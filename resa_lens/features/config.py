"""How features are counted, tallied and tried: the configurations alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from resa_lens.config import Config, resolved, setting
from resa_lens.errors import BadInputError
from resa_lens.models.hookpoints import MOST_LAYERS, parse_layer
from resa_lens.texts import prompts

Rule = Literal["all", "any", "either"]
RULES: dict[str, str] = {
    "all": "active at every occurrence of <think> and of </think>, and at no other token",
    "any": "active at one or more occurrences of each tag, and at no other token",
    "either": "active at one or more occurrences of either tag, and at no other token",
}
"""The counting rules; `all` is the paper's as the spec states it."""


def check_rule(rule: str) -> None:
    """Raise BadInputError where a rule is unknown."""
    if rule not in RULES:
        raise BadInputError(f"rule {rule!r} is unknown; use {', '.join(RULES)}")


def check_prompt(prompt: str) -> None:
    """Raise BadInputError where a prompt, by name, text or @file, has no think tags."""
    check_tags(prompts.resolve_system_prompt(prompt), prompts.THINK_OPEN, prompts.THINK_CLOSE)


def check_tags(text: str, *tags: str) -> None:
    """Raise BadInputError where a text has no tags to count at."""
    for tag in tags:
        if not tag or tag not in text:
            shown = text if len(text) < 60 else text[:57] + "..."
            raise BadInputError(
                f"the prompt {shown!r} has no {tag or 'tag'}; use one that contains "
                f"{' and '.join(tags)}, for example --prompt r1"
            )


def check_active(threshold: float) -> None:
    """Raise BadInputError where a feature cannot be active above a threshold."""
    if not 0 <= threshold < math.inf:
        raise BadInputError(f"threshold {threshold} is out of range; give 0 or more")


def check_two_tags(opens: str, closes: str) -> None:
    """Raise BadInputError where two tags are one: each token of one would count for both."""
    if opens == closes:
        raise BadInputError(
            f"the open tag and the close tag are both {opens!r:.60}: a feature of one cannot be "
            "told from one of the other; give two tags"
        )
    if opens and closes and (opens in closes or closes in opens):
        raise BadInputError(
            f"of the tags {opens!r:.60} and {closes!r:.60} one stands inside of the other: its "
            "tokens would count for both; give two tags, for example <think> and </think>"
        )


@dataclass(frozen=True)
class CountConfig(Config):
    """What the paper leaves open, with the stated defaults."""

    prompt: str = resolved(
        "r1", prompts.resolve_system_prompt,
        "Prompt with the think tags: r1, steps, short, a text, or @file.", check=check_prompt,
    )  # fmt: skip
    chat_template: bool = setting(False, "Send the prompt through the model's chat template.")
    open_tag: str = prompts.THINK_OPEN
    close_tag: str = prompts.THINK_CLOSE
    threshold: float = setting(
        0.0, "A feature is active where its value after the top-k is above this.", min=0
    )
    ignore_first: bool = setting(
        False, 'Leave the first position (an attention sink) out of "other tokens".'
    )

    def __post_init__(self) -> None:
        """Raise BadInputError where a value is out of range, or the tags are one."""
        super().__post_init__()
        check_two_tags(self.open_tag, self.close_tag)


@dataclass(frozen=True)
class ActivityConfig(Config):
    """What is kept of each feature."""

    examples: int = setting(
        6,
        "Places kept of each feature in each phase: so many strongest, so many drawn.",
        min=1,
        max=10_000,
    )
    firing_tokens: int = setting(
        16, "Tokens kept of each feature, of those at which it fires.", min=1, max=10_000
    )
    before: int = setting(16, "Tokens of context before the peak.", min=0)
    after: int = setting(8, "Tokens of context after the peak.", min=0)
    threshold: float = setting(
        0.0, "A feature is active where its value after the top-k is above this.", min=0
    )

    @property
    def window(self) -> int:
        """Tokens of an example, the peak included."""
        return self.before + 1 + self.after


@dataclass(frozen=True)
class FalsifyConfig(Config):
    """How often each test is tried, and what counts as firing."""

    texts: int = setting(40, "Texts of each kind of trial.", min=1, max=100_000)
    shuffles: int = setting(40, "Orders of the prompt's words.", min=1, max=100_000)
    fires: float = setting(
        0.5, "Share of trials from which on a feature counts as firing.", over=0, max=1
    )
    seed: int = setting(0, "Seed of everything that is drawn.", min=0, max=2**32 - 1)


def check_feature(text: str, n_layers: int = MOST_LAYERS) -> None:
    """Raise BadInputError where a text is no LAYER:FEATURE, of so many layers or of any model."""
    layer, _, feature = text.partition(":")
    parse_layer(layer, n_layers)
    if not feature.isdecimal():
        raise BadInputError(f"--show {text!a:.60} names no feature; give LAYER:FEATURE, as 5:62")


def check_features(text: str, *words: str) -> tuple[int, ...] | None:
    """Return features by their indices, None for what a word names.

    Raises:
        BadInputError: neither.
    """
    words = words or ("active", "counted")
    if text in words:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 10 for part in parts):
        raise BadInputError(
            f'features {text!r:.80} are no indices; use {", ".join(words)} or for example "3,17,40"'
        )
    return tuple(map(int, parts))
