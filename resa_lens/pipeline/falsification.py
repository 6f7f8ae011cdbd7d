"""Counted features put to the test: the texts, another seed's SAE, a random-weights model's SAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from resa_lens.errors import BadInputError
from resa_lens.features.exclusive import FeatureCounts, count_features
from resa_lens.features.falsify import (
    SURVIVES,
    VERDICTS,
    Counterpart,
    FalsifyConfig,
    FeatureVerdict,
    Responses,
    counterparts,
    judge,
    respond,
    summarise,
    union_of_rules,
)
from resa_lens.features.stimuli import PLAIN_TEXTS, Trial, trials
from resa_lens.hookpoints import Hookpoint, describe_layer
from resa_lens.models import Model
from resa_lens.pipeline.context import Context
from resa_lens.pipeline.discovery import seed_runs
from resa_lens.pipeline.sae_training import train_run
from resa_lens.pipeline.saes import SaeRun
from resa_lens.saes.baselines import random_weights_model
from resa_lens.saes.coder import SparseCoder
from resa_lens.workspace import config_dict, digest, read_json, write_json

PAGE = "verdicts.html"
RANDOM_WEIGHTS = "matched"
"""Weights drawn with the trained ones' mean and spread: activations of a trained model's size."""


@dataclass(frozen=True)
class Falsification:
    """Every verdict, and what is left of each rule's count."""

    folder: Path
    features: list[dict[str, Any]]
    """Of `FeatureVerdict.to_dict`; under `random_weights` what the same rule counts at the layer of
    the random-weights model, how many of these pass the texts, and of how many active ones."""
    summary: dict[str, Any]
    trials: dict[str, int]
    """Texts of each kind."""
    skipped: tuple[str, ...]
    """Tests that could not be made, each with its reason."""


@dataclass(frozen=True)
class _Tried:
    """Counted features of one set of SAEs, and how they answered to the trials."""

    rules: Mapping[Hookpoint, dict[int, tuple[str, ...]]]
    responses: Responses
    active: Mapping[int, int]
    """Features active on the prompt, by layer."""


def falsify_run(
    ctx: Context,
    model: Model,
    saes: SaeRun,
    counts: FeatureCounts,
    counts_folder: Path,
    config: FalsifyConfig,
    *,
    plain_texts: Sequence[str] = PLAIN_TEXTS,
    other_seed: bool = True,
    random_weights: bool = True,
) -> Falsification:
    """Give every counted feature its verdict, or read the finished run.

    The two further sets of SAEs are looked for in the workspace and trained where they are missing,
    as the given SAEs were: they need a training that the workspace knows.

    Raises:
        BadInputError: an SAE that does not fit the model, or texts that cannot be used.
    """
    identity = {
        "falsify": config_dict(config),
        "verdicts": list(VERDICTS),
        "plain_texts": digest(list(plain_texts)),
        "counts": ctx.workspace.relative(counts_folder),
        "saes": ctx.workspace.relative(saes.folder),
        "other_seed": other_seed,
        "random_weights": random_weights and RANDOM_WEIGHTS,
    }
    site = saes.points[0].site
    folder = ctx.workspace.path("falsified", model.slug, f"{site}-{digest(identity)}")
    if ctx.done(folder, counts_folder):
        ctx.reporter.note(f"verdicts: done before, in {folder}")
        return _read(folder)
    made = trials(
        model,
        counts.config,
        texts=config.texts,
        shuffles=config.shuffles,
        plain_texts=plain_texts,
        seed=config.seed,
    )
    # Every layer, also where nothing is counted: the null has all of them too.
    layers = [item.layer for item in counts.layers]
    counted = any(union_of_rules(item) for item in counts.layers)
    skipped: list[str] = []
    coders = saes.coders(model, layers, decoder=False)
    tried = _try(ctx, model, coders, counts, made, "counted features")
    del coders
    others = None
    if counted and other_seed:
        others = _other_seed(ctx, model, saes, counts, made, layers, tried, skipped)
    verdicts = judge(
        tried.responses, tried.rules, config, threshold=counts.config.threshold, other_seed=others
    )
    null = None
    if counted and random_weights:
        null = _random_weights(ctx, model, saes, counts, made, layers, config, skipped)
    chance = None if null is None else (null[0], sum(null[1].values()))
    summary = asdict(summarise(verdicts, sum(tried.active.values()), chance))
    features = [{**v.to_dict(), "random_weights": _at_layer(null, v)} for v in verdicts]
    by_layer = {
        layer: {name: sum(v.layer == layer and v.verdict == name for v in verdicts)
                for name in VERDICTS}
        for layer in layers
    }  # fmt: skip
    beside = null and {layer: sum(v.layer == layer for v in null[0]) for layer in layers}
    kinds = [trial.kind for trial in made]
    held = {
        "features": features,
        "summary": summary,
        "trials": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        "skipped": skipped,
    }
    for reason in skipped:
        ctx.reporter.note(f"left out: {reason}")
    manifest = ctx.manifest(
        "falsification",
        model,
        config=identity,
        parents=[identity["counts"], identity["saes"]],
        results={
            "summary": summary,
            "site": site,
            "model": model.name,
            "n_layers": model.n_layers,
            "skipped": skipped,
        },
    )
    with ctx.workspace.artifact(folder, manifest) as target:
        write_json(target / "verdicts.json", held)
        write_json(target / "trials.json", [asdict(trial) for trial in made])
        _write_page(target / PAGE, model, site, held, by_layer, beside)
    return _read(folder)


