"""Features ablated, scaled, clamped or steered while the model answers: dose, response, controls.

One arm is one pass over the questions: the base, the features at each strength, and matched random
features beside them.  A run that is under way keeps its finished arms in `.work-<run>` beside its
place, and the same command goes on after them.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from resa_lens.errors import BadInputError
from resa_lens.evals.engines import Generation, GenerationConfig, HFEngine
from resa_lens.evals.run import EvalConfig, EvalResult, evaluate, read_samples, write_samples
from resa_lens.evals.tasks import EvalItem
from resa_lens.features.exclusive import RULES, CountConfig
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
from resa_lens.hookpoints import Hookpoint, describe_layer
from resa_lens.models import Model
from resa_lens.phases import PHASES, phased_batches
from resa_lens.pipeline.context import Context
from resa_lens.pipeline.discovery import count_run
from resa_lens.pipeline.dose_response import Rows, compare_shares, dose_response, outcome
from resa_lens.pipeline.saes import SaeRun
from resa_lens.saes.coder import SparseCoder, hash_tensors
from resa_lens.workspace import config_dict, digest, read_json, write_errors, write_json

WORK = ".work-"
FIGURE = "dose_response.html"
TIMES = "seconds.json"
DOSES = (0.25, 0.5, 1.0, 2.0)
MASS_TOKENS = 16_384
"""Of the base run's answers, on which random features are matched."""


