"""A port of this machine on which the app can be served."""

from __future__ import annotations

import errno
import os
import socket
import sys
from typing import NoReturn

from resa_lens.errors import BadInputError
from resa_lens.resources import app_script

PORT, PORTS = 8501, 100
"""Where the app is served first, and how many ports on are tried."""


def free_port(port: int | None) -> tuple[int, str]:
    """Return a free port of this machine, and what is to be said about it.

    Raises:
        BadInputError: the one that was asked for is taken or not permitted, or none is free.
    """
    if port is not None:
        if problem := _taken(port):
            raise BadInputError(
                f"port {port} {problem}.\nEnd what holds it, give another --port, or leave it out "
                f"for the next free one from {PORT} on."
            )
        return port, ""
    if not (problem := _taken(PORT)):
        return PORT, ""
    for free in range(PORT + 1, PORT + PORTS):
        if not _taken(free):
            return free, f"port {PORT} {problem}; using {free}"
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
    import http.client
    import urllib.request

    try:
        with urllib.request.urlopen(f"http://localhost:{port}/_stcore/health", timeout=0.5):
            return f"a streamlit app, perhaps another `resa-lens app` (http://localhost:{port})"
    except (OSError, http.client.HTTPException):
        return "another program"


def serve(port: int, workspace: str | None, *, browser: bool) -> NoReturn:
    """Become the process that serves the app on a port of localhost."""
    settings = {
        "server.address": "localhost",
        "server.port": port,
        "server.headless": str(not browser).lower(),
        "server.showEmailPrompt": "false",
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false",
        "client.showErrorDetails": "none",
        "client.toolbarMode": "viewer",
        # The address stands above.
        "logger.hideWelcomeMessage": "true",
    }
    words = [sys.executable, "-m", "streamlit", "run", str(app_script())]
    words += [f"--{name}={value}" for name, value in settings.items()]
    words += ["--", "--workspace", workspace] if workspace else []
    os.execv(sys.executable, words)  # noqa: S606
