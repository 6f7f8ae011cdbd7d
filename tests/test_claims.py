"""Claims: one owner at a time, judged by its own sign of life, on one host and on several."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from resa_lens import claims, files
from resa_lens.claims import Claim, Owner, is_alive, mark, newest, take, this_process
from resa_lens.errors import RunFailedError, TakenError
from resa_lens.files import run_lock, write_errors

STEP = 0.04
"""Seconds between two renewals in these tests."""
NO_LOCKS = sorted(files._NO_LOCKS)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("RESA_LENS_CLAIM_INTERVAL", str(STEP))
    claims._LOOKS.clear()
    files._say_without_locks.cache_clear()


@pytest.fixture
def slow_renewal(monkeypatch):
    """What must be decided at once takes no interval."""
    monkeypatch.setenv("RESA_LENS_CLAIM_INTERVAL", "1000")


@pytest.fixture
def no_locks(monkeypatch):
    without_locks(monkeypatch, errno.ENOLCK)


def without_locks(monkeypatch, number: int) -> None:
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


def write_claim(path: Path, counter: int = 0, **changes) -> Owner:
    """Write a claim as another process would; by default one of another host."""
    owner = replace(this_process("a" * 16), **{"host": "elsewhere", **changes})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**asdict(owner), "counter": f"{counter:012}"}) + "\n")
    return owner


class Clock:
    def __init__(self, monkeypatch) -> None:
        self.now = 1e6
        monkeypatch.setattr(claims, "clock", lambda: self.now)

    def watch(self, path: Path, seconds: float) -> bool | None:
        """Look at a claim at every half interval; return what the last look says."""
        alive = None
        for _ in range(round(seconds / (STEP / 2))):
            self.now += STEP / 2
            alive = is_alive(path)
        return alive


HOLD = """
import sys, time
from pathlib import Path
from resa_lens.errors import TakenError
from resa_lens.files import run_lock, write_errors
folder = Path(sys.argv[1])
try:
    with run_lock(folder, "tuning"):
        print("begun", flush=True)
        if sys.argv[2:] == ["write"]:
            sys.stdin.readline()
        while sys.argv[2:] != ["write"]:
            time.sleep(1)
        with write_errors(folder):
            (folder / "result").write_text("of the one that stood still")
except TakenError as error:
    sys.exit(str(error))
