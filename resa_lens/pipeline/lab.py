"""The prompt lab: one prompt, what the model writes after it, its features, and the same changed.

One prompt is an anecdote: `pipeline.ablation` measures the same changes over questions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resa_lens import prompts
from resa_lens.activations import stream_activations
from resa_lens.errors import BadInputError
from resa_lens.evals.engines import GenerationConfig, HFEngine
from resa_lens.evals.engines.text import text_of
from resa_lens.evals.run import Asked, EvalConfig, score
from resa_lens.evals.run import ask as ask_all
from resa_lens.evals.tasks import EvalItem
from resa_lens.features.interventions import (
    VALUED,
    Control,
    EncodedBatch,
    FeatureMass,
    Intervention,
    Tracker,
    check_features,
    describe_controls,
    intervening,
    matched_controls,
    sum_masses,
)
from resa_lens.hookpoints import Hookpoint
from resa_lens.models import Model
from resa_lens.phases import PHASES, PhasedBatch, tag_phases
from resa_lens.saes.coder import SparseActs, SparseCoder, encode

UNNAMED = "lab"
"""Id of a question that is in no set: it names the random stream."""
READ_BYTES = 256 * 2**20
"""Of activations that are held at once."""
PARTIAL = 4
"""Tokens that one character's bytes can be spread over."""
FAIR = (0.5, 2.0)
"""Activation mass of random features over that of the named ones between which they may stand
beside them: on one short text a strong feature often has no equal."""

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


@dataclass(frozen=True)
class Change:
    """What is done to which features, at one layer or several."""

    features: Mapping[Hookpoint, tuple[int, ...]]
    kind: str = "ablate"
    strength: float = 1.0
    phases: tuple[str, ...] = PHASES
    keep_error: bool = True
    value: float | None = None
    """Of clamp and steer; by default each feature's mean over the unchanged document's tokens where
    it is active: of its activation, for steer of the length z |d| that it adds."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            BadInputError: no feature, or what `Intervention` refuses.
        """
        if not self.features:
            raise BadInputError("no feature was given; name at least one as layer:feature")
        if self.value is not None and self.kind not in VALUED:
            raise BadInputError(f"kind {self.kind!r} takes no value; use clamp or steer with it")
        for point, features in self.features.items():
            value = 0.0 if self.value is None else self.value
            self.at(point, features, (value,) * len(features))

    def at(
        self, point: Hookpoint, features: Sequence[int], values: Sequence[float]
    ) -> Intervention:
        """Return what is done to some features at a place."""
        return Intervention(
            point,
            tuple(features),
            self.kind,
            self.strength,
            self.phases,
            self.keep_error,
            tuple(values) if self.kind in VALUED else (),
        )


@dataclass(frozen=True)
class Changed:
    """The same prompt under a change, beside the unchanged document."""

    document: Document
    first: int | None
    """The first written token that differs, counted from 0; None where all are the same."""
    moved: dict[str, float]
    """How far the log-probability of the unchanged text moved, in nats: "all", "think", "answer".
    At temperature 1, whatever the answers were drawn at."""


@dataclass(frozen=True)
class RandomChange:
    """The change made to random features, as many and as active on the unchanged document."""

    changed: Changed
    controls: dict[Hookpoint, Control] = field(default_factory=dict)
    """Which features at which place, and how near they come to the named ones."""


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
    longest = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
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


# The same prompt with features changed


def change(
    model: Model,
    engine: HFEngine,
    asked: Asked,
    config: GenerationConfig,
    plain: Document,
    wanted: Change,
    coders: Coders,
    *,
    written: Written | None = None,
) -> Changed:
    """Let the model go on with the same prompt under a change.

    Args:
        model: the host.
        engine: of its module.
        asked: the prompt.
        config: as of the unchanged document.
        plain: the unchanged document.
        wanted: what is changed.
        coders: the SAEs of the change's places, with their decoders.
        written: told before each token.

    Raises:
        BadInputError: a feature out of range, or clamp or steer of features without a value: none
            was given and none is active in the document.
    """
    for point, features in wanted.features.items():
        check_features(model, point, features, coders)
    values = {}
    if wanted.kind in VALUED and wanted.value is None:
        for point in wanted.features:
            mass = sum_masses([_encoded(model, point, coders[point], plain)], coders[point])
            values[point] = _means(mass, wanted, wanted.features[point])
        if not any(any(found) for found in values.values()):
            raise BadInputError(
                f"none of the features is active at {', '.join(wanted.phases)} tokens of this "
                f"text, so {wanted.kind} has no value to take; give one"
            )
    made = [
        wanted.at(point, features, values.get(point) or _given(wanted, features))
        for point, features in sorted(wanted.features.items())
    ]
    return _beside(model, engine, asked, config, plain, made, coders, written)


