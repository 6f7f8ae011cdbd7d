"""SAEs for a model: found in the workspace, or given by the user and checked."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from resa_lens import corpora
from resa_lens.corpora import CorpusConfig, Record
from resa_lens.errors import BadInputError
from resa_lens.hookpoints import Hookpoint, describe_layer
from resa_lens.models import Model
from resa_lens.pipeline.context import Context
from resa_lens.saes.coder import SparseCoder
from resa_lens.saes.fit import check_fit
from resa_lens.saes.formats import by_hookpoint, find_coders, load_coder
from resa_lens.saes.hub import find_sae_folder
from resa_lens.saes.train import SaeConfig
from resa_lens.workspace import Manifest

PROBE_TOKENS = 2048
FIT_BYTES = 2 * 2**30
"""Of the SAEs that are checked at once for their fit; the next ones load beside them."""


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
    manifest: Manifest | None = None
    stored_site: str | None = None
    """The site of the folders' names where it is not the place's (--allow-site-mismatch)."""
    warnings: tuple[str, ...] = ()
    places: Mapping[Hookpoint, Path] = field(default_factory=dict)
    """Folders that are not named by sparsify's rule."""
    resumed_at_tokens: int = 0
    """Where this call went on with a killed run; 0 if it began anew."""

    def trained_on(self, model: Model) -> bool:
        """Whether the manifest says that these SAEs were trained on the model, at this site."""
        made = self.manifest
        return (
            made is not None
            and made.hashes.get("weights") == model.weights_hash
            and made.results.get("site") == self.points[0].site
        )

    def training(self) -> tuple[SaeConfig, CorpusConfig] | None:
        """Return how the SAEs were trained; None where that is unknown or cannot be done again."""
        made = self.manifest
        if made is None or made.kind != "saes" or made.config["sae"].get("mode") != "scratch":
            return None
        return SaeConfig(**made.config["sae"]), CorpusConfig(**made.config["corpus"])

    def place(self, point: Hookpoint) -> Path:
        """Return the folder of one SAE."""
        stored = Hookpoint(point.layer, self.stored_site or point.site)
        return self.places.get(stored, self.folder / stored.sparsify)

    def coders(
        self, model: Model, layers: Sequence[int] | None = None, *, decoder: bool = True
    ) -> dict[Hookpoint, SparseCoder]:
        """Load the coders of some layers, or of all; counting needs no decoder."""
        wanted = [p for p in self.points if layers is None or p.layer in layers]
        if missing := sorted(set(layers or ()) - {p.layer for p in wanted}):
            raise BadInputError(
                f"{self.folder} has no SAE at {describe_layer(missing[0], model.n_layers)}"
            )
        return {
            p: load_coder(
                self.place(p),
                device=model.device,
                d_in=model.d_model,
                decoder=decoder,
            )
            for p in wanted
        }


