"""Processes behind a page: their protocol, how they are stopped, and that none is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from app_driver import HOSTILE, texts
from streamlit.testing.v1 import AppTest

from resa_lens.app.lab import jobs
from resa_lens.jobs import children
from resa_lens.jobs.children import Command, Worker

# A worker whose work is as told, without a model: the protocol is the real one.
STUB = """
import os, subprocess, sys, time
from resa_lens.app.lab import worker
from resa_lens.errors import BadInputError

class Bench:
    def answer(self, do, values, tell):
        tell("at it", 1, 4, "so far")
        if do == "print":
            print("a library's print")
            os.write(1, b"{}\\n")
            subprocess.run([sys.executable, "-c", "import sys; print(9); sys.stdin.read()"])
        if do == "refuse":
            raise BadInputError("that is no model\\nuse another")
        if do == "fail":
            raise ValueError("deep\\n  inside")
        if do == "die":
            print("last words", file=sys.stderr, flush=True)
            os.kill(os.getpid(), 9)
        if do == "hang":
            time.sleep(60)
        if do == "wait":
            time.sleep(0.5)
        self.begun = [*getattr(self, "begun", []), values.get("name")]
        if do == "begun":
            return {"begun": self.begun}
        if do == "pause":
            time.sleep(1)
        return {"values": values}

worker.Bench = Bench
worker.main([])
"""


@pytest.fixture
def stub():
    worker = Worker([sys.executable, "-c", STUB])
    yield worker
    worker.close()


def ended(pid: int, seconds: float = 10) -> bool:
    """Whether a process goes away."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":  # it is gone; only whoever started it has not looked
            return True
        time.sleep(0.05)
    return False


def test_a_request_and_its_answer(stub):
    first, second = stub.ask("echo", text=HOSTILE, number=3), stub.ask("print", x=[1.5])
    assert second.wait(20)
    assert first.result == {"values": {"text": HOSTILE, "number": 3}}
    # What libraries and their processes print is no part of the answers.
    assert second.result == {"values": {"x": [1.5]}}
    assert (second.label, second.share, second.text) == ("at it", 0.25, "so far")
    assert first.error is second.error is None


def test_errors_come_back_and_the_process_goes_on(stub):
    refused = stub.ask("refuse")
    assert refused.wait(20)
    pid = stub.process.pid
    assert refused.error == "that is no model\nuse another"
    failed = stub.ask("fail")
    assert failed.wait(20)
    assert failed.error == "the work failed (ValueError: deep inside); the app's log has more"
    again = stub.ask("echo")
    assert again.wait(20)
    assert again.result == {"values": {}}
    assert stub.process.pid == pid


def test_a_worker_that_dies_is_said_and_replaced(stub):
    dead = stub.ask("die")
    assert dead.wait(20)
    assert "killed by SIGKILL; the machine may be out of memory" in dead.error
    assert "last words" in dead.error
    again = stub.ask("echo", x=1)
    assert again.wait(20)
    assert again.result == {"values": {"x": 1}}


def test_stop_ends_the_process_at_once(stub):
    job = stub.ask("hang")
    while job.label == "starting":
        time.sleep(0.02)
    pid = stub.process.pid
    assert not job.done
    job.stop()
    assert job.wait(5)
    assert job.stopped
    assert (job.result, job.error) == (None, None)
    assert ended(pid)
    again = stub.ask("echo")
    assert again.wait(20)
    assert again.result is not None


def test_what_waits_with_a_stopped_request_is_told_so_and_blames_no_memory(stub):
    first, second = stub.ask("hang"), stub.ask("echo")
    while first.label == "starting":
        time.sleep(0.02)
    first.stop()
    assert second.wait(10)
    assert "Stopped together with another request" in second.error
    assert "memory" not in second.error


def test_a_request_that_is_given_up_is_never_begun(stub):
    first = stub.ask("pause")
    while first.label == "starting":
        time.sleep(0.02)
    given_up = [stub.ask("hang") for _ in range(3)]
    for job in given_up:
        stub.drop(job)
        assert job.done
    last = stub.ask("echo", at="last")
    assert first.wait(20)
    assert last.wait(10), "a request that was given up was begun"
    assert last.result == {"values": {"at": "last"}}


