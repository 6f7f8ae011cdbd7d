"""Stage I: train an SAE at every layer in one pass over the data (paper, section 2.1, eq. 3 to 5).

sparsify's coder and its recipe: decoder rows of unit norm, b_dec from the first batch's mean,
signum behind a schedule-free average, or adam.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from resa_lens.activations import stream_activations
from resa_lens.errors import BadInputError, RunFailedError
from resa_lens.hookpoints import DEFAULT_SITE, Hookpoint, site_named
from resa_lens.models import Model, quiet
from resa_lens.saes.coder import SparseCoder, new_coder

with quiet():
    from schedulefree import ScheduleFreeWrapper
    from sparsify.sign_sgd import SignSGD

PAPER_LATENTS = 65_536
WIDE = 1024
"""From this width on the paper's sizes are the defaults; below it, a budget for a CPU."""


@dataclass(frozen=True)
class SaeConfig:
    """Training of one SAE a layer; None means the default of `for_width`."""

    site: str = DEFAULT_SITE
    latents: int | None = None
    """Dictionary size; 65,536 (paper, Table 7) from width 1,024 on, 16 x the width below."""
    k: int = 32
    """Active latents a token (Table 7)."""
    optimizer: str = "signum"
    """"signum" (Table 7) or "adam"."""
    learning_rate: float | None = None
    """Constant.  2.5e-4 (Table 7) from width 1,024 on; below it sparsify's automatic rule
    5e-3 / sqrt(latents / 16384) (adam: 2e-4 in place of 5e-3)."""
    tokens: int | None = None
    """Training tokens; 5.9 M (the authors' code) from width 1,024 on, 200 k below."""
    batch: int | None = None
    """Sequences a step; 16 (Table 7) from width 1,024 on, 4 below."""
    dead_threshold: int = 1_000_000
    """Tokens without firing after which a latent is dead (Table 7), at most half of the run."""
    seed: int = 0

    def for_width(self, d_model: int) -> SaeConfig:
        """Return the configuration with every default filled in for a model of this width.

        Raises:
            BadInputError: an impossible value.
        """
        wide = d_model >= WIDE
        latents = self.latents or (PAPER_LATENTS if wide else 16 * d_model)
        scale = {"signum": 5e-3, "adam": 2e-4}.get(self.optimizer)
        if scale is None:
            raise BadInputError(f"optimizer {self.optimizer!r} is unknown; use signum or adam")
        rate = self.learning_rate or (2.5e-4 if wide else scale / math.sqrt(latents / 2**14))
        full = replace(
            self,
            latents=latents,
            learning_rate=rate,
            tokens=self.tokens or (5_900_000 if wide else 200_000),
            batch=self.batch or (16 if wide else 4),
        )
        site_named(full.site)
        if min(full.tokens or 0, full.batch or 0, full.k, latents) < 1:
            raise BadInputError("tokens, batch, k and latents must be positive")
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
    fvu_train: float
    """Mean over the last tenth of the training."""


@dataclass(frozen=True)
class TrainedSaes:
    """The coders of one run and their quality."""

    coders: dict[Hookpoint, SparseCoder]
    quality: tuple[LayerQuality, ...]
    tokens: int
    dead_window: int
    """Tokens over which a latent had to fire once to be alive."""
    seconds: float


class _LayerTrainer:
    """One layer's coder with its optimizer and running figures."""

    def __init__(self, coder: SparseCoder, config: SaeConfig) -> None:
        self.coder = coder
        rate = float(config.learning_rate or 0)
        self.optimizer: torch.optim.Optimizer | ScheduleFreeWrapper
        if config.optimizer == "signum":
            inner = SignSGD(coder.parameters(), lr=rate)
            self.optimizer = ScheduleFreeWrapper(inner, momentum=0.95)
            self.optimizer.train()
        else:
            self.optimizer = torch.optim.Adam(coder.parameters(), lr=rate)
        self.started = False
        self.fvus: list[float] = []
        self.since_fired = torch.zeros(coder.num_latents, dtype=torch.long)

    def step(self, x: Float[Tensor, "row d_in"]) -> None:
        """Take one step on a batch of activations."""
        coder = self.coder
        if not self.started:
            coder.b_dec.data = x.mean(0)
            self.started = True
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x)
        fvu = out.fvu
        fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.fvus.append(fvu.item())
        self.since_fired += x.shape[0]
        fired = out.latent_indices[out.latent_acts > 0]
        self.since_fired[fired.cpu()] = 0

    def finish(self) -> SparseCoder:
        """Switch to the averaged weights, restore unit norm, freeze."""
        if isinstance(self.optimizer, ScheduleFreeWrapper):
            self.optimizer.eval()
        with torch.no_grad():
            # The average of unit vectors is shorter; moving the length to the encoder keeps
            # the reconstruction of each latent as it was trained.
            assert self.coder.W_dec is not None
            norm = self.coder.W_dec.norm(dim=1)
            self.coder.encoder.weight.mul_(norm[:, None])
            self.coder.encoder.bias.mul_(norm)
            self.coder.set_decoder_norm_to_unit_norm()
        return self.coder.requires_grad_(False)


