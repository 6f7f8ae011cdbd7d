"""SAEs for a model: found in the workspace, or given by the user and checked."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from resa_lens.artifacts.artifact import Artifact, Parent, checked
from resa_lens.artifacts.kinds.saes import Saes
from resa_lens.artifacts.stage import Context
from resa_lens.config import roles
from resa_lens.errors import BadInputError
from resa_lens.hashes import digest
from resa_lens.machine.limits import size_mb
from resa_lens.models.hookpoints import Hookpoint, describe_layer
from resa_lens.models.host import Model
from resa_lens.models.packing import check_separate, end_of_documents, separate_documents
from resa_lens.models.unloaded import UnloadedModel
from resa_lens.saes.coder import SparseCoder
from resa_lens.saes.fit import check_fit
from resa_lens.saes.formats import by_hookpoint, coder_contents, find_coders, load_coder
from resa_lens.saes.formats.common import stated_figures
from resa_lens.saes.hub import find_sae_folder
from resa_lens.saes.quality import measure_fvu
from resa_lens.saes.train import SaeConfig
from resa_lens.texts import corpora
from resa_lens.texts.corpora import CorpusConfig, Record
from resa_lens.texts.stored import Selection

PROBE_TOKENS = 2048
FIT_BYTES = 2 * 2**30
"""Of the SAEs that are checked at once for their fit; the next ones load beside them."""


@dataclass(frozen=True)
class EachCoder(Mapping[Hookpoint, SparseCoder]):
    """Coders that are loaded when they are looked up and not kept; see `SaeRun.each`."""

    run: SaeRun
    model: Model
    points: tuple[Hookpoint, ...]
    decoder: bool = True
    control: Callable[[SparseCoder], SparseCoder] = lambda coder: coder
    """What stands in the place of each coder."""

    def __getitem__(self, point: Hookpoint) -> SparseCoder:
        """Load the coder of a place."""
        if point not in self.points:
            raise KeyError(point)
        coder = self.run.coders(self.model, [point.layer], decoder=self.decoder)[point]
        return self.control(coder)

    def __iter__(self) -> Iterator[Hookpoint]:
        """Go through the places."""
        return iter(self.points)

    def __len__(self) -> int:
        """Return the number of places."""
        return len(self.points)

    def __contains__(self, point: object) -> bool:
        """Say whether a place has a coder, without loading it."""
        return point in self.points


@dataclass(frozen=True)
class SaeRun:
    """SAEs in a folder of sparsify's layout, and what is known of them."""

    folder: Path
    points: tuple[Hookpoint, ...]
    quality: dict[int, dict[str, float]]
    """By layer; empty for SAEs that came without a manifest."""
    tokens: int
    seconds: float
    fresh: bool
    """Whether this call trained them."""
    artifact: Artifact | None = None
    """Where the workspace, or another one, made them."""
    relative: str = ""
    """The folder as manifests hold it."""
    stored_site: str | None = None
    """The site of the folders' names where it is not the place's (--allow-site-mismatch)."""
    warnings: tuple[str, ...] = ()
    places: Mapping[Hookpoint, Path] = field(default_factory=dict)
    """Folders that are not named by sparsify's rule."""
    resumed_at_tokens: int = 0
    """Where this call went on with a killed run; 0 if it began anew."""
    checked: frozenset[int] = frozenset()
    """Layers that were held to their places when the SAEs were opened; `warnings` says how."""

    @property
    def site(self) -> str:
        """Where the SAEs stand."""
        return self.points[0].site

    @property
    def layers(self) -> list[int]:
        """The layers that have an SAE, 0-based."""
        return [point.layer for point in self.points]

    def trained_on(self, model: Model) -> bool:
        """Return whether the manifest says that they were trained on this model, at this site."""
        if self.artifact is None or self.artifact.manifest.results.get("site") != self.site:
            return False
        manifest = self.artifact.manifest
        if not manifest.verifiable:
            return manifest.hashes.get("weights") == model.weights_hash
        return manifest.ingredients.get("model") == model.contents

    def training(self) -> tuple[SaeConfig, CorpusConfig] | None:
        """Return how the SAEs were trained; None where that is unknown or cannot be done again."""
        if self.artifact is None or self.artifact.manifest.kind != Saes.name:
            return None
        config = self.artifact.manifest.config
        if config["sae"].get("mode") != "scratch":
            return None
        # Before the field was, every token was trained on.
        sae = {"include_special": True, **config["sae"]}
        return SaeConfig(**sae), CorpusConfig(**config["corpus"])

    def place(self, point: Hookpoint) -> Path:
        """Return the folder of one SAE."""
        stored = Hookpoint(point.layer, self.stored_site or point.site)
        return self.places.get(stored, self.folder / stored.sparsify)

    def parent(self, layers: Sequence[int] | None = None) -> Parent:
        """Return the SAEs of some layers, or of all, by the contents of their files.

        Raises:
            DamagedError: a file is missing.
        """
        contents = {
            str(point.layer): coder_contents(self.place(point))
            for point in self.points
            if layers is None or point.layer in layers
        }
        return Parent(digest({"site": self.site, "layers": contents}), self.relative)

    def coders(
        self, model: Model, layers: Sequence[int] | None = None, *, decoder: bool = True
    ) -> dict[Hookpoint, SparseCoder]:
        """Load the coders of some layers, or of all; counting needs no decoder."""
        wanted = [p for p in self.points if layers is None or p.layer in layers]
        if missing := sorted(set(layers or ()) - {p.layer for p in wanted}):
            raise BadInputError(
                f"{self.folder} has no SAE at {describe_layer(missing[0], model.n_layers)}"
            )
        self._check(wanted)
        return {
            p: load_coder(
                self.place(p),
                device=model.device,
                d_in=model.d_model,
                decoder=decoder,
            )
            for p in wanted
        }

    def each(
        self, model: Model, layers: Sequence[int] | None = None, *, decoder: bool = True
    ) -> EachCoder:
        """Return the coders of `coders` as a mapping that loads one whenever it is looked up.

        It keeps none: in a loop over its items one is alive, and the next one while it loads.
        """
        points = [p for p in self.points if layers is None or p.layer in layers]
        if missing := sorted(set(layers or ()) - {p.layer for p in points}):
            raise BadInputError(
                f"{self.folder} has no SAE at {describe_layer(missing[0], model.n_layers)}"
            )
        return EachCoder(self, model, tuple(points), decoder)

    def size_mb(self, layers: Sequence[int]) -> dict[int, float]:
        """Return what the SAE of each layer takes, by its files."""
        return {p.layer: size_mb(self.place(p)) for p in self.points if p.layer in layers}

    def _check(self, points: Sequence[Hookpoint]) -> None:
        """Raise DamagedError where the SAEs are not as their run wrote them."""
        if self.artifact is None or not self.artifact.verifiable:
            return
        for point in points:
            folder = self.place(point).relative_to(self.folder)
            for name in self.artifact.manifest.files:
                if Path(name).is_relative_to(folder):
                    self.artifact.file(name)


