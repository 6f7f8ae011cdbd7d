"""Interventions on SAE features of a running model, and random features to compare them with.

With z the active latents of x, d_i the decoder rows, F the chosen features and s the strength, a
token's activation x gives way to

    x' = x + sum_F (z'_i - z_i) d_i                      with the error term (x - SAE(x)) kept,
    x' = SAE(x) + sum_F (z'_i - z_i) d_i                 without it,

    ablate    z'_i = (1 - s) z_i                         s = 1 removes the features
    scale     z'_i = (1 + s) z_i                         s = 1 doubles them
    clamp     z'_i = (1 - s) z_i + s v_i                 s = 1 sets them to v_i, active or not
    steer     sum_F s v_i d_i / |d_i| in place of the sum above: a push of length s v_i, wherever

Strength 0 is the identity of every kind.  With the error term kept the model is then left alone, to
the last bit; without it the SAE's reconstruction stands in place of x at every strength.

Nothing here is dense in the latents: one encoding of the chosen tokens, and the listed features'
decoder rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from resa_lens.errors import BadInputError, RunFailedError
from resa_lens.features.checks import check_features
from resa_lens.models.activations import check_hookpoints, stream_activations
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model
from resa_lens.saes.coder import SparseActs, SparseCoder, decode, encode
from resa_lens.saes.kernels import row_starts, weighted_rows
from resa_lens.texts.phases import PHASES, PhasedBatch

KINDS: dict[str, str] = {
    "ablate": "z' = (1 - strength) z",
    "scale": "z' = (1 + strength) z",
    "clamp": "z' = (1 - strength) z + strength value",
    "steer": "x' = x + strength value d / |d|",
}
"""What a kind does to a feature; strength 0 changes nothing."""
PLACES = ("all", "first")
"""Tokens that are changed: all of the phases, or the first generated token alone.

The first generated token is chosen from the output at the prompt's last position, so that is the
position changed by "first": once, in the pass that reads the prompt.  What later tokens know of it
they know through the keys and values of that position, with a cache or without one.  arXiv
2601.08058 steers early in generation; that its first token is this position is our reading.
"""
VALUED = ("clamp", "steer")
"""Kinds that need a value a feature."""
POOL = 20
"""A control feature is drawn among so many nearest ones."""
TRIES = 256
"""Sets that are made for each control at most; the nearest is kept."""
ATTEMPTS = 20
"""To draw a set that was not drawn before."""


@dataclass(frozen=True)
class Intervention:
    """A change of some features at one place, at the tokens of some phases."""

    point: Hookpoint
    features: tuple[int, ...]
    kind: str = "ablate"
    """A name in `KINDS`."""
    strength: float = 1.0
    """0 is the identity."""
    phases: tuple[str, ...] = PHASES
    """Names in `PHASES`: the tokens that are changed."""
    keep_error: bool = True
    """Whether what the SAE does not explain stays in x."""
    values: tuple[float, ...] = ()
    """One a feature; what clamp sets it to, or how long steer's push is at strength 1."""
    at: str = "all"
    """A name in `PLACES`."""

    def __post_init__(self) -> None:
        """Check what can be checked without the SAE.

        Raises:
            BadInputError: no or a repeated feature, an unknown kind or phase, a strength or value
                that is not finite, or values where none belong.
        """
        if self.kind not in KINDS:
            raise BadInputError(f"kind {self.kind!r} is unknown; use {', '.join(KINDS)}")
        if not self.features:
            raise BadInputError("no feature was given; name at least one")
        if len(set(self.features)) != len(self.features):
            twice = next(f for f in self.features if self.features.count(f) > 1)
            raise BadInputError(f"feature {twice} stands twice; name each once")
        if unknown := [phase for phase in self.phases if phase not in PHASES]:
            raise BadInputError(f"phase {unknown[0]!r} is unknown; use {', '.join(PHASES)}")
        if self.at not in PLACES:
            raise BadInputError(f"place {self.at!r} is unknown; use {' or '.join(PLACES)}")
        if not self.phases:
            raise BadInputError(f"no phase was given; use {', '.join(PHASES)}")
        if not math.isfinite(self.strength):
            raise BadInputError(f"strength {self.strength} is not finite; 0 is the identity")
        wanted = len(self.features) if self.kind in VALUED else 0
        if len(self.values) != wanted or not all(map(math.isfinite, self.values)):
            raise BadInputError(
                f"kind {self.kind!r} takes {wanted} finite values for {len(self.features)} "
                f"features; got {', '.join(map(str, self.values)) or 'none'}"
            )

    @property
    def identity(self) -> bool:
        """Whether x' is x."""
        return self.strength == 0 and self.keep_error


