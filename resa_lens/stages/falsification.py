"""Counted features put to the test: the texts, another seed's SAE, a random-weights model's SAE."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.kinds.falsification import Falsification
from resa_lens.artifacts.stage import Context, Draft, Stage
from resa_lens.errors import BadInputError, RunFailedError
from resa_lens.features.battery import in_words
from resa_lens.features.counterparts import Counterpart, counterparts
from resa_lens.features.exclusive import FeatureCounts, count_features
from resa_lens.features.falsify import (
    FalsifyConfig,
    FeatureVerdict,
    judge,
    summarise,
    union_of_rules,
)
from resa_lens.features.responses import Responses, respond
from resa_lens.features.stimuli import PLAIN_TEXTS, Trial, trials
from resa_lens.features.words import STANDS, VERDICTS, WORDS, occurring
from resa_lens.files import named_path, read_json
from resa_lens.hashes import digest
from resa_lens.jobs.cluster import Cluster
from resa_lens.machine.limits import size_mb
from resa_lens.models.hookpoints import Hookpoint, describe_layer
from resa_lens.models.host import Model
from resa_lens.progress import SILENT, Advance
from resa_lens.stages.counts import CountRun
from resa_lens.stages.further_saes import (
    MATCHED,
    OTHER_SEED,
    RANDOM_WEIGHTS,
    FurtherSaes,
    RemoteSaes,
)
from resa_lens.stages.job_stage import JobStage, Share, worker_context
from resa_lens.stages.saes import SaeRun, in_groups
from resa_lens.stages.stability import seed_runs
from resa_lens.texts import corpora

PAGE = "verdicts.html"


@dataclass(frozen=True)
class FalsificationRun:
    """Every verdict, what is left of each rule's count, and the artifact that says it."""

    artifact: Artifact
    features: list[dict[str, Any]]
    """Of `FeatureVerdict.to_dict`; under `random_weights` what the same rule counts at the layer of
    the random-weights model, how many of these pass the texts, and of how many active ones."""
    summary: dict[str, Any]
    trials: dict[str, int]
    """Texts of each kind."""
    skipped: tuple[str, ...]
    """Tests that could not be made, each with its reason."""


def falsify_run(
    ctx: Context,
    model: Model,
    saes: SaeRun,
    counts: CountRun,
    config: FalsifyConfig,
    *,
    plain_texts: Sequence[str] = PLAIN_TEXTS,
    other_seed: bool = True,
    random_weights: bool = True,
    cluster: Cluster | None = None,
) -> FalsificationRun:
    """Give every counted feature its verdict, or read the finished run.

    The two further sets of SAEs are looked for in the workspace and trained where they are missing,
    as the given SAEs were: they need a training that the workspace knows.  Each training is a job:
    several processes share them, or a Ray cluster does them.

    Raises:
        BadInputError: an SAE that does not fit the model, texts that cannot be used, SAEs that are
            missing and whose data were changed, or no Ray cluster.
        RunFailedError: SAEs could not be trained.
    """
    with cluster.connected() if cluster else nullcontext():
        stage = _stage(ctx, model, saes, counts, config, plain_texts, other_seed, random_weights)
        return _read(stage.obtain(cluster))


def falsify_join(
    ctx: Context,
    model: Model,
    saes: SaeRun,
    counts: CountRun,
    config: FalsifyConfig,
    *,
    plain_texts: Sequence[str] = PLAIN_TEXTS,
    other_seed: bool = True,
    random_weights: bool = True,
) -> Share[FalsificationRun]:
    """Train what no other worker of the same falsification is at; see `JobStage.join`.

    Raises:
        BadInputError: as `falsify_run`.
        RunFailedError: as `falsify_run`.
    """
    stage = _stage(ctx, model, saes, counts, config, plain_texts, other_seed, random_weights)
    share = stage.join()
    return Share(share.jobs, share.left, _read(share.run) if share.run else None)


def _read(artifact: Artifact) -> FalsificationRun:
    stored = artifact.value("verdicts.json")
    return FalsificationRun(artifact, **{**stored, "skipped": tuple(stored["skipped"])})


