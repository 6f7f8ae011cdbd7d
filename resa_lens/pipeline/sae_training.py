"""Training SAEs into the workspace, with its forecast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from resa_lens import corpora
from resa_lens.corpora import CorpusConfig
from resa_lens.hookpoints import Hookpoint
from resa_lens.models import Model
from resa_lens.pipeline.context import Context
from resa_lens.pipeline.saes import SaeRun, find_saes, fit_corpus, open_saes, sae_run, split_records
from resa_lens.saes.train import SaeConfig, train_saes
from resa_lens.workspace import config_dict, digest


def train_run(
    ctx: Context, model: Model, layers: Sequence[int], config: SaeConfig, corpus: CorpusConfig
) -> SaeRun:
    """Train SAEs at the layers, or return the finished run of the same configuration."""
    config = config.for_width(model.d_model)
    corpus = fit_corpus(corpus, model)
    records = corpora.load_records(
        corpus.source, question_column=corpus.question_column, answer_column=corpus.answer_column
    )
    data_hash = corpora.hash_records(records)
    identity = {
        "sae": config_dict(config),
        "corpus": config_dict(corpus),
        "layers": list(layers),
        "data": data_hash,
        "dtype": model.dtype,
    }
    run = f"scratch-{config.site}-{config.latents}x{config.k}-{digest(identity)}"
    folder = ctx.workspace.path("saes", model.slug, run)
    points = [Hookpoint(layer, config.site) for layer in layers]
    if manifest := ctx.done(folder):
        ctx.reporter.note(f"SAEs: done before, in {folder}")
        return sae_run(folder, points, manifest, fresh=False)
    assert config.tokens is not None
    assert config.batch is not None
    assert config.latents is not None
    training, held = split_records(records)
    steps = max(1, config.tokens // (config.batch * corpus.sequence))
    weights = len(layers) * 2 * config.latents * model.d_model * 4

    def forecast(seconds: float) -> None:
        ctx.reporter.note(
            f"expected: {seconds * steps:.0f} s, about {weights * 4 / 2**20 + 300:.0f} MB of "
            f"memory besides the model, {weights / 2**20:.0f} MB on disk"
        )

    label = f"training {len(layers)} SAEs ({config.latents} latents, k {config.k}, {config.site})"
    with ctx.reporter.bar(label, steps) as advance:
        trained = train_saes(
            model,
            layers,
            corpora.batches(
                model.tokenizer, training, corpus, tokens=config.tokens, batch=config.batch
            ),
            list(
                corpora.batches(
                    model.tokenizer,
                    held,
                    replace(corpus, seed=corpus.seed + 1),
                    tokens=8 * corpus.sequence,
                    batch=4,
                )
            ),
            config,
            advance=advance,
            on_probe=forecast,
        )
    manifest = ctx.manifest(
        "saes",
        model,
        config=identity,
        hashes={"data": data_hash},
        results={
            "layers": [vars(q) for q in trained.quality],
            "tokens": trained.tokens,
            "dead_window": trained.dead_window,
            "model": model.name,
            "site": config.site,
            "n_layers": model.n_layers,
        },
    )
    manifest.seconds = round(trained.seconds, 3)
    with ctx.workspace.artifact(folder, manifest) as target:
        for point, coder in trained.coders.items():
            coder.save_to_disk(target / point.sparsify)
    return sae_run(folder, points, manifest, fresh=True)


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
