"""Claims: who is at work in a folder, for processes of several hosts that share it.

    <folder>/claim-<number>   of a run that one process at a time may do; the highest number counts
    <folder>/.claim-<token>   of a process's temporary files, which bear the token in their names

A claim is a line of JSON: host, boot, process and its start, a random token, and a counter that its
owner renews while it lives.  On the same machine the process table says at once who lives.  Of
another host's process only the counter tells: a reader that has watched it stand still for
`PATIENCE` intervals on its own monotonic clock takes over with the next number.  No wall clock is
read, and no claim is overwritten by another process.  An owner that was suspended proves its claim
before it writes.

RESA_LENS_CLAIM_INTERVAL sets the seconds between two renewals (2), the same for all hosts that
share a folder.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from resa_lens.errors import TakenError
from resa_lens.processes import Owner, process_start, this_process

PATIENCE = 15
"""Intervals that a counter stands still before its owner counts as dead."""
_LOOK = 5
"""Intervals that one look adds to these at most: a clock that jumps proves nothing."""
clock = time.monotonic


def interval() -> float:
    """Return the seconds between two renewals of a claim."""
    return float(os.environ.get("RESA_LENS_CLAIM_INTERVAL") or 2.0)


def say(text: str) -> None:
    """Print a line for people."""
    print(text, file=sys.stderr, flush=True)


def read(path: Path) -> tuple[bytes, Owner | None]:
    """Return a claim's text and its owner; no owner where it is not written yet, or damaged.

    Raises:
        OSError: there is no claim, or it cannot be read.
    """
    # A pipe without a writer would wait for one.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        text = os.read(descriptor, 4096)
    finally:
        os.close(descriptor)
    try:
        value = json.loads(text)
        del value["counter"]
        return text, Owner(**value)
    except (ValueError, TypeError, KeyError, RecursionError):
        return text, None


def name(path: Path | None) -> str:
    """Name the owner of a claim, as far as it says."""
    owner = None
    with suppress(OSError):
        owner = read(path)[1] if path else None
    return str(owner or "another process")


@dataclass
class _Look:
    text: bytes
    at: float
    still: float = 0.0
    """Seconds for which the text was watched and did not change."""


_LOOKS: dict[Path, _Look] = {}
"""What this process last saw of other hosts' claims."""


def is_alive(path: Path) -> bool | None:
    """Return whether a claim's owner lives; None: that shows only while it is watched.

    A claim that is not there has no owner.  Nothing is written.

    Raises:
        OSError: the claim cannot be read.
    """
    try:
        text, owner = read(path)
    except FileNotFoundError:
        return False
    if owner and owner.here:
        _LOOKS.pop(path, None)
        return process_start(owner.process) == owner.start
    now, last = clock(), _LOOKS.get(path)
    if last is None or last.text != text:
        _LOOKS[path] = _Look(text, now)
        return True if last and owner and owner.token.encode() in last.text else None
    last.still += min(max(0.0, now - last.at), _LOOK * interval())
    last.at = now
    return False if last.still >= PATIENCE * interval() else None


def is_of_here(path: Path) -> bool:
    """Return whether a file is a claim, and of a process of this host."""
    try:
        owner = read(path)[1]
    except OSError:
        return False
    return owner is not None and owner.here


def newest(folder: Path) -> Path | None:
    """Return the claim on a run's folder that counts, or None."""
    return max(folder.glob("claim-*"), key=_number, default=None)


def _number(path: Path) -> int:
    number = path.name.partition("claim-")[2]
    return int(number) if number.isdecimal() else -1


