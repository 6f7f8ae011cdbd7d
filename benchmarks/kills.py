"""Kill commands at random moments, on one host or two, and hold them to an unkilled run's bits.

    python benchmarks/kills.py --one 20 --two 40 --seed 0

Every command runs at a tiny shape in a workspace that has what it needs.  A chain of one host is
killed by SIGKILL and started again until it ends.  In a chain of two hosts, which are simulated by
RESA_LENS_HOST, both run the same command on one workspace; either is killed, or suspended for
longer than the other waits.  What is left must be what an unkilled run leaves: the artifacts of
the same identities, the pages, tables and folders outside the workspace, and every file the same
byte by byte, but for the seconds that some of them hold.  Processes are forked from one that has
loaded all modules.  Prints a row a chain; exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import platform
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from guard import normalised, payload

from resa_lens import claims

MODEL = ["--model", "tiny-reasoner", "--threads", "1"]
SHAPE = ["--tokens", "8192", "--latents", "128", *MODEL]
SAES = ["--layers", "4-5", *SHAPE]
SCORED = ["--limit", "6", "--max-new-tokens", "32"]
TUNE = ["--layer", "4", *SHAPE, "--steps", "6", "--learning-rate", "1e-3", *SCORED]
TEXT = ["--text-tokens", "3000"]
EITHER = ["--rule", "either"]
ADAPTER = str(Path(__file__).parents[1] / "data/tiny-reasoner-rl/checkpoints/step-35")
READY = (
    ["train-saes", *SAES, "--seeds", "2"],
    ["count-features", *SAES],
    *(["eval", *MODEL, "--limit", "7", "--max-new-tokens", n] for n in ("4", "8")),
)
WORKSPACE, OUT = "workspace", "out"
"""Of a chain's place: the workspace, and where commands write that take a path."""
COMMANDS = {
    "demo": ["demo", "--budget", "test", *MODEL],
    "train-saes": ["train-saes", *SAES, "--tokens", "40960"],
    "count-features": ["count-features", *SAES, "--prompt", "short"],
    "recommend-layers": ["recommend-layers", *SAES],
    "falsify": ["falsify", *SAES, "--texts", "6", "--shuffles", "4"],
    "stability": ["stability", *SAES],
    "activity": ["activity", *SAES, *TEXT, "--examples", "2"],
    "score-features": ["score-features", *SAES, *TEXT, "--draws", "50"],
    "match-features": ["match-features", "seed:0", "seed:1", "--layers", "4-5", *MODEL, *TEXT],
    "insert": [
        "insert",
        "--layers",
        "4",
        *SHAPE,
        *SCORED,
        "--arms",
        "short",
        "--text-tokens",
        "256",
    ],
    "ablate": [
        "ablate",
        "--layer",
        "4",
        *SHAPE,
        *SCORED,
        "--features",
        "1,2",
        "--doses",
        "1",
        "--control-sets",
        "2",
    ],
    "experts": [
        "experts",
        "steer",
        "--model",
        "tiny-moe-reasoner",
        "--threads",
        "1",
        *SCORED,
        *TEXT,
        "--answer-sets",
        "2",
        "--top",
        "2",
    ],
    "attribute": ["attribute", "--layer", "4", *EITHER, *SHAPE, *TEXT, "--top", "5"],
    "tune": ["tune", *TUNE],
    "tune on own samples": ["tune", "--control", "own-samples", *MODEL, *TUNE[-8:]],
    "eval": ["eval", *MODEL, "--limit", "24", "--max-new-tokens", "48"],
    "eval of replicates": [
        "eval",
        *MODEL,
        "--limit",
        "24",
        "--max-new-tokens",
        "48",
        "--replicates",
        "2",
    ],
    "compare": ["compare", "evals/*", "--save", f"{OUT}/compared.html"],
    "sweep": ["sweep", "--layers", "4,5", "--seeds", "1", *TUNE[2:], "--no-effects"],
    "convert": ["convert", "saes/*/*", f"{OUT}/converted", "--to", "saelens", "--force"],
    "export": ["export", "activity/*/*", f"{OUT}/exported", "--to", "neuronpedia"],
    "merge": ["merge", f"{OUT}/merged", *MODEL[:2], "--adapter", ADAPTER, "--force"],
}
WITHOUT_FILES = ("fit-mixture", "regret", "audit", "cost", "runs", "app", "doctor")
"""Commands that write nothing."""
PLACELESS = ("convert", "merge")
"""Commands without a workspace."""
TAKEN = re.compile("wait for it, or end it|took over|wrote .* meanwhile")
"""Of another process at the same work: the command is given again."""
RUNS = 100
"""Starts of one command in a chain, at most."""


