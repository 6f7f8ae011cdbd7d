"""The prompt lab: one prompt, what the model writes after it, and its features at every token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resa_lens.errors import BadInputError
from resa_lens.evals.engines import GenerationConfig, HFEngine
from resa_lens.evals.engines.text import text_of
from resa_lens.evals.run import Asked, EvalConfig, score
from resa_lens.evals.run import ask as ask_all
from resa_lens.evals.tasks import EvalItem
from resa_lens.features.checks import check_features
from resa_lens.features.interventions import Intervention, Tracker, intervening
from resa_lens.models.activations import stream_activations
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model
from resa_lens.saes.coder import SparseActs, SparseCoder, encode
from resa_lens.texts import prompts
from resa_lens.texts.phases import PHASES, tag_phases

UNNAMED = "lab"
"""Id of a question that is in no set: it names the random stream."""
READ_BYTES = 256 * 2**20
"""Of activations that are held at once."""
PARTIAL = 4
"""Tokens that one character's bytes can be spread over."""
Coders = Mapping[Hookpoint, SparseCoder]
Written = Callable[[Sequence[int]], None]
"""Called with the tokens that the model has written so far."""


@dataclass(frozen=True)
class Document:
    """A prompt and what the model wrote after it, token by token."""

    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    """Their texts, in order; one that only begins a character is empty."""
    phases: tuple[str, ...]
    """As interventions see them: names in `PHASES`."""
    prompt_tokens: int
    text: str
    """What was written, up to the end of the answer."""
    finished: bool
    """False where the longest length ended it."""
    answer: str | None
    """The parsed answer."""
    correct: bool | None
    """None where the right answer is not known."""

    @property
    def written(self) -> tuple[int, ...]:
        """The tokens behind the prompt."""
        return self.ids[self.prompt_tokens :]


def ask(text: str, *, raw: bool = False, question: EvalItem | None = None) -> Asked:
    """Return the text as evaluation asks it: in the project's question prompt, or as it is.

    Args:
        text: a question, or with `raw` the prompt itself.
        raw: put nothing around it.
        question: of a set, with its right answer: the answer is graded, and drawn from the stream
            that evaluation draws from.

    Raises:
        BadInputError: there is no text.
    """
    if not text.strip():
        raise BadInputError("the prompt is empty; type a question")
    item = question or EvalItem(UNNAMED, text, "")
    if not raw:
        return ask_all([item], EvalConfig())[0]
    opened = text.rfind(prompts.THINK_OPEN)
    return Asked(item, 0, text, text[opened:] if opened >= 0 else "")


def respond(
    model: Model,
    engine: HFEngine,
    asked: Asked,
    config: GenerationConfig,
    *,
    interventions: Sequence[Intervention] = (),
    coders: Coders | None = None,
    written: Written | None = None,
) -> Document:
    """Let the model go on with a prompt, changed or not.

    Args:
        model: the host.
        engine: of its module; kept by the caller, because a new one reads the whole vocabulary.
        asked: the prompt.
        config: length and sampling; the length gives way to the model's context.
        interventions: what is changed.
        coders: the SAEs they need.
        written: told before each token.

    Raises:
        BadInputError: a prompt longer than the model's context, or what `intervening` refuses.
    """
    tokenizer: Any = model.tokenizer
    prompt_ids: list[int] = tokenizer(asked.prompt)["input_ids"]
    longest = model.context
    room = config.max_new_tokens if longest is None else longest - len(prompt_ids)
    if room < 1:
        raise BadInputError(
            f"the prompt has {len(prompt_ids)} tokens and {model.name} reads {longest} in all; "
            "shorten it"
        )
    config = replace(config, max_new_tokens=min(config.max_new_tokens, room))
    watch = _Watch()
    with (
        intervening(model, interventions, coders or {}, watch),
        _told(model.model, written),
    ):
        (made,) = engine.generate([asked.prompt], config, streams=[asked.stream], hooks=watch)
    ids = (*prompt_ids, *made.token_ids)
    texts = token_texts(tokenizer, ids)
    row = score([asked], [made]).samples[0]
    return Document(
        ids,
        texts,
        tuple(PHASES[phase] for phase in _phases(watch.read, texts)),
        len(prompt_ids),
        made.text,
        made.finished,
        row["answer"],
        row["correct"] if asked.item.answer else None,
    )


class _Watch(Tracker):
    """A tracker that keeps the phase of every token that was read."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[int] = []

    def before_forward(
        self,
        rows: Sequence[int],
        positions: Int[Tensor, "row position"],
        phases: Int[Tensor, "row position"],
    ) -> None:
        super().before_forward(rows, positions, phases)
        self.read += phases[0].tolist()


@contextmanager
def _told(module: Any, written: Written | None) -> Iterator[None]:
    """Tell what was written so far, before each pass of the module."""
    if written is None:
        yield
        return
    so_far: list[int] = []
    prompt = True

    def before(_: Any, args: Any, inputs: dict[str, Any]) -> None:
        nonlocal prompt
        if not prompt:
            so_far.extend(inputs["input_ids"][0].tolist())
        prompt = False
        written(so_far)

    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _phases(read: Sequence[int], texts: Sequence[str]) -> list[int]:
    """Return every token's phase: as it was read, of the last one, which never was, by its text."""
    if len(read) >= len(texts):
        return list(read[: len(texts)])
    end = 0
    offsets = [(end, end := end + len(text)) for text in texts]
    return [*read, *tag_phases("".join(texts), offsets)[len(read) :]]


