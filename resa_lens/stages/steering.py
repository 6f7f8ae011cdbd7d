"""Experts changed while the model runs: what becomes of thoughts, answers and their length.

Experts are ranked on one half of the questions and judged on the other; where the answers' own
questions stand in the ranking's half they are left out there.  Beside the chosen experts stand
random sets that are used as much, and the best experts of ordinary token types.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.kinds.steering import Steering as SteeringKind
from resa_lens.artifacts.stage import Context, Draft
from resa_lens.errors import BadInputError
from resa_lens.evals.engines import Generation, GenerationConfig, HFEngine
from resa_lens.evals.run import evaluate, read_samples, write_samples
from resa_lens.evals.tasks import EvalItem
from resa_lens.experts.config import LEAST_DOCUMENTS, SteerConfig, parse_experts
from resa_lens.experts.edits import Edit, check_edit, editing
from resa_lens.experts.losses import loss_change, phase_losses
from resa_lens.experts.matching import MatchedSet, Place, matched_sets, use_of
from resa_lens.experts.rank import Ranking, best_of_types
from resa_lens.experts.routers import Router, find_routers
from resa_lens.experts.routing import Texts
from resa_lens.features.interventions import Tracker
from resa_lens.files import write_errors
from resa_lens.models.host import Model
from resa_lens.stages.dose_response import Rows, dose_response, outcome
from resa_lens.stages.expert_texts import ExpertData, class_key, documents, expert_data
from resa_lens.stages.ranking import ranked
from resa_lens.stages.routing import routing_mb
from resa_lens.stages.scores import chosen_questions, expect_answers, questions_hash
from resa_lens.texts.corpora import CorpusConfig
from resa_lens.texts.prompts import PHASES

THINK = PHASES.index("think")


@dataclass(frozen=True)
class SteeringRun:
    """What the change does, and the artifact that says it."""

    artifact: Artifact
    results: dict[str, Any]
    """As in `artifacts.kinds.steering.SteeringResults`."""


def check_steering(routers: Mapping[int, Router], config: SteerConfig) -> None:
    """Raise BadInputError where named experts, or the ranking's best, cannot be changed so."""
    if config.experts:
        check_edit(routers, Edit(parse_experts(config.experts), config.how, config.beta))
    else:
        check_edit(routers, Edit(dict.fromkeys(routers, (0,)), config.how, config.beta))
        total = sum(router.experts for router in routers.values())
        if config.rank.top >= total:
            raise BadInputError(
                f"--top {config.rank.top} of {total} experts leaves none to compare with; use fewer"
            )


def steering_run(
    ctx: Context,
    model: Model,
    items: Sequence[EvalItem],
    corpus: CorpusConfig,
    config: SteerConfig,
    *,
    source: str = "tiny",
) -> SteeringRun:
    """Change experts and measure the effect beside random sets, or read the finished run.

    Args:
        ctx: the workspace and who to tell.
        model: a mixture of experts.
        items: the questions; `config.eval` chooses among them.
        corpus: the documents that experts are ranked on, and those whose loss is measured.
        config: which experts, how, and the controls.
        source: the questions' name, for the manifest.

    Raises:
        BadInputError: a dense model, experts that cannot be changed so, too few documents, or no
            random sets of the same use.
        TakenError: another process is at this very run.
    """
    routers = find_routers(model)
    check_steering(routers, config)
    items, prompts, every = chosen_questions(ctx, model, items, config.eval)
    data = expert_data(model, corpus, config.rank.classes)
    stage = ctx.stage(
        SteeringKind,
        model,
        name=config.how,
        config={
            "steer": config, "classes": class_key(config.rank.classes), "corpus": data.corpus,
        },
        data={
            **data.hashes,
            "questions": questions_hash(items, sampled=config.eval.generation.temperature > 0),
        },
    )  # fmt: skip

    def work(draft: Draft) -> None:
        draft.expect(routing_mb(routers, config.rank.use.tokens), 1)
        sets = 1 + len(set_sizes(config, _size(config))) + config.answer_sets
        expect_answers(draft, model, prompts, every, sets)
        run = _Run(ctx, model, routers, items, data, config, draft.work)
        results = run.results()
        draft.results = {
            "model": model.name,
            "experts": [[row["layer"], row["expert"]] for row in results["experts"]],
            "how": config.how, "where": config.where,
            **{key: results[key] for key in ("effect", "control", "p_value")},
            "accuracy": results["accuracy"]["effect"]["difference"],
        }  # fmt: skip
        draft.settings = {"source": source}
        draft.json("steering.json", results)

        def write(target: Path) -> None:
            for file in sorted(draft.work.glob("*.parquet")):
                shutil.copy2(file, target)

        draft.write(write)

    artifact = stage.obtain(work, doing="steering experts")
    return SteeringRun(artifact, artifact.value("steering.json"))