def load_modules() -> None:
    """Import all that a command may import, so that a forked process begins at once.

    One thread: a forked process waits for ever for those that its parent had.
    """
    assert "torch" not in sys.modules  # it reads the variable as it is loaded
    os.environ["OMP_NUM_THREADS"] = "1"
    import resa_lens

    for module in pkgutil.walk_packages(resa_lens.__path__, "resa_lens."):
        if not module.name.startswith(("resa_lens.app", "resa_lens._data", "resa_lens.__main__")):
            try:
                importlib.import_module(module.name)
            except ImportError:
                continue  # of an extra
    from resa_lens.stages.demo import BUDGETS, Budget

    BUDGETS["test"] = Budget(
        sae_tokens=2048,
        latents=128,
        steps=3,
        questions=6,
        text_tokens=512,
        trials=2,
        expectation="expected: seconds",
    )


def words(argv: list[str], workspace: Path) -> list[str]:
    """Return a command's words with its places in a workspace or beside it written out."""
    parts = []
    for word in argv:
        if "*" in word:
            places = sorted(map(str, workspace.glob(word)))
            parts += places[:1] if word.startswith("saes/") else places
        else:
            parts.append(str(workspace.parent / word) if word.startswith(f"{OUT}/") else word)
    return [*parts, "--json", *([] if argv[0] in PLACELESS else ["--workspace", str(workspace)])]


def start(argv: list[str], workspace: Path, host: str) -> int:
    """Fork a process that runs a command; its words go into a file beside the workspace."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.environ["RESA_LENS_HOST"] = host
        log = os.open(said(workspace, host), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["resa-lens", *words(argv, workspace)]
        from resa_lens.cli import main

        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001 - shown; no second process may go on from here
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def said(workspace: Path, host: str) -> Path:
    """Return the file of a host's words."""
    return workspace.with_name(f"{workspace.name}-{host}.txt")


def run_whole(argv: list[str], place: Path) -> float:
    """Run a command without a kill; return its seconds."""
    began = time.monotonic()
    if ended(start(argv, place / WORKSPACE, "a"), wait=True):
        sys.exit(said(place / WORKSPACE, "a").read_text())
    return time.monotonic() - began


