"""The prompt lab: the same prompt with features off, up, set or pushed along, and random ones.

One prompt is an anecdote: `pipeline.ablation` measures the same changes over questions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

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
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model
from resa_lens.stages.lab import Coders, Document, Written, activations, respond
from resa_lens.texts.phases import PHASES, PhasedBatch

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

    @property
    def takes_mean(self) -> bool:
        """Whether each feature's mean is the value, because none was given."""
        return self.kind in VALUED and self.value is None

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


@dataclass(frozen=True)
class Trial:
    """A prompt that the model went on with, and a change under which it goes on again.

    Raises:
        BadInputError: a feature out of range.
    """

    model: Model
    engine: HFEngine
    """Of the model's module."""
    asked: Asked
    """The prompt."""
    config: GenerationConfig
    """As of the unchanged document."""
    plain: Document
    """The unchanged document."""
    change: Change
    coders: Coders
    """The SAEs of the change's places, with their decoders."""

    def __post_init__(self) -> None:
        """Check the features."""
        for point, features in self.change.features.items():
            check_features(self.model, point, features, self.coders)

    def changed(self, *, written: Written | None = None) -> Changed:
        """Let the model go on with the same prompt under the change; `written` is as of `respond`.

        Raises:
            BadInputError: clamp or steer of features without a value: none was given and none is
                active in the document.
        """
        values = {p: self._values(p, features) for p, features in self.change.features.items()}
        if self.change.takes_mean and not any(any(some) for some in values.values()):
            raise BadInputError(
                f"none of the features is active at {', '.join(self.change.phases)} tokens of this "
                f"text, so {self.change.kind} has no value to take; give one"
            )
        return self._run(self.change.features, written)

    def random(
        self,
        *,
        draws: int = 5,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[RandomChange]:
        """Do to random features what the change does to the named ones.

        They are matched, at each place, in activation mass and active tokens on the unchanged
        document itself, so they say how special the named features are on this prompt and on no
        other.  Only sets that differ and come near in mass (`FAIR`) are run, so there may be fewer
        than asked for.

        Args:
            draws: sets of random features.
            seed: of the draws.
            progress: called with (sets done, all sets).

        Raises:
            BadInputError: the features are never active in the document, or no random features come
                near them there: nothing can be compared.
        """
        sets: dict[Hookpoint, list[tuple[int, ...]]] = {}
        near: dict[Hookpoint, list[Control]] = {}
        phases = self.change.phases
        for point, features in sorted(self.change.features.items()):
            encoded, mass = self._encoded[point]
            at = [PHASES.index(phase) for phase in phases]
            if not float(mass.sums[at][:, list(features)].sum()):
                raise BadInputError(
                    f"the features at {point.describe(self.model.n_layers)} are never active at "
                    f"{', '.join(phases)} tokens of this text, so no random features can be "
                    "matched to them; take others, or another prompt"
                )
            sets[point] = matched_controls(mass, features, draws=draws, seed=seed, phases=phases)
            near[point] = describe_controls(
                [encoded], self.coders[point], features, sets[point], phases
            )
        chosen = _fair(sets, near)
        changes = []
        for done, draw in enumerate(chosen):
            if progress is not None:
                progress(done, len(chosen))
            changed = self._run({point: drawn[draw] for point, drawn in sets.items()}, None)
            changes.append(RandomChange(changed, {point: near[point][draw] for point in sets}))
        return changes

    @cached_property
    def _encoded(self) -> dict[Hookpoint, tuple[EncodedBatch, FeatureMass]]:
        """What the features of each place do in the unchanged document."""
        ids = torch.tensor([self.plain.ids])
        phases = torch.tensor([[PHASES.index(phase) for phase in self.plain.phases]])
        batch, places = PhasedBatch(ids, phases, torch.zeros_like(ids)), {}
        for point in self.change.features:
            coder = self.coders[point]
            encoded = EncodedBatch(batch, activations(self.model, point, coder, self.plain.ids))
            places[point] = encoded, sum_masses([encoded], coder)
        return places

    def _values(self, point: Hookpoint, features: Sequence[int]) -> tuple[float, ...]:
        """Return what clamp sets each feature to, or how far steer pushes along it."""
        if self.change.value is not None:
            return (self.change.value,) * len(features)
        if not self.change.takes_mean:
            return ()
        _, mass = self._encoded[point]
        means = mass.mean_active(features, self.change.phases)
        if self.change.kind == "clamp":
            return tuple(means)
        return tuple(mean * float(mass.norms[f]) for f, mean in zip(features, means, strict=True))

    def _run(self, targets: Mapping[Hookpoint, Sequence[int]], written: Written | None) -> Changed:
        """Let the model go on with features changed, and weigh the unchanged document under it."""
        interventions = [
            self.change.at(point, features, self._values(point, features))
            for point, features in sorted(targets.items())
        ]
        document = respond(
            self.model,
            self.engine,
            self.asked,
            self.config,
            interventions=interventions,
            coders=self.coders,
            written=written,
        )
        after = log_probabilities(self.model, self.plain, interventions, self.coders)
        return Changed(
            document,
            first_difference(self.plain.written, document.written),
            _by_phase(after - log_probabilities(self.model, self.plain), self.plain),
        )


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
    chosen = logits.float().log_softmax(-1).gather(1, ids[0, -count:, None])
    return chosen[:, 0].double().cpu()


def _by_phase(values: Float[Tensor, " written"], document: Document) -> dict[str, float]:
    at = document.phases[document.prompt_tokens :]
    sums = {"all": float(values.sum())}
    for phase in PHASES[1:]:
        if phase in at:
            sums[phase] = float(values[torch.tensor([name == phase for name in at])].sum())
    return sums