def _stage(
    ctx: Context,
    model: Model,
    saes: SaeRun,
    counts: CountRun,
    config: FalsifyConfig,
    plain_texts: Sequence[str],
    other_seed: bool,
    random_weights: bool,
) -> _Falsification:
    """Name the verdicts, and the trainings that they need."""
    # Every layer, also where nothing is counted: the null has all of them too.
    layers = [item.layer for item in counts.counts.layers]
    training = saes.training()
    others = other_seeds(ctx, model, saes, layers) if training and other_seed else {}
    next_seed = training[0].seed + 1 if training and other_seed else None
    seed = min(others, default=next_seed)
    stage = ctx.stage(
        Falsification,
        model,
        name=saes.site,
        config={
            "falsify": config,
            "other_seed": other_seed,
            "random_weights": random_weights and MATCHED,
            # None where SAEs without their training go without the test.
            "seeds": [seed, ctx.seed if training and random_weights else None],
        },
        data={"plain_texts": digest(list(plain_texts))},
        parents={"counts": counts.artifact.parent, "saes": saes.parent(layers)},
        noun="verdicts",
    )
    trainings = {}
    if training and any(union_of_rules(item) for item in counts.counts.layers):
        sae, corpus = training
        if seed is not None and seed not in others:
            trainings[OTHER_SEED] = replace(sae, seed=seed), replace(corpus, seed=corpus.seed + 1)
        if random_weights:
            trainings[RANDOM_WEIGHTS] = training
    further = FurtherSaes(ctx, model, tuple(layers), trainings)
    left_out = [
        f"{test}: these SAEs came without their training; give SAEs of this workspace"
        for test, included in (("other seed", other_seed), ("random weights", random_weights))
        if included and training is None
    ]
    return _Falsification(
        ctx, stage, model, saes, counts, config, plain_texts,
        None if seed is None else others.get(seed), further, tuple(left_out),
    )  # fmt: skip