"""


@contextmanager
def worker(folder: Path, *args: str, host: str | None = None, before=()) -> Iterator:
    """A process that claims a folder, of this host or of another."""
    env = {**os.environ, **({"RESA_LENS_HOST": host} if host else {})}
    process = subprocess.Popen(
        [*before, sys.executable, "-c", HOLD, str(folder), *args], env=env, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n", process.communicate()[1]
        yield process
    finally:
        process.kill()
        process.communicate()


# What a claim says, and its renewal


def test_a_claim_names_its_process_and_its_counter_moves(tmp_path):
    claim = take(tmp_path / "run", "tuning")
    text, owner = claims.read(claim.path)
    assert owner == this_process(claim.token)
    assert owner is not None
    assert (owner.process, owner.host) == (os.getpid(), os.uname().nodename)
    assert owner.start == claims.process_start(os.getpid())
    deadline = time.monotonic() + 10
    while claims.read(claim.path)[0] == text:
        assert time.monotonic() < deadline
        time.sleep(STEP / 4)
    assert len(claims.read(claim.path)[0]) == len(text)
    claim.release()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_renewal_makes_no_claim_anew_and_writes_into_nobody_elses(tmp_path):
    claim = mark(tmp_path)
    claim.path.unlink()
    time.sleep(3 * STEP)
    assert not claim.path.exists()
    write_claim(claim.path)
    text = claim.path.read_bytes()
    time.sleep(3 * STEP)
    claim.release()
    assert claim.path.read_bytes() == text


def test_a_forked_process_has_no_claims(tmp_path):
    claim = mark(tmp_path)
    claim.path.unlink()
    child = os.fork()
    if not child:
        os._exit(len(claims._OWN))
    assert os.waitpid(child, 0)[1] == 0
    with pytest.raises(TakenError):
        claims.prove()
    claim.release()
    claims.prove()


# The same machine: the process table decides at once


def test_a_live_process_of_this_machine_is_named_at_once(slow_renewal, tmp_path):
    with (
        worker(tmp_path) as process,
        pytest.raises(TakenError, match=f"^process {process.pid} is tuning into .*; wait for it"),
    ):
        take(tmp_path, "tuning")


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_process_of_this_machine_is_followed_at_once(slow_renewal, tmp_path, reaped):
    with worker(tmp_path) as process:
        process.kill()
        # Not waited for it is a zombie, which has a number and does nothing.
        os.waitid(os.P_PID, process.pid, os.WEXITED | (0 if reaped else os.WNOWAIT))
        claim = take(tmp_path, "tuning")
        assert claim.path.name == "claim-1"
        assert newest(tmp_path) == claim.path
        assert not (tmp_path / "claim-0").exists()
        claim.release()


def test_another_process_of_the_same_number_is_not_the_owner(slow_renewal, tmp_path):
    mine = this_process()
    write_claim(tmp_path / "claim-0", host=mine.host, start=str(int(mine.start) - 1))
    assert is_alive(tmp_path / "claim-0") is False
    write_claim(tmp_path / "claim-1", host=mine.host)
    assert is_alive(tmp_path / "claim-1") is True


@pytest.mark.parametrize("changes", [{"boot": "another"}, {"space": "another"}, {"host": "b"}])
def test_of_another_boot_container_or_host_the_process_table_says_nothing(tmp_path, changes):
    write_claim(tmp_path / "claim-0", **{"host": this_process().host, **changes})
    assert is_alive(tmp_path / "claim-0") is None


def test_without_a_process_table_in_files_the_signal_decides(tmp_path, monkeypatch):
    real = Path.readlink

    def readlink(self):
        if str(self).startswith("/proc"):
            raise OSError(errno.ENOENT, "no /proc")
        return real(self)

    monkeypatch.setattr(Path, "readlink", readlink)
    assert claims.process_start(os.getpid()) == ""
    assert claims.process_start(2**22 + 1) is None
    claim = take(tmp_path, "tuning")
    assert is_alive(claim.path) is True
    claim.release()


# Another host: its counter decides, on the reader's own clock


def test_a_counter_that_stands_still_long_enough_is_a_dead_owner(tmp_path, monkeypatch):
    clock, path = Clock(monkeypatch), tmp_path / "claim-0"
    write_claim(path)
    long = claims.PATIENCE * STEP
    assert clock.watch(path, long - STEP) is None
    assert clock.watch(path, 2 * STEP) is False


def test_a_counter_that_moves_is_a_live_owner(tmp_path, monkeypatch):
    clock, path = Clock(monkeypatch), tmp_path / "claim-0"
    for counter in range(10):
        write_claim(path, counter)
        assert is_alive(path) is (True if counter else None)
        assert clock.watch(path, claims.PATIENCE * STEP / 2) is None
    # Another owner's first claim is no sign of life of that one.
    write_claim(path, token="b" * 16)
    assert is_alive(path) is None


def test_a_clock_that_jumps_proves_nothing(tmp_path, monkeypatch):
    clock, path = Clock(monkeypatch), tmp_path / "claim-0"
    write_claim(path)
    for jump in (1e9, -1e9, 1e9):
        assert is_alive(path) is None
        clock.now += jump
    assert is_alive(path) is None


def test_no_wall_clock_is_read(tmp_path, monkeypatch):
    def wall(*_):
        raise AssertionError("a wall clock")

    monkeypatch.setattr(time, "time", wall)
    with run_lock(tmp_path):
        for past in (0, 2**31):
            os.utime(tmp_path / "claim-0", (past, past))
            assert is_alive(tmp_path / "claim-0") is True
            claims.prove()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"counter": 0}', "\0" * 50, "[" * 4000])
def test_a_claim_that_says_nothing_is_watched_as_another_hosts(tmp_path, monkeypatch, text):
    clock, path = Clock(monkeypatch), tmp_path / "claim-0"
    path.write_text(text)
    with pytest.raises(TakenError, match="another process is tuning"):
        take(tmp_path, "tuning", wait=False)
    assert clock.watch(path, (claims.PATIENCE + 1) * STEP) is False
    take(tmp_path, "tuning").release()


def test_a_process_of_another_host_is_watched_and_named(tmp_path, capsys):
    with worker(tmp_path, host="elsewhere") as process:
        name = f"process {process.pid} on host elsewhere"
        with pytest.raises(TakenError, match=f"^{name} is tuning into"):
            take(tmp_path, "tuning")
        with pytest.raises(TakenError, match=name):
            take(tmp_path, "tuning", wait=False)
    assert f"watching whether {name} still is tuning" in capsys.readouterr().err


def test_a_killed_owner_of_another_host_is_followed_after_a_while(tmp_path):
    with worker(tmp_path, host="elsewhere") as process:
        process.kill()
        began = time.monotonic()
        claim = take(tmp_path, "tuning")
        assert time.monotonic() - began >= claims.PATIENCE * STEP
        claim.release()


# Suspended owners


@pytest.mark.parametrize("locks", [True, False])
def test_an_owner_suspended_for_longer_than_its_renewal_stops_when_it_wakes(
    tmp_path, monkeypatch, locks
):
    with worker(tmp_path, "write", host="elsewhere") as process:
        if not locks:
            without_locks(monkeypatch, errno.ENOSYS)
        process.send_signal(signal.SIGSTOP)
        with run_lock(tmp_path, "tuning"), write_errors(tmp_path):
            (tmp_path / "result").write_text("whole")
            process.send_signal(signal.SIGCONT)
            _, said = process.communicate("\n", timeout=60)
            assert process.returncode == 1
            assert f"process {os.getpid()} on host" in said
            assert "took over; the same command again goes on" in said
            # It did not touch the claim of its follower either.
            claims.prove()
    assert (tmp_path / "result").read_text() == "whole"


def test_an_owner_that_wakes_after_its_follower_has_ended_stops_too(tmp_path):
    with worker(tmp_path, "write", host="elsewhere") as process:
        process.send_signal(signal.SIGSTOP)
        with run_lock(tmp_path, "tuning"):
            pass
        process.send_signal(signal.SIGCONT)
        _, said = process.communicate("\n", timeout=60)
        assert "another process took over" in said
    assert not (tmp_path / "result").exists()


def test_an_error_that_follows_from_a_lost_claim_is_said_as_that(tmp_path):
    def lose(error: Exception) -> None:
        with run_lock(tmp_path, "tuning"):
            (tmp_path / "claim-0").unlink()
            raise error

    for error in (KeyError("weights"), FileNotFoundError("state.json"), RunFailedError("nan")):
        with pytest.raises(TakenError, match="stood still while tuning"):
            lose(error)
    with pytest.raises(KeyError), run_lock(tmp_path):
        raise KeyError("weights")


def test_what_was_cleared_away_meanwhile_is_no_write_error(tmp_path):
    claim = mark(tmp_path)
    with pytest.raises(TakenError), claim.kept(), write_errors(tmp_path):  # noqa: PT012
        claim.path.unlink()
        (tmp_path / "gone" / "file").write_text("x")


# Taking


def test_two_that_begin_at_the_same_time_step_back_and_one_comes_first(tmp_path, monkeypatch):
    begin, rivals = Claim.begin, []

    def begin_beside_a_rival(self):
        begin(self)
        if not rivals:
            rivals.append(tmp_path / "claim-7")
            write_claim(rivals[0])
            threading.Timer(3 * STEP, rivals[0].unlink).start()

    monkeypatch.setattr(Claim, "begin", begin_beside_a_rival)
    claim = take(tmp_path, "tuning")
    assert {p.name for p in tmp_path.iterdir()} == {claim.path.name}
    claim.prove()
    claim.release()


def test_a_folder_that_is_removed_meanwhile_is_made_again(tmp_path, monkeypatch):
    begin, removed = Claim.begin, []

    def begin_after_removal(self):
        if not removed:
            removed.append(shutil.rmtree(self.path.parent))
        begin(self)

    monkeypatch.setattr(Claim, "begin", begin_after_removal)
    take(tmp_path / "a" / "run", "tuning").release()


COUNT = """
import errno, fcntl, os, random, sys, time
from pathlib import Path
from resa_lens.errors import TakenError
from resa_lens.files import run_lock, write_errors
if sys.argv[2] == "no locks":
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    fcntl.flock = flock
folder, done = Path(sys.argv[1]), 0
value = folder / "value"
while done < 8:
    try:
        with run_lock(folder / "run"), write_errors(folder):
            number = int(value.read_text())
            time.sleep(random.uniform(0, 0.01))
            value.write_text(str(number + 1))
        done += 1
    except TakenError:
        time.sleep(random.uniform(0, 0.02))