def test_nothing_is_sent_to_a_process_that_has_ended(monkeypatch):
    process = children._start([sys.executable, "-c", "pass"])
    process.wait()
    sent = []
    monkeypatch.setattr(children.os, "killpg", lambda *arguments: sent.append(arguments))
    children._kill(process)
    children._interrupt(process)
    assert sent == []


def test_requests_that_are_stopped_together_blame_no_memory(stub):
    first, second = stub.ask("hang"), stub.ask("echo")
    while first.label == "starting":
        time.sleep(0.02)
    first.stop()
    assert second.wait(5)
    assert not second.stopped
    assert second.error.startswith("Stopped together with another request")
    again = stub.ask("die")  # of the next process it is told as ever
    assert again.wait(20)
    assert "killed by SIGKILL" in again.error


def test_a_dropped_request_is_never_begun(stub):
    running = stub.ask("wait", name="running")
    waiting = [stub.ask("wait", name=f"waiting {i}") for i in range(6)]
    while running.label == "starting":
        time.sleep(0.02)
    for job in waiting:
        stub.drop(job)
        assert job.done
        assert (job.result, job.error) == (None, None)
    last = stub.ask("begun", name="last")
    assert last.wait(20)
    assert last.result == {"begun": ["running", "last"]}
    assert running.result is not None
    stub.drop(running)  # it has ended: nothing to do
    assert running.result is not None


def test_a_hang_does_not_block_asking(stub):
    job = stub.ask("echo")
    assert job.wait(20)
    os.kill(stub.process.pid, signal.SIGSTOP)
    began = time.monotonic()
    more = stub.ask("echo", text="x" * 500_000)  # far more than a pipe holds
    assert time.monotonic() - began < 1
    assert not more.wait(0.1)
    more.stop()
    assert more.wait(5)


@pytest.mark.parametrize("how", ["forgotten", "closed"])
def test_a_worker_ends_with_its_owner(how):
    worker = Worker([sys.executable, "-c", STUB])
    job = worker.ask("echo")
    assert job.wait(20)
    pid = worker.process.pid
    if how == "closed":
        worker.close()
    del worker, job
    assert ended(pid)


def test_a_forgotten_page_costs_no_memory_for_long():
    worker = Worker([sys.executable, "-c", STUB], idle_s=1)
    first = worker.ask("echo")
    assert first.wait(20)
    pid = worker._processes[0].pid
    assert ended(pid)
    again = worker.ask("echo", x=1)
    assert again.wait(20)
    assert again.result == {"values": {"x": 1}}
    worker.close()


@pytest.mark.slow
def test_nothing_asked_is_lost_to_an_end_by_idleness():
    # Asked just when the process would end: it is answered, by this process or by a new one.
    worker = Worker([sys.executable, "-c", STUB], idle_s=0.3)
    for pause in (0, 0.29, 0.3, 0.301, 0.31):
        time.sleep(pause)
        job = worker.ask("pause", x=pause)  # it takes longer than the idle time
        assert job.wait(20)
        assert job.result == {"values": {"x": pause}}
    worker.close()


OWNER = """
import sys, time
from resa_lens.jobs.children import Command, Worker
if sys.argv[1] == "worker":
    held = Worker([sys.executable, "-c", sys.argv[2]])
    job = held.ask("hang")
    while job.label == "starting":
        time.sleep(0.02)
    pid = held.process.pid
else:
    held = Command([], [sys.executable, "-c", sys.argv[2]])
    while held.label == "starting":
        time.sleep(0.02)
    pid = held.process.pid
print(pid, flush=True)
time.sleep(60)
"""

# A long command behind the real entry: `worker command`.
LONG = """
import sys, time
import resa_lens.cli
from resa_lens.app.lab import worker
def main():
    print("at work", file=sys.stderr, flush=True)
    time.sleep(60)
resa_lens.cli.main = main
worker.main(["command"])
"""