def ended(process: int, *, wait: bool = False) -> int | None:
    """Return a process's exit code, or None while it runs."""
    number, status = os.waitpid(process, 0 if wait else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if number else None


@dataclass
class Chain:
    """A command that is killed and started again until all hosts have its result."""

    argv: list[str]
    workspace: Path
    hosts: tuple[str, ...]
    kills_left: int
    longest: float
    """Seconds: a kill comes within them."""
    rng: random.Random
    kills: int = 0
    pauses: int = 0
    again: int = 0
    """Starts after another process was at the work, or had taken over."""
    running: dict[str, int] = field(default_factory=dict)

    def run(self) -> str | None:
        """Run it; return what went wrong, or None."""
        for host in self.hosts:
            self.running[host] = start(self.argv, self.workspace, host)
        wrong = None
        strike = self._next()
        while self.running and wrong is None:
            time.sleep(0.005)
            for host, process in list(self.running.items()):
                code = ended(process)
                if code is not None:
                    wrong = wrong or self._over(host, code)
            if time.monotonic() > strike and self.kills_left and self.running:
                self._strike()
                strike = self._next()
        for process in self.running.values():
            os.kill(process, signal.SIGKILL)
            ended(process, wait=True)
        return wrong

    def _next(self) -> float:
        return time.monotonic() + self.rng.uniform(0.02, self.longest)

    def _over(self, host: str, code: int) -> str | None:
        del self.running[host]
        if code == 0:
            return None
        words = said(self.workspace, host).read_text()
        if not TAKEN.search(words) or self.again > RUNS:
            return f"host {host} ended with {code}: {words[-1500:]}"
        self.again += 1
        time.sleep(5 * claims.interval())
        self.running[host] = start(self.argv, self.workspace, host)
        return None

    def _strike(self) -> None:
        host = self.rng.choice(sorted(self.running))
        process = self.running[host]
        if len(self.hosts) > 1 and not self.pauses and self.rng.random() < 0.3:
            os.kill(process, signal.SIGSTOP)
            time.sleep((claims.PATIENCE + 3) * claims.interval())
            os.kill(process, signal.SIGCONT)
            self.pauses += 1
            return
        os.kill(process, signal.SIGKILL)
        ended(process, wait=True)
        self.kills += 1
        self.kills_left -= 1
        self.running[host] = start(self.argv, self.workspace, host)


def state(place: Path) -> dict[str, tuple[str, dict[str, str], dict[str, Any]]]:
    """Return identity, files' hashes and files' contents by place.

    Of each artifact, and of each file at the workspace's root or beside the workspace.
    """
    from resa_lens.artifacts.workspace import Workspace
    from resa_lens.hashes import file_hash

    # Some results name their SAEs by the whole path.
    root, workspace = str(place.resolve()), Workspace(place / WORKSPACE)
    pattern = re.compile(re.escape(root))

    def content(file: Path) -> Any:
        return normalised(payload(file), pattern, {root: "<place>"})

    rows = {}
    for artifact in workspace.artifacts():
        assert not list(artifact.damage(cached=False)), artifact.path
        manifest = artifact.manifest
        contents = {name: content(artifact.path / name) for name in manifest.files}
        rows[artifact.relative] = manifest.identity, manifest.files, contents
    for file in (*workspace.root.glob("*"), *(place / OUT).rglob("*")):
        name = str(file.relative_to(place.resolve()))
        if file.is_file() and not any(part.startswith(".") for part in Path(name).parts):
            rows[name] = "", {"": file_hash(file, cached=False)}, {"": content(file)}
    return rows


def differences(whole: dict[str, Any], killed: dict[str, Any]) -> tuple[list[str], int, int]:
    """Return what differs, and how many files are the same: by byte, and but for seconds."""
    lines = [f"only on one side: {place}" for place in sorted({*whole} ^ {*killed})]
    same = timed = 0
    for place in {*whole} & {*killed}:
        (identity, files, contents), other = whole[place], killed[place]
        if (identity, {*files}) != (other[0], {*other[1]}):
            lines.append(f"another identity, or other files: {place}")
            continue
        for name, value in files.items():
            same += value == other[1][name]
            timed += value != other[1][name]
            if value != other[1][name] and json.dumps(contents[name]) != json.dumps(other[2][name]):
                lines.append(f"{place}/{name}")
    return lines, same, timed


def left_over(place: Path) -> list[str]:
    """Return what is unfinished in a place; of another host's killed process it may stay."""
    marks = (".*", "claim-*")
    return [f"left over: {p.relative_to(place)}" for mark in marks for p in place.rglob(mark)]


def main(arguments: list[str] | None = None) -> int:
    """Run the chains and print the table; return the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--one", type=int, default=20, help="kills in chains of one host")
    parser.add_argument("--two", type=int, default=40, help="kills in chains of two hosts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no chain after them")
    parser.add_argument("--only", help="commands, by commas")
    parser.add_argument("--interval", type=float, default=0.2, help="between renewals of a claim")
    options = parser.parse_args(arguments)
    os.environ |= {
        "RESA_LENS_CLAIM_INTERVAL": str(options.interval), "HF_HUB_OFFLINE": "1", "NO_COLOR": "1",
    }  # fmt: skip
    load_modules()
    rng = random.Random(options.seed)
    labels = options.only.split(",") if options.only else list(COMMANDS)
    print(f"{date.today()}, {platform.platform()}, {os.cpu_count()} cores, seed {options.seed}")
    bad = 0
    totals = {"one": [0, 0, 0], "two": [0, 0, 0]}
    with tempfile.TemporaryDirectory() as root:
        ready = Path(root) / "ready"
        ready.mkdir()
        for argv in READY:
            run_whole(argv, ready)
        known: dict[str, tuple[dict[str, Any], float]] = {}
        number, end = 0, time.monotonic() + 60 * options.minutes
        while totals["one"][0] < options.one or totals["two"][0] < options.two:
            if time.monotonic() > end:
                print("the time is over")
                break
            if number % len(labels) == 0:
                rng.shuffle(labels)
            label = labels[number % len(labels)]
            number += 1
            argv = COMMANDS[label]
            if label not in known:
                place = Path(root) / f"whole-{label}"
                shutil.copytree(ready, place)
                seconds = run_whole(argv, place)
                known[label] = state(place), seconds
                shutil.rmtree(place)
            whole, seconds = known[label]
            open_kinds = [k for k, most in (("one", options.one), ("two", options.two))
                          if totals[k][0] < most]  # fmt: skip
            kind = rng.choice(open_kinds)
            place = Path(root) / f"killed-{number}"
            shutil.copytree(ready, place)
            most = min(rng.randint(1, 4), vars(options)[kind] - totals[kind][0])
            hosts = ("a",) if kind == "one" else ("a", "b")
            chain = Chain(argv, place / WORKSPACE, hosts, most, 0.8 * seconds, rng)
            wrong = chain.run()
            lines, same, timed = differences(whole, state(place))
            lines += [wrong] if wrong else []
            lines += left_over(place) if kind == "one" else []
            totals[kind][0] += chain.kills
            totals[kind][1] += 1
            totals[kind][2] += chain.pauses
            bad += bool(lines)
            print(
                f"{number:3} {label:20} {len(hosts)} host{'s' * (kind == 'two'):1} "
                f"{chain.kills} kills {chain.pauses} pauses {chain.again} again: "
                f"{'DIFFERENT' if lines else 'same'}, {same} files byte by byte, {timed} but for "
                f"seconds and places",
                *lines[:5], sep="\n    ", flush=True,
            )  # fmt: skip
            shutil.rmtree(place)
    for kind, (kills, chains, pauses) in totals.items():
        print(f"{kind}: {kills} kills and {pauses} pauses in {chains} chains")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{used.ru_utime + used.ru_stime:.0f} s of CPU in all processes")
    print(f"{bad} chains differ")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