def _write_page(
    path: Path,
    model: Model,
    site: str,
    held: Mapping[str, Any],
    by_layer: Mapping[int, Mapping[str, int]],
    null: Mapping[int, int] | None,
) -> None:
    """Write verdicts by layer, the tallies and what survives as a page that needs nothing else."""
    from resa_lens.plots import verdict_figure
    from resa_lens.report import Table, write_page

    tallies = [
        (
            tally["rule"], str(tally["counted"]), *map(str, tally["verdicts"].values()),
            f"{tally['by_texts']} of {tally['active']}",
            "" if tally["null_active"] is None
            else f"{tally['null_by_texts']} of {tally['null_active']}",
            "" if tally["p_value"] is None else f"{tally['p_value']:.2g}",
        )
        for tally in held["summary"]["rules"]
    ]  # fmt: skip
    kept = [
        (describe_layer(f["layer"], model.n_layers), str(f["feature"]), f["rule"], f["reason"])
        for f in held["features"]
        if f["verdict"] == SURVIVES
    ]
    kinds = ", ".join(f"{n} {kind}" for kind, n in held["trials"].items())
    header = ("rule", "counted", *VERDICTS, "pass the texts", "with random weights", "p")
    last = Table(("layer", "feature", "rule", "why"), kept) if kept else "No feature survives."
    write_page(
        path,
        "What falsification leaves of the counts",
        f"{model.name}, site {site}. {held['summary']['reason']}.",
        [
            ("By layer", [verdict_figure(by_layer, null)]),
            ("By rule", [Table(header, tallies), f"Texts: {kinds}.", *held["skipped"]]),
            ("What survives", [last]),
        ],
    )


def _read(folder: Path) -> Falsification:
    held = read_json(folder / "verdicts.json")
    return Falsification(
        folder, held["features"], held["summary"], held["trials"], tuple(held["skipped"])
    )


def _try(
    ctx: Context,
    model: Model,
    coders: Mapping[Hookpoint, SparseCoder],
    counts: FeatureCounts,
    made: Sequence[Trial],
    what: str,
) -> _Tried:
    by_layer = {item.layer: item for item in counts.layers}
    rules = {point: union_of_rules(by_layer[point.layer]) for point in coders}
    listed = {point: tuple(features) for point, features in rules.items()}
    total = sum(map(len, listed.values()))
    with ctx.bar(f"trying {total} {what} on {len(made)} texts", len(made)) as advance:
        responses = respond(model, coders, listed, made, advance)
    active = {point.layer: by_layer[point.layer].active for point in coders}
    return _Tried(rules, responses, active)


