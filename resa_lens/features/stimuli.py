"""What a counted feature is tried on: the same tags in other surroundings, and other tags.

    injected     both tags put into plain text that reasons about nothing
    plain        what stands at those places before the tags come, as many tokens: the base rate
    neutral      the prompt with other tags in the same places
    shuffled     the prompt's words in random order, the tags among them
    paraphrase   other system prompts that ask for the same

The texts are ours.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from resa_lens.errors import BadInputError
from resa_lens.features.exclusive import CountConfig, tag_text
from resa_lens.models.host import Model
from resa_lens.texts import prompts
from resa_lens.texts.phases import tokens_within

NEUTRAL_TAGS: tuple[tuple[str, str], ...] = (
    ("<note>", "</note>"),
    ("<item>", "</item>"),
    ("<b>", "</b>"),
    ("<field>", "</field>"),
    ("<left>", "</left>"),
    ("<quote>", "</quote>"),
    ("<page>", "</page>"),
    ("<name>", "</name>"),
    ("<row>", "</row>"),
    ("<part>", "</part>"),
)
"""Pairs that look like the think tags and ask for no thought."""

PARAPHRASES: dict[str, str] = {
    "assistant": (
        "You are a careful assistant. Before you give an answer, write down how you get there "
        "inside <think> and </think>. Put the final answer inside <answer> and </answer>, like "
        "this: <think> how you get there </think> <answer> final answer </answer>."
    ),
    "teacher": (
        "A student brings a question to a teacher. The teacher works it out in private, which is "
        "marked as <think> </think>, and tells the student the result, marked as <answer> "
        "</answer>: <think> private work </think> <answer> result </answer>."
    ),
    "format": (
        "Output format: <think> reasoning </think> <answer> answer </answer>. The part from "
        "<think> to </think> holds the reasoning; the part from <answer> to </answer> the answer."
    ),
    "solver": (
        "Solve the problem that follows. Reason step by step between the tags <think> and "
        "</think>; when you are done, state the solution between <answer> and </answer>. Your "
        "reply is <think> steps </think> <answer> solution </answer>."
    ),
    "dialogue": (
        "User and Assistant talk. For each question the Assistant considers the problem at "
        "length, <think> considerations </think>, and then replies, <answer> reply </answer>. "
        "Considerations always stand in <think> </think> and replies in <answer> </answer>."
    ),
    "rules": (
        "Rules: 1. Think before you answer. 2. Thoughts go between <think> and </think>. 3. The "
        "answer goes between <answer> and </answer>. 4. Nothing else is written. Example: <think> "
        "thoughts </think> <answer> answer </answer>."
    ),
}
"""Further prompts that ask for what the r1 prompt asks for; `prompts.SYSTEM_PROMPTS` has more."""

PLAIN_TEXTS: tuple[str, ...] = (
    "The ferry leaves the harbour at dawn and returns when the lamps are lit.",
    "Her coat was green, with two deep pockets and a torn lining.",
    "Most of the orchard was planted in the year after the flood.",
    "A grey cat slept on the warm stones beside the kitchen door.",
    "The train was late again, and the platform filled with people.",
    "Snow covered the roofs of the village until the end of March.",
    "He keeps the old letters in a box under the stairs.",
    "The soup needs salt, a little pepper and a handful of parsley.",
    "Two swans crossed the lake while the fishermen mended their nets.",
    "The library closes early on Fridays and stays shut on Sundays.",
    "They painted the fence white and the gate a dark shade of blue.",
    "Rain fell all night and the river rose above the lower path.",
    "The baker opens the shop before the street lights go out.",
    "An old clock in the hall strikes the hours a little too slowly.",
    "The children ran along the beach and collected smooth flat stones.",
    "Our neighbour grows tomatoes and beans behind the garage.",
    "The museum shows maps, coins and the tools of early sailors.",
    "A light wind moved the curtains and the papers on the desk.",
    "The road to the north passes three farms and a small chapel.",
    "She plays the violin in the evening, mostly slow dances.",
    "The market sells cheese, honey and baskets made of willow.",
    "Fog hid the bridge and the tall chimneys on the other side.",
    "The dog waited at the corner until the last bus had gone.",
    "In autumn the leaves of the maple turn red before they fall.",
)
"""Sentences about nothing that has to be thought out."""


@dataclass(frozen=True)
class Trial:
    """One text, and the tokens where a feature is looked for."""

    kind: str
    """original, injected, plain, neutral, shuffled or paraphrase."""
    text: str
    ids: tuple[int, ...]
    places: tuple[tuple[int, ...], tuple[int, ...]]
    """Token positions of every opening tag and of every closing tag, or of what stands there."""


def trials(
    model: Model,
    config: CountConfig,
    *,
    texts: int = 40,
    shuffles: int = 20,
    plain_texts: Sequence[str] = PLAIN_TEXTS,
    seed: int = 0,
) -> list[Trial]:
    """Make every trial of a prompt; the first is the prompt itself.

    An injected text and the plain one after it are a pair: the same sentences, with the tags and
    without.

    Args:
        model: its tokenizer is used.
        config: the prompt and the tags that were counted.
        texts: plain texts with the tags put in.
        shuffles: orders of the prompt's words.
        plain_texts: sentences without reasoning, two of them a text.
        seed: of places and orders.

    Raises:
        BadInputError: no text or no shuffle is asked for, or a plain text has a tag in it.
    """
    tags = config.open_tag, config.close_tag
    if texts < 1 or shuffles < 1:
        raise BadInputError(f"{texts} texts and {shuffles} shuffles: give at least 1 of each")
    if len(plain_texts) < 2 or not all(len(text.split()) > 2 for text in plain_texts):
        raise BadInputError("plain texts: give two or more, each of three words or more")
    if tagged := next((t for t in plain_texts if any(tag in t for tag in tags)), None):
        raise BadInputError(f"the plain text {tagged[:60]!r} has a tag in it; remove the tag")
    rng = random.Random(f"falsify/{seed}")
    prompt = prompts.resolve_system_prompt(config.prompt)
    made = [_trial(model, "original", prompt, config)]
    for _ in range(texts):
        made += _injected(model, rng, plain_texts, config)
    for opens, closes in NEUTRAL_TAGS:
        if opens in prompt or closes in prompt:
            continue
        text = prompt.replace(tags[0], opens).replace(tags[1], closes)
        other = replace(config, open_tag=opens, close_tag=closes)
        made.append(_trial(model, "neutral", text, other))
    words = prompt.split()
    for _ in range(shuffles):
        text = " ".join(rng.sample(words, len(words)))
        made.append(_trial(model, "shuffled", text, config))
    for text in (*prompts.SYSTEM_PROMPTS.values(), *PARAPHRASES.values()):
        asked = text.replace(prompts.THINK_OPEN, tags[0]).replace(prompts.THINK_CLOSE, tags[1])
        if asked != prompt:
            made.append(_trial(model, "paraphrase", asked, config))
    return made


def _trial(model: Model, kind: str, text: str, config: CountConfig) -> Trial:
    tagged = tag_text(model, text, config)
    return Trial(kind, tagged.text, tagged.ids, (_all(tagged.open_spans), _all(tagged.close_spans)))


def _injected(
    model: Model, rng: random.Random, plain_texts: Sequence[str], config: CountConfig
) -> list[Trial]:
    """Put both tags before two words of a text; what begins there without is the other trial."""
    words = " ".join(rng.sample(list(plain_texts), 2)).split()
    first, second = sorted(rng.sample(range(1, len(words)), 2))
    opens, closes = config.open_tag, config.close_tag
    tagged = [*words[:first], opens, *words[first:second], closes, *words[second:]]
    bare = replace(config, chat_template=False)
    plain = " ".join(words)
    tokenizer: Any = model.tokenizer
    encoded = tokenizer(plain, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]

    injected = _trial(model, "injected", " ".join(tagged), bare)

    def place(index: int, size: int) -> tuple[int, ...]:
        # As many tokens as the tag has: more of them would fire more often.
        begin = len(" ".join(words[:index])) + 1
        return tokens_within(offsets, begin, len(plain))[:size]

    ids = tuple(int(i) for i in encoded["input_ids"])
    sizes = map(len, injected.places)
    places = tuple(place(i, n) for i, n in zip((first, second), sizes, strict=True))
    return [injected, Trial("plain", plain, ids, (places[0], places[1]))]


def _all(spans: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(sorted({position for span in spans for position in span}))
