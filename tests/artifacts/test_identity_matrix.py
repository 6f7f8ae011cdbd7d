"""What an artifact is made from: every ingredient of every stage is in its identity, no name is."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from stage_cases import CASES, MODELS, PHASED, Case, Materials, named

from resa_lens.artifacts.artifact import KINDS
from resa_lens.artifacts.manifest import Manifest
from resa_lens.artifacts.workspace import Workspace
from resa_lens.evals.engines import GenerationConfig
from resa_lens.evals.run import EvalConfig
from resa_lens.stages.adapters import adapter_run
from resa_lens.stages.merge import merge_model
from resa_lens.stages.sweep import sweep_run
from resa_lens.stages.sweep_jobs import SweepConfig
from resa_lens.stages.tune_job import TuneJob

each_case = pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Materials]:
    yield Materials(tmp_path_factory.mktemp("materials"))
    MODELS.clear()


@each_case
def test_each_ingredient_makes_another_identity(materials: Materials, case: Case):
    seen = {named(case, materials.plain).identity}
    alike = []
    for what, change in materials.changes(case):
        identity = named(case, change()).identity
        if identity in seen:
            alike.append(what)
        seen.add(identity)
    assert alike == []
    assert len(seen) > 10


@each_case
def test_no_name_place_or_execution_option_makes_another(materials: Materials, case: Case):
    plain = named(case, materials.plain).identity
    sames = list(materials.sames(case))
    assert [what for what, same in sames if named(case, same()).identity != plain] == []
    assert len(sames) > 5


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.fixed >= PHASED])
def test_the_share_of_thoughts_is_of_saes_alone(materials: Materials, name: str):
    case = CASES[name]
    corpus = replace(case.options["corpus"], thought_share=0.25, own_thoughts=3)
    other = replace(materials.plain, options={"corpus": corpus})
    assert named(case, other).identity == named(case, materials.plain).identity


@each_case
def test_another_recipe_makes_another_identity(materials: Materials, case: Case):
    plain = named(case, materials.plain)
    with patch.object(case.kind, "recipe", case.kind.recipe + 1):
        assert named(case, materials.plain).identity != plain.identity
    assert plain.identity == named(case, materials.plain).identity


def test_every_stage_is_here():
    assert {case.kind.name for case in CASES.values()} == set(KINDS) - {"model"}


STRUCTURE = {
    "ctx", "model", "saes", "run", "items", "counts", "corpus", "point", "config", "quality",
    "site", "job", "sae", "recommendation", "source", "lora", "first", "second",
    "target",
}  # fmt: skip
"""Arguments of the stages that are ingredients, or hold the options; each stands in the calls."""
HARMLESS = {"world", "cluster", "allow_mismatch", "label"}
"""Arguments that say with whom, how strictly or under which name it is done."""


def known_names(*functions: object) -> set[str]:
    """Return the options and the execution arguments of the cases of some stages."""
    cases = [case for case in CASES.values() if case.function in functions]
    return {name for case in cases for name in (*case.options, *case.execution)}


@each_case
def test_every_argument_of_a_stage_is_an_ingredient_an_option_or_execution(case: Case):
    parameters = set(inspect.signature(case.function).parameters)
    assert parameters - STRUCTURE - HARMLESS - known_names(case.function) == set()
    for name, value in case.options.items():
        assert is_dataclass(value) or name in case.others


def test_every_field_of_a_tuning_and_of_a_sweep_is_one_too():
    known = known_names(adapter_run, sweep_run) | {"tune", "model", "base", "source_model"}
    for config in (TuneJob, SweepConfig):
        assert {item.name for item in fields(config)} - known == set()


def test_how_an_adapter_gets_into_an_engine_makes_another_identity(materials: Materials):
    given = replace(materials.plain, adapters=(materials.adapter("same"),))
    identities = {
        named(CASES["eval"], replace(given, options={"engine": "vllm", "lora": lora})).identity
        for lora in ("request", "merged")
    }
    assert len(identities) == 2


def test_the_other_text_of_scores_counts_by_its_contents(materials: Materials):
    plain, case = materials.plain, CASES["scores"]

    def scored(other: Path) -> str:
        config = replace(case.options["config"], other=str(other))
        return named(case, replace(plain, options={"config": config})).identity

    identity = scored(plain.records)
    assert identity != named(case, plain).identity
    assert scored(materials.copy(plain.records, "other-text.jsonl")) == identity
    assert scored(materials.other("question")) != identity


def test_questions_without_ids_count_by_their_contents(materials: Materials):
    file = materials.records("without ids", ids=False)
    given = replace(
        materials.plain,
        records=file,
        options={"config": EvalConfig(generation=GenerationConfig(8))},
    )
    renamed = replace(given, records=materials.copy(file, "another name.jsonl"))
    assert named(CASES["eval"], renamed).identity == named(CASES["eval"], given).identity


def merged(materials: Materials, out: str, **changed: Any) -> str:
    """Return the identity of a merged model; nothing is written."""
    given = {"name": str(materials.model("same")), "adapters": [str(materials.adapter("same"))],
             "scale": 1.0, "dtype": "base", **changed}  # fmt: skip
    seen: list[Manifest] = []

    def stop(_self: Workspace, _folder: Path, manifest: Manifest) -> Any:
        seen.append(manifest)
        raise KeyboardInterrupt

    name, adapters = given.pop("name"), given.pop("adapters")
    with patch.object(Workspace, "artifact", stop), pytest.raises(KeyboardInterrupt):
        merge_model(name, adapters, materials.place / out, **given)
    return seen[0].identity


def test_a_merged_model_is_what_was_merged(materials: Materials):
    plain = merged(materials, "a")
    others = [
        merged(materials, "a", name=str(materials.model(what))) for what in ("weights", "tokenizer")
    ]
    others += [merged(materials, "a", adapters=[str(materials.adapter("weights"))])]
    others += [merged(materials, "a", scale=0.5), merged(materials, "a", dtype="float32")]
    assert len({plain, *others}) == 1 + len(others)
    moved = materials.copy(materials.adapter("same"), "moved adapter")
    assert merged(materials, "b", name="tiny-reasoner", adapters=[str(moved)]) == plain
