"""Training SAEs into the workspace: planned, in groups that fit, resumable, by one process or more.

A run that is under way lies beside its place, in `.work-<run>`: the groups of layers, each with its
checkpoints and, once trained, its SAEs and figures.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from resa_lens import corpora
from resa_lens.corpora import CorpusConfig, Record
from resa_lens.errors import BadInputError, DivergedError
from resa_lens.hookpoints import Hookpoint
from resa_lens.models import Model
from resa_lens.pipeline.context import Context
from resa_lens.pipeline.saes import SaeRun, find_saes, fit_corpus, open_saes, sae_run, split_records
from resa_lens.progress import Advance
from resa_lens.saes.checkpoint import Checkpoints, restore_threads, run_lock
from resa_lens.saes.coder import SparseCoder, hash_tensors
from resa_lens.saes.kernels import kernel_path
from resa_lens.saes.plan import Plan, plan_training
from resa_lens.saes.train import SaeConfig, keep_pretrained, train_saes
from resa_lens.saes.world import ALONE, World
from resa_lens.workspace import config_dict, digest, read_json, write_errors, write_json

WORK = ".work-"
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

    Raises:
        BadInputError: another process trains this run, or it cannot go on to the same bits here.
        RunFailedError: a loss that is not finite, or a full disk.
    """
    job = _job(ctx, model, layers, config, corpus, source)
    if manifest := world.agree(ctx.done(job.folder)):
        ctx.reporter.note(f"SAEs: done before, in {job.folder}")
        return sae_run(job.folder, job.points, manifest, fresh=False)
    work = job.folder.parent / f"{WORK}{job.folder.name}"
    with run_lock(work) if world.rank == 0 else nullcontext():
        if ctx.force and world.rank == 0:
            _clear(work)
        world.barrier()
        try:
            run = _train_groups(ctx, job, work, memory_limit_mb, world, spread_layers)
        except (Exception, KeyboardInterrupt) as error:
            held = list(work.glob(f"group-*/{FIGURES}")) + list(work.glob("group-*/checkpoint-*"))
            if world.rank == 0 and (not held or isinstance(error, DivergedError)):
                _discard(ctx, work)
            elif held:
                ctx.reporter.note(f"what was trained is kept in {work}; the same command goes on")
            raise
    if world.rank == 0:
        shutil.rmtree(work, ignore_errors=True)
    return run


