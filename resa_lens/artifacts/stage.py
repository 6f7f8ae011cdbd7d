"""One skeleton for all stages: identity, lookup, lock, metering, manifest and writing.

    stage = ctx.stage(Counts, model, name=site, config=config, parents={"saes": saes.parent()})
    artifact = stage.obtain(work)

`work` computes and fills a `Draft`; it is called only where the artifact is not there, or is not
whole.  What an artifact is made from is told to `Context.stage` and nowhere else.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from resa_lens import claims
from resa_lens.artifacts.artifact import Artifact, Kind, Parent, checked
from resa_lens.artifacts.begun import keep_cost, kept_cost, record_run, restore_run, unfinished_like
from resa_lens.artifacts.manifest import MANIFEST, SHOWN, Manifest
from resa_lens.artifacts.placement import place
from resa_lens.artifacts.walk import WORK
from resa_lens.artifacts.workspace import LOCK, Workspace, has_progress
from resa_lens.config import config_dict, result_fields
from resa_lens.errors import BadInputError, DamagedError, DivergedError, TakenError
from resa_lens.files import run_lock, write_json
from resa_lens.hashes import digest
from resa_lens.machine import meters
from resa_lens.machine.determinism import deterministic, prepare_cublas
from resa_lens.machine.limits import (
    check_disk,
    free_disk_mb,
    is_out_of_memory,
    memory_errors,
    size_mb,
)
from resa_lens.machine.precision import products
from resa_lens.models.host import Model, load_model
from resa_lens.models.unloaded import UnloadedModel, read_unloaded
from resa_lens.progress import SILENT, Advance, Reporter
from resa_lens.publishing import put_back
from resa_lens.saes.plan import Meter
from resa_lens.saes.world import ALONE, World

SMALL_MB = 1.0
"""Of disk: a manifest, and the tables of a stage that says nothing of its own."""
LOADING = "Use --dtype bfloat16 or a smaller model, or a machine with more memory."


@dataclass
class Context:
    """What every stage needs besides its own configuration."""

    workspace: Workspace
    reporter: Reporter = SILENT
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    force: bool = False
    threads: int | None = None
    deterministic: bool = False
    """Promise the same bits on CUDA too (`machine.determinism`)."""
    models: dict[str, Model] = field(default_factory=dict)
    command: Sequence[str] = ()
    """The command line that a manifest names; by default that of the process."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What was given to the command, as its `--config` takes it."""
    works: meters.Works = field(default_factory=meters.Works, repr=False)
    """The stages at work; a copy of this context has the same."""
    noted: set[str] = field(default_factory=set, init=False)
    """What `note_once` has said."""

    def __post_init__(self) -> None:
        """Prepare for deterministic work before the first product on a GPU."""
        if self.deterministic:
            prepare_cublas()

    def model(
        self,
        name: str,
        base: str | None = None,
        *,
        adapters: Sequence[str] = (),
        scale: float | Sequence[float] = 1.0,
    ) -> Model:
        """Load a model, with adapters on it, once and say what it is and where it runs."""
        key = f"{name}|{base or ''}" + (f"|{list(adapters)}|{scale}" if adapters else "")
        if key not in self.models:
            with memory_errors(f"loading {name}", LOADING):
                model = load_model(
                    name, device=self.device, dtype=self.dtype, base=base, adapters=adapters,
                    scale=scale,
                )  # fmt: skip
            place(model, self.threads, self.reporter.note)
            model.tell = self.reporter.note
            self.models[key] = model
            for folder in dict.fromkeys((model.folder, *(a.folder for a in model.adapters))):
                self._warn_of_changes(folder)
        return self.models[key]

    def unloaded(self, name: str, base: str | None = None) -> Model | UnloadedModel:
        """Return a model as its configuration and tokenizer say it: nothing is loaded for it."""
        return self.models.get(f"{name}|{base or ''}") or read_unloaded(name, base)

    def note_once(self, texts: Iterable[str]) -> None:
        """Tell the user what several stages may notice."""
        for text in texts:
            if text not in self.noted:
                self.noted.add(text)
                self.reporter.note(text)

    def _warn_of_changes(self, folder: Path) -> None:
        """Say where an adapter, or a merged model, is not as it was written."""
        try:
            artifact = self.workspace.read(folder)
            changed = next(artifact.damage(), None) if artifact else None
        except BadInputError:
            changed = f"{folder} does not say what it was made from: its {MANIFEST} is damaged"
        if changed:
            self.reporter.note(f"warning: {changed}")

    def bar(self, label: str, total: int) -> AbstractContextManager[Advance]:
        """Open a progress bar."""
        return self.reporter.bar(label, total)

    def stage(
        self,
        kind: type[Kind],
        model: Model,
        *,
        name: str,
        config: Any,
        data: Mapping[str, str] | None = None,
        parents: Mapping[str, Parent] | None = None,
        settings: Mapping[str, Any] | None = None,
        noun: str | None = None,
    ) -> Stage:
        """Name an artifact by what it is made from.

        Args:
            kind: its class.
            model: the model it is made with.
            name: what its folder's name says to people.
            config: a configuration, or a mapping of such: of the fields declared execution or
                source nothing enters the identity (`config.result_fields`).
            data: hashes of the records or texts that are read, by their part.
            parents: the artifacts, or contents by their hash, that it is made from, by their part.
            settings: what the manifest's config holds for people; by default all of `config`.
            noun: what messages call it; by default the kind's title.
        """
        ingredients = {
            "kind": kind.name,
            "recipe": kind.recipe,
            "model": dict(model.contents),
            "dtype": model.dtype,
            "config": result_fields(config),
            "data": dict(data or {}),
            "parents": {part: parent.identity for part, parent in (parents or {}).items()},
        }
        visible = dict(settings) if settings is not None else _shown(config)
        paths = [parent.path for parent in (parents or {}).values() if parent.path]
        return Stage(
            self, kind, model, name, ingredients, visible, dict(data or {}),
            tuple(dict.fromkeys(paths)), noun or kind.title,
        )  # fmt: skip


