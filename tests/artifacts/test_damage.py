"""Damaged workspaces: a seeded tenth of the cases of benchmarks/damage.py, and that there are many.

Every reader refuses in at most three lines that name the file, leaves it out or makes it anew and
says so, or gives what it gives without the damage; nothing hangs, falls or fills the memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import damage
import pytest

from resa_lens.artifacts.artifact import KINDS
from resa_lens.artifacts.kinds.counts import Counts
from resa_lens.artifacts.kinds.recommendation import Recommendation
from resa_lens.artifacts.manifest import MANIFEST
from resa_lens.artifacts.workspace import Workspace

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "damage.py"


@pytest.mark.slow
def test_a_tenth_of_the_damage_is_named_refused_or_harmless():
    command = [sys.executable, str(SCRIPT), "--share", "0.1", "--seed", "0", "--as-json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.stdout, done.stderr[-3000:]
    summary = json.loads(done.stdout)
    assert summary["faults"] == []
    assert done.returncode == 0
    assert summary["cases"] >= 60
    assert summary["consumers"] >= 10
    assert summary["peak_mb"] < 1024
    # Both happen: else the judgement would say nothing.
    assert min(summary["outcomes"][name] for name in ("same", "named", "refused")) > 5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest artifact of every kind."""
    place = tmp_path_factory.mktemp("damage") / "workspace"
    for kind in KINDS.values():
        damage.smallest(place, kind)
    return place


def test_the_smallest_artifacts_are_as_their_schemas_say(root: Path):
    problems: list[str] = []
    artifacts = Workspace(root).artifacts(problems=problems)
    assert problems == []
    assert {artifact.manifest.kind for artifact in artifacts} == set(KINDS)
    for artifact in artifacts:
        assert list(artifact.damage()) == []
        assert artifact.results is not None
        assert artifact.settings is not None
        for name, schema in artifact.kind.files.items():
            if isinstance(schema, type):
                artifact.read(name, schema)


def test_there_are_many_cases_of_every_file_of_every_kind(root: Path):
    made = damage.cases(root)
    assert len(made) >= 400
    assert len({case.name for case in made}) == len(made)
    counted = Counter((case.kind, case.file) for case in made)
    for kind in KINDS.values():
        for name in (MANIFEST, *kind.files):
            assert counted[kind.name, name] >= 5, (kind.name, name)
    every = {f"{MANIFEST} {what}" for what in damage.ANY_FILE} - {f"{MANIFEST} has a byte more"}
    for kind in damage.THOROUGH:
        assert every <= {f"{case.file} {case.what}" for case in made if case.kind == kind}


def outcome(exit: int, value: object = None, said: str = "", trace: str = "") -> damage.Outcome:
    return damage.Outcome(exit, value, said, trace)


CASE = damage.Case("counts", "counts/m/run", "features.json", "is cut", lambda path, draw: None)
PLAIN = outcome(0, {"runs": 1})
NAMED = "left out: /w/counts/m/run/features.json was changed"


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (PLAIN, None),
        (outcome(0, {"runs": 2}, NAMED), None),
        (outcome(2, None, f"error: {NAMED}"), None),
        (outcome(0, {"runs": 2}), "without a word"),
        (outcome(0, {"runs": 2}, "workspace: /w/counts/m/run"), "without a word"),
        (outcome(2, None, "error: something is wrong"), "does not name it"),
        (outcome(2, None, f"error: {NAMED}\na\nb\nc"), "4 lines"),
        (outcome(1, None, NAMED), "exit 1"),
        (outcome(1, None, "", "Traceback\nKeyError: 'model'"), "KeyError"),
    ],
)
def test_a_judgement_of_each_sort(given: damage.Outcome, fault: str | None):
    consumer = damage.Consumer("runs", lambda root: PLAIN)
    _, faults = damage.judge(CASE, consumer, given, PLAIN)
    assert [fault in text for text in faults] == ([True] if fault else []) if fault else not faults


def test_verify_must_name_what_is_damaged():
    verify = damage.Consumer("runs --verify", lambda root: PLAIN)
    assert damage.judge(CASE, verify, PLAIN, PLAIN)[1] == ["whole, says --verify"]
    assert damage.judge(CASE, verify, outcome(1, {}, NAMED), PLAIN)[1] == []
    assert damage.judge(CASE, verify, outcome(1, {}, "one file differs"), PLAIN)[1]


def test_a_hang_a_fall_and_a_full_memory_are_seen(tmp_path: Path):
    assert damage.in_child(lambda: [1], 60)[0] == [1]
    assert damage.in_child(lambda: (tmp_path / "nothing").read_text(), 60)[2].startswith("the proc")
    assert damage.in_child(lambda: __import__("time").sleep(60), 0.5)[2] == "hang"
    _, peak, _ = damage.in_child(lambda: len(bytearray(700 * 2**20)), 60)
    assert peak > 700


def test_a_damage_leaves_the_workspace_that_it_was_cloned_from(root: Path, tmp_path: Path):
    before = {path: path.lstat().st_size for path in root.rglob("*")}
    kinds = {Counts.name, Recommendation.name}
    for number, case in enumerate(c for c in damage.cases(root) if c.kind in kinds):
        target = tmp_path / str(number)
        damage.clone(root, target)
        untouched = damage.state(target)
        case.apply(target)
        assert damage.state(target) != untouched, case.name
    assert {path: path.lstat().st_size for path in root.rglob("*")} == before