@dataclass(frozen=True)
class _Job:
    """A training run with every default filled in, and its place."""

    model: Model
    layers: tuple[int, ...]
    config: SaeConfig
    corpus: CorpusConfig
    training: list[Record]
    held: list[Record]
    identity: dict[str, Any]
    folder: Path
    initial: Mapping[Hookpoint, SparseCoder] | None

    @property
    def points(self) -> list[Hookpoint]:
        return [Hookpoint(layer, self.config.site) for layer in self.layers]

    @property
    def steps(self) -> int:
        assert self.config.tokens is not None
        assert self.config.batch is not None
        return max(1, self.config.tokens // (self.config.batch * self.corpus.sequence))

    def batches(self) -> Iterator[Any]:
        assert self.config.tokens is not None
        assert self.config.batch is not None
        return corpora.batches(
            self.model.tokenizer,
            self.training,
            self.corpus,
            tokens=self.config.tokens,
            batch=self.config.batch,
        )

    def held_out(self) -> list[Any]:
        corpus = replace(self.corpus, seed=self.corpus.seed + 1)
        tokens = 8 * corpus.sequence
        return list(
            corpora.batches(self.model.tokenizer, self.held, corpus, tokens=tokens, batch=4)
        )


def _job(
    ctx: Context,
    model: Model,
    layers: Sequence[int],
    config: SaeConfig,
    corpus: CorpusConfig,
    source: str | None,
) -> _Job:
    initial = None
    if config.mode in ("finetune", "pretrained"):
        if source is None:
            raise BadInputError(
                f"mode {config.mode!r} begins with SAEs; pass their folder or hub id with --saes"
            )
        given = open_saes(ctx, model, Path(source).expanduser(), config.site, only=layers)
        initial = given.coders(model, layers)
        first = next(iter(initial.values()))
        for what, asked, has in (
            ("--latents", config.latents, first.num_latents),
            ("--k", config.k if config.k != SaeConfig().k else None, first.cfg.k),
        ):
            if asked not in (None, has):
                raise BadInputError(f"{what} {asked} is not that of {source}, {has}; leave it out")
        config = replace(
            config, latents=first.num_latents, k=first.cfg.k, activation=first.cfg.activation
        )
    elif source is not None:
        raise BadInputError("--saes goes with --mode finetune or pretrained")
    config = config.for_width(model.d_model)
    corpus = fit_corpus(corpus, model)
    records = corpora.load_records(
        corpus.source, question_column=corpus.question_column, answer_column=corpus.answer_column
    )
    identity = {
        "sae": config_dict(config),
        "corpus": config_dict(corpus),
        "layers": list(layers),
        "data": corpora.hash_records(records),
        "dtype": model.dtype,
    }
    if initial is not None:
        identity["source"] = {p.sparsify: hash_tensors(c) for p, c in initial.items()}
    run = f"{config.mode}-{config.site}-{config.latents}x{config.k}-{digest(identity)}"
    training, held = split_records(records)
    return _Job(
        model=model,
        layers=tuple(layers),
        config=config,
        corpus=corpus,
        training=training,
        held=held,
        identity=identity,
        folder=ctx.workspace.path("saes", model.slug, run),
        initial=initial,
    )


def plan_run(
    ctx: Context,
    model: Model,
    layers: Sequence[int],
    config: SaeConfig,
    corpus: CorpusConfig,
    *,
    source: str | None = None,
    memory_limit_mb: float | None = None,
    world: World = ALONE,
) -> Plan:
    """Return what the run will need, from a short probe; trains nothing."""
    job = _job(ctx, model, layers, config, corpus, source)
    return _plan(job, memory_limit_mb, world.size)


def _plan(job: _Job, memory_limit_mb: float | None, processes: int) -> Plan:
    return plan_training(
        job.model,
        job.layers,
        job.config,
        next(job.batches()),
        job.steps,
        memory_limit_mb=memory_limit_mb,
        processes=processes,
    )


def _train_groups(
    ctx: Context,
    job: _Job,
    work: Path,
    memory_limit_mb: float | None,
    world: World,
    spread_layers: bool,
) -> SaeRun:
    model, config = job.model, job.config
    threads = restore_threads(work, model.device, ctx.threads)
    if threads is not None:
        ctx.reporter.note(f"SAEs: going on with the run in {work} ({threads} threads, as it began)")
    groups_file = work / "groups.json"
    if groups_file.exists():
        groups = [tuple(group) for group in read_json(groups_file)]
    elif config.mode == "pretrained":
        groups = [job.layers]
    else:
        plan = _plan(job, memory_limit_mb, world.size)
        ctx.reporter.note(plan.describe())
        groups = world.agree(plan.groups)
        if world.rank == 0:
            with write_errors(work):
                write_json(groups_file, groups)
    world.barrier()
    began = time.monotonic()
    parts = []
    label = f"training {len(job.layers)} SAEs ({config.latents} latents, k {config.k})"
    with ctx.bar(label, len(groups) * job.steps, devices=world.size) as advance:
        for number, group in enumerate(groups):
            place = work / f"group-{number}"
            found = _read_group(place)
            if found is None:
                found = _train_group(job, group, place, advance, world, spread_layers)
            else:
                advance(job.steps)
            parts.append(found)
    rows = sorted((row for part in parts for row in part["layers"]), key=lambda r: r["layer"])
    manifest = ctx.manifest(
        "saes",
        model,
        config=job.identity,
        hashes={"data": job.identity["data"]},
        results={
            "layers": rows,
            "tokens": parts[0]["tokens"],
            "dead_window": parts[0]["dead_window"],
            "resumed_at_tokens": max(part["resumed_at_tokens"] for part in parts),
            "groups": [list(group) for group in groups],
            "processes": world.size,
            "model": model.name,
            "site": config.site,
            "n_layers": model.n_layers,
        },
    )
    manifest.kernel_path = f"{manifest.kernel_path}; {kernel_path(model.device)}"
    manifest.seconds = round(sum(part["seconds"] for part in parts) or time.monotonic() - began, 3)
    if world.rank == 0:
        with ctx.workspace.artifact(job.folder, manifest) as target:
            for number in range(len(groups)):
                # Links, not moves: killed here, the work is still whole.
                shutil.copytree(
                    work / f"group-{number}" / SAES,
                    target,
                    copy_function=_link,
                    dirs_exist_ok=True,
                )
            losses = {k: v for part in parts for k, v in part["losses"].items()}
            write_json(target / "losses.json", losses)
    world.barrier()
    return sae_run(job.folder, job.points, manifest, fresh=True)


def _train_group(
    job: _Job,
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
        trained = keep_pretrained(model, points, job.initial, job.held_out())
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


def _read_group(place: Path) -> dict[str, Any] | None:
    return read_json(place / FIGURES) if (place / FIGURES).exists() else None


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _discard(ctx: Context, work: Path) -> None:
    """Remove a run that left nothing to go on from, and the folders made for it."""
    shutil.rmtree(work, ignore_errors=True)
    for parent in work.parents:
        if not parent.is_relative_to(ctx.workspace.root):
            return
        try:
            parent.rmdir()
        except OSError:
            return


def _clear(work: Path) -> None:
    for part in work.iterdir():
        if part.name == "lock":
            continue
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


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
            Path(given).expanduser(),
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