@pytest.mark.parametrize(("kind", "script"), [("worker", STUB), ("command", LONG)])
def test_nothing_is_left_when_the_app_is_killed(kind, script):
    """SIGKILL in the middle of work: nobody is there to say goodbye."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, kind, script], stdout=subprocess.PIPE, text=True
    )
    pid = int(owner.stdout.readline())
    assert not ended(pid, 0.2)
    owner.kill()
    owner.wait()
    owner.stdout.close()
    assert ended(pid)


# Commands


BAR = """
import json, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run behind
from resa_lens.progress import ConsoleReporter
reporter = ConsoleReporter()
reporter.note("workspace: /a <b>")
with reporter.bar("training 2 SAEs", 4) as advance:
    for _ in range(3):
        advance(1)
        time.sleep(0.15)
    if "--stay" in sys.argv:
        time.sleep(60)
print(json.dumps({"arguments": sys.argv[1:]}))
"""


def test_a_command_tells_how_far_it_is():
    command = Command(["go", HOSTILE], [sys.executable, "-c", BAR])
    seen = []
    while not command.wait(0.02):
        seen.append((command.label, command.share))
    assert command.error is None
    assert command.result == {"arguments": ["go", HOSTILE, "--json"]}
    shares = [share for label, share in seen if label == "training 2 SAEs" and share is not None]
    assert {0.25, 0.5} <= set(shares)
    assert shares == sorted(shares)


def test_a_command_is_stopped_as_at_a_terminal():
    command = Command(["--stay", "--json"], [sys.executable, "-c", BAR])
    while command.share is None:
        time.sleep(0.02)
    command.stop()
    assert command.wait(10)
    assert command.stopped
    assert (command.result, command.error) == (None, None)
    assert ended(command.process.pid)


def test_a_command_that_ignores_the_interrupt_is_killed(monkeypatch):
    monkeypatch.setattr(children, "GRACE_S", 0.2)
    script = (
        "import signal, sys, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "print('deaf', file=sys.stderr, flush=True)\ntime.sleep(60)"
    )
    command = Command([], [sys.executable, "-c", script])
    while command.label != "deaf":
        time.sleep(0.02)
    command.stop()
    assert command.wait(10)
    assert command.process.poll() == -signal.SIGKILL


@pytest.mark.parametrize("how", [children._kill, children._interrupt])
def test_no_signal_goes_to_the_number_of_a_process_that_has_ended(how, monkeypatch):
    sent = []
    process = children._start([sys.executable, "-c", ""])
    process.wait()
    monkeypatch.setattr(children, "GRACE_S", 0.05)
    monkeypatch.setattr(children.os, "killpg", lambda *signal: sent.append(signal))
    how(process)
    time.sleep(0.2)
    assert sent == []


def test_a_command_that_heeds_the_interrupt_gets_no_second_signal(monkeypatch):
    sent = []
    send = os.killpg
    monkeypatch.setattr(children, "GRACE_S", 0.5)
    monkeypatch.setattr(children.os, "killpg", lambda *how: (sent.append(how[1]), send(*how)))
    command = Command(["--stay"], [sys.executable, "-c", BAR])
    while command.share is None:
        time.sleep(0.02)
    command.stop()
    assert command.wait(10)
    time.sleep(0.7)
    assert sent == [signal.SIGINT]


@pytest.mark.slow  # the command line imports torch
def test_commands_of_resa_lens(tmp_path):
    listed = Command(["runs", "--workspace", str(tmp_path / "none")], jobs.PROGRAM)
    assert listed.wait(60)
    assert listed.error is None
    assert listed.result == {"runs": [], "problems": []}


def test_a_failure_of_a_command_is_told():
    script = "import sys\nprint('note')\nprint('Traceback', file=sys.stderr)\nsys.exit(3)"
    command = Command([], [sys.executable, "-c", script])
    assert command.wait(10)
    assert command.error == "the command ended before its result (exit code 3)\nTraceback"
    script = "import sys\nprint('note\\nerror: 50% is no x\\nuse y', file=sys.stderr)\nsys.exit(2)"
    refused = Command([], [sys.executable, "-c", script])
    assert refused.wait(10)
    assert refused.error == "50% is no x\nuse y"
    silent = Command([], [sys.executable, "-c", "print('no object')"])
    assert silent.wait(10)
    assert "printed no JSON object" in silent.error


# The panel


def _panel(words: list[str]) -> None:
    from resa_lens.app.lab import jobs

    jobs.run_command_panel(words, "it")


@pytest.fixture
def panel(monkeypatch):
    monkeypatch.setattr(jobs, "PROGRAM", (sys.executable, "-c", BAR))

    def open_panel(*words: str) -> AppTest:
        return AppTest.from_function(_panel, default_timeout=20, args=(list(words),)).run()

    return open_panel


def settled(app: AppTest) -> AppTest:
    until = time.monotonic() + 20
    while any(button.label == "Stop" for button in app.button) and time.monotonic() < until:
        time.sleep(0.1)
        app.run()
    assert not app.exception
    return app


def test_the_panel_writes_into_a_scratch_folder(panel, tmp_path):
    app = panel("resa-lens", "eval", "--workspace", str(tmp_path), "--model", HOSTILE)
    line = app.code[0].value
    assert line.startswith("resa-lens eval --model '<img")
    assert "resa-lens-scratch-" in line
    assert str(tmp_path) not in line
    app.button(key="run-it").click().run()
    settled(app)
    result = json.loads(app.json[0].value)
    target = result["arguments"][4]
    assert result["arguments"] == ["eval", "--model", HOSTILE, "--workspace", target, "--json"]
    assert Path(target).is_dir()
    assert "resa-lens-scratch-" in target


def test_the_panel_never_writes_where_it_reads(panel, tmp_path):
    read = tmp_path / "a *b* workspace"
    app = panel("resa-lens", "eval", f"--workspace={read}")
    app.radio(key="where-it").set_value("a folder of mine").run()
    assert app.button(key="run-it").disabled
    app.text_input(key="folder-it").set_value(str(tmp_path / "own")).run()
    assert not app.button(key="run-it").disabled
    assert str(read) not in app.code[0].value
    for same in (read, read / "evals", f"{read}/../{read.name}"):
        app.text_input(key="folder-it").set_value(str(same)).run()
        assert app.button(key="run-it").disabled
        assert "the app never writes to" in app.text[0].value


@pytest.mark.parametrize("folder", ["~no-such-user/x", "a\0b"])
def test_a_folder_that_cannot_be_is_a_problem(panel, folder):
    app = panel("resa-lens", "eval")
    app.radio(key="where-it").set_value("a folder of mine").run()
    app.text_input(key="folder-it").set_value(folder).run()
    assert f"workspace {folder!r} cannot be reached" in texts(app)
    assert app.button(key="run-it").disabled


def _changing_panel() -> None:
    import streamlit as st

    from resa_lens.app.lab import jobs

    features = st.text_input("Features", "1", key="features")
    jobs.run_command_panel(["resa-lens", "ablate", "--features", str(features)], "it")


def test_a_result_stands_under_the_command_that_made_it(panel):
    app = AppTest.from_function(_changing_panel, default_timeout=20).run()
    app.button(key="run-it").click().run()
    assert app.code[0].value.startswith("resa-lens ablate --features 1 ")
    settled(app)
    assert len(app.code) == 1
    made = app.json[0].value
    app.text_input(key="features").set_value("9:999").run()
    shown, run = (code.value for code in app.code)
    assert "--features 9:999" in shown
    assert run.startswith("resa-lens ablate --features 1 ")
    assert "The command above was changed since; this one was run:" in texts(app)
    assert app.json[0].value == made


def test_the_panel_stops_and_says_so(panel):
    app = panel("resa-lens", "go", "--stay")
    app.button(key="run-it").click().run()
    pid = app.session_state["commands-under-way"]["it"].process.pid
    assert any(button.label == "Stop" for button in app.button)
    app.button(key="stop-it").click().run()
    settled(app)
    assert "Stopped." in texts(app)
    assert ended(pid)