"""


@pytest.mark.parametrize("locks", ["locks", "no locks"])
def test_interleaved_writers_of_two_hosts_lose_nothing(tmp_path, monkeypatch, locks):
    # Long enough that nobody counts as dead on a busy machine.
    monkeypatch.setenv("RESA_LENS_CLAIM_INTERVAL", "0.3")
    (tmp_path / "value").write_text("0")
    workers = [
        subprocess.Popen([sys.executable, "-c", COUNT, str(tmp_path), locks],
                         env={**os.environ, "RESA_LENS_HOST": host}, stderr=subprocess.DEVNULL)
        for host in ("a", "a", "b", "b")
    ]  # fmt: skip
    assert [process.wait(120) for process in workers] == [0] * 4
    assert (tmp_path / "value").read_text() == "32"
    assert not list((tmp_path / "run").glob("claim-*"))


# Locks of the file system


@pytest.mark.parametrize("number", NO_LOCKS, ids=errno.errorcode.get)
def test_where_locks_fail_claims_are_enough_and_it_is_said_once(
    tmp_path, monkeypatch, capsys, number
):
    without_locks(monkeypatch, number)
    for _ in range(2):
        with run_lock(tmp_path), pytest.raises(TakenError, match="is training"), run_lock(tmp_path):
            pass
    (line,) = capsys.readouterr().err.splitlines()
    assert "this file system has no locks (" in line


def test_another_error_of_a_lock_is_an_error(tmp_path, monkeypatch):
    without_locks(monkeypatch, errno.EBADF)
    with pytest.raises(RunFailedError), run_lock(tmp_path):
        pass


def test_a_lock_without_a_claim_is_of_a_process_that_begins(tmp_path):
    with (tmp_path / "lock").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(TakenError, match="another process is training"), run_lock(tmp_path):
            pass
    with run_lock(tmp_path):
        pass


def test_a_disk_without_room_is_said_before_any_work(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(RunFailedError, match="disk is full"), run_lock(tmp_path):
        pass


# Two numberings of processes on one machine

UNSHARE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")


def can_unshare() -> bool:
    try:
        done = subprocess.run([*UNSHARE, "true"], capture_output=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


@pytest.mark.skipif(not can_unshare(), reason="this machine makes no PID namespaces")
def test_processes_of_two_namespaces_with_the_same_number_are_told_apart(tmp_path):
    with worker(tmp_path, before=UNSHARE):
        _, owner = claims.read(tmp_path / "claim-0")
        assert owner is not None
        assert not owner.here
        # Alive there, though here its number is another process's.
        with pytest.raises(TakenError, match=f"process {owner.process} on host"):
            take(tmp_path, "tuning")
        done = subprocess.run(
            [*UNSHARE, sys.executable, "-c", HOLD, str(tmp_path)],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 1
        assert f"process {owner.process} on host" in done.stderr
    take(tmp_path, "tuning").release()
