"""What the work has cost: cost."""

from __future__ import annotations

from pathlib import Path

from resa_lens.cli.common import Outcome
from resa_lens.cli.groups import Output, Place
from resa_lens.cli.options import command, options
from resa_lens.config import give_one, setting
from resa_lens.files import check_file, check_path, named_path
from resa_lens.stages.reports import costs as reports


@options("Cost")
class Cost(Place, Output):
    """Whose cost is summed, at which prices."""

    adapter: str | None = setting(
        None, "Only what this adapter took: its folder, or its name in adapters/.", check=check_path
    )
    prices: Path | None = setting(
        None, "A .csv of prices: device,usd_per_hour,source,date.", check=check_file
    )
    usd_per_hour: float | None = setting(
        None, "The price of an hour of any device.", min=0, max=10**9
    )

    def __post_init__(self) -> None:
        """Raise BadInputError where two prices are given."""
        give_one(self, "prices", "usd_per_hour")


@command("cost")
def cost(args: Cost) -> Outcome:
    """Sum what each stage cost: time, energy, money.

    Time, tokens, memory, energy and USD, with the paper's table for comparison.

    Example: resa-lens cost --usd-per-hour 0.5
    """
    from resa_lens.artifacts import costs

    prices = costs.read_prices(args.prices)
    if args.usd_per_hour is not None:
        prices = costs.one_price(args.usd_per_hour)
    workspace, reporter = args.open()
    problems: list[str] = []
    if args.adapter is None:
        items = costs.workspace_costs(workspace, problems=problems)
    else:
        named = named_path(args.adapter, "adapter")
        folder = named if named.exists() else workspace.path("adapters", args.adapter)
        items = costs.lineage_costs(workspace, folder, problems=problems)
    for text in problems:
        reporter.note(f"left out: {text}")
    values = costs.report(items, prices)
    return values, reports.cost_of(values, args.adapter)
