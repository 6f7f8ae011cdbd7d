"""Commands about the workspace: runs, app."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Annotated, Any

import typer

from resa_lens.cli import common
from resa_lens.cli.common import JsonOption, WorkspaceOption


def runs(workspace: WorkspaceOption = None, as_json: JsonOption = False) -> None:
    """List what the workspace holds, the newest first.

    Example: resa-lens runs
    """

    def job() -> tuple[dict[str, Any], Any]:
        from resa_lens.saes.checkpoint import read_state

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

        for work in sorted(ctx.workspace.root.glob("*/*/.work-*")):
            held = [read_state(group) for group in sorted(work.glob("group-*"))]
            steps = max((state["step"] for state in held if state), default=0)
            arms = len(list(work.glob("*.parquet")))
            far = f"{arms} arm{'' if arms == 1 else 's'}" if not held else f"step {steps}"
            rows.append(
                {
                    "kind": f"{work.parents[1].name}, unfinished ({far})",
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
