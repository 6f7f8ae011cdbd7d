"""Adds to a synthetic workspace SAEs whose nearest features are known.

The workspace's own SAEs get random decoders; those of seed 1 have the same directions in another
order, with a little noise; those of the model cousin lie nowhere, but two records name them.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import kind_examples
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from synthetic_workspace import ACTIVITY, SAES, SITE, SLUG, WEIGHTS

from resa_lens.artifacts.kinds.matches import MATCH_SCHEMA
from resa_lens.files import write_json

D_IN = 64
TWIN = f"saes/{SLUG}/twin"
TWIN_ACTIVITY = f"activity/{SLUG}/twin"
COUSIN = "saes/cousin-0a0a0a0a/scratch"
SHARE = {"share": 0.5, "n": 9, "ci": [0.2, 0.8], "null_share": 0.0, "null_mean": 0.125}


def write_decoder(folder: Path, rows: torch.Tensor) -> None:
    """Write an SAE in sparsify's layout: its decoder, and an encoder that nobody reads."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {"encoder.weight": torch.zeros(2, 2), "W_dec": rows.contiguous()},
        folder / "sae.safetensors",
    )
    write_json(folder / "cfg.json", {"d_in": rows.shape[1], "num_latents": rows.shape[0], "k": 4})


def directions(latents: int, layer: int, d_in: int = D_IN) -> torch.Tensor:
    """Random directions of a layer, [latents, d_in], not of one length."""
    generator = torch.Generator().manual_seed(layer)
    return torch.randn(latents, d_in, generator=generator) * (
        1 + torch.arange(latents)[:, None] % 3
    )


def add_saes(
    root: Path, layers: int, latents: int, dtype: torch.dtype = torch.float32
) -> NDArray[np.int64]:
    """Write the decoders, the SAEs of seed 1 and their activity, and two records of matches.

    Returns:
        The feature of seed 1 that is each feature of the workspace's own SAEs, at every layer.
    """
    order = np.random.default_rng(0).permutation(latents)
    source = json.loads((root / SAES / "manifest.json").read_text())
    source["config"] = {"sae": {"latents": latents, "seed": 0}}
    write_json(root / SAES / "manifest.json", source)
    source["config"] = {"sae": {"latents": latents, "seed": 1}}
    for layer in range(layers):
        rows = directions(latents, layer)
        write_decoder(root / SAES / f"layers.{layer}.mlp", rows.to(dtype))
        twin = torch.empty_like(rows)
        noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(99))
        twin[torch.from_numpy(order)] = rows + 0.05 * noise
        write_decoder(root / TWIN / f"layers.{layer}.mlp", twin.to(dtype))
    write_json(root / TWIN / "manifest.json", source)
    shutil.copytree(root / ACTIVITY, root / TWIN_ACTIVITY)
    file = root / TWIN_ACTIVITY / "manifest.json"
    write_json(file, {**json.loads(file.read_text()), "parents": [TWIN]})
    for name, pair, models in (
        ("there", [SAES, COUSIN], ["synthetic", "cousin"]),
        ("back", [COUSIN, SAES], ["cousin", "synthetic"]),
    ):
        _record(root / "matches" / SLUG / name, pair, models, latents)
    return order


def _record(folder: Path, pair: list[str], models: list[str], latents: int) -> None:
    """Write matches of layer 1: a feature with the next one by cosine, with itself by activity."""
    folder.mkdir(parents=True)
    manifest = kind_examples.manifest(
        "matches",
        schema_version=1,
        identity="",
        config={"saes": pair},
        results={"site": SITE, "models": models, "layers": {"1": {"cosine": 0.5}}},
        parents=pair,
        hashes={"weights": WEIGHTS},
        created="2026-01-02T00:00:00+00:00",
        command=["resa-lens"],
    )
    write_json(folder / "manifest.json", manifest.model_dump(mode="json"))
    features = np.arange(latents)
    columns = {
        "layer": np.full(latents, 1), "feature": features, "fires": np.ones(latents, bool),
        "cosine_match": (features + 1) % latents, "cosine": np.full(latents, 0.75),
        "correlation_match": features, "correlation": np.full(latents, 0.25),
    }  # fmt: skip
    pq.write_table(pa.table(columns, schema=MATCH_SCHEMA), folder / "matches.parquet")
    row = {"layer": 1, "threshold": 0.7, "latents": [latents, latents], "cosine": SHARE,
           "cosine_reason": None, "correlation": SHARE}  # fmt: skip
    write_json(folder / "matches.json", [row])


def floor_of_a_decoder() -> float:
    """CPU seconds of the least that a decoder in bfloat16 costs, in pieces that fit the cache."""
    raw = np.ones((65_536, 1536), np.uint16)
    began = time.process_time()
    for start in range(0, len(raw), 1024):
        rows = (raw[start : start + 1024].astype(np.uint32) << 16).view(np.float32)
        _ = rows @ rows[0], np.einsum("ij,ij->i", rows, rows)
    return time.process_time() - began
