"""Features ablated, scaled, clamped or steered while the model answers: dose, response, controls.

One arm is one pass over the questions: the base, the features at each strength, and matched random
features at the same strengths.  A killed run keeps its finished arms, and the same command goes on
after them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.kinds.ablation import Ablation
from resa_lens.artifacts.stage import Context, Draft
from resa_lens.errors import BadInputError
from resa_lens.evals.engines import Generation, GenerationConfig, HFEngine
from resa_lens.evals.run import (
    EvalResult,
    evaluate,
    read_samples,
    write_samples,
)
from resa_lens.evals.tasks import EvalItem
from resa_lens.features.exclusive import RULES, CountConfig, check_rule
from resa_lens.features.interventions import (
    VALUED,
    Control,
    FeatureMass,
    Intervention,
    Tracker,
    check_features,
    describe_controls,
    encode_batches,
    intervening,
    matched_controls,
    sum_masses,
)
from resa_lens.files import read_json, write_errors, write_json
from resa_lens.models.hookpoints import describe_layer
from resa_lens.models.host import Model
from resa_lens.saes.coder import SparseCoder
from resa_lens.stages.config import AblationConfig as AblationConfig
from resa_lens.stages.counts import CountRun, count_run
from resa_lens.stages.dose_response import Rows, compare_shares, dose_response, outcome
from resa_lens.stages.saes import SaeRun
from resa_lens.stages.scores import chosen_questions, expect_answers, questions_hash
from resa_lens.texts.phases import PHASES, phased_batches

FIGURE = "dose_response.html"
TIMES = "seconds.json"
MASS_TOKENS = 16_384
"""Of the base run's answers, on which random features are matched."""


@dataclass(frozen=True)
class CountedFeatures:
    """The features that a rule counts at a layer."""

    layer: int
    features: tuple[int, ...]
    counts: CountRun


def counted_features(
    ctx: Context,
    model: Model,
    saes: SaeRun,
    rule: str,
    layer: int | None,
    count: CountConfig | None = None,
) -> CountedFeatures:
    """Return the features that a rule counts at a layer, or at the layer where it counts most.

    Raises:
        BadInputError: an unknown rule, a layer without SAE, or the rule counts none; another rule
            is never taken in its place.
    """
    check_rule(rule)
    if layer is not None and layer not in saes.layers:
        raise BadInputError(
            f"there is no SAE at {describe_layer(layer, model.n_layers)}; there are SAEs at "
            f"layers {', '.join(map(str, saes.layers))}"
        )
    counts = count_run(ctx, model, saes, count or CountConfig(), None if layer is None else [layer])
    by_layer = {item.layer: item.features for item in counts.counts.layers}
    where = "at any layer" if layer is None else f"at {describe_layer(layer, model.n_layers)}"
    if layer is None:
        layer = max(by_layer, key=lambda at: (len(by_layer[at][rule]), -at))
    if not by_layer[layer][rule]:
        others = ", ".join(
            f"{name} counts {sum(len(features[name]) for features in by_layer.values())}"
            for name in RULES
            if name != rule
        )
        raise BadInputError(
            f"rule {rule!r} counts no feature {where}; {others} there: name a rule, or features"
        )
    return CountedFeatures(layer, by_layer[layer][rule], counts)


class _Intervened:
    """An engine whose model stands under interventions."""

    def __init__(self, engine: HFEngine, tracker: Tracker) -> None:
        self.engine, self.tracker = engine, tracker

    def generate(
        self,
        prompts: Sequence[str],
        config: GenerationConfig,
        progress: Callable[[int], None] | None = None,
        *,
        streams: Sequence[tuple[int, ...]] | None = None,
    ) -> list[Generation]:
        return self.engine.generate(prompts, config, progress, streams=streams, hooks=self.tracker)


@dataclass(frozen=True)
class AblationRun:
    """Dose and response, and the artifact that holds every answer."""

    artifact: Artifact
    results: dict[str, Any]
    """Effect, control and p-value at the main strength, and a row a strength under `doses`."""