@dataclass
class Claim:
    """A claim of this process; a thread renews it until it is released."""

    path: Path
    doing: str
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    owner: Owner = field(init=False)
    counter: int = 0
    ended: threading.Event = field(default_factory=threading.Event)

    def begin(self) -> None:
        """Write the claim, and renew it from now on.

        Raises:
            FileExistsError: there is a claim of this name.
            OSError: it cannot be written.
        """
        self.owner = this_process(self.token)
        self._write(os.O_CREAT | os.O_EXCL)
        _OWN.append(self)
        threading.Thread(target=self._renew, daemon=True, name="claim").start()

    def _write(self, flags: int) -> None:
        # Always of one length: a renewal changes digits in place and needs no room on the disk.
        value = {**asdict(self.owner), "counter": f"{self.counter:012}"}
        descriptor = os.open(self.path, os.O_RDWR | os.O_CLOEXEC | flags, 0o644)
        try:
            if flags or self.token.encode() in os.read(descriptor, 4096):
                os.pwrite(descriptor, json.dumps(value).encode() + b"\n", 0)
        finally:
            os.close(descriptor)

    def _renew(self) -> None:
        while not self.ended.wait(interval()):
            self.counter += 1
            # Not made anew: what another process has removed stays removed.
            with suppress(OSError):
                self._write(0)

    def _own(self) -> bool:
        with suppress(FileNotFoundError):
            return self.token.encode() in read(self.path)[0]
        return False

    def prove(self) -> None:
        """Check that the claim still is this process's.

        Raises:
            TakenError: another process has taken over while this one stood still.
        """
        rival = newest(self.path.parent) if self.path.name[0] != "." else self.path
        if rival == self.path and self._own():
            return
        raise TakenError(
            f"this process stood still while {self.doing} into {self.path.parent}, and "
            f"{name(rival)} took over; the same command again goes on"
        )

    @contextmanager
    def kept(self) -> Iterator[Claim]:
        """Release the claim at the end; an error that follows from its loss is said as that.

        Raises:
            TakenError: another process has taken over.
        """
        try:
            yield self
        except TakenError:
            raise
        except Exception:
            with suppress(OSError):
                self.prove()
            raise
        finally:
            self.release()

    def release(self) -> None:
        """Remove the claim, if it still is this process's."""
        self.ended.set()
        with suppress(ValueError):
            _OWN.remove(self)
        with suppress(OSError):
            if self._own():
                self.path.unlink()


_OWN: list[Claim] = []
# No thread renews in a forked process: the claims stay its parent's.
os.register_at_fork(after_in_child=_OWN.clear)


def prove() -> None:
    """Check that all claims of this process still are its own: before it writes.

    Raises:
        TakenError: another process has taken one over.
    """
    for claim in tuple(_OWN):
        claim.prove()


def marked(folder: Path, token: str) -> Path:
    """Return the claim on the temporary files of a token."""
    return folder / f".claim-{token}"


def mark(folder: Path) -> Claim:
    """Claim the temporary files in a folder that bear the claim's token in their names.

    Raises:
        OSError: the claim cannot be written.
    """
    token = secrets.token_hex(8)
    claim = Claim(marked(folder, token), "writing", token)
    claim.begin()
    return claim


def take(folder: Path, doing: str, *, wait: bool = True, locked: bool = False) -> Claim:
    """Claim a run's folder; it comes into being where it is missing.

    Args:
        folder: of the run.
        doing: what other processes are told that this one does.
        wait: watch another host's process until it shows whether it lives; else it may.
        locked: another process has the folder's lock: without a claim it is about to write one.

    Raises:
        TakenError: another process is at work here.
        OSError: the claim cannot be written.
    """
    watched = False
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        others = sorted(folder.glob("claim-*"), key=_number)
        alive = is_alive(others[-1]) if others else locked
        if alive is not False:
            owner = name(others[-1] if others else None)
            # What moved since a look of long ago may have ended since.
            sure = alive and (watched or not others or others[-1] not in _LOOKS)
            if sure or not wait:
                raise TakenError(f"{owner} is {doing} into {folder}; wait for it, or end it")
            if not watched:
                say(f"watching whether {owner} still is {doing} into {folder}")
            watched = True
            time.sleep(interval() / 2)
            continue
        claim = Claim(folder / f"claim-{_number(others[-1]) + 1 if others else 0}", doing)
        with suppress(FileExistsError, FileNotFoundError):  # another was faster, or cleared up
            claim.begin()
            if not {*folder.glob("claim-*")} - {*others, claim.path}:
                for old in others:
                    old.unlink(missing_ok=True)
                return claim
            # Two began at once: both step back, and one will come first.
            claim.release()
            time.sleep(random.uniform(0, interval()))