def check_interventions(
    model: Model, interventions: Sequence[Intervention], coders: Mapping[Hookpoint, SparseCoder]
) -> None:
    """Raise BadInputError where an intervention does not fit the model or its SAE."""
    for wanted in interventions:
        point = wanted.point
        check_hookpoints(model, [point])
        check_features(model, point, wanted.features, coders)


class Tracker:
    """Holds the phases of the tokens that the model reads next.

    An engine fills it before each forward pass (`HFEngine.generate(hooks=...)`); for a pass over
    whole documents their phases are given, and where interventions act at the first generated token
    alone, the last positions of the prompts.
    """

    def __init__(
        self,
        phases: Int[Tensor, "row position"] | None = None,
        first: Bool[Tensor, "row position"] | None = None,
    ) -> None:
        self.phases = phases
        self.first = first
        """The positions whose output decides the first generated token."""

    def before_forward(
        self,
        rows: Sequence[int],
        positions: Int[Tensor, "row position"],
        phases: Int[Tensor, "row position"],
    ) -> None:
        """Take note of the next inputs' phases; -1 is left alone."""
        self.phases = phases
        self.first = torch.zeros_like(phases, dtype=torch.bool)
        # Prompts begin at position 0 and are padded on the left; what is generated never begins.
        if bool((positions == 0).any()):
            self.first[:, -1] = True


def listed(acts: SparseActs, features: Int[Tensor, " feature"]) -> SparseActs:
    """Return the pairs of some features alone."""
    keep = torch.isin(acts.latents, features)
    return acts._replace(rows=acts.rows[keep], latents=acts.latents[keep], values=acts.values[keep])


def weighted_decoder(coder: SparseCoder, acts: SparseActs) -> Float[Tensor, "row d_in"]:
    """Return sum z_i d_i of each row, without the decoder's bias."""
    assert coder.W_dec is not None, "the coder was loaded without its decoder"
    starts = row_starts(acts.rows, acts.n_rows)
    return weighted_rows(coder.W_dec, starts, acts.latents, acts.values)


@torch.no_grad()
def intervene(
    x: Float[Tensor, "row d_in"], coder: SparseCoder, wanted: Intervention
) -> Float[Tensor, "row d_in"]:
    """Return x' for every row; `Intervention.phases` is not looked at here."""
    if wanted.identity or not len(x):
        return x
    assert coder.W_dec is not None, "the coder was loaded without its decoder"
    full = x.to(coder.dtype)
    index = torch.tensor(wanted.features, device=x.device)
    acts = None
    if wanted.kind != "steer" or not wanted.keep_error:
        acts = encode(coder, full)
    made = full if wanted.keep_error or acts is None else decode(coder, acts)
    # Every kind is a gain on the features' own part, and for two a constant beside it.
    gain = {"ablate": -1.0, "scale": 1.0, "clamp": -1.0, "steer": 0.0}[wanted.kind]
    if gain and acts is not None:
        made = made + gain * wanted.strength * weighted_decoder(coder, listed(acts, index))
    if wanted.values:
        rows = coder.W_dec[index]
        if wanted.kind == "steer":
            # A dead latent's row may be zero: it pushes nowhere.
            rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
        values = torch.tensor(wanted.values, dtype=rows.dtype, device=x.device)
        made = made + wanted.strength * (values @ rows)
    return made.to(x.dtype)


def _edit(
    acts: Float[Tensor, "row position d_model"],
    hook: object = None,
    *,
    wanted: Intervention,
    coder: SparseCoder,
    tracker: Tracker,
) -> Float[Tensor, "row position d_model"]:
    phases = tracker.phases
    if phases is None or phases.shape != acts.shape[:2]:
        told = "nothing" if phases is None else f"{tuple(phases.shape)}"
        raise RunFailedError(
            f"the model reads {tuple(acts.shape[:2])} tokens and the tracker was told {told}; "
            "pass it to the engine as hooks"
        )
    phases = phases.to(acts.device)
    chosen = torch.isin(
        phases, torch.tensor([PHASES.index(p) for p in wanted.phases], device=acts.device)
    )
    if wanted.at == "first":
        if tracker.first is None:
            raise RunFailedError(
                "the tracker does not know where the prompts end; give it their last positions"
            )
        chosen = chosen & tracker.first.to(acts.device)
    if not chosen.any():
        return acts
    made = acts.clone()
    made[chosen] = intervene(acts[chosen], coder, wanted)
    return made


