"""Damage one file of a workspace, let every reader read it, and do so some hundred times.

    python benchmarks/damage.py                          all cases, about half an hour
    python benchmarks/damage.py --share 0.1 --seed 0     the part that the tests run

Cases and readers are those of tests/support/damage.py.  A line for each fault, then a summary;
exits with 1 where there is one.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
import tempfile
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

SMALL_HOLE = 300 * 2**20
"""Bytes of the hollow file of a sample: above what is read whole, and quick to hash."""


def main(share: float = 1.0, seed: int = 0, as_json: bool = False) -> None:
    """Run it and print the faults and the summary."""
    import damage

    if share < 1:
        damage.SPARSE = SMALL_HOLE
    damage.warm()
    place = Path(tempfile.mkdtemp(prefix="damage-"))
    try:
        root = place / "workspace"
        _, _, wrong = damage.in_child(lambda: damage.build(root), 600)
        if wrong:
            raise SystemExit(f"the workspace could not be built: {wrong}")
        plan = damage.plan_of(root, seed, share)

        def note(verdict: damage.Verdict) -> None:
            for fault in verdict.faults:
                print(f"{verdict.consumer} | {verdict.case} | {fault}", file=sys.stderr, flush=True)

        verdicts = damage.run(root, plan, place, note=note)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    summary = summarised(plan, verdicts)
    print(json.dumps(summary) if as_json else line(summary))
    raise SystemExit(1 if summary["faults"] else 0)


def summarised(plan: list[Any], verdicts: list[Any]) -> dict[str, Any]:
    """Return the figures of a run."""
    faults = [fault for verdict in verdicts for fault in verdict.faults]
    kinds = Counter(case.kind for case, _ in plan)
    return {
        "cases": len(plan),
        "kinds": dict(sorted(kinds.items())),
        "consumers": len({verdict.consumer for verdict in verdicts}),
        "pairs": len(verdicts),
        "outcomes": dict(Counter(verdict.outcome for verdict in verdicts).most_common()),
        "tracebacks": sum(fault.startswith("traceback") for fault in faults),
        "hangs": sum(fault == "hang" for fault in faults),
        "used": sum(fault.startswith(("altered", "whole")) for fault in faults),
        "written": sum("wrote" in fault for fault in faults),
        "peak_mb": round(max(verdict.peak_mb for verdict in verdicts)),
        "faults": [f"{v.consumer} | {v.case} | {fault}" for v in verdicts for fault in v.faults],
    }


def line(summary: dict[str, Any]) -> str:
    """Return the summary for docs/log.md."""
    outcomes = ", ".join(f"{count} {name}" for name, count in summary["outcomes"].items())
    return (
        f"{date.today()}, {platform.machine()}: {summary['cases']} cases of "
        f"{len(summary['kinds'])} kinds, {summary['consumers']} consumers, {summary['pairs']} "
        f"pairs ({outcomes}): {summary['tracebacks']} tracebacks, {summary['hangs']} hangs, "
        f"{summary['used']} altered files used without a word, {summary['written']} writes of "
        f"readers, {len(summary['faults'])} faults in all; peak {summary['peak_mb']} MB"
    )


if __name__ == "__main__":
    typer.run(main)
