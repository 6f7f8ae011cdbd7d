"""The long experiments are lists of jobs that equal processes on one folder share."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks import allocation, paper_tables, planted_blocks, planted_sweep
from benchmarks.insertion_experiment import draws
from benchmarks.shared import share
from resa_lens.errors import RunFailedError
from resa_lens.jobs.joblist import JobList

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The experiments set it for their whole process."""
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)


def test_a_job_is_done_again_where_its_files_were_removed(tmp_path: Path) -> None:
    begun: list[str] = []

    def do(name: str) -> None:
        file = tmp_path / f"{name}.json"
        if not file.exists():
            begun.append(name)
            file.write_text("{}")

    jobs = {name: lambda name=name: do(name) for name in ("a", "b")}
    share(tmp_path, jobs)
    share(tmp_path, jobs)
    (tmp_path / "a.json").unlink()
    share(tmp_path, jobs)
    assert begun == ["a", "b", "a"]


def test_a_job_that_fails_is_named(tmp_path: Path) -> None:
    def fails() -> None:
        raise RunFailedError("the loss is nan")

    with pytest.raises(RunFailedError, match="b: the loss is nan"):
        share(tmp_path, {"a": lambda: None, "b": fails})


@pytest.fixture
def starting(monkeypatch) -> list[str]:
    """Between a look at the jobs and the next one another process starts, for a while."""
    plain, starts = JobList.share, ["once", "twice"]

    def look(board: JobList, work: Any) -> list[str]:
        done = plain(board, work)
        if starts:
            starts.pop()
            board.retry(board.names)
        return done

    monkeypatch.setattr(JobList, "share", look)
    return starts


def test_a_failure_that_a_starting_process_forgets_is_named_all_the_same(
    tmp_path: Path, starting: list[str]
) -> None:
    def fails() -> None:
        raise RunFailedError("the loss is nan")

    with pytest.raises(RunFailedError, match="b: the loss is nan"):
        share(tmp_path, {"a": lambda: None, "b": fails})


def test_what_failed_in_another_process_and_is_forgotten_is_done_before_the_return(
    tmp_path: Path, starting: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    plain = JobList.retry

    def retry(board: JobList, names: Any) -> None:
        plain(board, names)
        if len(starting) == 2:
            board.fail("b", "the disk of another host is full")

    monkeypatch.setattr(JobList, "retry", retry)
    share(tmp_path, {"a": lambda: None, "b": lambda: done.append("b")})
    assert "b" in done


WORKER = """
import os, sys, time
from functools import partial
from pathlib import Path
from benchmarks.shared import share

work = Path(sys.argv[1])

def do(name):
    if not (work / f"{name}.json").exists():
        with (work / f"begun-{os.getpid()}.txt").open("a") as stream:
            stream.write(f"{name}\\n")
        time.sleep(0.2)
        (work / f"{name}.json").write_text("{}")

for group in "xy":
    share(work, {f"{group}{i}": partial(do, f"{group}{i}") for i in range(6)})
"""


def test_two_processes_do_each_job_once(tmp_path: Path) -> None:
    crew = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path)],
                         env={**os.environ, "PYTHONPATH": str(ROOT)})
        for _ in range(2)
    ]  # fmt: skip
    assert [process.wait(timeout=120) for process in crew] == [0, 0]
    begun = Counter(
        name for file in tmp_path.glob("begun-*.txt") for name in file.read_text().split()
    )
    assert begun == {f"{group}{i}": 1 for group in "xy" for i in range(6)}


def test_the_papers_tables_are_done_draw_by_draw(tmp_path: Path, monkeypatch) -> None:
    cells: list[tuple[int, str]] = []
    monkeypatch.setattr(paper_tables, "Draw", lambda *_: None)
    monkeypatch.setattr(
        paper_tables.Tables, "cell", lambda tables, name: cells.append((tables.seed, name))
    )
    paper_tables.run(tmp_path, [600, 601])
    names = ("750", *paper_tables.CELLS, *paper_tables.SCORED)
    assert cells == [(seed, name) for seed in (600, 601) for name in names]


def test_the_insertion_experiment_begins_with_the_primary_cells_of_all_draws(
    tmp_path: Path, monkeypatch
) -> None:
    done: list[tuple[int, str]] = []

    def cell(draw: Any, name: str) -> None:
        done.append((draw.seed, name))
        (draw.folder / f"{name}.json").write_text(json.dumps({}))

    monkeypatch.setattr(draws.Draw, "cell", cell)
    monkeypatch.setattr(
        draws.Draw, "insertion", lambda draw: draw.stored("insertion", lambda: {}) and None
    )
    draws.run(tmp_path, [1, 2], "AEBC")
    assert done == [(1, "A"), (1, "B"), (1, "C"), (2, "A"), (2, "B"), (2, "C"), (1, "E"), (2, "E")]
    assert len(list(tmp_path.glob("draw-*/insertion.json"))) == 2
    assert draws.plan("E") == ["E"]


def test_planted_blocks_have_the_tables_of_their_set(tmp_path: Path, monkeypatch) -> None:
    tables: list[tuple[int, str]] = []
    monkeypatch.setattr(planted_blocks, "source_saes", lambda _: {})
    monkeypatch.setattr(planted_blocks, "load_model", lambda _: None)
    monkeypatch.setattr(
        planted_blocks.Draw, "table", lambda draw, name: tables.append((draw.seed, name))
    )
    planted_blocks.run(tmp_path, [500, 600])
    cheap, dear = planted_blocks.TABLES, planted_blocks.DEAR
    assert tables == [
        *((500, name) for name in cheap), (500, dear[0]),
        *((600, name) for name in cheap), (500, dear[1]),
    ]  # fmt: skip


def test_a_planted_sweep_has_its_base_and_then_the_arms(tmp_path: Path, monkeypatch) -> None:
    names: list[str] = []
    monkeypatch.setattr(planted_blocks, "source_saes", lambda _: {})
    monkeypatch.setattr(planted_sweep, "load_model", lambda _: None)
    monkeypatch.setattr(planted_blocks.Draw, "stored", lambda _, name, work: names.append(name))
    planted_sweep.run(tmp_path, [500])
    arms = [f"sweep-{arm}-{layer}" for arm in ("sae", "pca") for layer in planted_blocks.LAYERS]
    assert names == ["sweep-base", *arms]


def test_an_allocation_is_a_list_of_cells(tmp_path: Path, monkeypatch) -> None:
    cells: list[tuple[Any, ...]] = []
    monkeypatch.setattr(allocation, "cell", lambda work, *place: cells.append(place))
    allocation.run(tmp_path, ["planted"], [0, 1])
    assert cells == [("planted", *arm, seed) for seed in (0, 1) for arm in allocation.ARMS]
