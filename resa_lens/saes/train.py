"""Stage I: train an SAE at every layer in one pass over the data (paper, section 2.1, eq. 3 to 5).

sparsify's recipe: decoder rows of unit norm, b_dec from the first batch's mean, signum behind a
schedule-free average, or adam.  The arithmetic of a step is in step.py, its optimizers in optim.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resa_lens.activations import stream_activations
from resa_lens.errors import BadInputError, DivergedError
from resa_lens.hookpoints import DEFAULT_SITE, Hookpoint, site_named
from resa_lens.models import Model
from resa_lens.saes.coder import ACTIVATIONS, Coder, SparseCoder, encode, new_coder
from resa_lens.saes.optim import OPTIMIZERS, SCHEDULES, new_optimizer, rate_at
from resa_lens.saes.quality import measure_fvu
from resa_lens.saes.select import Encoder, batch_topk, half_precision, half_room
from resa_lens.saes.step import Loss, forward_step, gradients
from resa_lens.saes.world import ALONE, World

PAPER_LATENTS = 65_536
WIDE = 1024
"""From this width on the paper's sizes are the defaults; below it, a budget for a CPU."""
MODES = ("scratch", "finetune", "pretrained")
PARAMETERS = ("W_dec", "encoder.weight", "encoder.bias", "b_dec")


@dataclass(frozen=True)
class SaeConfig:
    """Training of one SAE a layer; None means the default of `for_width`."""

    site: str = DEFAULT_SITE
    latents: int | None = None
    """Dictionary size; 65,536 (paper, Table 7) from width 1,024 on, 16 x the width below."""
    k: int = 32
    """Active latents a token (Table 7); with BatchTopK, on average."""
    optimizer: str = "signum"
    """"signum" (Table 7) or "adam"."""
    learning_rate: float | None = None
    """2.5e-4 (Table 7) from width 1,024 on; below it sparsify's automatic rule
    5e-3 / sqrt(latents / 16384) (adam: 2e-4 in place of 5e-3)."""
    tokens: int | None = None
    """Training tokens; 5.9 M (the authors' code) from width 1,024 on, 200 k below."""
    batch: int | None = None
    """Sequences a step; 16 (Table 7) from width 1,024 on, 4 below."""
    dead_threshold: int = 1_000_000
    """Tokens without firing after which a latent is dead (Table 7), at most half of the run: a
    longer window than the run could never be reached."""
    seed: int = 0
    activation: str = "topk"
    """"topk" or "batchtopk"."""
    auxk_alpha: float = 0.0
    """Weight of the AuxK loss, which revives dead latents; 0 leaves it out (Table 7)."""
    multi_topk: bool = False
    """Add the FVU of a second reconstruction from the top 4k, at 1/8."""
    schedule: str = "constant"
    """Of the learning rate: "constant" (Table 7), "linear" or "cosine", both to zero."""
    warmup: int = 0
    """Steps over which the learning rate rises."""
    mode: str = "scratch"
    """"scratch", "finetune" (from a given SAE) or "pretrained" (the given SAE, no training)."""

    def for_width(self, d_model: int) -> SaeConfig:
        """Return the configuration with every default filled in for a model of this width.

        Raises:
            BadInputError: an impossible value.
        """
        wide = d_model >= WIDE
        latents = (
            (PAPER_LATENTS if wide else 16 * d_model) if self.latents is None else self.latents
        )
        scale = {"signum": 5e-3, "adam": 2e-4}.get(self.optimizer)
        if scale is None:
            known = " or ".join(OPTIMIZERS)
            raise BadInputError(f"optimizer {self.optimizer!r} is unknown; use {known}")
        for what, value, known in (
            ("activation", self.activation, ACTIVATIONS),
            ("schedule", self.schedule, SCHEDULES),
            ("mode", self.mode, MODES),
        ):
            if value not in known:
                raise BadInputError(f"{what} {value!r} is unknown; use {', '.join(known)}")
        if min(latents, self.k) < 1 or self.k > latents:
            raise BadInputError(f"k {self.k} with {latents} latents: k must be 1 to the latents")
        rate = self.learning_rate or (2.5e-4 if wide else scale / math.sqrt(latents / 2**14))
        full = replace(
            self,
            latents=latents,
            learning_rate=rate,
            tokens=(5_900_000 if wide else 200_000) if self.tokens is None else self.tokens,
            batch=(16 if wide else 4) if self.batch is None else self.batch,
        )
        site_named(full.site)
        if min(full.tokens or 0, full.batch or 0) < 1 or self.dead_threshold < 1:
            raise BadInputError("tokens, batch and the dead threshold must be positive")
        if min(self.auxk_alpha, self.warmup) < 0:
            raise BadInputError("the weight of AuxK and the warm-up may not be negative")
        return full


