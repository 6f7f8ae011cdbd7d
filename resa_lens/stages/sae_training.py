"""Training SAEs into the workspace: planned, in groups that fit, resumable, by one process or more.

A run that is under way lies beside its place, in `.work-<run>`: the groups of layers, each with its
checkpoints and, once trained, its SAEs and figures.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from resa_lens.artifacts.kinds.saes import Saes
from resa_lens.artifacts.stage import Context, Draft
from resa_lens.files import named_path, read_json, write_errors, write_json
from resa_lens.machine.plans import duration
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model
from resa_lens.progress import Advance
from resa_lens.saes.checkpoint import Checkpoints
from resa_lens.saes.kernels import kernel_path
from resa_lens.saes.train import SaeConfig, TrainedSaes, keep_pretrained, train_saes
from resa_lens.saes.world import ALONE, World
from resa_lens.stages.own_thoughts import try_thoughts, with_own_thoughts
from resa_lens.stages.sae_job import SaeJob, sae_job
from resa_lens.stages.sae_plan import plan_job, pretrained_mb
from resa_lens.stages.saes import SaeRun, find_saes, open_saes, packed, sae_run
from resa_lens.texts.corpora import CorpusConfig

SAES, FIGURES = "saes", "figures.json"


def train_run(
    ctx: Context,
    model: Model,
    layers: Sequence[int],
    config: SaeConfig,
    corpus: CorpusConfig,
    *,
    source: str | None = None,
    memory_limit_mb: float | None = None,
    world: World = ALONE,
    spread_layers: bool = False,
    report: bool = False,
) -> SaeRun:
    """Train SAEs at the layers, go on with a killed run, or return the finished one.

    Args:
        ctx: the workspace and who to tell.
        model: the source model.
        layers: 0-based.
        config: defaults are filled in here.
        corpus: the trigger data.
        source: of modes finetune and pretrained, the SAEs to begin with (folder or hub id).
        memory_limit_mb: what the process may take; layers that do not fit together are trained
            one group after the other.
        world: the processes that train together.
        spread_layers: give each process some of the layers, in place of some of the rows.
        report: whether a quality report follows, which the line of what is expected counts in.

    Raises:
        BadInputError: another process trains this run, or it cannot go on to the same bits here.
        RunFailedError: a loss that is not finite, or a full disk.
    """
    return train_job(
        ctx,
        sae_job(ctx, model, layers, config, corpus, source),
        memory_limit_mb=memory_limit_mb,
        world=world,
        spread_layers=spread_layers,
        report=report,
    )


def train_job(
    ctx: Context,
    job: SaeJob,
    *,
    title: str = "",
    memory_limit_mb: float | None = None,
    world: World = ALONE,
    spread_layers: bool = False,
    report: bool = False,
) -> SaeRun:
    """Do a training whose defaults are filled in, as `train_run` does.

    `title` is said where it begins or goes on: not of a finished one, nor of another process's.

    Raises:
        BadInputError: as of `train_run`.
        RunFailedError: as of `train_run`.
    """
    model = job.model
    stage = ctx.stage(
        Saes,
        model,
        name=f"{job.config.mode}-{job.config.site}-{job.config.latents}x{job.config.k}",
        config={"sae": job.config, "corpus": job.corpus, "layers": list(job.layers)},
        data={"data": job.data},
        parents={"source": job.source} if job.source else {},
        noun="SAEs",
    )
    fresh = False

    def work(draft: Draft) -> None:
        nonlocal fresh
        fresh = True
        if title:
            ctx.reporter.note(title)
        with packed(model, job.corpus):
            own = _own_thoughts(ctx, job, draft.work, world) if job.corpus.own_thoughts else job
            _train_groups(ctx, own, draft, memory_limit_mb, world, spread_layers, report)

    artifact = stage.obtain(work, doing="training", world=world)
    return sae_run(artifact, job.config.site, fresh=fresh)


def _own_thoughts(ctx: Context, job: SaeJob, work: Path, world: World) -> SaeJob:
    """Return the job with the model's own thoughts in its records; one process writes them."""
    if world.rank == 0:
        trial = try_thoughts(job.model, job.training, job.corpus)
        ctx.reporter.note(f"expected: {duration(trial.seconds)} for the model's own thoughts")
        with_own_thoughts(ctx, job.model, job.training, job.corpus, work)
    world.barrier()
    return replace(job, training=with_own_thoughts(ctx, job.model, job.training, job.corpus, work))