def _shown(config: Any) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return {k: _shown(v) if hasattr(v, "__dataclass_fields__") else v
                for k, v in config.items()}  # fmt: skip
    return config_dict(config)


@dataclass
class Draft:
    """What a stage's work fills: results for the manifest, and files."""

    work: Path
    """Of a resumable stage, where it keeps what it has finished."""
    expect: Callable[..., None] = lambda *needs: None
    """Called with the MB of memory and of disk that the work will take (`Stage.expect`)."""
    results: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    """Added to the manifest's config: what only the work knows."""
    seconds: float = 0.0
    """What the work took in all processes that were at it, where it counts that itself."""
    threads: int | None = None
    """Where the work ran with others than the process has now."""
    kernel_path: str | None = None
    parents: list[str] = field(default_factory=list)
    """Paths of further artifacts that the work made and read: no part of the identity, for they
    follow from it."""
    writers: list[Callable[[Path], Any]] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    """JSON files by name."""

    def json(self, name: str, value: Any) -> None:
        """Add a JSON file; it is written when the work is done."""
        self.values[name] = value

    def write(self, writer: Callable[[Path], Any]) -> None:
        """Add a writer of files, called with the artifact's folder when the work is done."""
        self.writers.append(writer)


@dataclass
class Stage:
    """An artifact that is there, or will be."""

    ctx: Context
    kind: type[Kind]
    model: Model
    name: str
    ingredients: dict[str, Any]
    settings: dict[str, Any]
    data: dict[str, str]
    parents: tuple[str, ...]
    noun: str

    @property
    def identity(self) -> str:
        """SHA-256 of all that the artifact is made from."""
        return digest(self.ingredients)

    @property
    def folder(self) -> Path:
        """Its place in the workspace: names for people, then the identity's first digits."""
        last = "-".join(part for part in (self.name, self.identity[:SHOWN]) if part)
        parts = (self.model.slug, last) if self.kind.by_model else (f"{self.model.slug}-{last}",)
        return self.ctx.workspace.path(self.kind.folder, *parts)

    @property
    def work(self) -> Path:
        """Where a resumable run keeps what it has finished."""
        return self.folder.with_name(WORK + self.folder.name)

    def done(self, *, again: bool = False) -> Artifact | None:
        """Return the finished artifact: of this identity, with every file as it was written.

        What is damaged does not count, nor with --deterministic what was made without it on CUDA,
        and that is said unless this is a look `again`; with force nothing counts.
        """
        if self.ctx.force:
            return None
        try:
            artifact = self.ctx.workspace.lookup(self.kind, self.identity, self.folder)
            problem = next(artifact.damage(), None) if artifact else None
            if artifact and problem is None:
                # A forged manifest may agree with itself.
                _ = artifact.results, artifact.settings
                if self.ctx.deterministic and not artifact.manifest.exact:
                    problem = f"{artifact.path} was made on CUDA without --deterministic"
        except DamagedError as error:
            artifact, problem = None, str(error)
        if problem and not again:
            self.ctx.reporter.note(f"{self.noun}: {problem}; made anew")
        return None if problem else artifact

    def obtain(
        self,
        work: Callable[[Draft], None],
        *,
        doing: str | None = None,
        world: World = ALONE,
        usable: Callable[[Artifact], bool] = lambda _: True,
    ) -> Artifact:
        """Return the finished artifact, or do the work and write it.

        Args:
            work: computes and fills the draft; called by every process of `world`.
            doing: what a resumable run is doing; it has a folder and a lock of its own, which are
                kept where it is killed.  None: the work is short and begins anew.
            world: the processes that work together; the first one writes.
            usable: whether a finished artifact will do; else it is made anew.

        Raises:
            TakenError: another process is at this very work.
            BadInputError: no permission to write.
            RunFailedError: the work, or writing, failed.
        """
        first = world.rank == 0

        def finished(again: bool = False) -> Artifact | None:
            artifact = self.done(again=again)
            return world.agree(artifact if artifact and usable(artifact) else None)

        if first:
            put_back(self.folder)
        if artifact := finished():
            self.ctx.reporter.note(f"{self.noun}: done before, in {artifact.path}")
            return artifact
        try:
            if doing is None:
                with deterministic(self.ctx.deterministic):
                    return self._make(work, world, finished)
            return self._resumed(work, doing, world, finished)
        except TakenError:
            # By another process meanwhile.
            if world.size > 1 or not (artifact := finished(again=True)):
                raise
            return artifact

    def _resumed(
        self,
        work: Callable[[Draft], None],
        doing: str,
        world: World,
        finished: Callable[[bool], Artifact | None],
    ) -> Artifact:
        first = world.rank == 0
        with self._kept_if_begun() if first else nullcontext():
            with run_lock(self.work / LOCK, doing) if first else nullcontext():
                if first and self.ctx.force:
                    self._clear()
                world.barrier()
                # By another process, since.
                if (artifact := finished(True)) is None:
                    with self.as_begun(world):
                        artifact = self._make(work, world, finished, resumable=True)
                if first:
                    claims.prove()
                    shutil.rmtree(self.work, ignore_errors=True)
            world.barrier()
        return artifact

    def _make(
        self,
        work: Callable[[Draft], None],
        world: World,
        finished: Callable[[bool], Artifact | None],
        *,
        resumable: bool = False,
    ) -> Artifact:
        ctx = self.ctx
        draft = Draft(self.work, expect=self.expect)
        with memory_errors(self.noun, self.kind.lighter):
            device = next((model.device for model in ctx.models.values()), "cpu")
            costs: dict[str, Any] = {}
            if resumable:
                costs["before"] = kept_cost(self.work)
                if world.rank == 0:
                    costs["keep"] = partial(keep_cost, self.work)
            with ctx.works.meter(device, devices=world.size, **costs) as metered:
                self.expect(0, SMALL_MB)
                work(draft)
            # What another process has finished meanwhile is not replaced.
            if world.agree(self.folder.exists()) and (artifact := finished(True)):
                return artifact
            manifest = self._manifest(draft, metered.cost())
            if world.rank == 0:
                with ctx.workspace.artifact(self.folder, manifest) as target:
                    for name, value in draft.values.items():
                        write_json(target / name, value)
                    for writer in draft.writers:
                        writer(target)
        world.barrier()
        return Artifact(self.folder, ctx.workspace.relative(self.folder), manifest)

    def _manifest(self, draft: Draft, spent: dict[str, Any]) -> Manifest:
        model = self.model
        checked(self.kind.Results, draft.results, self.folder)
        spent["tokens"] = draft.results.get("tokens")
        attention = f"{model.attention if 'bridge' in vars(model) else 'plain'} attention"
        run: dict[str, Any] = {}
        if self.ctx.command:
            run = {"command": list(self.ctx.command), "options": dict(self.ctx.options)}
        return Manifest(
            **run,
            kind=self.kind.name,
            identity=self.identity,
            ingredients=self.ingredients,
            config={**self.settings, **draft.settings},
            results=draft.results,
            parents=list(dict.fromkeys((*self.parents, *draft.parents))),
            hashes={"weights": model.weights_hash, **self.data},
            seed=self.ctx.seed,
            threads=draft.threads or torch.get_num_threads(),
            deterministic=torch.are_deterministic_algorithms_enabled(),
            device=model.device,
            dtype=model.dtype,
            products=products(),
            kernel_path=f"{attention}; {draft.kernel_path}" if draft.kernel_path else attention,
            cost=spent,
            seconds=round(max(draft.seconds, spent["seconds"]), 3),
        )

    @contextmanager
    def as_begun(self, world: World = ALONE) -> Iterator[None]:
        """Go on with the threads and the promise that an unfinished run began with.

        Raises:
            BadInputError: it cannot go on to the same bits on this machine.
        """
        ctx, device = self.ctx, self.model.device
        before = torch.get_num_threads()
        threads, exact = before, ctx.deterministic
        if world.agree(not has_progress(self.work)):
            if world.rank == 0:
                if other := unfinished_like(self.work, self.ingredients):
                    ctx.reporter.note(f"{self.noun}: a new run; an unfinished one is in {other}")
                record_run(self.work, self.ingredients, device, exact)
        else:
            threads, exact = restore_run(self.work, device, ctx.threads, exact)
            noise = "" if exact or not device.startswith("cuda") else ", within noise on CUDA"
            ctx.reporter.note(
                f"{self.noun}: going on with the run in {self.work} ({threads} "
                f"thread{'s' if threads > 1 else ''}, as it began{noise})"
            )
        torch.set_num_threads(threads)
        try:
            with deterministic(exact):
                yield
        finally:
            torch.set_num_threads(before)

    def expect(self, memory_mb: float, disk_mb: float, most: str = "") -> None:
        """Compare what the work will take with what is free, before it begins.

        Args:
            memory_mb: beyond what the process has already; an estimate, so too little is a warning.
            disk_mb: of the artifact and of what is kept on the way.
            most: which options take less disk, where this is the most that it can be; too little is
                a warning then.

        Raises:
            BadInputError: the disk has too little room.
        """
        root, note = self.ctx.workspace.root, self.ctx.reporter.note
        left = max(SMALL_MB, disk_mb - size_mb(self.work))
        check_disk(root, SMALL_MB if most else left, self.noun, "--workspace")
        if left > (free := free_disk_mb(root)):
            note(
                f"warning: {self.noun}: up to {left:.0f} MB of disk are needed, {free:.0f} MB are "
                f"free in {root}. {most}"
            )
        if memory_mb and memory_mb > (available := Meter(self.model.device).available()):
            note(
                f"warning: {self.noun}: about {memory_mb:.0f} MB of memory are needed, "
                f"{available:.0f} MB are free. {self.kind.lighter}"
            )

    def _clear(self) -> None:
        """Remove what a killed run kept; its lock is this process's."""
        for part in self.work.iterdir():
            if part.name == LOCK:
                continue
            if part.is_dir():
                shutil.rmtree(part, ignore_errors=True)
            else:
                part.unlink(missing_ok=True)

    @contextmanager
    def _kept_if_begun(self) -> Iterator[None]:
        """Remove a run's folder that an error left with nothing to go on from."""
        new = [place for place in (self.work, *self.work.parents) if not place.exists()]
        try:
            yield
        except TakenError:
            raise
        except BaseException as error:
            # From a checkpoint of a run that diverged the same would follow.
            if has_progress(self.work) and not isinstance(error, DivergedError):
                # What is refused, or takes too much memory, would be so again.
                same = not isinstance(error, BadInputError) and not (
                    error.__cause__ and is_out_of_memory(error.__cause__)
                )
                self.ctx.reporter.note(
                    f"what was finished is kept in {self.work}"
                    + ("; the same command goes on" if same else "")
                )
            else:
                shutil.rmtree(self.work, ignore_errors=True)
                for place in new[1:]:
                    with suppress(OSError):
                        place.rmdir()
            raise
