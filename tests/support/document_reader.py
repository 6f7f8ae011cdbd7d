"""Somebody who types a document's commands, in an empty folder beside the project's data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# One process for a whole document: the imports are paid once, the environment is a real one.
DRIVER = """
import json, os, sys, traceback
from typer.testing import CliRunner
from resa_lens.cli import app
answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    done = CliRunner().invoke(app, json.loads(line))
    failed = done.exception and not isinstance(done.exception, SystemExit)
    trace = "".join(traceback.format_exception(done.exception)) if failed else ""
    said = done.output[-3000:] + trace if done.exit_code else done.stdout
    print(json.dumps([done.exit_code, said]), file=answers, flush=True)
"""


@dataclass
class Reader:
    """Types commands and takes from what was printed the names that the document leaves open."""

    folder: Path
    process: subprocess.Popen[str]

    @property
    def workspace(self) -> Path:
        return self.folder / "resa-workspace"

    def run(self, words: list[str]) -> str:
        """Run a command of resa-lens; it must succeed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        names = self.names()
        self.process.stdin.write(json.dumps([names.get(word, word) for word in words]) + "\n")
        self.process.stdin.flush()
        code, output = json.loads(self.process.stdout.readline())
        assert code == 0, f"resa-lens {' '.join(words)}\n{output}"
        return output

    def names(self) -> dict[str, str]:
        """What stands for the documents' placeholders."""
        found: dict[str, str] = {}
        base, tuned = self.pair() or (None, None)
        if base and tuned:
            found |= {"BASE_RUN": base.name, "TUNED_RUN": tuned.name}
            found |= {"resa-workspace/evals/A": str(base), "resa-workspace/evals/B": str(tuned)}
        for adapter in self.newest("adapters", "*paper*")[:1]:
            found |= {"ADAPTER": str(adapter), "resa-workspace/adapters/RUN": str(adapter)}
        for activity in sorted(self.workspace.glob("activity/*/mlp_out-*"))[:1]:
            found["ACTIVITY"] = str(activity)
        for sae in sorted(self.workspace.rglob("layers.5.mlp"))[:1]:
            found["saes/layers.12.mlp"] = str(sae)
        return found

    def pair(self) -> tuple[Path, Path] | None:
        """The newest evaluation of a tuned model, and the base model's on the same questions."""
        runs = self.newest("evals", "*")
        for tuned in (run for run in runs if "paper-mlp" in run.name):
            for base in (run for run in runs if "paper-mlp" not in run.name):
                if asked(base) == asked(tuned):
                    return base, tuned
        return None

    def newest(self, kind: str, pattern: str) -> list[Path]:
        """The finished runs of a kind, the newest first."""
        files = (self.workspace / kind).glob(f"{pattern}/manifest.json")
        return [file.parent for file in sorted(files, key=lambda file: -file.stat().st_mtime_ns)]


def asked(run: Path) -> Any:
    """What an evaluation asked, and how."""
    config = json.loads((run / "manifest.json").read_text())["config"]
    return config["eval"], config["questions"]


@contextmanager
def reading(folder: Path) -> Iterator[Reader]:
    """Sit down in a folder that has the project's data, with an own hub cache and no network."""
    for name in ("data", "docs", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    lines = (ROOT / "data" / "tiny" / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "few.jsonl").write_text("".join(lines[:40]))
    hub = {"HF_HOME": str(folder / "huggingface"), "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    own = ("RESA_LENS_WORKSPACE", "HF_HUB_CACHE", "HF_DATASETS_CACHE")
    env = {name: value for name, value in os.environ.items() if name not in own} | hub
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER], cwd=folder, env=env, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        yield Reader(folder, process)
        assert process.stdin is not None
        process.stdin.close()
        process.wait(60)