@dataclass(frozen=True)
class AblationConfig:
    """What is done to which features, and what it is compared with."""

    point: Hookpoint
    features: tuple[int, ...]
    rule: str | None = None
    """The rule that counted the features; None where they were named."""
    kind: str = "ablate"
    strength: float = 1.0
    """The dose that effect, control and p-value are of."""
    doses: tuple[float, ...] = DOSES
    phases: tuple[str, ...] = PHASES
    keep_error: bool = True
    value: float | None = None
    """Of clamp and steer; by default the mean over the tokens of the base run's answers where the
    feature is active: of its activation, for steer of the length z |d| that it adds."""
    controls: int = 5
    """Sets of random features."""
    all_doses: bool = False
    """Run the random features at every dose, not at `strength` alone."""
    seed: int = 0
    """Of the random features and of the intervals."""
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            BadInputError: no control, a dose that is not finite, a main strength of 0, or what
                `Intervention` refuses.
        """
        if self.controls < 1:
            raise BadInputError(f"controls is {self.controls}; use at least 1 random set")
        if self.strength == 0:
            raise BadInputError("strength 0 changes nothing; use another, 1 by default")
        for strength in (self.strength, *self.doses):
            if not math.isfinite(strength):
                raise BadInputError(f"strength {strength} is not finite; 0 is the identity")
        self.intervention(1.0, self.features, (1.0,) * len(self.features))
        if self.value is not None and not math.isfinite(self.value):
            raise BadInputError(f"value {self.value} is not finite; give a number, or none")
        if self.value is not None and self.kind not in VALUED:
            raise BadInputError(f"kind {self.kind!r} takes no value; use clamp or steer with it")

    @property
    def strengths(self) -> tuple[float, ...]:
        """The doses and the main strength, sorted, without 0: the base is that."""
        return tuple(sorted({*self.doses, self.strength} - {0.0}))

    def intervention(
        self, strength: float, features: Sequence[int], values: Sequence[float]
    ) -> Intervention:
        """Return what is done to some features at a strength."""
        return Intervention(
            self.point,
            tuple(features),
            self.kind,
            strength,
            self.phases,
            self.keep_error,
            tuple(values) if self.kind in VALUED else (),
        )


def check_rule(rule: str) -> None:
    """Raise BadInputError where a rule is unknown."""
    if rule not in RULES:
        raise BadInputError(f"rule {rule!r} is unknown; use {', '.join(RULES)}")


def counted_features(
    ctx: Context,
    model: Model,
    saes: SaeRun,
    rule: str,
    layer: int | None,
    count: CountConfig | None = None,
) -> tuple[int, tuple[int, ...]]:
    """Return the features that a rule counts at a layer, or at the layer where it counts most.

    Raises:
        BadInputError: an unknown rule, a layer without SAE, or the rule counts none; another rule
            is never taken in its place.
    """
    check_rule(rule)
    if layer is not None and layer not in {point.layer for point in saes.points}:
        held = ", ".join(str(point.layer) for point in saes.points)
        raise BadInputError(
            f"there is no SAE at {describe_layer(layer, model.n_layers)}; there are SAEs at "
            f"layers {held}"
        )
    _, counts = count_run(
        ctx, model, saes, count or CountConfig(), None if layer is None else [layer]
    )
    held_at = {item.layer: item.features for item in counts.layers}
    if layer is not None:
        where = f"at {describe_layer(layer, model.n_layers)}"
    else:
        where = "at any layer"
        layer = max(held_at, key=lambda at: (len(held_at[at][rule]), -at))
    if not held_at[layer][rule]:
        totals = {
            name: sum(len(held_at[at][name]) for at in held_at) for name in RULES if name != rule
        }
        others = ", ".join(f"{name} counts {total}" for name, total in totals.items())
        raise BadInputError(
            f"rule {rule!r} counts no feature {where}; {others} there: name a rule, or features"
        )
    return layer, held_at[layer][rule]


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


def ablate_run(
    ctx: Context,
    model: Model,
    saes: SaeRun,
    items: Sequence[EvalItem],
    config: AblationConfig,
    *,
    source: str = "tiny",
) -> tuple[Path, dict[str, Any]]:
    """Measure dose and response with matched controls, or read the finished run.

    Raises:
        BadInputError: no SAE at the place, or a feature out of range.
    """
    point = config.point
    coders = saes.coders(model, [point.layer])
    check_features(model, point, config.features, coders)
    coder = coders[point]
    identity = {
        "ablation": config_dict(config),
        "source": source,
        "sae": hash_tensors(coder),
        "dtype": model.dtype,
        "questions": digest([[i.id, i.question, i.answer] for i in items]),
    }
    folder = ctx.workspace.path("ablations", model.slug, f"{point.site}-{digest(identity)}")
    if ctx.done(folder):
        ctx.reporter.note(f"ablation: done before, in {folder}")
        return folder, read_json(folder / "results.json")
    work = folder.parent / f"{WORK}{folder.name}"
    if ctx.force:
        shutil.rmtree(work, ignore_errors=True)
    with write_errors(work):
        work.mkdir(parents=True, exist_ok=True)
    arms = _Arms(ctx, model, coder, items, config, work)
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
        "keep_error": config.keep_error,
        "warnings": list(saes.warnings),
        **arms.run(),
    }
    manifest = ctx.manifest(
        "ablation",
        model,
        config=identity,
        parents=[ctx.workspace.relative(saes.folder)],
        results={key: results[key] for key in ("layer", "site", "effect", "control", "p_value")},
    )
    manifest.seconds = round(arms.seconds, 3)
    with ctx.workspace.artifact(folder, manifest) as target:
        for file in work.glob("*.parquet"):
            shutil.copy2(file, target)
        write_json(target / "results.json", results)
        write_figure(target / FIGURE, results)
    shutil.rmtree(work, ignore_errors=True)
    return folder, results


def write_figure(path: Path, results: Mapping[str, Any]) -> None:
    """Write the dose-response figure as a page that needs nothing else.

    Args:
        path: of the page.
        results: of `ablate_run`.
    """
    from resa_lens.plots import dose_response_figure
    from resa_lens.report import Table, write_page

    n = len(results["features"])
    what = f"{results['kind']} {n} feature{'' if n == 1 else 's'}"
    header = ("strength", "accuracy", "effect, points", "95 %", "p", "beyond random", "95 %", "p")
    rows = [("0", f"{100 * results['base']['accuracy']:.1f} %", *[""] * 6)]
    for dose in results["doses"]:
        cells = _cells(dose["effect"])
        cells += _cells(dose["control"]["beyond"]) if dose["control"] else ("", "", "")
        rows.append((f"{dose['strength']:g}", f"{100 * dose['accuracy']:.1f} %", *cells))
    lead = (
        f"{results['model']}, {results['where']}, site {results['site']}, at "
        f"{', '.join(results['phases'])} tokens; {results['n']} questions. At strength "
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
        held = len(self.taken)
        self.ctx.reporter.note(
            f"expected: about {(arms - held) * self.seconds / max(held, 1):.0f} s for "
            f"{arms - held} more arms of {len(self.items) * config.eval.samples} answers"
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
        beside = main["control"]
        before = outcome(base)
        return {
            "effect": main["effect"]["difference"],
            "effect_ci": main["effect"]["ci"],
            "effect_p_value": main["effect"]["p_value"],
            "control": beside["effect"]["difference"],
            "control_ci": beside["effect"]["ci"],
            "beyond": beside["beyond"]["difference"],
            "beyond_ci": beside["beyond"]["ci"],
            "p_value": beside["beyond"]["p_value"],
            "rank_p": beside["rank_p"],
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

    def _arm(self, name: str, wanted: Intervention | None) -> Rows:
        file = self.work / f"{name}.parquet"
        if file.is_file() and name in self.taken:
            return read_samples(file)
        total = len(self.items) * self.config.eval.samples
        with self.ctx.bar(f"arm {name}", total) as advance:
            result = self._evaluate(wanted, advance)
        self.taken[name] = round(result.seconds, 3)
        with write_errors(self.work):
            write_samples(result, file)
            # Behind the samples: an arm that has no time here is run anew.
            write_json(self.work / TIMES, self.taken)
        return result.samples

    def _evaluate(self, wanted: Intervention | None, advance: Callable[[int], None]) -> EvalResult:
        before = [0]

        def progress(done: int, total: int) -> None:
            advance(done - before[0])
            before[0] = done

        changes = [] if wanted is None else [wanted]
        coders = {self.config.point: self.coder}
        with intervening(self.model, changes, coders, Tracker()) as tracker:
            engine = _Intervened(self.engine, tracker) if changes else self.engine
            return evaluate(engine, self.items, self.config.eval, progress)

    def _controls(self, plain: Rows) -> tuple[FeatureMass, list[tuple[int, ...]], list[Control]]:
        """Match random features on the base run's own answers."""
        config, model = self.config, self.model
        longest = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
        batches = phased_batches(
            model.tokenizer,
            [row["prompt"] + row["generation"] for row in plain],
            tokens=MASS_TOKENS,
            longest=longest,
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