@dataclass(frozen=True)
class _Falsification(JobStage):
    """Verdicts with everything opened that they are made from."""

    ctx: Context
    stage: Stage
    model: Model
    saes: SaeRun
    counts: CountRun
    config: FalsifyConfig
    plain_texts: Sequence[str]
    twin: SaeRun | None
    """Another seed's SAEs that were there at the start."""
    further: FurtherSaes
    left_out: tuple[str, ...]
    """Tests that cannot be made, each with its reason."""
    all_needed = True

    @property
    def names(self) -> tuple[str, ...]:
        """The trainings."""
        return tuple(self.further.trainings)

    def prepare(self, *, wait: bool) -> None:
        """Raise BadInputError for unusable texts, or data that the given SAEs did not see.

        Both show before hours of training.
        """
        _ = self.texts
        self._expect()
        _, corpus = next(iter(self.further.trainings.values()))
        known = self.saes.artifact.manifest.hashes.get("data") if self.saes.artifact else None
        if known not in (None, corpora.hash_records(corpora.read_records(corpus))):
            raise BadInputError(
                f"data {corpus.source!r} are not those that the SAEs in {self.saes.folder} were "
                "trained on; put these back, or use --no-other-seed and --no-random-weights"
            )

    def _expect(self) -> None:
        # Encoders of one set at a time, and the model once more with random weights.
        again = size_mb(self.model.folder) if RANDOM_WEIGHTS in self.names else 0.0
        encoders = sum(self.saes.size_mb(self.further.layers).values()) / 2
        self.stage.expect(encoders + again, 0)

    @cached_property
    def texts(self) -> list[Trial]:
        """The texts that features are tried on."""
        config = self.config
        return trials(
            self.model,
            self.counts.counts.config,
            texts=config.texts,
            shuffles=config.shuffles,
            plain_texts=self.plain_texts,
            seed=config.seed,
        )

    def work(self) -> FurtherSaes:
        """Return what trains SAEs in this process."""
        return self.further

    def remote(self) -> RemoteSaes:
        """Return what trains SAEs in a worker of Ray."""
        further = self.further
        return RemoteSaes(
            str(self.ctx.workspace.root),
            self.model.name,
            further.layers,
            further.trainings,
            worker_context(self.ctx, self.model),
        )

    def outcome(self, name: str) -> str | None:
        """Say where a training's SAEs are."""
        file = self.jobs.record(name)
        return f"SAEs in {read_json(file)}" if file.exists() else None

    def bar(self, by: str = "") -> AbstractContextManager[Advance]:
        """Open a bar over the trainings of others; each of this process has one of its own."""
        return super().bar(by) if by else SILENT.bar("", 0)

    def _trained(self, name: str) -> SaeRun:
        """Return the SAEs of a training: those that its record names, whoever trained them."""
        file = self.jobs.record(name)
        if file.exists() and (run := self.further.recorded(name, read_json(file))):
            return run
        return self.further.run(name)

    def tables(self, draft: Draft) -> None:
        """Try the features of all SAEs, and fill the draft with their verdicts."""
        for name, reason in self.jobs.failed().items():
            raise RunFailedError(f"{name}: {reason}")
        ctx, model, saes, config = self.ctx, self.model, self.saes, self.config
        features, further = self.counts.counts, self.further
        layers = list(further.layers)
        if not self.names:
            self._expect()
        texts = self.texts
        tried = _try(ctx, model, saes, features, texts, "counted features")
        counted = any(union_of_rules(item) for item in features.layers)
        threshold = features.config.threshold
        twins = null = None
        if counted and (self.twin or OTHER_SEED in self.names):
            if self.twin:
                ctx.reporter.note(f"another seed's SAEs: using {self.twin.folder}")
            run = self.twin or self._trained(OTHER_SEED)
            draft.parents.append(run.relative)
            what = "features of another seed's SAEs"
            there = _try(ctx, model, run, features, texts, what, anew=True)
            twins = _counterparts(model, saes, run, tried, there)
        if RANDOM_WEIGHTS in self.names:
            run = self._trained(RANDOM_WEIGHTS)
            draft.parents.append(run.relative)
            what = "features of the random-weights model's SAEs"
            host = further.host(RANDOM_WEIGHTS)
            there = _try(ctx, host, run, features, texts, what, anew=True)
            null = (
                judge(there.responses, there.rules, config, threshold=threshold),
                there.active,
            )
        skipped = list(self.left_out) if counted else []
        for reason in skipped:
            ctx.reporter.note(f"left out: {reason}")
        verdicts = judge(
            tried.responses, tried.rules, config, threshold=threshold, other_seed=twins
        )
        chance = None if null is None else (null[0], sum(null[1].values()))
        kinds = [trial.kind for trial in texts]
        content = {
            "features": [{**v.to_dict(), "random_weights": _at_layer(null, v)} for v in verdicts],
            "summary": asdict(summarise(verdicts, sum(tried.active.values()), chance)),
            "trials": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
            "skipped": skipped,
        }
        draft.results = {
            "summary": content["summary"],
            "site": saes.site,
            "model": model.name,
            "n_layers": model.n_layers,
            "skipped": skipped,
        }
        draft.settings = {"counts": self.counts.artifact.relative, "saes": saes.relative}
        draft.json("verdicts.json", content)
        draft.json("trials.json", [asdict(trial) for trial in texts])
        null_layers = None if null is None else [verdict.layer for verdict in null[0]]
        draft.write(
            lambda target: _write_page(
                target / PAGE, model, saes.site, content, layers, null_layers
            )
        )


def _write_page(
    path: Path,
    model: Model,
    site: str,
    content: Mapping[str, Any],
    layers: Sequence[int],
    null: Sequence[int] | None,
) -> None:
    """Write verdicts by layer, the tallies and what survives as a page that needs nothing else.

    `null` holds the layer of each feature that is counted with random weights.
    """
    from resa_lens.figures.page import Table, write_page
    from resa_lens.figures.plots import verdict_figure

    named = Counter((f["layer"], f["verdict"]) for f in content["features"])
    by_layer = {layer: {name: named[layer, name] for name in VERDICTS} for layer in layers}
    at_random = None if null is None else {layer: null.count(layer) for layer in layers}
    words = occurring(content["summary"]["rules"])
    tallies = [
        (
            tally["rule"], str(tally["counted"]), *(str(tally["verdicts"][name]) for name in words),
            f"{tally['by_texts']} of {tally['active']}",
            "" if tally["null_active"] is None
            else f"{tally['null_by_texts']} of {tally['null_active']}",
            "" if tally["p_value"] is None else f"{tally['p_value']:.2g}",
        )
        for tally in content["summary"]["rules"]
    ]  # fmt: skip
    rows = [
        (
            describe_layer(f["layer"], model.n_layers),
            str(f["feature"]),
            f["rule"],
            f["verdict"],
            f["reason"],
        )
        for f in content["features"]
        if WORDS[f["verdict"]].group == STANDS
    ]
    kinds = ", ".join(f"{n} {kind}" for kind, n in content["trials"].items())
    header = ("rule", "counted", *words, "stand by the texts", "with random weights", "p")
    survivors = (
        Table(("layer", "feature", "rule", "verdict", "why"), rows) if rows else "No feature does."
    )
    meanings = Table(
        ("verdict", "class", "meaning"), [(name, *word) for name, word in WORDS.items()]
    )
    write_page(
        path,
        "What falsification leaves of the counts",
        f"{model.name}, site {site}. {content['summary']['reason']}.",
        [
            ("By layer", [verdict_figure(by_layer, at_random)]),
            ("By rule", [Table(header, tallies), f"Texts: {kinds}.", *content["skipped"]]),
            ("What stands", [survivors]),
            ("The verdicts", [meanings, f"How often they err: {in_words()}."]),
        ],
    )


