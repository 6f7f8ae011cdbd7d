"""Work in child processes: started, asked, watched and stopped by one that never waits for it.

Two kinds: a worker, which answers requests and keeps what the next one may need, and any
`resa-lens` command line.  Both end with whoever holds them, however that ends.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

IDLE_S = 900
"""Without a request for so long a worker's process is ended, and its memory is free: whoever asked
may have forgotten it, and the next request starts a new one."""
GRACE_S = 10
"""What a command gets to end by itself once it is stopped."""
LAST_LINES = 6
"""Of what a process says, shown where it died."""
_BAR = re.compile(r"(?P<label>.*?)\s+[━╸╺]+\s*(?P<share>\d{1,3})%")
"""A line of rich's progress bars, as resa-lens draws them."""
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(eq=False)
class Job:
    """Work under way in another process, as far as it has reported."""

    request: dict[str, Any] = field(default_factory=dict)
    """The values that it was asked with."""
    label: str = "starting"
    share: float | None = None
    """Of the work that is done, 0 to 1; None where that is not known."""
    text: str = ""
    """What is there so far."""
    result: Any = None
    error: str | None = None
    """One message, where the work could not be done."""
    stopped: bool = False
    """Whether it was stopped by the person."""
    halt: Callable[[], None] = lambda: None
    """Ends its process."""
    _ended: threading.Event = field(default_factory=threading.Event)

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._ended.is_set()

    def wait(self, seconds: float) -> bool:
        """Wait a little; return whether it has ended."""
        return self._ended.wait(seconds)

    def stop(self) -> None:
        """End it now."""
        if not self.done:
            self.stopped = True
            self.halt()

    def end(self, *, result: Any = None, error: str | None = None) -> None:
        """Take the result, or why there is none; what was stopped has neither."""
        if not self.done:
            self.result = result
            self.error = None if self.stopped else error
            self._ended.set()


def _kill(process: subprocess.Popen[str]) -> None:
    """End a process and its group, and wait until it is gone."""
    _signal(process, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)


