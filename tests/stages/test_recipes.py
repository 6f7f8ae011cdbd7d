"""A stage that computes something else than before has a new recipe number.

The golden figures are those of every stage at a tiny shape, through SAEs that do not depend on the
machine.  Where a figure changes on purpose: raise `recipe` of the kind's class in artifacts/kinds/
and write the figures anew with

    RESA_LENS_WRITE_GOLDEN=1 python -m pytest tests/stages/test_recipes.py -n 0
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from resa_lens.artifacts.artifact import KINDS, Artifact
from resa_lens.artifacts.workspace import Workspace
from resa_lens.cli import app
from resa_lens.stages import insertion

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
FILE = GOLDEN / "recipes.json"
SAES = next((GOLDEN / "workspace" / "saes").glob("*/*"))
TRAINED = {"saes": 0.1, "quality": 0.1, "adapter": 0.01, "sweep": 0.02}
"""Relative tolerance where weights were trained, whose last bits are the processor's."""
TOLERANCE = 2e-3
"""Elsewhere: sums in float32."""
AVX2 = {
    ("matches", "matches.json[0].agreement.share"): 805 / 825,
    ("matches", "matches.json[0].agreement.ci[0]"): 0.9628523132449385,
    ("matches", "matches.json[0].agreement.ci[1]"): 0.9842528196437164,
}
"""What stands there without AVX-512: two of 825 features have two partners alike, between which the
last bits decide (805 agree in place of 807, from one commit)."""
OWN = ("seconds", "threads_probe", "planned_memory_mb", "peak_memory_mb", "saes", "adapter", "eval",
       "folder", "path", "html")  # fmt: skip
"""Keys of what is the run's own: times, memory and places."""
HERE = ["--saes", str(SAES), "--layers", "5"]
LAYER = ["--saes", str(SAES), "--layer", "5"]
SHORT = ["--limit", "8", "--max-new-tokens", "48"]
MIXTURE = ["--model", "tiny-moe-reasoner", "--text-tokens", "3000"]
COMMANDS = [
    ["train-saes", "--layers", "5", "--tokens", "2048", "--latents", "128", "--k", "8",
     "--thought-share", "0"],
    ["count-features", *HERE],
    ["recommend-layers", *HERE, "--rule", "either", "--selector", "causal"],
    ["stability", *HERE, "--rule", "either", "--rule", "any", "--selector", "most-features"],
    ["activity", *HERE, "--text-tokens", "1500", "--examples", "1"],
    ["score-features", *HERE, "--text-tokens", "1500", "--draws", "20", "--score", "auc"],
    ["falsify", *HERE, "--texts", "4", "--shuffles", "2", "--no-other-seed",
     "--no-random-weights"],
    ["attribute", *LAYER, "--text-tokens", "600", "--top", "3"],
    ["ablate", *LAYER, "--features", "1,2", "--doses", "1", "--control-sets", "1", *SHORT],
    ["match-features", str(SAES), str(SAES), "--layers", "5", "--text-tokens", "600"],
    ["experts", "measure", *MIXTURE],
    ["experts", "rank", *MIXTURE, "--target", "think", "--draws", "99"],
    ["experts", "steer", *MIXTURE, "--target", "think", "--draws", "99", "--top", "2",
     "--answer-sets", "1", *SHORT],
    ["tune", "--model", "tiny-reasoner", *LAYER, "--steps", "2", "--rank", "2",
     "--learning-rate", "1e-3", *SHORT],
    ["sweep", "--saes", str(SAES), "--layers", "5", "--seeds", "2", "--steps", "1", "--no-effects",
     "--rank", "2", *SHORT],
]  # fmt: skip


def flat(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (place, value) of every number, word and truth value that is a result."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in OWN:
                yield from flat(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from flat(item, f"{place}[{number}]")
    elif isinstance(value, bool | int | float) or value is None:
        yield place, value


def figures(artifact: Artifact) -> dict[str, Any]:
    found = dict(flat(artifact.manifest.results, "results"))
    for name in artifact.manifest.files:
        # Trials are texts, losses are the training's course.
        if name.endswith(".json") and "/" not in name and name not in ("trials.json", "cfg.json"):
            found |= dict(flat(artifact.value(name), name))
    # Enough to see a change, and little to carry.
    names = sorted(found)
    return {name: found[name] for name in names[:: max(1, len(names) // 120)]}


@pytest.fixture(scope="module")
def computed(
    tmp_path_factory: pytest.TempPathFactory, small_starting_point: int
) -> dict[str, dict[str, Any]]:
    workspace = tmp_path_factory.mktemp("recipes") / "workspace"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(insertion, "SHORT_TOKENS", small_starting_point)
        for command in COMMANDS:
            done = CliRunner().invoke(app, [*command, "--workspace", str(workspace), "--json"])
            assert done.exit_code == 0, (command, done.stderr, done.exception)
    by_kind: dict[str, dict[str, Any]] = {}
    for artifact in reversed(Workspace(workspace).artifacts()):
        name = artifact.manifest.kind
        if name not in by_kind:
            by_kind[name] = {"recipe": KINDS[name].recipe, "figures": figures(artifact)}
    if os.environ.get("RESA_LENS_WRITE_GOLDEN"):
        FILE.write_text(json.dumps(dict(sorted(by_kind.items())), indent=1) + "\n")
    return by_kind


STAGES = sorted(set(KINDS) - {"model"})
"""A merged model is what its own tests hold: sums of weights, to the bit."""


def changes(name: str, golden: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What of a stage's figures is not as before, a line each."""
    mend = "raise `recipe` in artifacts/kinds/ and write the golden figures anew (top of this file)"
    if now["recipe"] != golden["recipe"]:
        return [f"recipe of {name} is new; write the golden figures"]
    if now["figures"].keys() != golden["figures"].keys():
        return [f"{name} has other results: {mend}"]
    other = []
    for place, before in golden["figures"].items():
        value = now["figures"][place]
        if isinstance(before, float) and isinstance(value, float):
            bound = TRAINED.get(name, TOLERANCE)
            alternatives = (before, AVX2.get((name, place), before))
            same = any(math.isclose(x, value, rel_tol=bound, abs_tol=bound) for x in alternatives)
        else:
            same = value == before
        if not same:
            other.append(f"{name} {place}: {before} was, {value} is; {mend}")
    return other


def test_a_change_of_results_has_a_new_recipe_number(computed: Any) -> None:
    """All stages in one test: each worker would compute them all again for its share."""
    assert sorted(computed) == STAGES
    golden = json.loads(FILE.read_text())
    changed = [line for name in STAGES for line in changes(name, golden[name], computed[name])]
    assert not changed, "\n".join(changed)
    assert all(len(entry["figures"]) >= 3 for entry in computed.values())


def test_a_change_is_seen_and_named() -> None:
    golden = json.loads(FILE.read_text())
    for name in STAGES:
        entry = golden[name]
        assert changes(name, entry, entry) == []
        place, before = next(
            (key, value)
            for key, value in entry["figures"].items()
            if isinstance(value, int | float)
        )
        other = {**entry["figures"], place: 2 * before + 1}
        (line,) = changes(name, entry, {**entry, "figures": other})
        assert line.startswith(f"{name} {place}: {before} was")
        (line,) = changes(name, entry, {**entry, "recipe": 99})
        assert "recipe" in line
