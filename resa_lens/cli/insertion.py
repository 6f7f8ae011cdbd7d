"""What an SAE could teach, before anything is tuned through it: insert."""

from __future__ import annotations

from resa_lens.cli.common import Outcome
from resa_lens.cli.groups import AdapterBase, Questions, WithSaesAt
from resa_lens.cli.options import command, options, part
from resa_lens.config import setting
from resa_lens.errors import BadInputError
from resa_lens.evals.config import EvalConfig
from resa_lens.files import check_path
from resa_lens.stages.config import InsertionConfig
from resa_lens.stages.reports import interventions as reports


@options("Insertion")
class Insert(AdapterBase, Questions, WithSaesAt):
    """What is inserted into which model."""

    source_model: str | None = setting(
        None, "Model whose SAEs are inserted; the target by default.", check=check_path
    )
    insertion: InsertionConfig = part(InsertionConfig, "arms tokens seed", "Insertion")
    asking: EvalConfig = part(EvalConfig, "limit levels extraction", "Questions", limit=500)


@command("insert")
def insert(args: Insert) -> Outcome:
    """Insert SAEs while the model answers, tuning nothing.

    What an SAE does to the answers is what preset distil would hand on. Beside it stand PCA and
    noise of its size, the target's own SAE and the source's activations.

    Example: resa-lens insert --model tiny-reasoner --layers 5 --limit 100
    """
    from dataclasses import replace

    from resa_lens.stages.insertion import insertion_run
    from resa_lens.stages.scores import check_context, load_eval_items

    evaluation = replace(args.asking, generation=args.generation)
    columns = {name: getattr(args.corpus, name) for name in ("question_column", "answer_column")}
    items = load_eval_items(args.tasks, evaluation, **columns, required=False)
    check_context(args.model, args.base, items, evaluation)
    ctx, _ = args.load()
    target = ctx.model(args.model, args.base)
    source = ctx.model(args.source_model) if args.source_model else target
    if (source.d_model, source.n_layers) != (target.d_model, target.n_layers):
        raise BadInputError(
            f"source {source.name} has {source.n_layers} layers x {source.d_model}, target "
            f"{target.name} {target.n_layers} x {target.d_model}; they must be of one shape"
        )
    saes = args.find(ctx, source)
    run = insertion_run(
        ctx, target, saes, items, args.corpus, replace(args.insertion, eval=evaluation),
        layers=args.scope(source) or saes.layers, source=source, tasks=args.tasks,
    )  # fmt: skip
    return run.to_dict(), reports.insertion(target.slug, target.n_layers, run.to_dict())
