"""A corpus on the disk gives the artifacts of one in memory, and takes a small one's memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from identities import data_file

from benchmarks import large_corpus
from resa_lens.artifacts.stage import Context
from resa_lens.artifacts.workspace import Workspace
from resa_lens.features.activity import ActivityConfig
from resa_lens.progress import SILENT
from resa_lens.saes.train import SaeConfig
from resa_lens.stages.activity import activity_run
from resa_lens.stages.sae_training import train_run
from resa_lens.stages.saes import find_saes
from resa_lens.texts import corpora, stored
from resa_lens.texts.corpora import CorpusConfig

SAES = SaeConfig(latents=64, k=4, tokens=1024, batch=4)


def test_saes_and_activity_are_found_again_and_made_alike(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(stored, "SETTLED_S", 0.0)
    corpus = CorpusConfig(str(data_file(tmp_path / "data.jsonl")), sequence=64, thought_share=None)
    config = ActivityConfig(examples=2)

    def run(name: str) -> Any:
        ctx = Context(Workspace(tmp_path / name), SILENT)
        saes = train_run(ctx, tiny, [4], SAES, corpus)
        found = find_saes(ctx, tiny, SAES, corpus, [4])
        assert found is not None
        assert found.folder == saes.folder
        return saes, activity_run(ctx, tiny, saes, corpus, config, tokens=2000)

    listed, tables = run("listed")
    monkeypatch.setattr(stored, "IN_MEMORY", 0)
    assert isinstance(corpora.read_records(corpus), stored.StoredRecords)
    again, same = run("listed")
    assert (again.fresh, again.folder) == (False, listed.folder)
    assert same.artifact.path == tables.artifact.path
    large, other = run("large")
    assert large.fresh
    assert large.artifact.manifest.identity == listed.artifact.manifest.identity
    file = "layers.4.mlp/sae.safetensors"
    assert (large.folder / file).read_bytes() == (listed.folder / file).read_bytes()
    for name in ("features", "examples", "documents"):
        mine, theirs = (pq.read_table(r.artifact.path / f"{name}.parquet") for r in (other, tables))
        assert mine.equals(theirs)


MEASURE = """
import json, sys
from pathlib import Path
from benchmarks import large_corpus
print(json.dumps(large_corpus.memory(Path(sys.argv[1]), float(sys.argv[2]))))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """300 MB of records, which as a list take 535 MB more than 1 MB of them (docs/log.md)."""
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(large_corpus.__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), "300"],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout)
    kept = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("records.jsonl"))
    assert kept > 290 * 2**20
    assert peaks["large"] - peaks["small"] < 80