def _signal(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Send a signal to a process and its group; an ended one's number may be another's by now."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)


def _start(
    command: Sequence[str], environment: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    # A session of its own: the interrupt of a terminal is the app's, and all of it can be ended.
    return subprocess.Popen(  # noqa: S603
        list(command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **(environment or {})},
        start_new_session=True,
    )


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
    more = "; the machine may be out of memory" if name == "SIGKILL" else ""
    return f"killed by {name}{more}"


def _watch(
    process: subprocess.Popen[str],
    note: Callable[[str], None],
    reply: Callable[[str], None],
    end: Callable[[int], None],
) -> None:
    """Read a process in threads: call with each line of its two outputs, and with its exit code."""

    def notes() -> None:
        for line in process.stderr or ():
            note(line)

    def replies() -> None:
        for line in process.stdout or ():
            reply(line)
        code = process.wait()
        reader.join(timeout=1)
        end(code)

    reader = threading.Thread(target=notes, daemon=True)
    reader.start()
    threading.Thread(target=replies, daemon=True).start()


class Worker:
    """The process that holds a model; it starts with the first request, and again after an end."""

    def __init__(self, command: Sequence[str], idle_s: float = IDLE_S) -> None:
        """Start nothing yet.

        Args:
            command: the process: it reads requests and writes replies, a line of JSON each.
            idle_s: seconds without a request after which it is ended.
        """
        self._command, self._idle_s = command, idle_s
        # Whoever ends an idle process must know that nothing was sent to it in the meantime.
        self._lock = threading.Lock()
        self._idle: threading.Timer | None = None
        self._number = 0
        self._jobs: dict[int, Job] = {}
        self._stopped = threading.Event()
        self._processes: list[subprocess.Popen[str]] = []
        self._end = weakref.finalize(self, _end_all, self._processes)

    @property
    def process(self) -> subprocess.Popen[str] | None:
        """The process, where one is alive."""
        alive = [process for process in self._processes if process.poll() is None]
        return alive[-1] if alive else None

    def ask(self, do: str, **values: Any) -> Job:
        """Send a request; requests are answered one after the other."""
        with self._lock:
            process = self.process or self._begin()
            self._number += 1
            job = Job(values, halt=partial(_halt, process, self._stopped))
            self._jobs[self._number] = job
            self._wait_for_idle()
        _send(process, {"id": self._number, "do": do, "with": values})
        if (code := process.poll()) is not None:  # it died before the job was on its list
            job.end(error=_dead(code))
        return job

    def drop(self, job: Job) -> None:
        """Give a request up: one that is not begun never is, and no answer to it is awaited."""
        for number, known in list(self._jobs.items()):
            if known is job and (process := self.process) is not None:
                self._jobs.pop(number, None)
                _send(process, {"cancel": number})
                job.stopped = True
                job.end()

    def close(self) -> None:
        """End the process."""
        _end_all(self._processes)

    def _wait_for_idle(self) -> None:
        """End the process once it has been idle for long; a timer keeps no forgotten worker."""
        me = weakref.ref(self)

        def look() -> None:
            if worker := me():
                with worker._lock:
                    if worker._idle is not timer:  # something was asked since
                        return
                    if worker._jobs and worker.process:
                        worker._wait_for_idle()
                    else:
                        _end_all(worker._processes)

        self._idle = timer = threading.Timer(self._idle_s, look)
        timer.daemon = True
        timer.start()

    def _begin(self) -> subprocess.Popen[str]:
        process = _start(self._command)
        self._processes[:] = [process]
        self._jobs, self._stopped = {}, threading.Event()
        # The threads know nothing of the worker: it may be forgotten while they listen.
        _listen(process, self._jobs, self._stopped)
        return process


def _halt(process: subprocess.Popen[str], stopped: threading.Event) -> None:
    """End a worker's process because a person wants it."""
    stopped.set()
    _kill(process)


def _end_all(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        _kill(process)
    processes.clear()


def _send(process: subprocess.Popen[str], message: dict[str, Any]) -> None:
    """Send a message in a thread: a process that hangs reads nothing, and its pipe is soon full."""

    def write() -> None:
        assert process.stdin is not None
        with suppress(BrokenPipeError, ValueError):  # its end is told by the listening thread
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()

    threading.Thread(target=write, daemon=True).start()


def _listen(process: subprocess.Popen[str], jobs: dict[int, Job], stopped: threading.Event) -> None:
    """Hand the replies to their jobs; where the process ends, say so to those that wait."""
    lines: deque[str] = deque(maxlen=LAST_LINES)

    def note(line: str) -> None:
        lines.append(line.rstrip())
        sys.stderr.write(line)  # the app's own log

    def reply(line: str) -> None:
        try:
            message = json.loads(line)
        except ValueError:  # cut short by its end
            return
        job = jobs.get(message["id"])
        if job is None:
            return
        if progress := message.get("progress"):
            job.label, job.text = progress["label"], progress["text"]
            total = progress["total"]
            job.share = progress["done"] / total if total else None
        else:
            jobs.pop(message["id"])
            job.end(result=message.get("result"), error=message.get("error"))

    def end(code: int) -> None:
        last = "\n".join(line for line in lines if line)
        reason = _dead(code) + (f"\nIts last lines:\n{last}" if last else "")
        if stopped.is_set():
            reason = "Stopped together with another request, which the same process was to answer."
        for job in list(jobs.values()):
            job.end(error=reason)

    _watch(process, note, reply, end)


def _dead(code: int) -> str:
    return (
        f"The process that runs the model ended before it had answered ({_how_it_ended(code)}). "
        "The next click starts a new one."
    )


class Command(Job):
    """A `resa-lens` command line as a process; its result is the object that --json prints."""

    def __init__(self, arguments: Sequence[str], program: Sequence[str]) -> None:
        """Start it.

        Args:
            arguments: behind `resa-lens`.
            program: what takes them, and ends with its input.
        """
        super().__init__()
        self.line = shlex.join(["resa-lens", *arguments])
        words = [*arguments] if "--json" in arguments else [*arguments, "--json"]
        # As on a terminal, so that bars are drawn.
        terminal = {"TTY_COMPATIBLE": "1", "TERM": "xterm", "COLUMNS": "160"}
        self.process = process = _start([*program, *words], terminal)
        self.halt = partial(_interrupt, process)
        # It ends with its input.
        assert process.stdin is not None
        weakref.finalize(self, process.stdin.close)
        # The threads do not keep it: it may be forgotten while they listen.
        me = weakref.ref(self)
        lines: deque[str] = deque(maxlen=LAST_LINES)
        printed: list[str] = []

        def note(raw: str) -> None:
            # A bar is drawn anew on its own line.
            for line in filter(None, map(str.strip, re.split(r"[\r\n]", _CONTROL.sub("", raw)))):
                job, bar = me(), _BAR.match(line)
                if not bar:
                    lines.append(line)
                if job:
                    job.label = bar["label"] if bar else line
                    job.share = min(1.0, int(bar["share"]) / 100) if bar else None

        def end(code: int) -> None:
            if job := me():
                job.end(**_result(code, "".join(printed), list(lines)))

        _watch(process, note, printed.append, end)


def _result(code: int, printed: str, lines: list[str]) -> dict[str, Any]:
    """Return a command's result or error by its exit code, its output and its last notes."""
    if code == 0:
        try:
            return {"result": json.loads(printed)}
        except ValueError:
            return {"error": f"the command printed no JSON object: {printed[:200]!r}"}
    last = "\n".join(lines)
    if match := re.search(r"^error: (.*)", last, re.MULTILINE | re.DOTALL):
        return {"error": match[1]}
    return {"error": f"the command ended before its result ({_how_it_ended(code)})\n{last}"}


def _interrupt(process: subprocess.Popen[str]) -> None:
    """Stop as a person at a terminal would; what does not end then is killed."""
    _signal(process, signal.SIGINT)
    late = threading.Timer(GRACE_S, _kill, [process])
    late.daemon = True
    late.start()