def ablate_run(
    ctx: Context,
    model: Model,
    saes: SaeRun,
    items: Sequence[EvalItem],
    config: AblationConfig,
    *,
    source: str = "tiny",
    counts: CountRun | None = None,
) -> AblationRun:
    """Measure dose and response with matched controls, or read the finished run.

    The manifest names the questions by their `source`, and the counts that the features, or the
    layer, are from.

    Raises:
        BadInputError: no SAE at the place, or a feature out of range.
        TakenError: another process is at this ablation.
    """
    point = config.point
    coders = saes.coders(model, [point.layer])
    check_features(model, point, config.features, coders)
    scored = config.eval
    items, prompts, every = chosen_questions(ctx, model, items, scored)
    stage = ctx.stage(
        Ablation,
        model,
        name=point.site,
        config={"ablation": config},
        data={"questions": questions_hash(items, sampled=scored.generation.temperature > 0)},
        parents={"saes": saes.parent([point.layer])},
    )

    def work(draft: Draft) -> None:
        doses = len(config.strengths) * (1 + config.controls)
        expect_answers(draft, model, prompts, every, 2 + doses)
        arms = _Arms(ctx, model, coders[point], items, config, draft.work)
        results = {
            "model": model.name,
            "layer": point.layer,
            "site": point.site,
            "where": point.describe(model.n_layers),
            "saes": str(saes.folder),
            "rule": config.rule,
            "features": list(config.features),
            "kind": config.kind,
            "strength": config.strength,
            "phases": list(config.phases),
            "at": config.at,
            "keep_error": config.keep_error,
            "warnings": list(saes.warnings),
            **arms.run(),
        }
        summary = ("layer", "site", "effect", "control", "p_value")
        draft.results = {key: results[key] for key in summary}
        draft.settings = {"source": source}
        draft.parents = [counts.artifact.relative] if counts else []
        draft.seconds = arms.seconds
        draft.json("results.json", results)

        def write(target: Path) -> None:
            for file in draft.work.glob("*.parquet"):
                shutil.copy2(file, target)
            write_figure(target / FIGURE, results)

        draft.write(write)

    artifact = stage.obtain(work, doing="ablating features")
    return AblationRun(artifact, artifact.value("results.json"))


def write_figure(path: Path, results: Mapping[str, Any]) -> None:
    """Write the dose-response figure as a page that needs nothing else.

    Args:
        path: of the page.
        results: of `ablate_run`.
    """
    from resa_lens.figures.page import Table, write_page
    from resa_lens.figures.plots import dose_response_figure

    n = len(results["features"])
    what = f"{results['kind']} {n} feature{'' if n == 1 else 's'}"
    header = ("strength", "accuracy", "effect, points", "95 %", "p", "beyond random", "95 %", "p")
    rows = [("0", f"{100 * results['base']['accuracy']:.1f} %", *[""] * 6)]
    for dose in results["doses"]:
        cells = _cells(dose["effect"])
        cells += _cells(dose["control"]["beyond"]) if dose["control"] else ("", "", "")
        rows.append((f"{dose['strength']:g}", f"{100 * dose['accuracy']:.1f} %", *cells))
    place = f"{', '.join(results['phases'])} tokens"
    if results.get("at") == "first":
        place = "the position that decides the first generated token"
    lead = (
        f"{results['model']}, {results['where']}, site {results['site']}, at "
        f"{place}; {results['n']} questions. At strength "
        f"{results['strength']:g}: {results['note']}."
    )
    named = ", ".join(map(str, results["features"]))
    by = f"counted by rule {results['rule']}" if results["rule"] else "named"
    write_page(
        path,
        f"Dose and response: {what}",
        lead,
        [
            ("Accuracy by strength", [dose_response_figure(results["doses"], what)]),
            ("Figures", [Table(header, rows), f"Features, {by}: {named}."]),
        ],
    )


def _cells(share: Mapping[str, Any]) -> tuple[str, str, str]:
    low, high = (f"{100 * bound:+.1f}" for bound in share["ci"])
    return f"{100 * share['difference']:+.1f}", f"{low} to {high}", f"{share['p_value']:.3g}"