def random_changes(
    model: Model,
    engine: HFEngine,
    asked: Asked,
    config: GenerationConfig,
    plain: Document,
    wanted: Change,
    coders: Coders,
    *,
    draws: int = 5,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[RandomChange]:
    """Do to random features what the change does to the named ones.

    They are matched, at each place, in activation mass and active tokens on the unchanged document
    itself, so they say how special the named features are on this prompt and on no other.  Only
    sets that differ and come near in mass (`FAIR`) are run, so there may be fewer than asked for.

    Args:
        model: the host.
        engine: of its module.
        asked: the prompt.
        config: as of the unchanged document.
        plain: the unchanged document.
        wanted: what is changed.
        coders: the SAEs of the change's places, with their decoders.
        draws: sets of random features.
        seed: of the draws.
        progress: called with (sets done, all sets).

    Raises:
        BadInputError: the features are never active in the document, or no random features come
            near them there: nothing can be compared.
    """
    sets: dict[Hookpoint, list[tuple[int, ...]]] = {}
    near: dict[Hookpoint, list[Control]] = {}
    masses: dict[Hookpoint, FeatureMass] = {}
    for point, features in sorted(wanted.features.items()):
        check_features(model, point, features, coders)
        encoded = _encoded(model, point, coders[point], plain)
        mass = sum_masses([encoded], coders[point])
        at = [PHASES.index(phase) for phase in wanted.phases]
        if not float(mass.sums[at][:, list(features)].sum()):
            raise BadInputError(
                f"the features at {point.describe(model.n_layers)} are never active at "
                f"{', '.join(wanted.phases)} tokens of this text, so no random features can be "
                "matched to them; take others, or another prompt"
            )
        sets[point] = matched_controls(mass, features, draws=draws, seed=seed, phases=wanted.phases)
        near[point] = describe_controls(
            [encoded], coders[point], features, sets[point], wanted.phases
        )
        masses[point] = mass
    chosen = _fair(sets, near)
    found = []
    for done, draw in enumerate(chosen):
        if progress is not None:
            progress(done, len(chosen))
        made = []
        for point, drawn in sets.items():
            features = drawn[draw]
            values = (
                _means(masses[point], wanted, features)
                if wanted.kind in VALUED and wanted.value is None
                else _given(wanted, features)
            )
            made.append(wanted.at(point, features, values))
        beside = _beside(model, engine, asked, config, plain, made, coders, None)
        found.append(RandomChange(beside, {point: near[point][draw] for point in sets}))
    return found


def _fair(
    sets: Mapping[Hookpoint, Sequence[tuple[int, ...]]], near: Mapping[Hookpoint, Sequence[Control]]
) -> list[int]:
    """Return which draws differ and come near in mass at every place.

    Raises:
        BadInputError: there is none.
    """
    first = {
        drawn: place for place, drawn in reversed(list(enumerate(zip(*sets.values(), strict=True))))
    }
    ratios = {
        place: [control.mass["all"] or 0.0 for control in row]
        for place, row in enumerate(zip(*near.values(), strict=True))
    }
    chosen = [
        place
        for place in sorted(first.values())
        if all(FAIR[0] <= ratio <= FAIR[1] for ratio in ratios[place])
    ]
    if not chosen:
        held = [ratio for place in first.values() for ratio in ratios[place]]
        raise BadInputError(
            "no random features come near the named ones on this text: theirs is "
            f"{min(held):.2f} to {max(held):.2f} of the activation mass.\nOver many questions "
            "there are more to choose from: resa-lens ablate"
        )
    return chosen


def _beside(
    model: Model,
    engine: HFEngine,
    asked: Asked,
    config: GenerationConfig,
    plain: Document,
    made: Sequence[Intervention],
    coders: Coders,
    written: Written | None,
) -> Changed:
    document = respond(
        model, engine, asked, config, interventions=made, coders=coders, written=written
    )
    after = log_probabilities(model, plain, made, coders)
    return Changed(
        document,
        first_difference(plain.written, document.written),
        _by_phase(after - log_probabilities(model, plain), plain),
    )


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Return the first place where two token sequences differ, None where they are the same."""
    for place, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return place
    return None if len(one) == len(other) else min(len(one), len(other))


@torch.no_grad()
def log_probabilities(
    model: Model,
    document: Document,
    interventions: Sequence[Intervention] = (),
    coders: Coders | None = None,
) -> Float[Tensor, " written"]:
    """Return the log-probability, in nats, of every written token, changed or not."""
    count = len(document.written)
    if not count:
        return torch.zeros(0)
    ids = torch.tensor([document.ids], device=model.device)
    phases = torch.tensor([[PHASES.index(phase) for phase in document.phases]])
    with intervening(model, interventions, coders or {}, Tracker(phases)):
        logits = model.model(input_ids=ids, logits_to_keep=count + 1).logits[0, :-1]
    found = logits.float().log_softmax(-1).gather(1, ids[0, -count:, None])
    return found[:, 0].double().cpu()


def _by_phase(values: Float[Tensor, " written"], document: Document) -> dict[str, float]:
    at = document.phases[document.prompt_tokens :]
    held = {"all": float(values.sum())}
    for phase in PHASES[1:]:
        if phase in at:
            held[phase] = float(values[torch.tensor([name == phase for name in at])].sum())
    return held


def _encoded(
    model: Model, point: Hookpoint, coder: SparseCoder, document: Document
) -> EncodedBatch:
    ids = torch.tensor([document.ids])
    phases = torch.tensor([[PHASES.index(phase) for phase in document.phases]])
    batch = PhasedBatch(ids, phases, torch.zeros_like(ids))
    return EncodedBatch(batch, activations(model, point, coder, document.ids))


def _given(wanted: Change, features: Sequence[int]) -> tuple[float, ...]:
    return () if wanted.value is None else (wanted.value,) * len(features)


def _means(mass: FeatureMass, wanted: Change, features: Sequence[int]) -> tuple[float, ...]:
    """Return what clamp sets each feature to, or how far steer pushes along it."""
    means = mass.mean_active(features, wanted.phases)
    if wanted.kind == "clamp":
        return tuple(means)
    return tuple(mean * float(mass.norms[f]) for f, mean in zip(features, means, strict=True))