def _size(config: SteerConfig) -> int:
    if config.experts:
        return sum(map(len, parse_experts(config.experts).values()))
    return config.rank.top


def set_sizes(config: SteerConfig, size: int) -> tuple[int, ...]:
    """Return the numbers of experts of the curve, ascending; the last is all of them.

    Raises:
        BadInputError: a dose above the number of experts.
    """
    if config.sizes is None:
        powers = [2**i for i in range(size.bit_length()) if 2**i < size]
        return (*powers, size)
    if wrong := [each for each in config.sizes if each > size]:
        raise BadInputError(f"size {wrong[0]}: {size} experts are chosen; name at most so many")
    return tuple(sorted({*config.sizes, size}))


class _Steered:
    """An engine whose model stands under an edit."""

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


class _Run:
    """One steering: the ranking, the random sets, and every arm once."""

    def __init__(
        self,
        ctx: Context,
        model: Model,
        routers: Mapping[int, Router],
        items: Sequence[EvalItem],
        data: ExpertData,
        config: SteerConfig,
        work: Path,
    ) -> None:
        self.ctx, self.model, self.routers, self.items = ctx, model, routers, items
        self.config, self.work = config, work
        self.layers = sorted(routers)
        questions = {item.question for item in items}
        self.ranking_data = data.half(odd=False).without(questions)
        self.judged_data = data.half(odd=True).without(questions)
        self.engine = HFEngine(model.model, model.tokenizer)

    def results(self) -> dict[str, Any]:
        """Run what is missing and return the figures."""
        config = self.config
        ranking, texts, routing, _ = ranked(
            self.ctx, self.model, self.routers, self.ranking_data, config.rank
        )
        chosen = self._chosen(ranking)
        within = np.isin(texts.phases, [PHASES.index(p) for p in config.phases])
        use = routing.tally(np.where(within, 0, -1), 1)[0] / max(int(within.sum()), 1)
        sets = self._sets(use, chosen)
        judged = documents(
            self.ctx, self.model, self.judged_data, replace(config.rank.use, generations=0)
        )
        if judged.count < LEAST_DOCUMENTS:
            raise BadInputError(
                f"{judged.count} documents are left to judge on, and {LEAST_DOCUMENTS} are needed; "
                "give more --text-tokens or more data"
            )
        losses = self._losses(judged, chosen, sets, ranking)
        answers = self._answers(chosen, sets)
        doses = []
        for dose, row in zip(losses["doses"], answers, strict=True):
            doses.append({**dose, **{k: v for k, v in row.items() if k != "strength"}})
        main = losses["doses"][-1]["loss"].get("think") or losses["doses"][-1]["loss"]["prompt"]
        known = {place: ranking.row(place) for place in chosen}
        return {
            "experts": [
                {**known[place], "rank": ranking.order.index(place) + 1, "use": float(use[place])}
                for place in chosen
            ],
            "target": ranking.target, "by": ranking.by, "how": config.how, "beta": config.beta,
            "where": config.where, "use": use_of(use, chosen),
            "effect": main["change"], "effect_ci": main["ci"], "effect_p_value": main["p_value"],
            "control": main["random"]["mean"], "p_value": main["random"]["rank_p"],
            "beyond": main["random"]["beyond"], "beyond_p": main["random"]["beyond_p"],
            "accuracy": answers[-1],
            "base": losses["base"], "doses": doses,
            "null": {
                "random": [
                    {"experts": [[self.layers[at], e] for at, e in one.experts], "use": one.use}
                    for one in sets
                ],
                "types": losses["types"], "ranking": ranking.null(),
            },
            "documents": judged.count, "ranking_documents": texts.count,
            "questions": len(self.items), "notes": self._notes(ranking),
        }  # fmt: skip

    def _notes(self, ranking: Ranking) -> list[str]:
        notes = list(ranking.notes)
        plain = [r for r in self.routers.values() if r.rule and not r.rule.renormalise]
        if plain and self.config.how == "reroute":
            notes.append(
                "the router does not renormalise its weights: only tokens that used an expert that "
                "is off change, which a model built without it does not do"
            )
        return notes

    def _chosen(self, ranking: Ranking) -> list[Place]:
        if self.config.experts:
            return [
                (self.layers.index(layer), expert)
                for layer, experts in parse_experts(self.config.experts).items()
                for expert in experts
            ]
        best = ranking.order[: self.config.rank.top]
        check_edit(self.routers, self._edit(best))
        return best

    def _edit(self, places: Sequence[Place]) -> Edit:
        experts: dict[int, list[int]] = {}
        for at, expert in places:
            experts.setdefault(self.layers[at], []).append(expert)
        config = self.config
        return Edit(experts, config.how, config.beta, config.phases)

    def _sets(self, use: np.ndarray[Any, Any], chosen: Sequence[Place]) -> list[MatchedSet]:
        router = next(iter(self.routers.values()))
        most = router.k if self.config.how == "on" else router.experts - router.k
        return matched_sets(
            use, chosen, self.config.random, most=most, seed=self.config.seed
        )  # fmt: skip

    def _doses(self, chosen: Sequence[Place]) -> list[Sequence[Place]]:
        return [chosen[:dose] for dose in set_sizes(self.config, len(chosen))]

    def _losses(
        self,
        judged: Texts,
        chosen: Sequence[Place],
        sets: Sequence[MatchedSet],
        ranking: Ranking,
    ) -> dict[str, Any]:
        steps = self._doses(chosen)
        types = best_of_types(ranking.types, self.layers, len(chosen)) if ranking.types else {}
        total = 1 + len(steps) + len(sets) + len(types)
        with self.ctx.bar("loss with experts changed", total) as advance:

            def measured(edit: Edit | None) -> np.ndarray[Any, Any]:
                edits = [] if edit is None else [edit]
                losses = phase_losses(self.model, judged, edits, self.routers)
                advance(1)
                return losses

            base = measured(None)
            after = [measured(self._edit(step)) for step in steps]
            drawn = [measured(self._edit(one.experts)) for one in sets]
            others = []
            for name, experts in types.items():
                edit = replace(self._edit(chosen), experts=experts)
                change = loss_change(base, measured(edit)).get("think")
                others.append({
                    "type": name,
                    "experts": [[layer, e] for layer, es in experts.items() for e in es],
                    "change": None if change is None else change["change"],
                })  # fmt: skip
        doses = []
        for step, losses in zip(steps, after, strict=True):
            whole = step is steps[-1]
            doses.append(
                {"experts": len(step), "loss": loss_change(base, losses, drawn if whole else ())}
            )
        means = {
            phase: float(np.nanmean(base[:, at]))
            for at, phase in enumerate(PHASES)
            if np.isfinite(base[:, at]).any()
        }
        return {"base": means, "doses": doses, "types": others}

    def _answers(self, chosen: Sequence[Place], sets: Sequence[MatchedSet]) -> list[dict[str, Any]]:
        """Return a row a dose, the last one with the random sets."""
        base = self._arm("base", None)
        steps = self._doses(chosen)
        target = {
            float(len(step)): self._arm(f"dose-{len(step)}", self._edit(step)) for step in steps
        }
        drawn = [
            self._arm(f"random-{number}", self._edit(one.experts))
            for number, one in enumerate(sets[: self.config.answer_sets])
        ]
        controls = {float(len(chosen)): drawn} if drawn else {}
        rows = dose_response(base, target, controls, self.config.seed)
        before = outcome(base)
        for row in rows:
            row["base"] = {
                "accuracy": float(before.correct.mean()), "tokens": float(before.tokens.mean()),
                "finished": float(before.finished.mean()),
            }  # fmt: skip
        return rows

    def _arm(self, name: str, edit: Edit | None) -> Rows:
        file = self.work / f"{name}.parquet"
        if file.is_file():
            return read_samples(file)
        total = len(self.items) * self.config.eval.samples
        before = [0]
        with self.ctx.bar(f"arm {name}", total) as advance:

            def progress(done: int, _total: int) -> None:
                advance(done - before[0])
                before[0] = done

            # The questions are chosen already.
            config = replace(self.config.eval, limit=None, levels=None)
            edits = [] if edit is None else [edit]
            with editing(self.model, edits, routers=self.routers) as tracker:
                engine = _Steered(self.engine, tracker) if edits else self.engine
                result = evaluate(engine, self.items, config, progress)
        with write_errors(self.work):
            write_samples(result, file)
        return result.samples
