"""What a counted feature is tried on: the same tags in other surroundings, and other tags.

    original     the prompt itself, with every occurrence of its tags
    injected     both tags put into plain text that reasons about nothing
    plain        what stands at those places before the tags come, as many tokens: the base rate
    words        the prompt with its words exchanged for those of plain texts, the tags in place
    shuffled     the prompt's words in random order, the tags among them
    paraphrase   other system prompts that ask for the same
    untagged     the prompt and its paraphrases with an ordinary word in the place of each tag
    neutral      the prompt and its paraphrases with other delimiters in the tags' places
    format       prompts with such delimiters that do not speak of reasoning
    document     a worked problem behind the prompt, at the tags around its thought
    thought      the same text, at two places within the thought

Every trial but the original has two places: one occurrence of the opening tag and one of the
closing tag, drawn where the text has several, or what stands there.  A feature has so the same
number of chances to fire in each.  Words have as many tokens as the tag; a delimiter has its own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from resa_lens.errors import BadInputError
from resa_lens.features.exclusive import CountConfig, TaggedPrompt, tag_text
from resa_lens.features.stimulus_texts import (
    FORMAT_ENDS,
    FORMATS,
    NEUTRAL_TAGS,
    PARAPHRASES,
    PLAIN_TEXTS,
    PROBLEMS,
    REPLIES,
    REQUESTS,
    ROLES,
)
from resa_lens.models.bounds import check_length
from resa_lens.models.host import Model
from resa_lens.texts import prompts
from resa_lens.texts.phases import tokens_within

KINDS = (
    "injected", "plain", "words", "shuffled", "paraphrase", "untagged", "neutral", "format",
    "document", "thought",
)  # fmt: skip
"""Kinds of trial, but for the original."""


@dataclass(frozen=True)
class Trial:
    """One text, and the tokens where a feature is looked for."""

    kind: str
    """original, or one of `KINDS`."""
    text: str
    ids: tuple[int, ...]
    places: tuple[tuple[int, ...], tuple[int, ...]]
    """Token positions of the opening tag and of the closing tag, or of what stands there."""


def trials(
    model: Model,
    config: CountConfig,
    *,
    texts: int = 40,
    shuffles: int = 40,
    plain_texts: Sequence[str] = PLAIN_TEXTS,
    seed: int = 0,
) -> list[Trial]:
    """Make every trial of a prompt; the first is the prompt itself.

    An injected text and the plain one after it are a pair: the same sentences, with the tags and
    without.  So are a document and the thought after it.

    Args:
        model: its tokenizer is used.
        config: the prompt and the tags that were counted.
        texts: trials of each kind but the shuffled ones; fewer where a text would come twice.
        shuffles: orders of the prompt's words.
        plain_texts: sentences without reasoning, two of them a text.
        seed: of everything that is drawn.

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
    return _Maker(model, config, plain_texts, seed).trials(texts, shuffles)