class _Arms:
    """Runs the arms of one ablation, each once."""

    def __init__(
        self,
        ctx: Context,
        model: Model,
        coder: SparseCoder,
        items: Sequence[EvalItem],
        config: AblationConfig,
        work: Path,
    ) -> None:
        self.ctx, self.model, self.coder, self.items = ctx, model, coder, list(items)
        self.config, self.work = config, work
        self.engine = HFEngine(model.model, model.tokenizer)
        self.taken: dict[str, float] = read_json(work / TIMES) if (work / TIMES).is_file() else {}
        """Seconds by arm, of those too that an earlier call ran."""

    @property
    def seconds(self) -> float:
        """Seconds of all finished arms."""
        return sum(self.taken.values())

    def run(self) -> dict[str, Any]:
        """Run what is missing and return the figures."""
        config = self.config
        plain = self._arm("plain", None)
        base = plain
        mass, sets, match = self._controls(plain)
        values = self._values(mass, config.features)
        if values and not any(values):
            raise BadInputError(
                f"none of the features is active at {', '.join(config.phases)} tokens, so "
                f"{config.kind} has no value to take; give one with --value"
            )
        with_controls = config.strengths if config.all_doses else (config.strength,)
        arms = 1 + len(config.strengths) + len(sets) * len(with_controls) + (not config.keep_error)
        finished = len(self.taken)
        self.ctx.reporter.note(
            f"expected: about {(arms - finished) * self.seconds / max(finished, 1):.0f} s for "
            f"{arms - finished} more arms of {len(self.items) * config.eval.samples} answers"
        )
        if not config.keep_error:
            # Strength 0 is the SAE's reconstruction: what the features do is beside that.
            base = self._arm("base", config.intervention(0.0, config.features, values))
        target = {
            s: self._arm(f"target-{s:g}", config.intervention(s, config.features, values))
            for s in config.strengths
        }
        controls = {
            s: [
                self._arm(
                    f"control-{number}-{s:g}",
                    config.intervention(s, drawn, self._values(mass, drawn)),
                )
                for number, drawn in enumerate(sets)
            ]
            for s in with_controls
        }
        doses = dose_response(base, target, controls, config.seed)
        main = next(row for row in doses if row["strength"] == config.strength)
        random = main["control"]
        before = outcome(base)
        return {
            "effect": main["effect"]["difference"],
            "effect_ci": main["effect"]["ci"],
            "effect_p_value": main["effect"]["p_value"],
            "control": random["effect"]["difference"],
            "control_ci": random["effect"]["ci"],
            "beyond": random["beyond"]["difference"],
            "beyond_ci": random["beyond"]["ci"],
            "p_value": random["beyond"]["p_value"],
            "rank_p": random["rank_p"],
            "note": self._note(main, mass),
            "n": main["n"],
            "samples": main["samples"],
            "detectable": main["effect"]["detectable"],
            "base": {
                "accuracy": float(before.correct.mean()),
                "tokens": float(before.tokens.mean()),
                "finished": float(before.finished.mean()),
            },
            "insertion": None
            if config.keep_error
            else compare_shares(outcome(plain).correct, before.correct, config.seed),
            "values": list(values) if config.kind in VALUED else None,
            "doses": doses,
            "controls": [asdict(control) for control in match],
            "active_tokens": self._active(mass, config.features),
            "tokens": int(mass.tokens.sum()),
        }

    def _arm(self, name: str, change: Intervention | None) -> Rows:
        file = self.work / f"{name}.parquet"
        if file.is_file() and name in self.taken:
            return read_samples(file)
        total = len(self.items) * self.config.eval.samples
        with self.ctx.bar(f"arm {name}", total) as advance:
            result = self._evaluate(change, advance)
        self.taken[name] = round(result.seconds, 3)
        with write_errors(self.work):
            write_samples(result, file)
            # Behind the samples: an arm that has no time here is run anew.
            write_json(self.work / TIMES, self.taken)
        return result.samples

    def _evaluate(self, change: Intervention | None, advance: Callable[[int], None]) -> EvalResult:
        before = [0]

        def progress(done: int, total: int) -> None:
            advance(done - before[0])
            before[0] = done

        changes = [] if change is None else [change]
        coders = {self.config.point: self.coder}
        with intervening(self.model, changes, coders, Tracker()) as tracker:
            engine = _Intervened(self.engine, tracker) if changes else self.engine
            # The questions are chosen already.
            config = replace(self.config.eval, limit=None, levels=None)
            return evaluate(engine, self.items, config, progress)

    def _controls(self, plain: Rows) -> tuple[FeatureMass, list[tuple[int, ...]], list[Control]]:
        """Match random features on the base run's own answers."""
        config, model = self.config, self.model
        batches = phased_batches(
            model.tokenizer,
            [row["prompt"] + row["generation"] for row in plain],
            tokens=MASS_TOKENS,
            longest=model.context,
        )
        encoded = list(encode_batches(model, config.point, self.coder, batches))
        mass = sum_masses(encoded, self.coder)
        sets = matched_controls(
            mass, config.features, draws=config.controls, seed=config.seed, phases=config.phases
        )
        match = describe_controls(encoded, self.coder, config.features, sets, config.phases)
        return mass, sets, match

    def _values(self, mass: FeatureMass, features: Sequence[int]) -> tuple[float, ...]:
        if self.config.kind not in VALUED:
            return ()
        if self.config.value is not None:
            return (self.config.value,) * len(features)
        means = mass.mean_active(features, self.config.phases)
        if self.config.kind == "clamp":
            return tuple(means)
        return tuple(m * float(mass.norms[f]) for f, m in zip(features, means, strict=True))

    def _active(self, mass: FeatureMass, features: Sequence[int]) -> dict[str, int]:
        active = mass.active[:, list(features)].sum(1)
        return {phase: int(active[PHASES.index(phase)]) for phase in self.config.phases}

    def _note(self, main: dict[str, Any], mass: FeatureMass) -> str:
        sampling = (
            "greedy: deterministic, one answer a question"
            if self.config.eval.generation.temperature == 0
            else f"{self.config.eval.samples} sampled answers a question"
        )
        if not any(self._active(mass, self.config.features).values()):
            return f"the features are never active at the chosen tokens; {sampling}"
        return f"{main['effect']['note']}; {sampling}"