def split_records(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Split off one record in 20 for the quality figures; of few records, all serve for both."""
    if len(records) < 200:
        return list(records), list(records)
    order = list(range(len(records)))
    random.Random("held out").shuffle(order)
    held = set(order[: len(records) // 20])
    return (
        [r for i, r in enumerate(records) if i not in held],
        [r for i, r in enumerate(records) if i in held],
    )


def probe_batches(model: Model, records: Sequence[Record], corpus: CorpusConfig) -> list[Any]:
    """Return a few sequences of a corpus, to check how well an SAE fits."""
    corpus = fit_corpus(corpus, model)
    return list(corpora.batches(model.tokenizer, records, corpus, tokens=PROBE_TOKENS, batch=2))


def fit_corpus(corpus: CorpusConfig, model: Model) -> CorpusConfig:
    """Shorten the sequences where the model's context is shorter."""
    longest = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
    return replace(corpus, sequence=min(corpus.sequence, longest or corpus.sequence))


def sae_run(
    folder: Path, points: Sequence[Hookpoint], manifest: Manifest, *, fresh: bool
) -> SaeRun:
    """Describe a run of the workspace by its manifest."""
    results = manifest.results
    return SaeRun(
        folder=folder,
        points=tuple(points),
        quality={q["layer"]: q for q in results["layers"]},
        tokens=results["tokens"],
        seconds=manifest.seconds,
        fresh=fresh,
        resumed_at_tokens=results.get("resumed_at_tokens", 0),
        manifest=manifest,
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
    named = by_hookpoint(find_coders(folder))
    if not named:
        raise BadInputError(f"--saes {folder}: no SAE says its layer; name its folder layers.N.mlp")
    sites = sorted({p.site for p in named})
    if site not in sites and not allow_mismatch:
        raise BadInputError(f"--saes {folder} has SAEs for site {', '.join(sites)}, not for {site}")
    stored = site if site in sites else sites[0]
    chosen = [Hookpoint(p.layer, site) for p in named if p.site == stored]
    records = corpora.load_records((corpus or CorpusConfig()).source)
    probe = probe_batches(model, split_records(records)[1], corpus or CorpusConfig())
    manifest = ctx.workspace.manifest(folder)
    run = SaeRun(
        folder,
        tuple(sorted(chosen)),
        {q["layer"]: q for q in manifest.results["layers"]} if manifest else {},
        manifest.results["tokens"] if manifest else 0,
        0.0,
        False,
        manifest,
        stored,
        places=named,
    )
    fvu: dict[Hookpoint, float] = {}
    warnings: list[str] = []
    known = run.trained_on(model)
    for coders in _in_groups(run, model, only):
        fits, told = check_fit(model, coders, probe, allow_mismatch=allow_mismatch, known=known)
        fvu |= fits
        warnings += told
    for warning in warnings:
        ctx.reporter.note(f"warning: {warning}")
    return replace(
        run,
        quality=run.quality or {p.layer: {"fvu": value} for p, value in fvu.items()},
        warnings=tuple(warnings),
    )


def _in_groups(
    run: SaeRun, model: Model, only: Sequence[int] | None
) -> Iterator[dict[Hookpoint, SparseCoder]]:
    """Load coders, as many at once as `FIT_BYTES` allows: those of a large model fill a machine."""
    layers = sorted(set(only)) if only is not None else [p.layer for p in run.points]
    held: dict[Hookpoint, SparseCoder] = {}
    for layer in layers:
        held |= run.coders(model, [layer])
        size = sum(t.nbytes for coder in held.values() for t in coder.state_dict().values())
        if size >= FIT_BYTES:
            yield held
            held = {}
    if held:
        yield held


def find_saes(
    ctx: Context, model: Model, config: SaeConfig, corpus: CorpusConfig, layers: Sequence[int]
) -> SaeRun | None:
    """Return the newest run of the model and site that has all the layers.

    What the caller left at its default matches any run; what was asked for must be so, and so must
    k, whose default is a figure like another, and the dtype of the model.  A run of the caller's
    seed, then one on the caller's data, comes before newer ones: those may be there for comparison
    alone.
    """
    site, plain = config.site, SaeConfig()
    asked = {
        key: value
        for key in ("latents", "k", "optimizer", "learning_rate", "tokens", "batch", "seed")
        if (value := getattr(config, key)) != getattr(plain, key) or key == "k"
    }
    runs = ctx.workspace.find(f"saes/{model.slug}", "saes")
    runs.sort(
        key=lambda run: (
            run[1].config["sae"]["seed"] != config.seed,
            run[1].config["corpus"]["source"] != corpus.source,
        )
    )
    for folder, manifest in runs:
        made, data = manifest.config["sae"], manifest.config["corpus"]["source"]
        if manifest.results.get("site") != site or any(made[k] != v for k, v in asked.items()):
            continue
        if manifest.dtype != model.dtype:
            continue
        if corpus.source not in (CorpusConfig().source, data):
            continue
        held = [q["layer"] for q in manifest.results["layers"]]
        if set(layers) <= set(held):
            points = [Hookpoint(layer, site) for layer in held]
            return sae_run(folder, points, manifest, fresh=False)
    return None