class _Maker:
    """Draws the trials of one prompt, one kind after the other."""

    def __init__(
        self, model: Model, config: CountConfig, plain_texts: Sequence[str], seed: int
    ) -> None:
        self.model, self.config, self.plain_texts = model, config, list(plain_texts)
        self.seed = seed
        self.prompt = prompts.resolve_system_prompt(config.prompt)
        tagged = tag_text(model, self.prompt, config)
        places = _all(tagged.open_spans), _all(tagged.close_spans)
        self.original = Trial("original", tagged.text, tagged.ids, places)
        self.sizes = [len(place) for place in _drawn(tagged, None)]
        self.words = _vocabulary(self.plain_texts)

    def trials(self, texts: int, shuffles: int) -> list[Trial]:
        """Return the original and the trials of every kind."""
        limits = dict.fromkeys(KINDS, texts) | {"shuffled": shuffles}
        chosen = [self.original]
        for kinds, draws in (
            (("injected", "plain"), self._injected),
            (("words",), self._exchanged),
            (("shuffled",), self._shuffled),
            (("paraphrase",), self._paraphrases),
            (("untagged",), self._untagged),
            (("neutral",), self._delimiters),
            (("format",), self._formats),
            (("document", "thought"), self._documents),
        ):
            # A kind's texts do not depend on how many of another are drawn.
            rng = random.Random(f"falsify/{self.seed}/{kinds[0]}")
            known: set[str] = set()
            for pair in draws(rng, limits[kinds[0]]):
                if pair[0].text not in known:
                    known.add(pair[0].text)
                    chosen += pair
                if len(known) == limits[kinds[0]]:
                    break
        return chosen

    def _trial(self, kind: str, text: str, config: CountConfig, rng: random.Random) -> Trial:
        tagged = tag_text(self.model, text, config)
        return Trial(kind, tagged.text, tagged.ids, _drawn(tagged, rng))

    def _tokens(self, text: str) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
        tokenizer: Any = self.model.tokenizer
        encoded = tokenizer(text, return_offsets_mapping=True)
        return tuple(int(i) for i in encoded["input_ids"]), encoded["offset_mapping"]

    def _retagged(self, text: str, tags: tuple[str, str]) -> str:
        return text.replace(self.config.open_tag, tags[0]).replace(self.config.close_tag, tags[1])

    def _injected(self, rng: random.Random, texts: int) -> Iterator[list[Trial]]:
        """Put both tags before two words of a text; what begins there without is the other one."""
        bare = replace(self.config, chat_template=False)
        for _ in range(2 * texts):
            words = " ".join(rng.sample(self.plain_texts, 2)).split()
            first, second = sorted(rng.sample(range(1, len(words)), 2))
            tagged = [*words[:first], bare.open_tag, *words[first:second], bare.close_tag,
                      *words[second:]]  # fmt: skip
            injected = self._trial("injected", " ".join(tagged), bare, rng)
            plain = " ".join(words)
            ids, offsets = self._tokens(plain)
            places = []
            for index, place in zip((first, second), injected.places, strict=True):
                # As many tokens as the tag has: more of them would fire more often.
                begin = len(" ".join(words[:index])) + 1
                places.append(tokens_within(offsets, begin, len(plain))[: len(place)])
            yield [injected, Trial("plain", plain, ids, (places[0], places[1]))]

    def _exchanged(self, rng: random.Random, texts: int) -> Iterator[list[Trial]]:
        tags = self.config.open_tag, self.config.close_tag
        for _ in range(2 * texts):
            words = []
            for word in self.prompt.split():
                if any(tag in word for tag in tags):
                    words.append(word)
                    continue
                end = word[len(word.rstrip(".,;:!?")) :]
                words.append(rng.choice(self.words) + end)
            yield [self._trial("words", " ".join(words), self.config, rng)]

    def _shuffled(self, rng: random.Random, shuffles: int) -> Iterator[list[Trial]]:
        words = self.prompt.split()
        for _ in range(2 * shuffles):
            text = " ".join(rng.sample(words, len(words)))
            yield [self._trial("shuffled", text, self.config, rng)]

    def _requests(self, rng: random.Random) -> list[str]:
        """Return prompts that ask for reasoning, with the tags of the count, whole ones first."""
        opens, closes = self.config.open_tag, self.config.close_tag
        whole = [
            text.replace(prompts.THINK_OPEN, opens).replace(prompts.THINK_CLOSE, closes)
            for text in (*prompts.SYSTEM_PROMPTS.values(), *PARAPHRASES.values())
        ]
        parts = [
            " ".join((role, request.replace("OPEN", opens).replace("CLOSE", closes), reply))
            for role, request, reply in product(ROLES, REQUESTS, REPLIES)
        ]
        return [*whole, *rng.sample(parts, len(parts))]

    def _paraphrases(self, rng: random.Random, texts: int) -> Iterator[list[Trial]]:
        for text in self._requests(rng):
            if text != self.prompt:
                yield [self._trial("paraphrase", text, self.config, rng)]

    def _bases(self, rng: random.Random) -> Iterator[str]:
        """Yield the prompt and its paraphrases in turns."""
        for text in self._requests(rng):
            yield self.prompt
            yield text

    def _untagged(self, rng: random.Random, texts: int) -> Iterator[list[Trial]]:
        for text in self._bases(rng):
            # A word is looked for in the text: it must stand nowhere else.
            words = [w for w in _vocabulary(PLAIN_TEXTS) if len(w) > 3 and w not in text.lower()]
            if len(words) < 2:
                continue
            first, second = rng.sample(words, 2)
            if first in second or second in first:
                continue
            config = replace(self.config, open_tag=first, close_tag=second)
            trial = self._trial("untagged", self._retagged(text, (first, second)), config, rng)
            opens, closes = (
                place[:size] for place, size in zip(trial.places, self.sizes, strict=True)
            )
            yield [replace(trial, places=(opens, closes))]

    def _delimiters(self, rng: random.Random, texts: int) -> Iterator[list[Trial]]:
        for number, text in enumerate(self._bases(rng)):
            # The prompt and a paraphrase with each pair.
            tags = NEUTRAL_TAGS[number // 2 % len(NEUTRAL_TAGS)]
            if not any(tag in text for tag in tags):
                yield [self._delimited("neutral", self._retagged(text, tags), tags, rng)]

    def _formats(self, rng: random.Random, texts: int) -> Iterator[list[Trial]]:
        parts = [" ".join(two) for two in product(FORMATS, FORMAT_ENDS)]
        every = list(product(parts, NEUTRAL_TAGS))
        for part, tags in rng.sample(every, len(every)):
            text = part.replace("OPEN", tags[0]).replace("CLOSE", tags[1])
            yield [self._delimited("format", text, tags, rng)]

    def _delimited(self, kind: str, text: str, tags: tuple[str, str], rng: random.Random) -> Trial:
        config = replace(self.config, open_tag=tags[0], close_tag=tags[1])
        return self._trial(kind, text, config, rng)

    def _documents(self, rng: random.Random, texts: int) -> Iterator[list[Trial]]:
        """Put worked problems behind the prompt; a prompt that leaves no room for them has none."""
        opens, closes = self.config.open_tag, self.config.close_tag
        for _ in range(2 * texts):
            a, b = rng.randint(2, 60), rng.randint(2, 60)
            values = {"a": a, "b": b, "sum": a + b, "product": a * b}
            question, thought, answer = (part.format(**values) for part in rng.choice(PROBLEMS))
            before = prompts.behind(self.prompt, f"Problem: {question} ")
            begin = len(before) + len(opens) + 1
            end = begin + len(thought)
            text = f"{before}{opens} {thought} {closes} {prompts.ANSWER_OPEN} Answer: {answer}"
            text = f"{text} {prompts.ANSWER_CLOSE}"
            ids, offsets = self._tokens(text)
            try:
                check_length(self.model, len(ids))
            except BadInputError:
                return
            borders = (
                tokens_within(offsets, len(before), begin - 1),
                tokens_within(offsets, end + 1, end + 1 + len(closes)),
            )
            inside = [
                position
                for position in tokens_within(offsets, begin, end)
                if position not in {*borders[0], *borders[1]}
            ]
            within = tuple(
                tuple(inside[start : start + size])
                for size in self.sizes
                for start in [rng.randrange(max(1, len(inside) - size + 1))]
            )
            yield [
                Trial("document", text, ids, borders),
                Trial("thought", text, ids, (within[0], within[1])),
            ]


def _vocabulary(texts: Sequence[str]) -> list[str]:
    words = " ".join(texts).split()
    return sorted({word.strip(".,;:!?").lower() for word in words} - {""})


def _drawn(
    tagged: TaggedPrompt, rng: random.Random | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return one occurrence of each tag: drawn, or the first."""
    opens, closes = (
        [span for span in spans if span] or [()]
        for spans in (tagged.open_spans, tagged.close_spans)
    )
    return (rng.choice(opens), rng.choice(closes)) if rng else (opens[0], closes[0])


def _all(spans: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(sorted({position for span in spans for position in span}))