def _other_seed(
    ctx: Context,
    model: Model,
    saes: SaeRun,
    counts: FeatureCounts,
    made: Sequence[Trial],
    layers: Sequence[int],
    tried: _Tried,
    skipped: list[str],
) -> Mapping[Hookpoint, Mapping[int, Counterpart]] | None:
    training = saes.training()
    if training is None:
        skipped.append(
            "other seed: these SAEs came without their training; give SAEs of this workspace"
        )
        return None
    runs = [run for run in seed_runs(ctx, model, saes, layers) if run.folder != saes.folder]
    if not runs:
        sae, corpus = training
        ctx.reporter.note(f"another seed's SAEs: none; training seed {sae.seed + 1}")
        run = train_run(
            ctx,
            model,
            layers,
            replace(sae, seed=sae.seed + 1),
            replace(corpus, seed=corpus.seed + 1),
        )
    else:
        run = runs[0]
        ctx.reporter.note(f"another seed's SAEs: using {run.folder}")
    theirs = run.coders(model, layers, decoder=False)
    found = count_features(model, theirs, counts.config)
    other = _try(ctx, model, theirs, found, made, "features of another seed's SAEs")
    del theirs

    def directions(point: Hookpoint) -> tuple[Tensor, Tensor]:
        mine, others = (side.coders(model, [point.layer])[point].W_dec for side in (saes, run))
        assert mine is not None
        assert others is not None
        return mine, others

    return counterparts(tried.responses, other.responses, directions)


def _random_weights(
    ctx: Context,
    model: Model,
    saes: SaeRun,
    counts: FeatureCounts,
    made: Sequence[Trial],
    layers: Sequence[int],
    config: FalsifyConfig,
    skipped: list[str],
) -> tuple[list[FeatureVerdict], Mapping[int, int]] | None:
    training = saes.training()
    if training is None:
        skipped.append(
            "random weights: these SAEs came without their training; give SAEs of this workspace"
        )
        return None
    host = random_weights_model(model, ctx.seed, weights=RANDOM_WEIGHTS)
    ctx.reporter.note(f"SAEs of a model with random weights ({host.slug}), the null:")
    run = train_run(replace(ctx, force=False), host, layers, *training)
    coders = run.coders(host, layers, decoder=False)
    found = count_features(host, coders, counts.config)
    tried = _try(ctx, host, coders, found, made, "features of the random-weights model's SAEs")
    threshold = counts.config.threshold
    return judge(tried.responses, tried.rules, config, threshold=threshold), tried.active


def _at_layer(
    null: tuple[list[FeatureVerdict], Mapping[int, int]] | None, verdict: FeatureVerdict
) -> dict[str, int] | None:
    """Return what the feature's rule counts at its layer of the random-weights model."""
    if null is None:
        return None
    verdicts, active = null
    here = [v for v in verdicts if v.layer == verdict.layer and verdict.rule in v.rules]
    return {
        "counted": len(here),
        "pass": sum(v.verdict == SURVIVES for v in here),
        "active": active[verdict.layer],
    }


def survivors_of(
    ctx: Context, model: Model, counts_folder: Path, rule: str
) -> dict[str, Any] | None:
    """Return what falsification left of a rule's count on these counts; None if it was not run."""
    counts = ctx.workspace.relative(counts_folder)
    for _, manifest in ctx.workspace.find(f"falsified/{model.slug}", "falsification"):
        if manifest.config["counts"] == counts:
            rules = manifest.results["summary"]["rules"]
            return next(tally for tally in rules if tally["rule"] == rule)
    return None


def read_plain_texts(path: str) -> list[str]:
    """Read a file of plain texts, one a line.

    Raises:
        BadInputError: there is none, or it has fewer than two.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise BadInputError(f"file of plain texts {path!r} does not exist")
    lines = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    if len(lines) < 2:
        raise BadInputError(f"{path} has {len(lines)} lines; give two plain texts or more")
    return lines