@contextmanager
def intervening(
    model: Model,
    interventions: Sequence[Intervention],
    coders: Mapping[Hookpoint, SparseCoder],
    tracker: Tracker,
) -> Iterator[Tracker]:
    """Let a model run with interventions: generation with a cache, or whole documents.

    Several at one place act one after the other, in the order given: the second encodes what the
    first made.  An intervention that is the identity puts no hook on the model.  No gradient flows
    through a token that is changed.

    Args:
        model: the host; its bridge is booted, so that places are those of every other stage.
        interventions: what is changed.
        coders: the SAEs, by place, with their decoders.
        tracker: knows the phases of the inputs of each forward pass.

    Raises:
        BadInputError: no SAE at the place, another width, or a feature out of range.
    """
    check_interventions(model, interventions, coders)
    hooks = [
        (
            wanted.point.transformer_lens,
            partial(_edit, wanted=wanted, coder=coders[wanted.point], tracker=tracker),
        )
        for wanted in interventions
        if not wanted.identity
    ]
    with model.bridge.hooks(fwd_hooks=hooks):
        yield tracker


# Random features of the same activation mass


@dataclass(frozen=True)
class FeatureMass:
    """How much each feature does on some text, by phase; sums of two texts add."""

    sums: Float[Tensor, "phase d_sae"]
    """Sum of z |d| over the phase's tokens: the length of what ablation takes away."""
    active: Float[Tensor, "phase d_sae"]
    """Tokens with z above 0."""
    norms: Float[Tensor, " d_sae"]
    """|d|."""
    tokens: Int[Tensor, " phase"]

    def __add__(self, other: FeatureMass) -> FeatureMass:
        """Return the masses on both texts."""
        return FeatureMass(
            self.sums + other.sums,
            self.active + other.active,
            self.norms,
            self.tokens + other.tokens,
        )

    def mean_active(self, features: Sequence[int], phases: Sequence[str] = PHASES) -> list[float]:
        """Return each feature's mean activation over the tokens where it is active; 0 for none."""
        at, index = _phase_indices(phases), list(features)
        sums, active = self.sums[at][:, index].sum(0), self.active[at][:, index].sum(0)
        return (sums / (self.norms[index] * active).clamp_min(1e-30)).tolist()


def _phase_indices(phases: Sequence[str]) -> list[int]:
    return sorted({PHASES.index(phase) for phase in phases})


def mass_of(
    acts: SparseActs, phases: Int[Tensor, " row"], norms: Float[Tensor, " d_sae"]
) -> FeatureMass:
    """Return the mass of the features in one batch of rows; norms are the decoder rows' lengths."""
    rows, latents = acts.rows.cpu(), acts.latents.cpu()
    values = acts.values.double().cpu()
    place = phases.cpu()[rows] * acts.d_sae + latents
    size = len(PHASES) * acts.d_sae
    shape = (len(PHASES), acts.d_sae)
    # top-k may hold latents of value 0.
    return FeatureMass(
        torch.bincount(place, values * norms[latents], size).view(shape),
        torch.bincount(place, (values > 0).double(), size).view(shape),
        norms,
        torch.bincount(phases.cpu(), minlength=len(PHASES)),
    )


class EncodedBatch(NamedTuple):
    """A batch of documents and the active latents at its tokens."""

    batch: PhasedBatch
    acts: SparseActs


def encode_batches(
    model: Model, point: Hookpoint, coder: SparseCoder, batches: Sequence[PhasedBatch]
) -> Iterator[EncodedBatch]:
    """Yield the active latents of each batch; row r x position + p is document r's token p."""
    stream = stream_activations(model, (batch.ids for batch in batches), [point])
    for batch, read in zip(batches, stream, strict=True):
        yield EncodedBatch(batch, encode(coder, read.acts[point].flatten(0, 1).to(coder.dtype)))


@dataclass(frozen=True)
class Control:
    """Random features that stand beside the chosen ones; ratios are theirs over the chosen ones'.

    None where the chosen features are never active there.
    """

    features: tuple[int, ...]
    mass: dict[str, float | None]
    """By phase and "all": sum of z |d|."""
    active: float | None
    """Pairs of a token and an active feature."""
    removed: float | None
    """Mean length of sum z d over the tokens, which also knows how directions cancel."""