def split_records(records: Sequence[Record]) -> tuple[Sequence[Record], Sequence[Record]]:
    """Split off one record in 20 for the quality figures; of few records, all serve for both.

    Both parts are indices into the records, none of which is read or copied for it.
    """
    if len(records) < 200:
        return records, records
    order = array("q", range(len(records)))
    random.Random("held out").shuffle(order)
    apart = bytearray(len(records))
    for index in order[: len(records) // 20]:
        apart[index] = 1
    training, held_out = (
        Selection(records, array("q", (i for i, mark in enumerate(apart) if mark == part)))
        for part in (0, 1)
    )
    return training, held_out


def probe_batches(model: Model, records: Sequence[Record], corpus: CorpusConfig) -> list[Any]:
    """Return a few sequences of a corpus, to check how well an SAE fits."""
    corpus = fit_corpus(corpus, model)
    return list(corpora.batches(model.tokenizer, records, corpus, tokens=PROBE_TOKENS, batch=2))


@contextmanager
def packed(model: Model, corpus: CorpusConfig) -> Iterator[None]:
    """Let a model read packed sequences as a corpus asks: joined, or each document apart.

    Raises:
        BadInputError: they are to be apart and this model cannot.
    """
    if corpus.packing == "joined":
        yield
        return
    eos = end_of_documents(model.tokenizer)
    with separate_documents(model.model, eos):
        check_separate(model.bridge, model.model, eos, corpus.sequence, model.name)
        yield


def fit_corpus(corpus: CorpusConfig, model: Model | UnloadedModel) -> CorpusConfig:
    """Shorten the sequences where the model's context is shorter."""
    return replace(corpus, sequence=min(corpus.sequence, model.context or corpus.sequence))


def phased_corpus(corpus: CorpusConfig, model: Model | UnloadedModel) -> CorpusConfig:
    """Return the corpus of texts that are looked at by phase, fitted to the model.

    Each record's steps stand in them (`phases.phased_texts`), so the share of thoughts and the
    model's own thoughts, which are of what an SAE trains on, say nothing about them.
    """
    return replace(fit_corpus(corpus, model), thought_share=0.0, own_thoughts=0)


def sae_run(artifact: Artifact, site: str, *, fresh: bool = False) -> SaeRun:
    """Describe a run of a workspace by its manifest."""
    manifest = artifact.manifest
    checked(Saes.Results, manifest.results, artifact.path)
    return SaeRun(
        folder=artifact.path,
        points=tuple(Hookpoint(row["layer"], site) for row in manifest.results["layers"]),
        quality={row["layer"]: row for row in manifest.results["layers"]},
        tokens=manifest.results["tokens"],
        seconds=manifest.seconds,
        fresh=fresh,
        resumed_at_tokens=manifest.results.get("resumed_at_tokens", 0),
        artifact=artifact,
        relative=artifact.relative,
    )


def open_saes(
    ctx: Context,
    model: Model,
    folder: Path,
    site: str,
    *,
    allow_mismatch: bool = False,
    corpus: CorpusConfig | None = None,
    only: Sequence[int] | None = None,
) -> SaeRun:
    """Open SAEs that the user points to, in any readable format, and check that they fit.

    With a mismatch allowed, SAEs of another site are put at `site` all the same.

    Args:
        ctx: the workspace and who to tell.
        model: the model they are put into.
        folder: holds one folder a hookpoint; or a hub id.
        site: where they are put.
        allow_mismatch: warn where they do not fit.
        corpus: of the probe text.
        only: open these layers alone; one SAE of a large model is nearly a gigabyte.

    Raises:
        BadInputError: none of the site is there, or one does not fit the model.
    """
    wanted = None if only is None else [Hookpoint(layer, site) for layer in only]
    folder = find_sae_folder(str(folder), wanted)
    named = by_hookpoint(find_coders(folder, model.names))
    if not named:
        raise BadInputError(f"--saes {folder}: no SAE says its layer; name its folder layers.N.mlp")
    sites = sorted({p.site for p in named})
    if site not in sites and not allow_mismatch:
        raise BadInputError(f"--saes {folder} has SAEs for site {', '.join(sites)}, not for {site}")
    stored = site if site in sites else sites[0]
    chosen = [Hookpoint(p.layer, site) for p in named if p.site == stored]
    corpus = corpus or CorpusConfig()
    records = corpora.read_records(corpus)
    corpus = corpora.settled(corpus, records)
    probe = probe_batches(model, split_records(records)[1], corpus)
    artifact = ctx.workspace.read(folder)
    if artifact and artifact.manifest.kind != Saes.name:
        artifact = None
    if artifact:
        checked(Saes.Results, artifact.manifest.results, artifact.path)
    results = artifact.manifest.results if artifact else {"layers": [], "tokens": 0}
    run = SaeRun(
        folder,
        tuple(sorted(chosen)),
        {row["layer"]: row for row in results["layers"]},
        results["tokens"],
        0.0,
        False,
        artifact,
        ctx.workspace.relative(folder),
        stored,
        places=named,
    )
    quality: dict[int, dict[str, float]] = {}
    warnings: list[str] = []
    types: set[str] = set()
    known = run.trained_on(model)
    layers = run.layers if only is None else sorted(set(only))
    with packed(model, fit_corpus(corpus, model)):
        for coders in in_groups(run, model, layers):
            measured = measure_fvu(model, coders, probe)
            types |= {str(getattr(coder, "stored", "float32")) for coder in coders.values()}
            try:
                _, told = check_fit(
                    model, coders, probe, allow_mismatch=allow_mismatch, known=known,
                    measured=measured,
                )  # fmt: skip
            except BadInputError as error:
                raise BadInputError(f"{run.folder}: {error}") from error
            quality |= {p.layer: {"fvu": fvu, "l0": l0} for p, (fvu, l0) in measured.items()}
            warnings += told
    ctx.reporter.note(_fit_text(model, run, quality))
    if cast := sorted(types - {"float32"}):
        ctx.reporter.note(f"SAEs stored as {', '.join(cast)}: turned into float32, which is exact")
    for warning in warnings:
        ctx.reporter.note(f"warning: {warning}")
    return replace(
        run,
        quality=run.quality or quality,
        warnings=tuple(warnings),
        checked=frozenset(layers),
    )


def _fit_text(model: Model, run: SaeRun, quality: Mapping[int, Mapping[str, float]]) -> str:
    """Say how SAEs do on the model in use, beside what their files state of them."""
    parts = []
    for layer, row in quality.items():
        claimed = run.quality.get(layer) or stated_figures(run.place(Hookpoint(layer, run.site)))
        named = ((name, claimed.get(key)) for key, name in (("fvu", "FVU"), ("l0", "L0")))
        figures = ", ".join(f"{name} {value:.3g}" for name, value in named if value is not None)
        stated = f" (stated: {figures})" if figures else ""
        parts.append(f"layer {layer} FVU {row['fvu']:.3g}, L0 {row['l0']:.3g}{stated}")
    return f"SAEs on a probe text of {model.slug}: {'; '.join(parts)}"


def in_groups(
    run: SaeRun, model: Model, layers: Sequence[int], *, decoder: bool = True
) -> Iterator[dict[Hookpoint, SparseCoder]]:
    """Load coders, as many at once as `FIT_BYTES` allows: those of a large model fill a machine."""
    group: dict[Hookpoint, SparseCoder] = {}
    for layer in layers:
        group |= run.coders(model, [layer], decoder=decoder)
        size = sum(t.nbytes for coder in group.values() for t in coder.state_dict().values())
        if size >= FIT_BYTES:
            yield group
            group = {}
    if group:
        yield group


def find_saes(
    ctx: Context, model: Model, config: SaeConfig, corpus: CorpusConfig, layers: Sequence[int]
) -> SaeRun | None:
    """Return the newest run of the model and site that has all the layers, and is whole.

    What the caller left at its default matches any run; what was asked for must be so, and so must
    k, whose default is a figure like another, the dtype of the model, the packing of documents, a
    share of thoughts that is not None, and data that were named: by their records, not by their
    name.  A run of the caller's seed, then one
    on the caller's data, comes before newer ones: those may be there for comparison alone.
    """
    site, plain = config.site, SaeConfig()
    asked = {
        key: value
        for key in ("latents", "k", "optimizer", "learning_rate", "tokens", "batch", "seed")
        if (value := getattr(config, key)) != getattr(plain, key) or key == "k"
    }
    data = corpora.hash_records(corpora.read_records(corpus))
    plain_data = CorpusConfig()
    named = any(
        getattr(corpus, key) != getattr(plain_data, key)
        for key, role in roles(CorpusConfig).items()
        if role == "source"
    )
    runs = []
    for artifact in ctx.workspace.artifacts(Saes, schemas=True):
        manifest = artifact.manifest
        if not manifest.verifiable or manifest.ingredients.get("model") != model.contents:
            continue
        trained = manifest.config["sae"]
        fits = (
            manifest.results.get("site") == site
            and manifest.dtype == model.dtype
            and all(trained[key] == value for key, value in asked.items())
            and manifest.config.get("corpus", {}).get("packing", "joined") == corpus.packing
            and corpus.thought_share in (None, thought_share(artifact))
            and corpus.own_thoughts in (0, manifest.config["corpus"].get("own_thoughts", 0))
            and set(layers) <= {row["layer"] for row in manifest.results["layers"]}
        )
        if fits and (not named or manifest.hashes.get("data") == data):
            runs.append(artifact)
    runs.sort(
        key=lambda run: (
            run.manifest.config["sae"]["seed"] != config.seed,
            run.manifest.hashes.get("data") != data,
        )
    )
    for artifact in runs:
        if damage := next(artifact.damage(), None):
            ctx.reporter.note(f"SAEs left out: {damage}")
            continue
        return sae_run(artifact, site)
    return None


def thought_share(saes: Artifact) -> float:
    """Return the share of an SAE run's documents that held their steps; before there was one, 0."""
    return saes.manifest.config.get("corpus", {}).get("thought_share", 0.0)


def as_trained(saes: SaeRun, corpus: CorpusConfig, records: Sequence[Record]) -> CorpusConfig:
    """Return a corpus with the share of thoughts that the SAEs trained on, where none is asked for.

    Of SAEs from elsewhere it is what new ones would train on.
    """
    if corpus.thought_share is None and saes.artifact is not None:
        return replace(corpus, thought_share=thought_share(saes.artifact))
    return corpora.settled(corpus, records)
