"""A training of SAEs with every default filled in: its data, its batches, what it begins with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from resa_lens.artifacts.artifact import Parent
from resa_lens.artifacts.stage import Context
from resa_lens.errors import BadInputError
from resa_lens.files import named_path
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model
from resa_lens.saes.allocation import check_places
from resa_lens.saes.coder import SparseCoder
from resa_lens.saes.train import SaeConfig
from resa_lens.stages.saes import fit_corpus, open_saes, split_records
from resa_lens.texts import corpora
from resa_lens.texts.corpora import CorpusConfig, Record


@dataclass(frozen=True)
class SaeJob:
    """A training run with every default filled in, and its place."""

    model: Model
    layers: tuple[int, ...]
    config: SaeConfig
    corpus: CorpusConfig
    training: Sequence[Record]
    held_out_records: Sequence[Record]
    data: str
    """Hash of all records."""
    source: Parent | None
    """The SAEs that the training begins with."""
    initial: Mapping[Hookpoint, SparseCoder] | None
    """Loaded when they are looked up, and not kept."""

    @property
    def steps(self) -> int:
        """Batches of one pass."""
        assert self.config.tokens is not None
        assert self.config.batch is not None
        return max(1, self.config.tokens // (self.config.batch * self.corpus.sequence))

    @property
    def tokens(self) -> int:
        """Tokens of one pass."""
        assert self.config.batch is not None
        return self.steps * self.config.batch * self.corpus.sequence

    def batches(self) -> Iterator[Any]:
        """Yield the batches of one pass, each [batch, position]."""
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
        """Return sequences that are not trained on, in batches."""
        corpus = replace(self.corpus, seed=self.corpus.seed + 1)
        tokens = 8 * corpus.sequence
        return list(
            corpora.batches(
                self.model.tokenizer, self.held_out_records, corpus, tokens=tokens, batch=4
            )
        )


def sae_job(
    ctx: Context,
    model: Model,
    layers: Sequence[int],
    config: SaeConfig,
    corpus: CorpusConfig,
    source: str | None,
) -> SaeJob:
    """Fill in every default of a training, and open what it begins with.

    Args:
        ctx: the workspace and who to tell.
        model: the source model.
        layers: 0-based.
        config: as it was asked for.
        corpus: the trigger data.
        source: of modes finetune and pretrained, the SAEs to begin with (folder or hub id).

    Raises:
        BadInputError: SAEs that are missing or do not fit, figures that are not theirs, or data
            that cannot be read.
    """
    initial = parent = None
    if config.mode in ("finetune", "pretrained"):
        if source is None:
            raise BadInputError(
                f"mode {config.mode!r} begins with SAEs; pass their folder or hub id with --saes"
            )
        begin = open_saes(ctx, model, named_path(source, "SAEs"), config.site, only=layers)
        initial = begin.each(model, layers)
        parent = begin.parent(layers)
        first = next(iter(initial.values()))
        for what, value, has in (
            ("--latents", config.latents, first.num_latents),
            ("--k", config.k if config.k != SaeConfig().k else None, first.cfg.k),
        ):
            if value not in (None, has):
                raise BadInputError(f"{what} {value} is not that of {source}, {has}; leave it out")
        config = replace(
            config, latents=first.num_latents, k=first.cfg.k, activation=first.cfg.activation
        )
    elif source is not None:
        raise BadInputError("--saes goes with --mode finetune or pretrained")
    config = config.for_width(model.d_model)
    longest, corpus = corpus.sequence, fit_corpus(corpus, model)
    if corpus.sequence < longest and longest != CorpusConfig().sequence:
        raise BadInputError(
            f"--sequence {longest}: {model.name} reads {corpus.sequence} tokens; use at most that "
            "many"
        )
    if corpus.sequence < longest:
        ctx.note_once([
            f"sequences of {corpus.sequence} tokens, the most that {model.name} reads, in place of "
            f"{longest}"
        ])  # fmt: skip
    records = corpora.read_records(corpus)
    ctx.note_once(corpora.doubtful(records, corpus.source))
    share, corpus = corpus.thought_share, corpora.settled(corpus, records)
    if share is None and not corpus.thought_share:
        ctx.note_once([
            f"warning: data {corpus.source!r} hold no worked steps, so these SAEs never see a "
            "thought; name a column of steps with --steps-column, or let the model write some with "
            "--own-thoughts"
        ])  # fmt: skip
    training, held_out_records = split_records(records)
    if config.mode != "pretrained":
        check_places(config, (config.batch or 1) * corpus.sequence)
    job = SaeJob(
        model=model,
        layers=tuple(layers),
        config=config,
        corpus=corpus,
        training=training,
        held_out_records=held_out_records,
        data=corpora.hash_records(records),
        source=parent,
        initial=initial,
    )
    tokens = config.tokens
    if config.mode != "pretrained" and tokens is not None and job.tokens > tokens:
        ctx.note_once([
            f"warning: SAEs are trained on {job.tokens:,} tokens, not {tokens:,}: one batch is "
            f"{config.batch} sequences of {corpus.sequence}; use a smaller --batch"
        ])  # fmt: skip
    return job