def matched_controls(
    mass: FeatureMass,
    features: Sequence[int],
    *,
    draws: int,
    seed: int = 0,
    phases: Sequence[str] = PHASES,
) -> list[tuple[int, ...]]:
    """Draw sets of random features as many and as active as the given ones.

    The distance of two features, and of two sets, is the relative difference of mass summed over
    the phases, and likewise of active tokens:

        sum_p |m_p - t_p| / sum_p t_p  +  sum_p |a_p - b_p| / sum_p b_p

    A draw makes some sets in which each given feature gives way to one of the `POOL` nearest that
    are still free, keeps the nearest set and, of three features or more, exchanges single ones
    where that brings it nearer.  For one feature it is one of the `POOL` nearest.  Sets differ
    where there are enough of them.

    Raises:
        BadInputError: fewer other features than given ones.
    """
    d_sae, count = mass.sums.shape[1], len(features)
    if d_sae - count < count:
        raise BadInputError(
            f"{count} of {d_sae} features leave no {count} others to compare with; name fewer"
        )
    at = _phase_indices(phases)
    profile = np.stack([mass.sums[at].numpy(), mass.active[at].numpy()])  # [2, phase, d_sae]
    wanted = profile[:, :, list(features)]
    free = np.setdiff1d(np.arange(d_sae), list(features))
    length = min(len(free), POOL + count)
    nearest = np.empty((count, length), dtype=np.int64)
    for row in range(count):
        distance = _distance(profile[:, :, free], wanted[:, :, row, None])
        nearest[row] = free[np.argsort(distance, kind="stable")[:length]]
    made: list[tuple[int, ...]] = []
    for draw in range(draws):
        for attempt in range(ATTEMPTS):
            drawn = _draw(profile, wanted, nearest, np.random.default_rng([seed, draw, attempt]))
            if drawn not in made or attempt == ATTEMPTS - 1:
                made.append(drawn)
                break
    return made


def _draw(
    profile: np.ndarray, wanted: np.ndarray, nearest: np.ndarray, rng: np.random.Generator
) -> tuple[int, ...]:
    count = len(nearest)
    # Of the sets that there are, a twentieth at most: the nearest of all would be the same always.
    chosen = np.full((min(TRIES, POOL ** (count - 1)), count), -1)
    for row in rng.permutation(count):
        used = (nearest[row][None, :, None] == chosen[:, None, :]).any(-1)
        open_ = ~used & (np.cumsum(~used, axis=1) <= POOL)
        pick = np.argmax(open_ * (0.5 + rng.random(open_.shape)), axis=1)
        chosen[:, row] = nearest[row][pick]
    total = wanted.sum(-1)[:, :, None]
    best = chosen[np.argmin(_distance(profile[:, :, chosen].sum(-1), total))]
    # One sweep of single exchanges: a feature without an equal leaves a gap that others fill.
    for row in rng.permutation(count) if count > 2 else ():
        rest = np.delete(best, row)
        # Its own place is first: of equals it stays.
        open_ = np.append(best[row], nearest[row][~np.isin(nearest[row], best)][:POOL])
        sums = profile[:, :, rest].sum(-1)[:, :, None] + profile[:, :, open_]
        best[row] = open_[np.argmin(_distance(sums, total))]
    return tuple(sorted(best.tolist()))


def _distance(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Distance as in `matched_controls`; [2, phase, candidate] and [2, phase, 1]."""
    scale = np.maximum(wanted.sum(1), 1e-12)
    return (np.abs(found - wanted).sum(1) / scale).sum(0)


def describe_controls(
    encoded: Sequence[EncodedBatch],
    coder: SparseCoder,
    features: Sequence[int],
    sets: Sequence[tuple[int, ...]],
    phases: Sequence[str] = PHASES,
) -> list[Control]:
    """Say how near each set comes to the features, on the text that it was matched on."""
    total = sum_masses(encoded, coder)
    at = _phase_indices(phases)
    removed = np.zeros(1 + len(sets))
    for batch, acts in encoded:
        inside = torch.isin(batch.phases.flatten(), torch.tensor(at)).to(acts.rows.device)
        for place, chosen in enumerate([tuple(features), *sets]):
            index = torch.tensor(chosen, device=acts.rows.device)
            lengths = weighted_decoder(coder, listed(acts, index)).norm(dim=1)
            removed[place] += lengths[inside].double().sum().item()

    def mass(chosen: Sequence[int], where: list[int]) -> float:
        return float(total.sums[where][:, list(chosen)].sum())

    def active(chosen: Sequence[int]) -> float:
        return float(total.active[at][:, list(chosen)].sum())

    def ratio(own: float, target: float) -> float | None:
        return own / target if target > 0 else None

    return [
        Control(
            chosen,
            {
                **{PHASES[p]: ratio(mass(chosen, [p]), mass(features, [p])) for p in at},
                "all": ratio(mass(chosen, at), mass(features, at)),
            },
            ratio(active(chosen), active(features)),
            ratio(float(removed[1 + place]), float(removed[0])),
        )
        for place, chosen in enumerate(sets)
    ]


def sum_masses(encoded: Sequence[EncodedBatch], coder: SparseCoder) -> FeatureMass:
    """Return the masses over all batches.

    Raises:
        BadInputError: there is no batch.
    """
    if not encoded:
        raise BadInputError("no document was given; activation masses need at least one")
    assert coder.W_dec is not None, "the coder was loaded without its decoder"
    norms = coder.W_dec.norm(dim=1).double().cpu()
    # One after the other: of 65,536 latents each batch's mass is 3 MB.
    masses = (mass_of(acts, batch.phases.flatten(), norms) for batch, acts in encoded)
    return reduce(FeatureMass.__add__, masses)
