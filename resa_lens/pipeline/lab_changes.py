"""The prompt lab: the same prompt with features off, up, set or pushed along, and random ones.

One prompt is an anecdote: `pipeline.ablation` measures the same changes over questions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from resa_lens.errors import BadInputError
from resa_lens.evals.engines import GenerationConfig, HFEngine
from resa_lens.evals.run import Asked
from resa_lens.features.checks import check_features
from resa_lens.features.interventions import (
    VALUED,
    Control,
    EncodedBatch,
    FeatureMass,
    Intervention,
    Tracker,
    describe_controls,
    intervening,
    matched_controls,
    sum_masses,
)
from resa_lens.hookpoints import Hookpoint
from resa_lens.models import Model
from resa_lens.phases import PHASES, PhasedBatch
from resa_lens.pipeline.lab import Coders, Document, Written, activations, respond
from resa_lens.saes.coder import SparseCoder

FAIR = (0.5, 2.0)
"""Activation mass of random features over that of the named ones between which they may stand
beside them: on one short text a strong feature often has no equal."""


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
