"""What the work has cost, in tables and sentences."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from resa_lens.figures.grids import cell, grid

PAPER_NOTE = (
    "The paper's are estimates on 2 L40S or RTX 6000 Ada GPUs at about 1 USD per GPU hour, for a "
    "model of 1.5 B parameters, as printed (Modularity's total is not the sum of its parts). "
    "Training includes the SAEs; other is what chooses and examines layers, which the paper does "
    "not list."
)


def cost_of(values: dict[str, Any], adapter: str | None) -> Iterator[Any]:
    """Yield what a workspace, or an adapter, has cost."""
    if not values["artifacts"]:
        yield "the workspace is empty; begin with: resa-lens demo"
        return
    what = f"adapter {Path(adapter).name}" if adapter else "the whole workspace"
    yield grid(f"Cost of {what}", [*values["stages"], values["total"]], {
        "stage": "{stage}", "n": "{artifacts}", "time": lambda row: duration(row["seconds"]),
        "tokens": "{tokens:,}", "peak MB": "{peak_rss_mb:.0f}", "GPU MB": "{peak_cuda_mb:.0f}",
        "energy, Wh": energy, "USD": lambda row: dollars(row["usd"]),
    })  # fmt: skip
    yield from _notes(values, bool(adapter))
    parts = {name: values[name] for name in ("training", "evaluation", "other", "total")}
    amounts = {k: dollars(p["usd"]) if p["artifacts"] else "none" for k, p in parts.items()}
    columns = {"experiment": "{experiment}", **{name: f"{{{name}}}" for name in parts}}
    paper = [
        {"experiment": row["experiment"], "training": cell("{train_usd:.0f}", row),
         "evaluation": cell("{eval_usd:.0f}", row), "other": "",
         "total": cell("{total_usd:.0f}", row)}
        for row in values["paper"]
    ]  # fmt: skip
    here = {"experiment": f"here: {what}", **amounts}
    yield grid("As in the paper's Table 2: USD", [here, *paper], columns)
    yield PAPER_NOTE


def _notes(values: dict[str, Any], one_adapter: bool) -> Iterator[str]:
    if one_adapter:
        yield (
            "An artifact that serves others too, as an SAE run of many layers, counts whole; the "
            "base's evaluation counts where it asked the same."
        )
    total = values["total"]
    if unmetered := total["artifacts"] - total["metered"]:
        yield (
            f"{unmetered} of {total['artifacts']} artifacts were not metered: their time and peak "
            "memory are what their manifests hold, which may be of a part or of the whole process."
        )
    if values["unpriced"]:
        yield (
            f"No price for {', '.join(values['unpriced'])}: no USD figure. Give one with "
            "--usd-per-hour N, or --prices FILE with the columns device,usd_per_hour,source,date."
        )
    for price in values["prices"]:
        yield (
            f"Price of {price['device']}: {price['usd_per_hour']:g} USD an hour "
            f"({price['source']}, {price['date']})."
        )
    if reasons := values["energy_not_readable"]:
        yield f"Energy not readable everywhere: {'; '.join(reasons)}."


def duration(seconds: float) -> str:
    """Return a time as 12.3 s, 4 min 05 s or 3 h 07 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def energy(stage: dict[str, Any]) -> str:
    """Return watt hours, with how many artifacts they are of where not of all."""
    if stage["watt_hours"] is None:
        return "none read"
    partial = stage["energy_read"] != stage["artifacts"]
    return f"{stage['watt_hours']:.3g}" + (f" ({stage['energy_read']} of them)" if partial else "")


def dollars(amount: float | None) -> str:
    """Return USD with two digits that say something."""
    if amount is None:
        return "no price"
    return f"{amount:.2f}" if amount >= 0.995 or amount == 0 else f"{amount:.2g}"
