"""Commands about the workspace: runs, app."""

from __future__ import annotations

import errno
import http.client
import importlib.util
import os
import socket
import sys
import urllib.request
from typing import Annotated, Any

import typer

from resa_lens.cli import common
from resa_lens.cli.common import JsonOption, WorkspaceOption

PORT, PORTS = 8501, 100
"""Where the app is served first, and how many ports on are tried."""


def runs(workspace: WorkspaceOption = None, as_json: JsonOption = False) -> None:
    """List what the workspace holds, the newest first.

    Example: resa-lens runs
    """
    from resa_lens.workspace import WORK, how_far

    def job() -> tuple[dict[str, Any], Any]:
        ctx = common.context(workspace, 0, "cpu", "auto", False, None)
        unread: list[str] = []
        found = ctx.workspace.find("", unread=unread) if ctx.workspace.root.is_dir() else []
        for text in unread:
            ctx.reporter.note(f"left out: {text}")
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
        for work in sorted([*root.glob(f"*/{WORK}*"), *root.glob(f"*/*/{WORK}*")]):
            stage = work.relative_to(root).parts[0]
            rows.append(
                {
                    "kind": f"{stage}, unfinished ({how_far(work)})",
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
    port: Annotated[
        int | None,
        typer.Option(
            help=f"On localhost; {PORT} by default, or the next one that is free.",
            min=1,
            max=65535,
        ),
    ] = None,
    no_browser: Annotated[
        bool, typer.Option("--no-browser", help="Only serve; open the address yourself.")
    ] = False,
) -> None:
    """Open the feature explorer in a browser, on localhost.

    Without --workspace and without ./resa-workspace it shows the example that ships.

    Example: resa-lens app --workspace resa-workspace
    """
    from resa_lens.errors import BadInputError
    from resa_lens.resources import app_script

    def job() -> tuple[dict[str, Any], Any]:
        if importlib.util.find_spec("streamlit") is None:
            raise BadInputError("streamlit is not installed; run: pip install 'resa-lens[app]'")
        from resa_lens.app import places

        place = next(iter(places.found(workspace).values()))
        if place.root.exists() and not place.root.is_dir():
            raise BadInputError(f"workspace {place.root} is a file; pass a folder with --workspace")
        free, note = _port(port)
        typer.echo(f"workspace: {place.root} ({place.why})", err=True)
        if note:
            typer.echo(note, err=True)
        typer.echo(f"feature explorer: http://localhost:{free} (Ctrl+C ends it)", err=True)
        options = {
            "server.address": "localhost",
            "server.port": free,
            "server.headless": str(no_browser).lower(),
            "server.showEmailPrompt": "false",
            "server.fileWatcherType": "none",
            "browser.gatherUsageStats": "false",
            "client.showErrorDetails": "none",
            "client.toolbarMode": "viewer",
            # The address stands above.
            "logger.hideWelcomeMessage": "true",
        }
        command = [sys.executable, "-m", "streamlit", "run", str(app_script())]
        command += [f"--{name}={value}" for name, value in options.items()]
        command += ["--", "--workspace", workspace] if workspace else []
        os.execv(sys.executable, command)  # noqa: S606

    common.run(job, False)


def _port(asked: int | None) -> tuple[int, str]:
    """Return a free port of this machine, and what is to be said about it.

    Raises:
        BadInputError: the one that was asked for is taken or not permitted, or none is free.
    """
    from resa_lens.errors import BadInputError

    if asked is not None:
        problem = _taken(asked)
        if problem:
            raise BadInputError(
                f"port {asked} {problem}.\nEnd what holds it, give another --port, or leave it out "
                f"for the next free one from {PORT} on."
            )
        return asked, ""
    first = _taken(PORT)
    if not first:
        return PORT, ""
    for port in range(PORT + 1, PORT + PORTS):
        if not _taken(port):
            return port, f"port {PORT} {first}; using {port}"
    raise BadInputError(
        f"ports {PORT} to {PORT + PORTS - 1} are all taken; give a free one with --port"
    )


def _taken(port: int) -> str:
    """Say why a port of this machine cannot be had, "" if it can."""
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((address, port))
        except OSError as error:
            if error.errno == errno.EACCES:
                return "needs the administrator's permission; ports from 1024 on do not"
            if error.errno == errno.EADDRINUSE:
                return f"is taken by {_holder(port)}"
            # No such family of addresses here.
    return ""


def _holder(port: int) -> str:
    """Guess what answers at a port."""
    try:
        with urllib.request.urlopen(f"http://localhost:{port}/_stcore/health", timeout=0.5):
            return f"a streamlit app, perhaps another `resa-lens app` (http://localhost:{port})"
    except (OSError, http.client.HTTPException):
        return "another program"
