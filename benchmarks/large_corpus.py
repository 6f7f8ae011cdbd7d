"""What a corpus beyond memory costs: reading it, finding records in any order, and peak memory.

    python -m benchmarks.large_corpus memory --megabytes 300
    python -m benchmarks.large_corpus access --megabytes 300

`memory` runs train-saes and activity on a small corpus and then on a large one, in one process, and
prints how much higher the second peak is.  `access` compares three ways to read records in the
order of a seed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from resa_lens.texts import stored
from resa_lens.texts.corpora import load_records
from resa_lens.texts.tables import read_table

SHARD_ROWS = 10_000
STEPS = 3000
"""Characters of a row's worked steps."""


def write(folder: Path, megabytes: float, *, group: int = 1000) -> Path:
    """Write parquet shards of questions with worked steps, of about so many megabytes."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    text = " ".join(str(rng.randrange(1000)) for _ in range(10 * STEPS))
    rows = max(1, round(megabytes * 2**20 / (STEPS + 60)))
    for shard, first in enumerate(range(0, rows, SHARD_ROWS)):
        numbers = range(first, min(first + SHARD_ROWS, rows))
        table = pa.table({
            "question": [f"What is {n} + {n}?" for n in numbers],
            "answer": [str(2 * n) for n in numbers],
            "steps": [text[start : start + STEPS] for start in (n * 37 % STEPS for n in numbers)],
        })  # fmt: skip
        # Without dictionaries its pages are as large on the disk as in memory.
        file = folder / f"train-{shard:05d}.parquet"
        pq.write_table(table, file, row_group_size=group, use_dictionary=False, compression="none")
    return folder


def peak_mb() -> float:
    """Return the most that this process has held in memory, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def run(*arguments: str) -> dict[str, Any]:
    """Run a command of resa-lens in this process and return what it prints as JSON."""
    from typer.testing import CliRunner

    from resa_lens.cli import app

    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, (result.stderr, result.exception)
    return json.loads(result.stdout)


def memory(work: Path, megabytes: float) -> dict[str, float]:
    """Return the peak memory of train-saes and activity on small and on large data."""
    peaks: dict[str, float] = {}
    # Written before anything is measured: a table in memory is a peak of its own.
    corpora = {n: write(work / n, size) for n, size in (("small", 1.0), ("large", megabytes))}
    for name, data in corpora.items():
        options = ["--layers", "4", "--data", str(data), "--workspace", str(work / f"w-{name}")]
        began = time.perf_counter()
        saes = run("train-saes", *options, "--tokens", "4096", "--latents", "128", "--no-report")[
            "folder"
        ]
        run("activity", *options, "--saes", saes, "--text-tokens", "4096")
        peaks[name] = peak_mb()
        peaks[f"{name}_s"] = time.perf_counter() - began
    return peaks


def access(work: Path, megabytes: float) -> dict[str, float]:
    """Return milliseconds a record in the order of a seed, three ways, and of the first reading."""
    folder = write(work / "data", megabytes)
    began = time.perf_counter()
    records = load_records(str(folder))
    first = time.perf_counter() - began
    order = random.Random(0).sample(range(len(records)), len(records))
    files = [pq.ParquetFile(file) for file in read_table(folder).files]
    whole = pa.concat_tables([file.read() for file in files]).combine_chunks()
    pq.write_table(whole, work / "one-group.parquet", row_group_size=len(whole), compression="none")
    one = pq.ParquetFile(work / "one-group.parquet")

    def by_group(number: int) -> None:
        group, row = divmod(number % SHARD_ROWS, 1000)
        files[number // SHARD_ROWS].read_row_group(group).slice(row, 1).to_pylist()

    def of_one_group(number: int) -> None:
        one.read_row_group(0).slice(number, 1).to_pylist()

    def each(read: Callable[[int], object], count: int) -> float:
        started = time.perf_counter()
        for number in order[:count]:
            read(number)
        return 1000 * (time.perf_counter() - started) / count

    assert isinstance(records, stored.StoredRecords)
    return {
        "records": len(records),
        "first_reading_s": first,
        "stored_ms": each(records.__getitem__, 2000),
        "row_groups_of_1000_ms": each(by_group, 50),
        "one_row_group_ms": each(of_one_group, 3),
    }


def main() -> None:
    """Print one of the two as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=["memory", "access"])
    parser.add_argument("--megabytes", type=float, default=300.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        measure = memory if options.what == "memory" else access
        print(json.dumps(measure(Path(folder), options.megabytes), indent=1))


if __name__ == "__main__":
    main()
