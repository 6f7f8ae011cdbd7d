"""Stage I: train an SAE at every layer in one pass over the data (paper, section 2.1, eq. 3 to 5).

sparsify's recipe: decoder rows of unit norm, b_dec from the first batch's mean, signum behind a
schedule-free average, or adam.  The arithmetic of a step is in step.py, its optimizers in optim.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resa_lens.errors import BadInputError, DivergedError
from resa_lens.machine import determinism
from resa_lens.models.activations import ordinary, special_ids, stream_activations
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model
from resa_lens.saes.allocation import Usage, check_places, under_used
from resa_lens.saes.coder import ACTIVATIONS, BATCH_TOPK, Coder, SparseCoder, encode, new_coder
from resa_lens.saes.config import SaeConfig as SaeConfig
from resa_lens.saes.optim import new_optimizer, rate_at
from resa_lens.saes.quality import measure_fvu
from resa_lens.saes.select import Encoder, batch_topk, half_precision, half_room
from resa_lens.saes.static import PLACES
from resa_lens.saes.step import Loss, forward_step, gradients
from resa_lens.saes.world import ALONE, World
from resa_lens.texts.corpora import Batches, Position

PARAMETERS = ("W_dec", "encoder.weight", "encoder.bias", "b_dec")


@dataclass(frozen=True)
class LayerQuality:
    """An SAE's quality on held-out sequences, and its training."""

    layer: int
    fvu: float
    """Fraction of variance unexplained on held-out sequences, without BOS, EOS and padding unless
    they were trained on."""
    l0: float
    """Mean number of active latents a token."""
    dead_share: float
    """Share of latents that did not fire in the last tokens of the training."""
    fvu_train: float | None
    """Mean over the last tenth of the training; None without training."""
    fvu_special: float | None = None
    """The FVU with BOS, EOS and padding among the tokens."""


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

    position: Sequence[int] | None
    """Where the corpus stands; a checkpoint holds it."""

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
        self.usage = Usage(config, int(coder.num_latents), self.params["b_dec"].device)
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
        rows = world.rows(x)
        if not self.fvus:
            check_places(replace(self.config, latents=coder.num_latents), rows)
        if not self.started:
            mean = world.sum_(x.sum(0)) / rows
            self.params["b_dec"].copy_(mean)
            self.optimizer.moved("b_dec")
            self.started = True
        coder.set_decoder_norm_to_unit_norm()
        dead = None
        if self.loss.auxk_alpha and self.fvus:
            dead = self.since_fired >= self.window
            if self.usage.density is not None:
                known = self.tokens >= self.window
                dead = under_used(self.usage.density) if known else None
        encoder = self.params["encoder.weight"], self.params["encoder.bias"]
        forward = partial(
            forward_step, coder, x, self.loss, half=half_precision(*encoder, half), dead=dead,
            world=world, shares=self.usage.places(rows),
        )  # fmt: skip
        alone = world.size == 1 or coder.cfg.activation == "topk"
        fixed = alone and coder.cfg.activation in PLACES
        figures = forward(places=fixed and not determinism.on_cpu(x))
        # The one look at the device in a step.
        if figures.overflow is None:
            fvu = figures.fvu.item()
        else:
            fvu, overflow = torch.stack([figures.fvu, figures.overflow.float()]).tolist()
            if overflow:
                figures = forward()
                fvu = figures.fvu.item()
        self.fvus.append(fvu)
        if not math.isfinite(fvu):
            return fvu
        assert self.config.learning_rate is not None
        number = len(self.fvus) - 1
        rate = rate_at(
            number, self.steps, self.config.learning_rate, self.config.schedule, self.config.warmup
        )
        self.optimizer.begin(rate)
        for name, gradient in gradients(coder, figures, world):
            self.optimizer.update(name, gradient)
            # Or it would live on while the next one is made, which may be as large.
            del gradient
        self.tokens += rows
        self.since_fired += rows
        self.since_fired.masked_fill_(figures.fired, 0)
        counts = None
        if self.usage.density is not None:
            latents = figures.terms[0].active.latents
            counts = world.sum_(torch.bincount(latents, minlength=int(coder.num_latents)))
        self.usage.note(counts, figures.chosen, rows, len(self.fvus), self.window)
        if coder.cfg.activation != "topk":
            self.last = x
        return fvu

    def tensors(self) -> dict[str, Tensor]:
        """Return all that a checkpoint must hold, to be written or copied into."""
        return {
            **self.params,
            **{f"optimizer.{k}": v for k, v in self.optimizer.tensors().items()},
            "since_fired": self.since_fired,
            **self.usage.tensors(),
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
        if self.last is not None and ACTIVATIONS[coder.cfg.activation] is BATCH_TOPK:
            coder.threshold = self._threshold(Encoder(coder.encoder.weight, coder.encoder.bias))
        elif self.usage.lowest is not None:
            level = self.usage.lowest * norm
            if self.last is not None:
                # One number scales them all, so that k latents a token are active in the last
                # batch; a latent that took all it could get has no level to scale.
                unit = level.clamp_min(1e-6 * level.max().clamp_min(1e-30))
                weight, bias = coder.encoder.weight / unit[:, None], coder.encoder.bias / unit
                level = unit * self._threshold(Encoder(weight, bias))
            coder.threshold = level
        return coder.requires_grad_(False)

    def _threshold(self, encoder: Encoder) -> float:
        """Return the smallest value that is kept of the last batch, k latents a token."""
        assert self.last is not None
        kept = batch_topk(encoder, self.last - self.coder.b_dec, self.coder.cfg.k).values
        lowest = kept.min().item() if kept.numel() else 0.0
        values = [float(v) for v in self.world.gather(lowest)]  # pyright: ignore
        return sum(values) / len(values)


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
    by_point = {}
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
        by_point[point] = LayerTrainer(
            coder, config, steps, started=initial is not None, world=world
        )
    return by_point


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
    special = torch.tensor([], dtype=torch.long) if config.include_special else special_ids(model)
    kept: list[Tensor] = []

    if isinstance(batches, Batches) and store and store.position:
        batches.go_on(done, Position(*store.position))
        remaining = batches
    else:
        remaining = islice(batches, done, None)

    def parts() -> Iterator[Tensor]:
        for ids in remaining:
            mine = world.part(ids)
            kept[:] = [ordinary(ids if spread_layers else mine, special)]
            yield mine

    for batch in stream_activations(model, parts(), points):
        for number, point in enumerate(points):
            x = batch.acts.pop(point).flatten(0, 1).float()
            if spread_layers:
                x = world.to_owner(x, number % world.size)
            if x is None:
                continue
            if not kept[0].all():
                x = x[kept[0].to(x.device)]
            trainer = trainers[point]
            if not math.isfinite(trainer.step(x, half)):
                raise DivergedError(
                    f"SAE at layer {point.layer}: the loss is {trainer.fvus[-1]} at step {done}; "
                    f"lower the learning rate (now {config.learning_rate:.3g})"
                )
        done += 1
        advance(1)
        if store:
            if isinstance(batches, Batches):
                store.position = batches.position
            store.keep(done, steps, trainers)
    if not done:
        raise BadInputError("the corpus gave no batch; use more records or fewer tokens a batch")
    coders = {point: trainer.finish() for point, trainer in trainers.items()}
    measured = measure_fvu(model, coders, held_out, include_special=config.include_special)
    mixed = any(not ordinary(ids, special).all() for ids in held_out)
    whole = measure_fvu(model, coders, held_out, include_special=True) if mixed else measured
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
            fvu_special=whole[point][0],
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
    whole = measure_fvu(model, coders, held_out, include_special=True)
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
            fvu_special=whole[point][0],
        )
        for point in points
    )
    window = sum(ids.numel() for ids in held_out)
    seconds = time.monotonic() - began
    return TrainedSaes(coders, quality, 0, window, seconds)
