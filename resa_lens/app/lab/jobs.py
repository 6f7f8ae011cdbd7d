"""Child processes of a page: the lab's worker, and commands that are run from the app.

Both end with the browser's session (streamlit keeps one for some minutes after the browser left),
and with the app, however that ends.
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import streamlit as st

from resa_lens.app import places
from resa_lens.app.widgets import download, missing, problem, readable, shell
from resa_lens.files import named_path
from resa_lens.jobs.children import Command, Job, Worker
from resa_lens.resources import workspace_folder

EVERY_S = 0.5
"""Between two looks at work that is under way."""
SOON_S = 0.4
"""What a page waits for work that may be quick, before it draws a progress bar."""
WORKER = (sys.executable, "-m", "resa_lens.app.lab.worker")
PROGRAM = (*WORKER, "command")


def worker() -> Worker:
    """Return the worker of this browser session; a short loss of the connection does not end it."""
    return st.session_state.setdefault("lab-worker", Worker(WORKER))


def _commands() -> dict[str, Command]:
    """Return the commands of this session by panel."""
    return st.session_state.setdefault("commands-under-way", {})


def _scratch() -> Path:
    """Return a folder that goes with the session."""
    name = "scratch-folder"
    if name not in st.session_state:
        st.session_state[name] = tempfile.TemporaryDirectory(
            prefix="resa-lens-scratch-", ignore_cleanup_errors=True
        )
    return Path(st.session_state[name].name)


# On a page


def show_progress(job: Job, key: str) -> None:
    """Draw how far a job is, with a button that stops it; the page is drawn anew at its end."""

    @st.fragment(run_every=EVERY_S)
    def draw() -> None:
        if job.done:
            st.rerun()
        # Names of models and text of the model are no Markdown.
        st.progress(0.0 if job.share is None else job.share)
        with st.container(horizontal=True, vertical_alignment="center"):
            if st.button("Stop", icon=":material/stop_circle:", key=f"stop-{key}"):
                job.stop()
                st.rerun()
            st.text(job.label[:200])
        if job.text:
            st.text(job.text[-2000:])

    draw()


def run_command_panel(command: Sequence[str], key: str) -> None:
    """Offer to run a `resa-lens` command here: where to write, run, progress, stop, result.

    It writes into a scratch folder or one that is named, never into the workspace of its
    --workspace, which the app reads.

    Args:
        command: the words of the command line, "resa-lens" first.
        key: of the panel's widgets.
    """
    named, arguments = places.split([str(word) for word in command[1:]])
    read = named_path(named, "workspace").resolve() if named else None
    running = _commands().get(key)
    if running is not None and not running.done:
        shell(running.line)
        show_progress(running, key)
        return
    target = _target(read, key)
    arguments += ["--workspace", str(target)] if target else []
    line = shlex.join(["resa-lens", *arguments])
    shell(line)
    clicked = st.button(
        "Run it here", icon=":material/play_arrow:", key=f"run-{key}", disabled=target is None
    )
    if clicked and target is not None:
        _commands()[key] = Command(arguments, PROGRAM)
        st.rerun()
    if running is not None:
        if running.line != line:
            missing("The command above was changed since; this one was run:", running.line)
        _outcome(running, key)


def _target(read: Path | None, key: str) -> Path | None:
    """Choose the folder that is written to; None until it is settled."""
    choices = ["a scratch folder", "a folder of mine"]
    choice = st.radio("Write into", choices, horizontal=True, key=f"where-{key}")
    if choice == choices[0]:
        st.caption(
            "Empty at first: what the command needs and does not find there, it makes. It goes "
            "with this session."
        )
        return _scratch()
    named = st.text_input("Folder", key=f"folder-{key}", placeholder="a path on this machine")
    if not named.strip():
        return None
    target = readable(workspace_folder, named.strip())
    if target and read and target.is_relative_to(read):
        problem(
            f"{target} belongs to the workspace that is shown here, which the app never writes to. "
            "Name another folder, or run the command in a terminal."
        )
        return None
    return target


def _outcome(job: Command, key: str) -> None:
    if job.stopped:
        st.text("Stopped. The same command goes on where it was, where it can.")
    elif job.error is not None:
        problem(job.error)
    else:
        st.json(job.result, expanded=1)
        text = json.dumps(job.result, indent=2)
        download("Download as JSON", lambda: text, f"{key}.json", key=f"json-{key}")