@dataclass(frozen=True)
class LayerQuality:
    """An SAE's quality on held-out sequences, and its training."""

    layer: int
    fvu: float
    """Fraction of variance unexplained on held-out sequences."""
    l0: float
    """Mean number of active latents a token."""
    dead_share: float
    """Share of latents that did not fire in the last tokens of the training."""
    fvu_train: float | None
    """Mean over the last tenth of the training; None without training."""


@dataclass(frozen=True)
class TrainedSaes:
    """The coders of one run and their quality."""

    coders: Mapping[Hookpoint, SparseCoder]
    quality: tuple[LayerQuality, ...]
    tokens: int
    dead_window: int
    """Tokens over which a latent had to fire once to be alive."""
    seconds: float
    resumed_at_tokens: int = 0
    """Where this call went on; 0 if it began anew."""
    losses: Mapping[int, Sequence[float]] | None = None
    """FVU of every step, by layer."""


class Store(Protocol):
    """Where a run's checkpoints lie (checkpoint.py)."""

    def load(self, trainers: Mapping[Hookpoint, LayerTrainer]) -> int:
        """Restore the newest checkpoint into the trainers; return the steps that it holds."""
        ...

    def keep(self, step: int, steps: int, trainers: Mapping[Hookpoint, LayerTrainer]) -> None:
        """Write a checkpoint if one is due after this step."""
        ...


