"""Commands about the workspace: runs, app."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from resa_lens.cli import common
from resa_lens.cli.common import JsonOption, WorkspaceOption


def runs(workspace: WorkspaceOption = None, as_json: JsonOption = False) -> None:
    """List what the workspace holds, the newest first.

    Example: resa-lens runs
    """

    def job() -> tuple[dict[str, Any], Any]:
        ctx = common.context(workspace, 0, "cpu", "auto", False, None)
        found = ctx.workspace.find("") if ctx.workspace.root.is_dir() else []
        rows = []
        for folder, manifest in found:
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            rows.append(
                {
                    "kind": manifest.kind,
                    "path": ctx.workspace.relative(folder),
                    "created": manifest.created,
                    "megabytes": round(size / 2**20, 2),
                    "seconds": manifest.seconds,
                }
            )

        root = ctx.workspace.root
        for work in sorted([*root.glob("*/.work-*"), *root.glob("*/*/.work-*")]):
            stage = work.relative_to(root).parts[0]
            rows.append(
                {
                    "kind": f"{stage}, unfinished ({_how_far(work)})",
                    "path": ctx.workspace.relative(work),
                    "created": "",
                    "megabytes": round(
                        sum(f.stat().st_size for f in work.rglob("*") if f.is_file()) / 2**20, 2
                    ),
                    "seconds": 0.0,
                }
            )

        def show() -> None:
            made = common.table("Runs", "kind", "created (UTC)", "MB", "seconds", "path")
            made.columns[-1].justify = "left"
            for row in rows:
                # The state stands in the column of the time: paths keep their room.
                kind, _, state = row["kind"].partition(", ")
                created = row["created"][:16].replace("T", " ") or state
                seconds = f"{row['seconds']:.0f}" if row["created"] else ""
                made.add_row(kind, created, f"{row['megabytes']:.1f}", seconds, row["path"])
            common.show_all(made if rows else "the workspace is empty; begin with: resa-lens demo")

        return {"runs": rows}, show

    common.run(job, as_json)


def _how_far(work: Path) -> str:
    """Say how far an unfinished run came, by what it has kept."""
    from resa_lens.saes.checkpoint import read_state

    def several(n: int, what: str) -> str:
        return f"{n} {what}{'' if n == 1 else 's'}"

    if (work / "answers.jsonl").exists():
        # The first line is the run's settings.
        lines = (work / "answers.jsonl").read_bytes().count(b"\n")
        return several(max(0, lines - 1), "answer")
    if (work / "locks").is_dir():
        return several(len(list((work / "jobs").glob("*.json"))), "job")
    if arms := len(list(work.glob("*.parquet"))):
        return several(arms, "arm")
    held = [read_state(place) for place in (work, *work.glob("group-*"))]
    return f"step {max((state['step'] for state in held if state), default=0)}"


def explorer(
    workspace: WorkspaceOption = None,
    port: Annotated[int, typer.Option(help="On localhost.", min=1, max=65535)] = 8501,
) -> None:
    """Open the feature explorer in a browser, on localhost.

    Example: resa-lens app --workspace resa-workspace
    """
    from resa_lens.errors import BadInputError
    from resa_lens.resources import app_script

    def job() -> tuple[dict[str, Any], Any]:
        if importlib.util.find_spec("streamlit") is None:
            raise BadInputError("streamlit is not installed; run: pip install 'resa-lens[app]'")
        ctx = common.context(workspace, 0, "cpu", "auto", False, None)
        os.environ["RESA_LENS_WORKSPACE"] = str(ctx.workspace.root)
        options = ["--server.address", "localhost", "--server.port", str(port)]
        options += ["--browser.gatherUsageStats", "false", "--client.toolbarMode", "viewer"]
        command = [sys.executable, "-m", "streamlit", "run", str(app_script()), *options]
        os.execv(sys.executable, command)  # noqa: S606

    common.run(job, False)
