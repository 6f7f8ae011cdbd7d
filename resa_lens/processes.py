"""Who a process is: on which host, since which boot, and since when.

RESA_LENS_HOST names this host otherwise than the system does.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Owner:
    """A process, as its claim names it."""

    host: str
    boot: str
    space: str
    """What its number counts in: containers of one machine count for themselves."""
    process: int
    start: str
    """In clock ticks since the boot: it tells apart two processes of one number."""
    token: str

    @property
    def here(self) -> bool:
        """Whether this machine's process table tells of the process."""
        mine = this_process()
        return (self.host, self.boot, self.space) == (mine.host, mine.boot, mine.space)

    def __str__(self) -> str:
        """Name the process, and its host where that is another one."""
        return f"process {self.process}" + ("" if self.here else f" on host {self.host}")


def this_process(token: str = "") -> Owner:
    """Return this process as the owner of a claim."""
    host, process = os.environ.get("RESA_LENS_HOST") or socket.gethostname(), os.getpid()
    space = boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = str(Path("/proc/self/ns/pid").readlink())
    return Owner(host, boot, space, process, process_start(process) or "", token)


def process_start(process: int) -> str | None:
    """Return when a process of this machine began, "" where that is not known; None: it ended."""
    with suppress(OSError):
        # The /proc of another numbering knows this process by another number.
        if str(Path("/proc/self").readlink()) == str(os.getpid()):
            try:
                text = Path(f"/proc/{process}/stat").read_text()
            except OSError:
                return None
            # Behind the name, which may hold anything: the state, and 19 fields on the start.
            fields = text.rpartition(")")[2].split()
            return None if fields[0] in "ZX" else fields[19]
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return ""


def is_silent_rank() -> bool:
    """Say whether this is a process that torchrun started beside the first, which alone speaks."""
    return os.environ.get("RANK", "0") != "0"


@contextmanager
def noting_interrupts() -> Iterator[list[int]]:
    """Yield a list that holds the interrupts so far."""
    interrupts: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or (
        threading.current_thread() is not threading.main_thread()
    ):
        yield interrupts
        return

    def note(number: int, frame: Any) -> None:
        interrupts.append(number)
        signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)
