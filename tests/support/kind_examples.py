"""The smallest results and settings of each kind that its schema takes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.manifest import Manifest
from resa_lens.hashes import digest

OF_MODEL = {"site": "mlp_out", "model": "tiny-reasoner", "n_layers": 12}
FIGURES = {
    "tokens": 10, "documents": 2, "fvu": 0.1, "l0": 32.0, "dead_share": 0.0, "loss_change": 0.1,
    "loss_change_se": 0.01, "loss_recovered": None,
}  # fmt: skip
EFFECT = {
    "value": 0.1, "se": 0.01, "n": 9, "control": 0.0, "target": 0.1, "p_value": 0.5, "features": 3,
    "controls": 4,
}  # fmt: skip
TALLY = {
    "rule": "either", "counted": 3, "verdicts": {"survives": 1}, "survivors": 1, "ci": [0.1, 0.8],
    "active": 90, "by_texts": 1,
}  # fmt: skip
SCORE = {"accuracy": 0.5, "n": 9, "ci": [0.2, 0.8]}

RESULTS: dict[str, dict[str, Any]] = {
    "saes": {**OF_MODEL, "layers": [{"layer": 5, "fvu": 0.1}]},
    "quality": {**OF_MODEL, "layers": {"5": FIGURES}},
    "counts": {**OF_MODEL, "layers": [{"layer": 5, "all": 0, "any": 1, "either": 2}]},
    "stability": {**OF_MODEL, "verdict": "stable", "reason": "it returns", "tables": 4},
    "recommendation": {
        **OF_MODEL, "recommended": [5], "selector": "mixture", "verdict": "supported",
        "reason": "features stand there",
    },
    "activity": {
        **OF_MODEL, "layers": [{"layer": 5, "latents": 64}], "tokens": {"think": 10},
        "documents": 2,
    },
    "scores": {**OF_MODEL, "layers": [5], "significant": {"auc": 3}},
    "falsification": {**OF_MODEL, "summary": {"rules": [TALLY], "reason": "1 of 3 survives"}},
    "effects": {**OF_MODEL, "layers": {"5": EFFECT}, "rule": "either"},
    "attribution": {
        **OF_MODEL, "layer": 5, "documents": 2,
        "agreement": {"spearman": 0.9, "p_value": 0.1, "n": 9},
    },
    "ablation": {**OF_MODEL, "layer": 5, "effect": -0.1, "control": 0.0, "p_value": 0.1},
    "matches": {**OF_MODEL, "models": ["a", "b"], "layers": {"5": {"cosine": 0.5}}},
    "routing": {
        "model": "tiny-moe-reasoner", "layers": [0, 1], "n_layers": 2, "experts": 4, "k": 2,
        "documents": 3, "tokens": 90,
    },
    "ranking": {
        "model": "tiny-moe-reasoner", "target": "<think>", "by": "npmi", "layer": 1, "expert": 3,
        "score": 0.5, "reached_by": 7, "types": 25, "documents": 40,
    },
    "steering": {
        "model": "tiny-moe-reasoner", "experts": [[1, 3]], "how": "reroute", "where": "all",
        "effect": 0.1, "control": 0.05, "p_value": 0.1, "accuracy": -0.02,
    },
    "adapter": {**OF_MODEL, "layer": 5},
    "eval": {
        **SCORE, "by_task": {}, "by_level": {}, "seconds": 1.0, "tokens": 90,
        "model": "tiny-reasoner", "slug": "",
    },
    "sweep": {**OF_MODEL, "source": "tiny-reasoner", "preset": "paper"},
    "model": {},
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "saes": {"sae": {"latents": 1024, "seed": 0}},
    "recommendation": {"rule": "either", "selector": "mixture", "recipe": "robust"},
    "attribution": {"layer": 5},
    "ablation": {"ablation": {"point": {"layer": 5}, "features": [3]}},
    "eval": {"questions": "0868625b"},
    "sweep": {
        "sweep": {"layers": [5]}, "questions": "0868625b", "target": "", "source": "",
        "jobs": [{"name": "L05-s0", "layer": 5, "seed": 0, "control": None}],
    },
}  # fmt: skip


def manifest(kind: str, **fields: Any) -> Manifest:
    """Return a manifest that the kind's schema takes; `results` and `config` add to the least."""
    results = copy.deepcopy(RESULTS[kind]) | fields.pop("results", {})
    config = copy.deepcopy(SETTINGS.get(kind, {})) | fields.pop("config", {})
    ingredients = fields.setdefault("ingredients", {"kind": kind})
    fields.setdefault("identity", digest(ingredients))
    return Manifest(kind=kind, config=config, results=results, commit=None, **fields)


def artifact(root: Path, relative: str, kind: str, **fields: Any) -> Artifact:
    """Return an artifact that lies nowhere; see `manifest`."""
    return Artifact(root / relative, relative, manifest(kind, **fields))