class LayerTrainer:
    """One layer's coder with its optimizer and running figures."""

    def __init__(
        self,
        coder: Coder,
        config: SaeConfig,
        steps: int,
        *,
        started: bool = False,
        world: World = ALONE,
    ) -> None:
        self.coder, self.config, self.steps, self.world = coder, config, steps, world
        coder.requires_grad_(False)
        self.params = {name: coder.get_parameter(name).data for name in PARAMETERS}
        self.optimizer = new_optimizer(config.optimizer, self.params)
        self.loss = Loss(config.auxk_alpha, config.multi_topk)
        self.started = started
        """Whether b_dec is set: by the first batch's mean, or by the SAE that training goes on
        from."""
        self.fvus: list[float] = []
        self.tokens = 0
        self.since_fired = torch.zeros(
            coder.num_latents, dtype=torch.long, device=self.params["b_dec"].device
        )
        self.last: Tensor | None = None

    @property
    def window(self) -> int:
        """Tokens without firing after which a latent is dead: one that this run can reach."""
        planned = self.steps * self.tokens // max(1, len(self.fvus))
        return min(self.config.dead_threshold, max(1, planned // 2))

    def step(self, x: Float[Tensor, "row d_in"], half: Tensor | None = None) -> float:
        """Take one step on a batch of activations; return its FVU.

        Args:
            x: this rank's rows.
            half: room for the encoder's weights in bfloat16, shared between layers.
        """
        coder, world = self.coder, self.world
        if not self.started:
            mean = world.sum_(x.sum(0)) / (x.shape[0] * world.size)
            self.params["b_dec"].copy_(mean)
            self.optimizer.moved("b_dec")
            self.started = True
        coder.set_decoder_norm_to_unit_norm()
        dead = None
        if self.loss.auxk_alpha and self.fvus:
            dead = self.since_fired >= self.window
        encoder = self.params["encoder.weight"], self.params["encoder.bias"]
        found = forward_step(
            coder, x, self.loss, half=half_precision(*encoder, half), dead=dead, world=world
        )
        fvu = found.fvu.item()
        self.fvus.append(fvu)
        if not math.isfinite(fvu):
            return fvu
        assert self.config.learning_rate is not None
        number = len(self.fvus) - 1
        rate = rate_at(
            number, self.steps, self.config.learning_rate, self.config.schedule, self.config.warmup
        )
        self.optimizer.begin(rate)
        for name, gradient in gradients(coder, found, world):
            self.optimizer.update(name, gradient)
        self.tokens += x.shape[0] * world.size
        self.since_fired += x.shape[0] * world.size
        self.since_fired[found.fired] = 0
        if coder.cfg.activation == "batchtopk":
            self.last = x
        return fvu

    def tensors(self) -> dict[str, Tensor]:
        """Return all that a checkpoint must hold, to be written or copied into."""
        return {
            **self.params,
            **{f"optimizer.{k}": v for k, v in self.optimizer.tensors().items()},
            "since_fired": self.since_fired,
        }

    def scalars(self) -> dict[str, Any]:
        """Return the state that is no tensor."""
        return {
            "fvus": self.fvus,
            "tokens": self.tokens,
            "optimizer": self.optimizer.scalars(),
            "started": self.started,
        }

    def load_scalars(self, values: dict[str, Any]) -> None:
        """Put back what `scalars` gave."""
        self.fvus = [float(value) for value in values["fvus"]]
        self.tokens = int(values["tokens"])
        self.optimizer.load_scalars(values["optimizer"])
        self.started = bool(values["started"])

    @torch.no_grad()
    def finish(self) -> Coder:
        """Put the averaged weights in place, restore unit norm, set the threshold, freeze."""
        self.optimizer.finish()
        coder = self.coder
        assert coder.W_dec is not None
        # The average of unit vectors is shorter; moving the length to the encoder keeps the
        # reconstruction of each latent as it was trained.
        norm = coder.W_dec.norm(dim=1)
        coder.encoder.weight.mul_(norm[:, None])
        coder.encoder.bias.mul_(norm)
        coder.set_decoder_norm_to_unit_norm()
        if self.last is not None:
            # The smallest value that the final weights keep in the last batch: above it, k latents
            # a token are active on average.
            encoder = Encoder(coder.encoder.weight, coder.encoder.bias)
            kept = batch_topk(encoder, self.last - coder.b_dec, coder.cfg.k).values
            lowest = kept.min().item() if kept.numel() else 0.0
            values = [float(v) for v in self.world.gather(lowest)]  # pyright: ignore
            coder.threshold = sum(values) / len(values)
        return coder.requires_grad_(False)


def new_trainers(
    points: Sequence[Hookpoint],
    d_model: int,
    config: SaeConfig,
    steps: int,
    *,
    device: str = "cpu",
    initial: Mapping[Hookpoint, SparseCoder] | None = None,
    world: World = ALONE,
) -> dict[Hookpoint, LayerTrainer]:
    """Return a trainer for each hookpoint, deterministic by the configuration's seed."""
    assert config.latents is not None
    made = {}
    for point in points:
        coder = new_coder(
            d_model,
            config.latents,
            config.k,
            seed=config.seed * 10_007 + point.layer,
            device=device,
            activation=config.activation,
        )
        if initial is not None:
            coder.load_state_dict(initial[point].state_dict())
        made[point] = LayerTrainer(coder, config, steps, started=initial is not None, world=world)
    return made


def train_saes(
    model: Model,
    layers: Sequence[int],
    batches: Iterable[Int[Tensor, "batch position"]],
    held_out: Sequence[Int[Tensor, "batch position"]],
    config: SaeConfig,
    *,
    steps: int | None = None,
    advance: Callable[[int], None] = lambda done: None,
    initial: Mapping[Hookpoint, SparseCoder] | None = None,
    store: Store | None = None,
    world: World = ALONE,
    spread_layers: bool = False,
) -> TrainedSaes:
    """Train one SAE a layer, all in one pass: each batch goes through the model once.

    Args:
        model: the source model.
        layers: 0-based.
        batches: training sequences; with several ranks the same global batches on each.
        held_out: sequences for the quality figures, not among the training ones.
        config: with every default filled in (`for_width`).
        steps: batches that are coming, for schedules and checkpoints; counted if left out.
        advance: called with the steps done, after every step.
        initial: SAEs to go on from (mode finetune).
        store: checkpoints, to resume from and to write.
        world: the ranks that train together.
        spread_layers: give each rank some of the layers, in place of some of the rows.

    Raises:
        DivergedError: a loss that is not finite; the layer and step are named.
    """
    points = [Hookpoint(layer, config.site) for layer in layers]
    began = time.monotonic()
    if steps is None:
        batches = list(batches)
        steps = len(batches)
    mine = points[world.rank :: world.size] if spread_layers else points
    apart = ALONE if spread_layers else world
    trainers = new_trainers(
        mine, model.d_model, config, steps, device=model.device, initial=initial, world=apart
    )
    done = store.load(trainers) if store else 0
    resumed = max((trainer.tokens for trainer in trainers.values()), default=0)
    advance(done)
    half = half_room(config.latents or 0, model.d_model, model.device)
    parts = (world.part(ids) for ids in islice(batches, done, None))
    for batch in stream_activations(model, parts, points):
        for number, point in enumerate(points):
            x = batch.acts.pop(point).flatten(0, 1).float()
            if spread_layers:
                x = world.to_owner(x, number % world.size)
            if x is None:
                continue
            trainer = trainers[point]
            if not math.isfinite(trainer.step(x, half)):
                raise DivergedError(
                    f"SAE at layer {point.layer}: the loss is {trainer.fvus[-1]} at step {done}; "
                    f"lower the learning rate (now {config.learning_rate:.3g})"
                )
        done += 1
        advance(1)
        if store:
            store.keep(done, steps, trainers)
    if not done:
        raise BadInputError("the corpus gave no batch; use more records or fewer tokens a batch")
    coders = {point: trainer.finish() for point, trainer in trainers.items()}
    measured = measure_fvu(model, coders, held_out)
    # The last step's update was seen by no loss.
    for point, (fvu, _) in measured.items():
        if held_out and not fvu <= torch.finfo(torch.float32).max:
            raise DivergedError(
                f"SAE at layer {point.layer}: the FVU is {fvu} after the last step; "
                f"lower the learning rate (now {config.learning_rate:.3g})"
            )
    quality = tuple(
        LayerQuality(
            layer=point.layer,
            fvu=measured[point][0],
            l0=measured[point][1],
            dead_share=(trainer.since_fired >= trainer.window).float().mean().item(),
            fvu_train=sum(tail := trainer.fvus[-max(1, done // 10) :]) / len(tail),
        )
        for point, trainer in trainers.items()
    )
    return TrainedSaes(
        coders,
        quality,
        max(trainer.tokens for trainer in trainers.values()),
        next(iter(trainers.values())).window,
        time.monotonic() - began,
        resumed,
        {point.layer: tuple(trainer.fvus) for point, trainer in trainers.items()},
    )


def keep_pretrained(
    model: Model,
    points: Sequence[Hookpoint],
    given: Mapping[Hookpoint, SparseCoder],
    held_out: Sequence[Int[Tensor, "batch position"]],
) -> TrainedSaes:
    """Take SAEs as they are (mode pretrained): only their figures are measured.

    Their dead share is that of the held-out sequences, where rare latents do not fire.
    """
    began = time.monotonic()
    coders = {point: given[point] for point in points}
    fired = {p: torch.zeros(c.num_latents, dtype=torch.bool) for p, c in coders.items()}
    measured = measure_fvu(model, coders, held_out)
    for batch in stream_activations(model, held_out, points):
        for point, coder in coders.items():
            acts = encode(coder, batch.acts[point].flatten(0, 1).float(), exact=False)
            fired[point][acts.latents.cpu()] = True
    quality = tuple(
        LayerQuality(
            point.layer,
            *measured[point],
            dead_share=1 - fired[point].float().mean().item(),
            fvu_train=None,
        )
        for point in points
    )
    window = sum(ids.numel() for ids in held_out)
    seconds = time.monotonic() - began
    return TrainedSaes(coders, quality, 0, window, seconds)