def _train_groups(
    ctx: Context,
    job: SaeJob,
    draft: Draft,
    memory_limit_mb: float | None,
    world: World,
    spread_layers: bool,
    report: bool,
) -> None:
    model, config, work = job.model, job.config, draft.work
    groups = _groups(ctx, job, draft, memory_limit_mb, world, report)
    world.barrier()
    parts = []
    label = f"training {len(job.layers)} SAEs ({config.latents} latents, k {config.k})"
    with ctx.bar(label, len(groups) * job.steps) as advance:
        for number, group in enumerate(groups):
            place = work / f"group-{number}"
            found = _read_group(place)
            if found is None:
                found = _train_group(job, group, place, advance, world, spread_layers)
            else:
                advance(job.steps)
            parts.append(found)
    rows = sorted((row for part in parts for row in part["layers"]), key=lambda r: r["layer"])
    draft.results = {
        "layers": rows,
        "tokens": parts[0]["tokens"],
        "dead_window": parts[0]["dead_window"],
        "resumed_at_tokens": max(part["resumed_at_tokens"] for part in parts),
        "groups": [list(group) for group in groups],
        "processes": world.size,
        "model": model.name,
        "site": config.site,
        "n_layers": model.n_layers,
    }
    draft.kernel_path = kernel_path(model.device)
    draft.seconds = sum(part["seconds"] for part in parts)
    draft.json("losses.json", {k: v for part in parts for k, v in part["losses"].items()})

    def write(target: Path) -> None:
        for number in range(len(groups)):
            # Links, not moves: killed here, the work is still whole.
            shutil.copytree(
                work / f"group-{number}" / SAES, target, copy_function=_link, dirs_exist_ok=True
            )

    draft.write(write)


def _groups(
    ctx: Context,
    job: SaeJob,
    draft: Draft,
    memory_limit_mb: float | None,
    world: World,
    report: bool,
) -> list[tuple[int, ...]]:
    """Return the layers that are trained together, as begun, or fewer where memory is less now.

    A layer's training does not depend on the others of its group, so a part of a group goes on
    from the group's checkpoint.
    """
    work, file = draft.work, draft.work / "groups.json"
    groups = [tuple(group) for group in read_json(file)] if file.exists() else []
    if job.config.mode == "pretrained":
        each = pretrained_mb(job, memory_limit_mb)
        draft.expect(2 * each, len(job.layers) * each)
        return [job.layers]
    left = [layer for number, group in enumerate(groups or [job.layers])
            for layer in group if not (work / f"group-{number}" / FIGURES).exists()]  # fmt: skip
    if not left:
        return groups
    rest = replace(job, layers=tuple(left))
    plan, whole = plan_job(ctx, rest, memory_limit_mb, world, report=report)
    ctx.reporter.note(whole.describe())
    if whole.peak_memory_mb > whole.available_mb:
        ctx.reporter.note(
            f"warning: {whole.peak_memory_mb:.0f} MB are planned for, {whole.available_mb:.0f} MB "
            "are free; use a smaller --memory-limit"
        )
    for lever in whole.shorter:
        ctx.reporter.note(f"shorter: {lever}")
    # SAEs of finished groups lie among what is kept, and are linked, not copied.
    draft.expect(0, plan.work_disk_mb + (plan.disk_mb if len(plan.groups) == 1 else 0))
    planned = world.agree(plan.groups)
    if world.rank == 0:
        most = max(map(len, planned))
        with write_errors(work):
            for number, group in enumerate(groups):
                place = work / f"group-{number}"
                if len(group) > most and not (place / FIGURES).exists():
                    groups[number] = group[:most]
                    for first in range(most, len(group), most):
                        part = work / f"group-{len(groups)}"
                        shutil.rmtree(part, ignore_errors=True)
                        for kept in place.glob("checkpoint-*"):
                            shutil.copytree(kept, part / kept.name, copy_function=_link)
                        groups.append(group[first : first + most])
            groups = groups or [tuple(group) for group in planned]
            write_json(file, groups)
    return world.agree(groups)


