"""Writes a workspace of a given size as the project's commands would leave it, but without a model.

Activity, counts, scores, verdicts, an ablation and an attribution of the same SAEs: valid
manifests, the schemas and row groups of our writers, one planted feature with known values.  Whole
arrays are written at once, so 26 layers of 65,536 latents take seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kind_examples
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from resa_lens.artifacts.feature_tables import (
    DOCUMENT_SCHEMA,
    DOCUMENTS,
    EDGES,
    EXAMPLE_SCHEMA,
    EXAMPLES,
    FEATURE_SCHEMA,
    FEATURES,
    GROUP,
    SCORE_GROUP,
    SCORE_SCHEMA,
    STRONGEST,
)
from resa_lens.files import write_json
from resa_lens.texts.prompts import PHASES

MODEL, SITE, WEIGHTS = "synthetic", "mlp_out", "5e" * 32
SLUG = "synthetic-5e5e5e5e"
SAES = f"saes/{SLUG}/scratch"
COUNTS = f"counts/{SLUG}/run"
ACTIVITY = f"activity/{SLUG}/run"
TOKENS = {"prompt": 40_000, "think": 50_000, "answer": 10_000}
DOCUMENT_COUNT, DOCUMENT_TOKENS = 40, 60
BEFORE, WINDOW = 4, 9
BINS = 48
LENS_COUNTS = np.minimum(np.arange(40), np.arange(40)[::-1]) + 1
"""Tokens of the vocabulary by logit: one at each end."""
PERIOD = 64  # distinct rows of the list columns: they repeat, so files stay small
RULES = ("all", "any", "either")


@dataclass(frozen=True)
class Size:
    """How much is written."""

    layers: int = 3
    latents: int = 2048
    """All of them fire."""
    examples: int = 2
    """Documents a feature."""
    scores: tuple[str, ...] = ("cohens_d", "auc")
    counted: int = 12
    """Features a layer that the rule either counts."""


@dataclass(frozen=True)
class Planted:
    """The feature whose values are known."""

    layer: int = 1
    feature: int = 62
    density: dict[str, float] = field(
        default_factory=lambda: {"prompt": 0.001, "think": 0.5, "answer": 0.002}
    )
    """Denser in thoughts than any other feature."""
    token: str = " zebra"
    """First of the tokens that it raises, and at its strongest example."""
    reason: str = "it fires in 8 of 8 other prompts"

    @property
    def overall(self) -> float:
        """Density over all tokens."""
        fired = sum(self.density[phase] * TOKENS[phase] for phase in PHASES)
        return fired / sum(TOKENS.values())


PLANTED = Planted()


def write_workspace(root: Path, size: Size | None = None, *, hostile: str = "") -> Path:
    """Write the workspace.

    Args:
        root: its folder; comes into being.
        size: how much.
        hostile: a text that stands wherever a model or a file brings in a text.
    """
    size = size or Size()
    layers = list(range(size.layers))
    model = hostile or MODEL

    def manifest(kind: str, folder: str, config: dict, results: dict, parents: list[str]) -> Path:
        target = root / folder
        target.mkdir(parents=True, exist_ok=True)
        made = kind_examples.manifest(
            kind,
            # Without an identity: what is changed by a test is read as it is.
            schema_version=1,
            identity="",
            config=config,
            results={"site": SITE, "model": model, "n_layers": size.layers, **results},
            parents=parents,
            hashes={"weights": WEIGHTS},
            created="2026-01-01T00:00:00+00:00",
            command=["resa-lens"],
        )
        write_json(target / "manifest.json", made.model_dump(mode="json"))
        return target

    quality = [{"layer": n, "fvu": 0.2, "l0": 32.0, "dead_share": 0.0} for n in layers]
    manifest("saes", SAES, {}, {"layers": quality}, [])
    counted = {layer: _counted(layer, size) for layer in layers}
    counts = [{"layer": n, **{r: len(found[r]) for r in RULES}} for n, found in counted.items()]
    config = {"saes": SAES, "layers": layers}
    target = manifest("counts", COUNTS, config, {"layers": counts}, [SAES])
    rows = [{"layer": n, "active": 300, "features": found} for n, found in counted.items()]
    write_json(target / "features.json", {"layers": rows})
    target = manifest(
        "activity",
        ACTIVITY,
        {"saes": SAES, "layers": layers},
        {
            "layers": [{"layer": n, "latents": size.latents} for n in layers],
            "tokens": TOKENS,
            "documents": DOCUMENT_COUNT,
        },
        [SAES],
    )
    _write_activity(target, size, hostile)
    target = manifest("scores", f"scores/{SLUG}/run", {"saes": SAES}, {"layers": layers}, [SAES])
    _write_scores(target, size)
    config = {"saes": SAES, "counts": COUNTS, "falsify": {"fires": 0.5}}
    target = manifest("falsification", f"falsified/{SLUG}/run", config, {}, [COUNTS, SAES])
    write_json(target / "verdicts.json", _verdicts(counted, hostile))
    point = {"layer": PLANTED.layer, "site": SITE}
    for name, features in (("alone", [PLANTED.feature]), ("set", [PLANTED.feature, 3, 5])):
        config = {"ablation": {"point": point, "features": features}}
        target = manifest("ablation", f"ablations/{SLUG}/{name}", config, point, [SAES])
        write_json(target / "results.json", _ablation(features, hostile))
    config = {"layer": PLANTED.layer}
    target = manifest("attribution", f"attributions/{SLUG}/run", config, point, [SAES])
    write_json(target / "results.json", _attribution(hostile))
    return root


def _counted(layer: int, size: Size) -> dict[str, list[int]]:
    held = set(range(7, size.latents, max(1, size.latents // size.counted)))
    strict = {PLANTED.feature} if layer == PLANTED.layer else set()
    return {"all": sorted(strict), "any": sorted(strict), "either": sorted(held | strict)}


def _lists(values: Any, width: int, kind: pa.DataType) -> pa.ListArray:
    flat = pa.array(np.asarray(values).ravel().tolist(), kind)
    return pa.ListArray.from_arrays(pa.array(np.arange(0, len(flat) + 1, width), pa.int32()), flat)


def _same(text: str, n: int) -> pa.Array:
    return pa.repeat(pa.scalar(text), n)


def _repeated(rows: pa.Array, n: int) -> pa.Array:
    return rows.take(pa.array(np.arange(n) % len(rows)))


def _write_activity(target: Path, size: Size, hostile: str) -> None:
    rng = np.random.default_rng(0)
    words = [f" word{i}" for i in range(400)]
    if hostile:
        words = [*words[:-1], hostile]
    octaves = 2.0 ** np.arange(-10, 15)
    edges = np.stack([octaves, 1.5 * octaves], 1).ravel()[: BINS + 1]
    schema = FEATURE_SCHEMA.with_metadata({EDGES: ",".join(f"{e:.6g}" for e in edges)})
    histogram = np.zeros((PERIOD, BINS), dtype=np.int32)
    histogram[:, 18:28] = rng.integers(0, 90, (PERIOD, 10))
    logits = -np.sort(-rng.normal(3, 1, (PERIOD, 10)).round(2))
    tokens = np.array(words)[rng.integers(0, len(words), (PERIOD, 10))]
    if hostile:
        tokens[:, 0] = hostile
    shown = np.array(words)[rng.integers(0, len(words), (PERIOD, WINDOW))]
    acts = rng.choice([0.0, 0.0, 0.5, 2.0], (PERIOD, WINDOW))
    acts[:, BEFORE] = 4.0
    lists = {
        "histogram": _lists(histogram, BINS, pa.int32()),
        "top_tokens": _lists(tokens, 10, pa.string()),
        "fires_on": _lists(tokens[:, :2], 2, pa.string()),
        "fires_on_share": _lists(np.tile([0.75, 0.25], (PERIOD, 1)), 2, pa.float32()),
        "fires_on_mean": _lists(np.tile([1.0, 3.0], (PERIOD, 1)), 2, pa.float32()),
        "top_logits": _lists(logits, 10, pa.float32()),
        "bottom_tokens": _lists(tokens[::-1], 10, pa.string()),
        "bottom_logits": _lists(-logits, 10, pa.float32()),
        "lens_histogram": _lists(np.tile(LENS_COUNTS, (PERIOD, 1)), LENS_COUNTS.size, pa.int32()),
        "nearest": _lists(rng.integers(0, size.latents, (PERIOD, 5)), 5, pa.int32()),
        "nearest_cosines": _lists(np.tile([0.5, 0.4, 0.3, 0.2, 0.1], (PERIOD, 1)), 5, pa.float32()),
    }
    windows = {
        "tokens": _lists(shown, WINDOW, pa.string()),
        "acts": _lists(acts, WINDOW, pa.float32()),
    }
    with (
        pq.ParquetWriter(target / FEATURES, schema) as features,
        pq.ParquetWriter(target / EXAMPLES, EXAMPLE_SCHEMA) as examples,
    ):
        for layer in range(size.layers):
            for first in range(0, size.latents, GROUP):
                index = np.arange(first, min(first + GROUP, size.latents))
                features.write_table(_feature_group(layer, index, lists, schema, rng))
                examples.write_table(_example_group(layer, index, size.examples, windows))
    phases = [0] * 20 + [1] * 30 + [2] * 10
    columns = [
        list(range(DOCUMENT_COUNT)),
        [[1] * DOCUMENT_TOKENS] * DOCUMENT_COUNT,
        [phases] * DOCUMENT_COUNT,
    ]
    made = dict(zip(DOCUMENT_SCHEMA.names, columns, strict=True))
    pq.write_table(pa.table(made, schema=DOCUMENT_SCHEMA), target / DOCUMENTS)


def _feature_group(
    layer: int, index: np.ndarray, lists: dict[str, pa.Array], schema: pa.Schema, rng: Any
) -> pa.Table:
    n = index.size
    here = np.flatnonzero(index == PLANTED.feature) if layer == PLANTED.layer else []
    columns: dict[str, Any] = {"layer": np.full(n, layer), "feature": index}
    fired = np.zeros(n, dtype=np.int64)
    for phase in PHASES:
        share = rng.integers(1, 400, n) / 1000
        share[here] = PLANTED.density[phase]
        count = np.rint(share * TOKENS[phase]).astype(np.int64)
        columns[f"tokens_fired_{phase}"] = count
        columns[f"density_{phase}"] = share
        columns[f"mean_{phase}"] = np.full(n, 1.5)
        columns[f"max_{phase}"] = np.full(n, 4.0)
        fired += count
    columns |= {
        "tokens_fired": fired,
        "documents_fired": np.full(n, DOCUMENT_COUNT),
        "density": fired / sum(TOKENS.values()),
        "density_se": np.full(n, 0.001),
        "mean": np.full(n, 1.5),
        "max": rng.integers(1, 100, n).astype(float),
    }
    columns |= {name: _repeated(rows, n) for name, rows in lists.items()}
    if len(here):
        place = int(here[0])
        own = columns["top_tokens"][place].as_py()
        raised = [[PLANTED.token, *own[1:]]]
        columns["top_tokens"] = _put(columns["top_tokens"], place, pa.array(raised))
    return pa.table({name: columns[name] for name in schema.names}, schema=schema)


def _put(rows: pa.Array, place: int, one: pa.Array) -> pa.Array:
    return pa.concat_arrays([rows[:place], one.cast(rows.type), rows[place + 1 :]])


def _example_group(
    layer: int, index: np.ndarray, count: int, windows: dict[str, pa.Array]
) -> pa.Table:
    n = index.size * count
    tokens = _repeated(windows["tokens"], n)
    at = np.flatnonzero(index == PLANTED.feature) if layer == PLANTED.layer else []
    if len(at):
        place = int(at[0]) * count
        own = tokens[place].as_py()
        own[BEFORE] = PLANTED.token
        tokens = _put(tokens, place, pa.array([own]))
    columns = {
        "layer": np.full(n, layer),
        "feature": np.repeat(index, count),
        "interval": _same(STRONGEST, n),
        "rank": np.tile(np.arange(count), index.size),
        "document": np.arange(n) % DOCUMENT_COUNT,
        "position": np.full(n, 20 + BEFORE),
        "phase": _same("think", n),
        "value": np.full(n, 4.0),
        "start": np.full(n, 20),
        "tokens": tokens,
        "acts": _repeated(windows["acts"], n),
    }
    return pa.table(columns, schema=EXAMPLE_SCHEMA)


def _write_scores(target: Path, size: Size) -> None:
    rng = np.random.default_rng(1)
    n = size.layers * size.latents
    layer = np.repeat(np.arange(size.layers), size.latents)
    feature = np.tile(np.arange(size.latents), size.layers)
    place = PLANTED.layer * size.latents + PLANTED.feature
    with pq.ParquetWriter(target / "scores.parquet", SCORE_SCHEMA) as writer:
        for name in size.scores:
            columns: dict[str, Any] = {
                "layer": layer,
                "feature": feature,
                "score": _same(name, n),
                "value": rng.integers(-500, 500, n) / 1000,
                "null": np.full(n, 0.01),
                "p": rng.integers(60, 1000, n) / 1000,
            }
            columns["value"][place], columns["p"][place] = 2.5, 0.001
            columns["q"] = np.where(np.arange(n) == place, 0.004, np.minimum(1, columns["p"] * 2))
            for key in SCORE_SCHEMA.names[len(columns) :]:
                columns[key] = np.full(n, 100)
            writer.write_table(pa.table(columns, schema=SCORE_SCHEMA), row_group_size=SCORE_GROUP)
    top = {"layer": PLANTED.layer, "feature": PLANTED.feature, "ci": [2.1, 2.9]}
    summary = {
        "design": "phases",
        "correction": "bh",
        "draws": 1000,
        "scores": [{"score": name, "tested": n, "top": [top]} for name in size.scores],
    }
    write_json(target / "summary.json", summary)


def _share(fired: int, n: int) -> dict[str, Any]:
    return {"fired": fired, "n": n, "share": fired / n, "ci": [0.0, 1.0]}


def _verdicts(counted: dict[int, dict[str, list[int]]], hostile: str) -> dict[str, Any]:
    made = []
    for layer, found in counted.items():
        for feature in found["either"]:
            planted = (layer, feature) == (PLANTED.layer, PLANTED.feature)
            fired = 0 if planted else 40
            made.append(
                {
                    "layer": layer,
                    "feature": feature,
                    "rule": "all" if planted else "either",
                    "rules": list(RULES) if planted else ["either"],
                    "verdict": "survives" if planted else "token detector",
                    "reason": hostile or (PLANTED.reason if planted else "it fires at the tags"),
                    "places": ["open"],
                    "shares": {
                        "injected": _share(fired, 40),
                        "plain": _share(0, 40),
                        "shuffled": _share(fired // 2, 20),
                        "neutral": _share(0, 10),
                        "paraphrase": _share(8, 8),
                    },
                    "injection_p": 1.0 if planted else 1e-6,
                    "other_seed": {
                        "cosine": 0.9,
                        "feature": 5,
                        "correlation": 0.9,
                        "correlated": 9,
                        "elsewhere": 0.3,
                        "found": True,
                    },
                    "failed": [] if planted else ["injection", "shuffle"],
                    "random_weights": {"counted": 16, "pass": 1, "active": 645},
                }
            )
    kinds = {"original": 1, "injected": 40, "plain": 40, "neutral": 10, "shuffled": 20}
    summary = kind_examples.RESULTS["falsification"]["summary"]
    return {"features": made, "summary": summary, "trials": kinds, "skipped": []}


def _ablation(features: list[int], hostile: str) -> dict[str, Any]:
    effect = {"difference": -0.04, "ci": [-0.08, -0.01], "p_value": 0.02, "changed": 9, "n": 200}
    beyond = {**effect, "difference": -0.03, "p_value": 0.04}
    control = {"effect": effect, "beyond": beyond, "each": [-0.01, -0.02], "rank_p": 0.2}
    return {
        "layer": PLANTED.layer,
        "features": features,
        "rule": None,
        "kind": hostile or "ablate",
        "strength": 1.0,
        "phases": list(PHASES),
        "effect": -0.04,
        "effect_ci": [-0.08, -0.01],
        "effect_p_value": 0.02,
        "beyond": -0.03,
        "beyond_ci": [-0.07, 0.0],
        "p_value": 0.04,
        "rank_p": 0.17,
        "n": 200,
        "samples": 1,
        "note": hostile or "McNemar's exact test",
        "base": {"accuracy": 0.68, "tokens": 44.0, "finished": 1.0},
        "doses": [
            {"strength": 1.0, "accuracy": 0.64, "effect": effect, "control": control},
            {"strength": 2.0, "accuracy": 0.62, "effect": effect, "control": None},
        ],
        "controls": [{"features": [1]}],
    }


def _attribution(hostile: str) -> dict[str, Any]:
    effect = {
        "feature": PLANTED.feature,
        "mass": 10.0,
        "active": 101,
        "documents": 31,
        "gradient": 0.0021,
        "patching": 0.0019,
        "ci": [0.001, 0.003],
        "p_value": 0.01,
        "p_corrected": 0.03,
    }
    return {
        "layer": PLANTED.layer,
        "metric": hostile or "loss",
        "effects": [effect],
        "documents": 35,
        "tokens": 4160,
        "loss": 0.02,
    }