def token_texts(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Return what each token adds to the text: joined they are the text.

    Some tokenizers write a space only between two tokens, and bytes of one character can be several
    tokens: the last of them shows it.
    """
    texts: list[str] = []
    start, said = 0, ""
    for end in range(1, len(ids) + 1):
        text = text_of(tokenizer, ids[start:end])
        if text.endswith("\ufffd") and not _stuck(texts):
            texts.append("")
            continue
        texts.append(text[len(said) :])
        start, said = end - 1, text_of(tokenizer, ids[end - 1 : end])
    if texts and texts[-1] == "":
        texts[-1] = text_of(tokenizer, ids[start:])[len(said) :]
    return tuple(texts)


def _stuck(texts: Sequence[str]) -> bool:
    """Whether the bytes before are more than a character has: they make none."""
    last = texts[-(PARTIAL - 1) :]
    return len(last) == PARTIAL - 1 and not any(last)


# Which features are active where


def activations(
    model: Model, point: Hookpoint, coder: SparseCoder, ids: Sequence[int]
) -> SparseActs:
    """Return the active latents of one layer at every token.

    Raises:
        BadInputError: the SAE does not fit the model.
    """
    check_features(model, point, (), {point: coder})
    (read,) = stream_activations(model, [torch.tensor([list(ids)])], [point])
    return encode(coder, read.acts[point][0].to(coder.dtype))


def feature_values(acts: SparseActs, features: Sequence[int]) -> Float[Tensor, " row"]:
    """Return the sum of some features' activations at every token."""
    keep = torch.isin(acts.latents, torch.tensor(list(features), device=acts.latents.device))
    made = torch.zeros(acts.n_rows, dtype=acts.values.dtype, device=acts.values.device)
    return made.index_add(0, acts.rows[keep], acts.values[keep])


def summed_values(
    model: Model,
    wanted: Mapping[Hookpoint, Sequence[int]],
    load: Callable[[Hookpoint], SparseCoder],
    ids: Sequence[int],
    progress: Callable[[int, int], None] | None = None,
) -> Float[Tensor, " row"]:
    """Return the sum over layers of some features' activations at every token.

    Args:
        model: the host.
        wanted: features by place; only these layers are read and encoded.
        load: gives a place's SAE; one is held at a time.
        ids: the document.
        progress: called with (layers done, all layers).

    Raises:
        BadInputError: an SAE that does not fit, or a feature that it has not.
    """
    total = torch.zeros(len(ids))
    points = sorted(wanted)
    at_once = max(1, READ_BYTES // (4 * model.d_model * max(1, len(ids))))
    for first in range(0, len(points), at_once):
        some = points[first : first + at_once]
        (read,) = stream_activations(model, [torch.tensor([list(ids)])], some)
        for place, point in enumerate(some, first):
            if progress is not None:
                progress(place, len(points))
            coder = load(point)
            check_features(model, point, wanted[point], {point: coder})
            acts = encode(coder, read.acts.pop(point)[0].to(coder.dtype))
            total += feature_values(acts, wanted[point]).float().cpu()
    return total


@dataclass(frozen=True)
class Ranked:
    """A feature at one token."""

    layer: int
    feature: int
    value: float
    """Its activation."""
    share: float
    """Of the sum of all activations of its layer there, so that layers compare."""


def ranked(
    model: Model,
    points: Sequence[Hookpoint],
    load: Callable[[Hookpoint], SparseCoder],
    ids: Sequence[int],
    most: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Ranked, ...]:
    """Return the features of several layers at the last token of a text, the largest share first.

    Args:
        model: the host.
        points: places of SAEs.
        load: gives a place's SAE; one is held at a time.
        ids: the text up to the token.
        most: features that are returned.
        progress: called with (layers done, all layers).

    Raises:
        BadInputError: an SAE that does not fit the model.
    """
    ranking: list[Ranked] = []
    (read,) = stream_activations(model, [torch.tensor([list(ids)])], list(points))
    last = {point: read.acts.pop(point)[0, -1:].clone() for point in points}
    for place, point in enumerate(points):
        if progress is not None:
            progress(place, len(points))
        coder = load(point)
        check_features(model, point, (), {point: coder})
        acts = encode(coder, last[point].to(coder.dtype))
        values: list[float] = acts.values.tolist()
        pairs = zip(acts.latents.tolist(), values, strict=True)
        ranking += [Ranked(point.layer, at, value, value / sum(values)) for at, value in pairs]
    return tuple(sorted(ranking, key=lambda one: -one.share)[:most])


def read(model: Model, prompt: str, written: str) -> Document:
    """Return a text that was written before, token by token as the model reads it.

    Args:
        model: the host.
        prompt: what the model read.
        written: what stands behind it; nothing is graded.

    Raises:
        BadInputError: it is longer than the model's context.
    """
    tokenizer: Any = model.tokenizer
    before: list[int] = tokenizer(prompt)["input_ids"]
    ids: list[int] = before + tokenizer(written, add_special_tokens=False)["input_ids"]
    if model.context is not None and len(ids) > model.context:
        raise BadInputError(
            f"the text has {len(ids)} tokens and {model.name} reads {model.context}"
        )
    texts = token_texts(tokenizer, ids)
    phases = tuple(PHASES[phase] for phase in _phases((), texts))
    return Document(tuple(ids), texts, phases, len(before), written, True, None, None)