def _train_group(
    job: SaeJob,
    group: Sequence[int],
    place: Path,
    advance: Advance,
    world: World,
    spread_layers: bool,
) -> dict[str, Any]:
    """Train one group of layers and leave its SAEs and figures in its folder."""
    model, points = job.model, [Hookpoint(layer, job.config.site) for layer in group]
    steps = job.steps
    if job.config.mode == "pretrained":
        assert job.initial is not None
        trained = _keep_each(job, points, place, save=world.rank == 0 or spread_layers)
        steps = 0
    else:
        trained = train_saes(
            model,
            group,
            job.batches(),
            job.held_out(),
            job.config,
            steps=steps,
            advance=advance,
            initial=job.initial,
            store=Checkpoints(place, model.device, world),
            world=world,
            spread_layers=spread_layers,
        )
    found: dict[str, Any] = {
        "layers": [vars(q) for q in trained.quality],
        "tokens": trained.tokens,
        "dead_window": trained.dead_window,
        "resumed_at_tokens": trained.resumed_at_tokens,
        "seconds": round(trained.seconds, 3),
        "losses": trained.losses or {},
    }
    with write_errors(place):
        for point, coder in trained.coders.items():
            if world.rank == 0 or spread_layers:
                coder.save_to_disk(place / SAES / point.sparsify)
        shares = world.gather(found)
        if spread_layers:
            found["layers"] = [row for share in shares for row in share["layers"]]
            found["losses"] = {k: v for share in shares for k, v in share["losses"].items()}
        if world.rank == 0:
            # Last: with it the group is finished.
            write_json(place / FIGURES, found)
            for old in place.glob("checkpoint-*"):
                shutil.rmtree(old, ignore_errors=True)
    world.barrier()
    return found


def _keep_each(job: SaeJob, points: Sequence[Hookpoint], place: Path, *, save: bool) -> TrainedSaes:
    """Measure and copy SAEs as they are, one at a time: of a large model each is a gigabyte."""
    assert job.initial is not None
    parts: list[TrainedSaes] = []
    held_out = job.held_out()
    for point in points:
        part = keep_pretrained(job.model, [point], {point: job.initial[point]}, held_out)
        if save:
            with write_errors(place):
                part.coders[point].save_to_disk(place / SAES / point.sparsify)
        parts.append(replace(part, coders={}))
        del part
    quality = tuple(row for part in parts for row in part.quality)
    seconds = sum(part.seconds for part in parts)
    return replace(parts[0], quality=quality, seconds=seconds)


def _read_group(place: Path) -> dict[str, Any] | None:
    return read_json(place / FIGURES) if (place / FIGURES).exists() else None


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def saes_for(
    ctx: Context,
    model: Model,
    layers: Sequence[int],
    config: SaeConfig,
    corpus: CorpusConfig,
    given: str | None = None,
    *,
    allow_mismatch: bool = False,
    only: Sequence[int] | None = None,
    anew: bool = False,
) -> SaeRun:
    """Return SAEs at the layers: as given, as found, or trained now.

    `only` is that of `open_saes`; `anew` trains them even where they are found.  --force is about
    a command's own result, so the commands that merely need SAEs do not train them again.
    """
    if given:
        return open_saes(
            ctx,
            model,
            named_path(given, "SAEs"),
            config.site,
            allow_mismatch=allow_mismatch,
            corpus=corpus,
            only=only,
        )
    if not anew and (found := find_saes(ctx, model, config, corpus, layers)):
        ctx.reporter.note(f"SAEs: using {found.folder}")
        return found
    ctx.reporter.note(
        f"SAEs: {'anew' if anew else 'none'} for {model.slug}, site {config.site}, layers "
        f"{', '.join(map(str, layers))}; training them"
    )
    return train_run(ctx, model, layers, config, corpus)
