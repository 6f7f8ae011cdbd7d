"""What the work has cost: cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from resa_lens.cli import common
from resa_lens.cli.common import JsonOption, WorkspaceOption


def cost(
    adapter: Annotated[
        str | None,
        typer.Option(help="Only what this adapter took: its folder, or its name in adapters/."),
    ] = None,
    prices: Annotated[
        Path | None,
        typer.Option(help="A .csv of prices: device,usd_per_hour,source,date."),
    ] = None,
    usd_per_hour: Annotated[
        float | None, typer.Option(help="The price of an hour of any device.", min=0.0)
    ] = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sum what each stage cost: time, tokens, memory, energy, USD; the paper's table beside it.

    Example: resa-lens cost --usd-per-hour 0.5
    """

    def job() -> tuple[dict[str, Any], Any]:
        from dataclasses import asdict

        from resa_lens import cost as costs
        from resa_lens.errors import BadInputError

        if prices is not None and usd_per_hour is not None:
            raise BadInputError("--prices and --usd-per-hour are both given; give one")
        table = costs.read_prices(prices)
        if usd_per_hour is not None:
            table = costs.one_price(usd_per_hour)
        ctx = common.context(workspace, 0, "cpu", "auto", False, None)
        if adapter is None:
            items = costs.workspace_costs(ctx.workspace)
        else:
            named = Path(adapter).expanduser()
            folder = named if named.exists() else ctx.workspace.path("adapters", adapter)
            items = costs.lineage_costs(ctx.workspace, folder)
        stages = costs.by_stage(items, table)
        columns = costs.in_papers_columns(items, table)
        paper = costs.paper_costs()
        used = costs.used_prices(items, table)
        values = {
            "stages": [asdict(stage) for stage in stages],
            **{name: asdict(part) for name, part in columns.items()},
            "artifacts": [asdict(item) for item in items],
            "prices": [asdict(price) for price in used],
            "unpriced": costs.unpriced(items, table),
            "energy_not_readable": costs.why_no_energy(items),
            "paper": paper,
        }

        def show() -> None:
            if not items:
                common.show_all("the workspace is empty; begin with: resa-lens demo")
                return
            what = f"adapter {Path(adapter).name}" if adapter else "the whole workspace"
            made = common.table(
                f"Cost of {what}", "stage", "n", "time", "tokens", "peak MB", "GPU MB",
                "energy, Wh", "USD",
            )  # fmt: skip
            for stage in (*stages, columns["total"]):
                made.add_row(
                    stage.stage,
                    str(stage.artifacts),
                    duration(stage.seconds),
                    "" if stage.tokens is None else f"{stage.tokens:,}",
                    f"{stage.peak_rss_mb:.0f}",
                    "" if stage.peak_cuda_mb is None else f"{stage.peak_cuda_mb:.0f}",
                    energy(stage),
                    dollars(stage.usd),
                )
            beside = common.table(
                "As in the paper's Table 2: USD", "experiment", "training", "evaluation", "other",
                "total",
            )  # fmt: skip
            amounts = [dollars(part.usd) if part.artifacts else "none" for part in columns.values()]
            beside.add_row(f"here: {what}", *amounts)
            for row in paper:
                beside.add_row(
                    row["experiment"], f"{row['train_usd']:.0f}", f"{row['eval_usd']:.0f}", "",
                    f"{row['total_usd']:.0f}",
                )  # fmt: skip
            common.show_all(made, *_notes(values, bool(adapter)), beside, PAPER_NOTE)

        return values, show

    common.run(job, as_json)


PAPER_NOTE = (
    "The paper's are estimates on 2 L40S or RTX 6000 Ada GPUs at about 1 USD per GPU hour, for a "
    "model of 1.5 B parameters, as printed (Modularity's total is not the sum of its parts). "
    "Training includes the SAEs; other is what chooses and examines layers, which the paper does "
    "not list."
)


def _notes(values: dict[str, Any], one_adapter: bool) -> list[str]:
    lines = []
    if one_adapter:
        lines.append(
            "An artifact that serves others too, as an SAE run of many layers, counts whole; the "
            "base's evaluation counts where it asked the same."
        )
    total = values["total"]
    if unmetered := total["artifacts"] - total["metered"]:
        lines.append(
            f"{unmetered} of {total['artifacts']} artifacts were not metered: their time and peak "
            "memory are what their manifests hold, which may be of a part or of the whole process."
        )
    if values["unpriced"]:
        lines.append(
            f"No price for {', '.join(values['unpriced'])}: no USD figure. Give one with "
            "--usd-per-hour N, or --prices FILE with the columns device,usd_per_hour,source,date."
        )
    lines += [
        f"Price of {p['device']}: {p['usd_per_hour']:g} USD an hour ({p['source']}, {p['date']})."
        for p in values["prices"]
    ]
    if reasons := values["energy_not_readable"]:
        lines.append(f"Energy not readable everywhere: {'; '.join(reasons)}.")
    return lines


def duration(seconds: float) -> str:
    """Return a time as 12.3 s, 4 min 05 s or 3 h 07 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def energy(stage: Any) -> str:
    """Return watt hours, with how many artifacts they are of where not of all."""
    if stage.watt_hours is None:
        return "none read"
    share = "" if stage.energy_read == stage.artifacts else f" ({stage.energy_read} of them)"
    return f"{stage.watt_hours:.3g}{share}"


def dollars(amount: float | None) -> str:
    """Return USD with two digits that say something."""
    if amount is None:
        return "no price"
    return f"{amount:.2f}" if amount >= 0.995 or amount == 0 else f"{amount:.2g}"
