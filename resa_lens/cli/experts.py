"""Experts of a mixture: measured, ranked, changed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from resa_lens.cli.common import Outcome
from resa_lens.cli.groups import OnData, Questions
from resa_lens.cli.options import argument, command, options, options_of, part
from resa_lens.config import setting
from resa_lens.errors import BadInputError
from resa_lens.evals.config import EvalConfig, GenerationConfig
from resa_lens.experts.config import RankConfig, SteerConfig, UseConfig, parse_experts
from resa_lens.stages.reports import experts as reports

if TYPE_CHECKING:
    from resa_lens.artifacts.stage import Context
    from resa_lens.evals.tasks import EvalItem

NAMED, CHANGED = 10, 4
"""Experts that `rank` names and `steer` changes, where no number is given."""
OF_RANK = ("by", "target", "classes", "types", "draws", "top")
OF_STEER = (
    "experts", "how", "beta", "where", "sizes", "random", "answer_sets", "tasks", "limit",
    "extraction",
)  # fmt: skip
"""Options of one action that the ones before it do not take."""


@options("Experts")
class Experts(Questions, OnData):
    """What is done, on which documents, and for what."""

    action: Literal["measure", "rank", "steer"] = argument(
        "measure (how much each expert is used), rank (for a tag, phase or class) or steer (off, "
        "on or scaled while the model answers).",
    )
    use: UseConfig = part(UseConfig, "tokens unit generations max_new_tokens", "Documents")
    rank: RankConfig = part(RankConfig, "by target classes types draws seed", "Ranking")
    top: int | None = setting(
        None, f"Experts that are named [{NAMED}], or changed [{CHANGED}].", min=1, max=10**6
    )
    steer: dict[str, Any] = part(
        SteerConfig, "experts how beta where sizes random answer_sets seed", "Steering",
        given="values",
    )  # fmt: skip
    asking: EvalConfig = part(EvalConfig, "limit extraction", "Questions", limit=500)
    generation: GenerationConfig = part(GenerationConfig, "max_new_tokens", "Questions")

    def __post_init__(self) -> None:
        """Raise BadInputError where an option does nothing here, or the changes cannot be."""
        known = options_of(type(self))
        for names, actions in ((OF_RANK, ("rank", "steer")), (OF_STEER, ("steer",))):
            if self.action in actions:
                continue
            for name in names:
                if self.value(name) != known[name].default:
                    label = known[name].label
                    raise BadInputError(
                        f"{label} {self.value(name)} is of experts {' and '.join(actions)}; leave "
                        f"it out of experts {self.action}"
                    )
        self.steering()

    def value(self, name: str) -> Any:
        """Return an option's value, of a part or the command's own."""
        if name in self.steer:
            return self.steer[name]
        for owner in (self, self.rank, self.asking):
            if name in type(owner).__dataclass_fields__:
                return getattr(owner, name)
        return options_of(type(self))[name].default

    def ranking(self) -> RankConfig:
        """Return the configuration of a ranking."""
        top = self.top or (CHANGED if self.action == "steer" else NAMED)
        return replace(self.rank, top=top, use=self.use)

    def steering(self) -> SteerConfig:
        """Return the configuration of a steering."""
        return SteerConfig(rank=self.ranking(), eval=self.evaluation(), **self.steer)

    def check(self, ctx: Context) -> None:
        """Raise BadInputError for a dense model, experts it has not, or a missing target, too."""
        super().check(ctx)
        from resa_lens.experts.routers import check_mixture
        from resa_lens.models.unloaded import read_unloaded
        from resa_lens.stages.ranking import check_target
        from resa_lens.stages.scores import check_new_tokens

        model = read_unloaded(*self.names()[0])
        experts = self.steering().experts
        check_mixture(model.config, model.name, parse_experts(experts) if experts else {})
        if self.action == "steer" or self.use.generations or self.rank.classes == "right":
            check_new_tokens(model, self.use.max_new_tokens)
        if self.action != "measure":
            check_target(ctx, model, self.corpus, self.ranking())

    def items(self) -> list[EvalItem]:
        """Return the questions, if the model can be asked them; nothing is loaded for it."""
        from resa_lens.models.unloaded import read_unloaded
        from resa_lens.stages.scores import questions_for

        names = ("question_column", "answer_column")
        columns = {name: getattr(self.corpus, name) for name in names}
        model = read_unloaded(*self.names()[0])
        return questions_for(model, self.tasks, self.evaluation(), **columns, required=False)


@command("experts")
def experts(args: Experts) -> Outcome:
    """Measure, rank or steer experts of a mixture.

    How much each expert is used by phase; which answer to a tag, a phase or a class of documents,
    beside the nulls; and what becomes of thoughts and answers with them off, on or scaled, beside
    random experts of the same use.

    Example: resa-lens experts rank --model tiny-moe-reasoner --target "<think>"
    """
    if args.action == "measure":
        from resa_lens.stages.routing import routing_run

        ctx, model = args.load()
        measured = routing_run(ctx, model, args.corpus, args.use)
        values = {**measured.results, "folder": str(measured.artifact.path)}
        return values, reports.routing(model.slug, values)
    if args.action == "rank":
        from resa_lens.stages.ranking import ranking_run

        ctx, model = args.load()
        config = args.ranking()
        ranked = ranking_run(ctx, model, args.corpus, config)
        values = {**ranked.results, "folder": str(ranked.artifact.path)}
        return values, reports.ranking(model.slug, values, config.top)
    from resa_lens.stages.steering import steering_run

    items = args.items()
    ctx, model = args.load()
    run = steering_run(ctx, model, items, args.corpus, args.steering(), source=args.tasks)
    values = {**run.results, "folder": str(run.artifact.path)}
    return values, reports.steering(model.slug, values)