@dataclass(frozen=True)
class _Tried:
    """Counted features of one set of SAEs, and how they answered to the trials."""

    rules: Mapping[Hookpoint, dict[int, tuple[str, ...]]]
    responses: Responses
    active: Mapping[int, int]
    """Features active on the prompt, by layer."""


def _try(
    ctx: Context,
    model: Model,
    run: SaeRun,
    counts: FeatureCounts,
    texts: Sequence[Trial],
    what: str,
    *,
    anew: bool = False,
) -> _Tried:
    """Try the counted features, or with `anew` those that the same count names in other SAEs."""
    layers = [item.layer for item in counts.layers]
    coders = run.each(model, layers, decoder=False)
    if anew:
        counts = count_features(model, coders, counts.config)
    by_layer = {item.layer: item for item in counts.layers}
    rules = {point: union_of_rules(by_layer[point.layer]) for point in coders}
    listed = {point: tuple(features) for point, features in rules.items()}
    total = sum(map(len, listed.values()))
    responses = Responses(tuple(texts), {}, {})
    with ctx.bar(
        f"trying {total} {what} on {len(texts)} texts", len(texts) * len(layers)
    ) as advance:
        for group in in_groups(run, model, layers, decoder=False):
            size = len(group)
            some = respond(
                model, group, listed, texts, lambda done, size=size: advance(done * size)
            )
            responses = replace(
                responses, values={**responses.values, **some.values},
                features={**responses.features, **some.features},
            )  # fmt: skip
    return _Tried(rules, responses, {layer: item.active for layer, item in by_layer.items()})


def _counterparts(
    model: Model, saes: SaeRun, other: SaeRun, tried: _Tried, there: _Tried
) -> Mapping[Hookpoint, Mapping[int, Counterpart]]:
    """Look for each counted feature in the SAEs of another seed."""

    def directions(point: Hookpoint) -> tuple[Tensor, Tensor]:
        own, others = (run.coders(model, [point.layer])[point].W_dec for run in (saes, other))
        assert own is not None
        assert others is not None
        return own, others

    return counterparts(tried.responses, there.responses, directions)


def other_seeds(
    ctx: Context, model: Model, saes: SaeRun, layers: Sequence[int]
) -> dict[int, SaeRun]:
    """Return the workspace's SAEs that differ from the given ones in their seed alone, by seed."""
    runs = [run for run in seed_runs(ctx, model, saes, layers) if run.folder != saes.folder]
    return {training[0].seed: run for run in runs if (training := run.training())}


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
        "pass": sum(WORDS[v.verdict].group == STANDS for v in here),
        "active": active[verdict.layer],
    }


def survivors_of(ctx: Context, counts: CountRun, rule: str) -> dict[str, Any] | None:
    """Return what falsification left of a rule's count on these counts; None if it was not run."""
    for artifact in ctx.workspace.artifacts(Falsification, schemas=True):
        parents = artifact.manifest.ingredients.get("parents", {})
        if parents.get("counts") == counts.artifact.manifest.identity:
            rules = artifact.manifest.results["summary"]["rules"]
            return next(tally for tally in rules if tally["rule"] == rule)
    return None


def read_plain_texts(path: str) -> list[str]:
    """Read a file of plain texts, one a line.

    Raises:
        BadInputError: there is none, or it has fewer than two.
    """
    file = named_path(path, "file of plain texts")
    if not file.is_file():
        raise BadInputError(f"file of plain texts {path!r} does not exist")
    lines = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    if len(lines) < 2:
        raise BadInputError(f"{path} has {len(lines)} lines; give two plain texts or more")
    return lines
