"""The training loop of every tuning: one optimizer, schedule, log, state and resume for all losses.

An update takes `accumulation` batches; its gradient is the mean over them.  With several processes
each takes its share of these batches and the gradients are summed, so the update is the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resa_lens.config import check_value, result_fields
from resa_lens.errors import BadInputError, RunFailedError
from resa_lens.files import run_lock
from resa_lens.saes.checkpoint import restore_threads
from resa_lens.saes.world import ALONE, PATIENCE, World
from resa_lens.tuning.collapse import CollapseWatch
from resa_lens.tuning.config import Schedule
from resa_lens.tuning.config import TuneConfig as TuneConfig
from resa_lens.tuning.log import LOG, Log, memory_mb
from resa_lens.tuning.state import Course, TuningState, own_draws, seed_batch, write_whole

Metrics = Mapping[str, float | Tensor]
LossOf = Callable[[Any], tuple[Tensor, Metrics]]


@dataclass(frozen=True)
class TuneResult:
    """The course of one tuning."""

    steps: int
    """Updates."""
    tokens: int
    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    trainable: int
    """Trainable parameters."""
    seconds: float
    resumed_at: int = 0
    """Updates that an earlier call had made; 0 if this one began anew."""
    collapsed_at: int = 0
    """The update after which the model had collapsed; 0 where it did not."""
    kept_step: int = 0
    """After a collapse, the update whose adapters are kept."""


def join_processes(device: str) -> World:
    """Join the processes started by `accelerate launch` (or torchrun); alone without them.

    accelerate forms the group.  Its `prepare` is not used: it wraps the model for one forward pass
    an update, and the loss of SAE-Tuning takes two, through the bridge.
    """
    from accelerate import PartialState

    state = PartialState(cpu=not device.startswith("cuda"), timeout=PATIENCE)
    return World(state.process_index, state.num_processes)


def check_accumulation(config: TuneConfig, world: World) -> None:
    """Check that the batches of an update divide among the processes.

    Raises:
        BadInputError: they do not.
    """
    if config.accumulation % world.size:
        raise BadInputError(
            f"an accumulation of {config.accumulation} batches does not divide among {world.size} "
            f"processes; use {world.size * math.ceil(config.accumulation / world.size)}"
        )


def fit(
    peft: nn.Module,
    batches: Iterable[Any],
    steps: int,
    loss_of: LossOf,
    config: TuneConfig,
    *,
    schedule: str = "cosine",
    clip_norm: float | None = None,
    doing: str = "tuning",
    device: str = "cpu",
    folder: Path | None = None,
    save: Callable[[Path], None] | None = None,
    identity: Mapping[str, Any] | None = None,
    world: World = ALONE,
    advance: Callable[[int], None] = lambda done: None,
    trackers: Sequence[Callable[[dict[str, Any]], None]] = (),
    watch: CollapseWatch | None = None,
) -> TuneResult:
    """Train what requires gradients in a module.

    Args:
        peft: put into training mode, and left in evaluation mode.
        batches: what `loss_of` takes, `steps` x accumulation of them; the same on every process.
        steps: updates.
        loss_of: gives a batch's loss, a mean, and metrics: "tokens" is summed, the others averaged
            over an update.  What it draws from torch, numpy and random follows from the seed and
            the batch's number.
        config: learning rate, seed, accumulation and what else concerns the loop.
        schedule: "cosine" to `min_rate_share` of the learning rate, or "constant".
        clip_norm: clip the gradient norm to this.
        doing: how errors name the run.
        device: where the module is.
        folder: for state, log and adapters on the way; it is locked while the loop runs, and where
            it holds a state the loop goes on from there.
        save: writes the adapter into a folder, for `checkpoint_every`.
        identity: what else makes the run what it is; a state that differs in it is refused.
        world: the processes that train together; only rank 0 writes.
        advance: called with the updates done.
        trackers: called with each line of the log.
        watch: ends the run where the model has collapsed, with the last good adapters.

    Raises:
        BadInputError: no batch, an accumulation that does not divide, or a state of another run.
        RunFailedError: a loss or gradient norm that is not finite.
    """
    check_value("schedule", schedule, Schedule, {})
    check_accumulation(config, world)
    weights = {name: p for name, p in peft.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        list(weights.values()),
        lr=config.learning_rate,
        betas=(0.9, 0.999),
        weight_decay=config.weight_decay,
        # One operator for all adapters; on a CPU within one step of the float of the plain loop.
        fused=True,
    )
    store = None
    if folder is not None:
        whole = {
            **result_fields(config),
            "schedule": schedule,
            "clip_norm": clip_norm,
            "steps": steps,
            "doing": doing,
            "dtype": str(next(peft.parameters()).dtype),
            **(identity or {}),
        }
        store = TuningState(folder, whole, device, world, watch=watch)
    if watch is not None:
        watch.remember(0, weights)
    writes = folder is not None and world.rank == 0
    with run_lock(folder, doing) if folder is not None and writes else nullcontext(), own_draws():
        if folder is not None:
            restore_threads(folder, device, None)
        course = store.load(weights, optimizer) if store else Course()
        log = Log(
            folder / LOG if folder is not None and writes else None,
            trackers if world.rank == 0 else (),
            after=len(course.losses),
        )
        try:
            resumed = len(course.losses)
            advance(resumed)
            peft.train()
            update = _Update(list(weights.values()), optimizer, loss_of, config, world)
            rest = islice(iter(batches), resumed * config.accumulation, None)
            for step in range(resumed, 0 if course.collapsed else steps):
                began = time.monotonic()
                group = list(islice(rest, config.accumulation))
                if len(group) < config.accumulation:
                    if group and not course.losses:
                        raise BadInputError(
                            f"the data gave {len(group)} batches, an update takes "
                            f"{config.accumulation}"
                        )
                    break
                rate = config.learning_rate * rate_share(step, steps, schedule, config)
                loss, norm, metrics = update(step, group, rate, clip_norm, doing)
                seconds = time.monotonic() - began
                course.losses.append(loss)
                course.grad_norms.append(norm)
                course.tokens += int(metrics["tokens"])
                course.seconds += seconds
                log.write(
                    {
                        "step": step + 1,
                        "loss": loss,
                        **metrics,
                        "grad_norm": norm,
                        "learning_rate": rate,
                        "tokens_per_second": round(metrics["tokens"] / seconds, 1),
                        "peak_memory_mb": memory_mb(device),
                    }
                )
                if watch is not None and watch.due(step + 1, steps):
                    if watch.collapsed(step + 1, weights):
                        course.collapsed = step + 1
                        break
                    course.good = watch.step
                every = config.checkpoint_every
                if save and folder is not None and writes and every and (step + 1) % every == 0:
                    write_whole(folder / f"step-{step + 1}", save)
                if store and step + 1 < steps:
                    store.keep(step + 1, steps, weights, optimizer, course)
                advance(1)
        finally:
            log.close()
            optimizer.zero_grad(set_to_none=True)
        if not course.losses:
            raise BadInputError("the elicitation data gave no batch")
        # The last step's update was seen by no loss.
        if not all(bool(torch.isfinite(p).all()) for p in weights.values()):
            raise RunFailedError(
                f"{doing}: the adapters are not finite after the last step; "
                f"lower the learning rate (now {config.learning_rate:.3g})"
            )
        if store:
            store.finish(len(course.losses), weights, optimizer, course)
    peft.eval()
    trainable = sum(p.numel() for p in weights.values())
    return TuneResult(
        len(course.losses),
        course.tokens,
        tuple(course.losses),
        tuple(course.grad_norms),
        trainable,
        course.seconds,
        resumed,
        course.collapsed,
        course.good,
    )


def rate_share(step: int, steps: int, schedule: str, config: TuneConfig) -> float:
    """Return the share of the learning rate at an update (0-based)."""
    if schedule == "constant":
        return 1.0
    low = config.min_rate_share
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))


@dataclass
class _Update:
    """One update: this process's batches, the sums over the processes, clipping, AdamW."""

    weights: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    loss_of: LossOf
    config: TuneConfig
    world: World

    def __call__(
        self, step: int, group: list[Any], rate: float, clip_norm: float | None, doing: str
    ) -> tuple[float, float, dict[str, float]]:
        sums: dict[str, Tensor] = {}
        for number in range(self.world.rank, len(group), self.world.size):
            seed_batch(self.config.seed, step * len(group) + number)
            loss, metrics = self.loss_of(group[number])
            if not loss.requires_grad:
                raise BadInputError(
                    f"{doing}: no gradient reaches an adapter; adapt modules that the loss "
                    "depends on (--targets, --adapter-layers), or use another layer"
                )
            (loss / len(group)).backward()
            for name, value in {"loss": loss.detach(), **metrics}.items():
                value = torch.as_tensor(value).to(loss.device, torch.float64)
                sums[name] = sums[name] + value if name in sums else value
        self._sum_gradients()
        totals = self.world.sum_(torch.stack(list(sums.values())))
        grads = [p.grad for p in self.weights if p.grad is not None]
        norm_of = torch.nn.utils.get_total_norm(grads)
        if clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.weights, clip_norm, norm_of)
        # The update's only look at the device.
        *seen, norm = torch.cat([totals, norm_of.to(totals)[None]]).tolist()
        means = {name: total / len(group) for name, total in zip(sums, seen, strict=True)}
        means["tokens"] = round(means["tokens"] * len(group))
        value = means.pop("loss")
        for what, figure in (("loss", value), ("gradient norm", norm)):
            if not math.isfinite(figure):
                raise RunFailedError(
                    f"{doing}: the {what} is {figure} at step {step}; "
                    f"lower the learning rate (now {self.config.learning_rate:.3g})"
                )
        for options in self.optimizer.param_groups:
            options["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return value, norm, means

    def _sum_gradients(self) -> None:
        if self.world.size == 1:
            return
        held = [p.grad for p in self.weights if p.grad is not None]
        flat = self.world.sum_(torch.cat([grad.flatten() for grad in held]))
        for grad, part in zip(held, flat.split([g.numel() for g in held]), strict=True):
            grad.copy_(part.view_as(grad))