def train_saes(
    model: Model,
    layers: Sequence[int],
    batches: Iterable[Int[Tensor, "batch position"]],
    held_out: Sequence[Int[Tensor, "batch position"]],
    config: SaeConfig,
    *,
    advance: Callable[[int], None] = lambda done: None,
    on_probe: Callable[[float], None] = lambda seconds: None,
) -> TrainedSaes:
    """Train one SAE a layer, all in one pass: each batch goes through the model once.

    Args:
        model: the source model.
        layers: 0-based.
        batches: training sequences.
        held_out: sequences for the quality figures, not among the training ones.
        config: with every default filled in (`for_width`).
        advance: called with 1 after every step.
        on_probe: called once with the seconds of the second step, for a forecast.

    Raises:
        RunFailedError: a loss that is not finite; the layer and step are named.
    """
    points = [Hookpoint(layer, config.site) for layer in layers]
    assert config.latents is not None
    began = time.monotonic()
    trainers = {
        point: _LayerTrainer(
            new_coder(
                model.d_model,
                config.latents,
                config.k,
                seed=config.seed * 10_007 + point.layer,
                device=model.device,
            ),
            config,
        )
        for point in points
    }
    tokens = steps = 0
    mark = began
    for batch in stream_activations(model, batches, points):
        for point, trainer in trainers.items():
            trainer.step(batch.acts[point].flatten(0, 1).float())
            if not math.isfinite(trainer.fvus[-1]):
                raise RunFailedError(
                    f"SAE at layer {point.layer}: the loss is {trainer.fvus[-1]} at step {steps}; "
                    f"lower the learning rate (now {config.learning_rate:.3g})"
                )
        tokens += batch.ids.numel()
        steps += 1
        advance(1)
        if steps == 2:
            on_probe(time.monotonic() - mark)
        mark = time.monotonic()
    if not steps:
        raise BadInputError("the corpus gave no batch; use more records or fewer tokens a batch")
    window = min(config.dead_threshold, max(1, tokens // 2))
    coders = {point: trainer.finish() for point, trainer in trainers.items()}
    measured = measure_fvu(model, coders, held_out)
    # The last step's update was seen by no loss.
    for point, (fvu, _) in measured.items():
        if held_out and not math.isfinite(fvu):
            raise RunFailedError(
                f"SAE at layer {point.layer}: the FVU is {fvu} after the last step; "
                f"lower the learning rate (now {config.learning_rate:.3g})"
            )
    quality = tuple(
        LayerQuality(
            layer=point.layer,
            fvu=measured[point][0],
            l0=measured[point][1],
            dead_share=(trainer.since_fired >= window).float().mean().item(),
            fvu_train=sum(tail := trainer.fvus[-max(1, steps // 10) :]) / len(tail),
        )
        for point, trainer in trainers.items()
    )
    return TrainedSaes(coders, quality, tokens, window, time.monotonic() - began)


@torch.no_grad()
def measure_fvu(
    model: Model,
    coders: dict[Hookpoint, SparseCoder],
    batches: Iterable[Int[Tensor, "batch position"]],
) -> dict[Hookpoint, tuple[float, float]]:
    """Return (FVU, L0) a hookpoint over all the sequences; NaN where there was none.

    FVU = sum |x - x~|^2 / sum |x - mean(x)|^2, the mean over all tokens given.
    """
    sums: dict[Hookpoint, dict[str, Tensor | float]] = {}
    for batch in stream_activations(model, batches, list(coders)):
        for point, coder in coders.items():
            x = batch.acts[point].flatten(0, 1).float()
            found = coder.encode(x)
            error = (x - coder.decode(found.top_acts, found.top_indices)).pow(2).sum().item()
            held = sums.setdefault(
                point, {"n": 0.0, "x": torch.zeros(x.shape[1]), "xx": 0.0, "e": 0.0, "l0": 0.0}
            )
            held["n"] += x.shape[0]
            held["x"] += x.sum(0).double().cpu()
            held["xx"] += x.double().pow(2).sum().item()
            held["e"] += error
            held["l0"] += (found.top_acts > 0).sum().item()
    result = dict.fromkeys(coders, (math.nan, math.nan))
    for point, held in sums.items():
        mean = held["x"] / held["n"]
        assert isinstance(mean, Tensor)
        variance = float(held["xx"]) - float(held["n"]) * mean.pow(2).sum().item()
        result[point] = (
            float(held["e"]) / max(variance, 1e-12),
            float(held["l0"]) / float(held["n"]),
        )
    return result
