"""Every resumable stage: what it refuses to go on with, what may change, and what ends it early."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.begun import BEGUN
from resa_lens.artifacts.stage import Context, Stage
from resa_lens.artifacts.workspace import Workspace
from resa_lens.errors import BadInputError, RunFailedError
from resa_lens.evals.engines import GenerationConfig, HFEngine
from resa_lens.evals.run import EvalConfig
from resa_lens.features.activity import ActivityConfig, Tally
from resa_lens.machine import limits
from resa_lens.machine.limits import memory_errors
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model, load_model
from resa_lens.progress import Reporter
from resa_lens.resources import data_path
from resa_lens.saes.plan import Meter, TrainingPlan
from resa_lens.saes.train import LayerTrainer, SaeConfig
from resa_lens.stages import activity, sae_plan, sae_training
from resa_lens.stages.ablation import AblationConfig, ablate_run
from resa_lens.stages.activity import activity_run
from resa_lens.stages.adapters import adapter_run
from resa_lens.stages.sae_training import train_run
from resa_lens.stages.saes import SaeRun
from resa_lens.stages.scores import eval_run, load_eval_items
from resa_lens.stages.sweep import sweep_run
from resa_lens.stages.sweep_jobs import SweepConfig
from resa_lens.stages.sweep_tunings import Tunings
from resa_lens.stages.tune_job import TuneJob
from resa_lens.texts.corpora import CorpusConfig
from resa_lens.tuning import loop
from resa_lens.tuning.loop import TuneConfig

CORPUS = CorpusConfig(sequence=64)
SAE = SaeConfig(latents=64, k=4, tokens=1024, batch=2)
GENERATION = GenerationConfig(max_new_tokens=6, batch_size=2)
ITEMS = load_eval_items("tiny", EvalConfig(limit=6))
LAYERS = [1, 2]


class Notes(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


@dataclass(frozen=True)
class House:
    """A small random model, its SAEs, and every stage's whole run."""

    folder: Path
    model: Model
    saes: SaeRun
    whole: dict[str, Artifact]

    def ctx(self, place: Path, **options: Any) -> Context:
        ctx = Context(Workspace(place), Notes(), **options)
        ctx.models[f"{self.folder}|"] = self.model
        return ctx


def train(ctx: Context, house: House, sae: SaeConfig = SAE, **options: Any) -> Artifact:
    run = train_run(ctx, house.model, LAYERS, sae, CORPUS, **options)
    assert run.artifact is not None
    return run.artifact


def measure(ctx: Context, house: House, examples: int = 2, **options: Any) -> Artifact:
    config = ActivityConfig(examples=examples)
    return activity_run(
        ctx, house.model, house.saes, CORPUS, config, tokens=1500, **options
    ).artifact


def tune(ctx: Context, house: House, rank: int = 2, **lora: Any) -> Artifact:
    config = TuneConfig(rank=rank, learning_rate=1e-3, **lora)
    job = TuneJob(
        str(house.folder), "1", lora=config, elicitation=CORPUS, trigger=CORPUS, steps=6,
        allow_mismatch=True,
    )  # fmt: skip
    return adapter_run(ctx, job, house.saes).artifact


def answer(ctx: Context, house: House, new: int = 6, batch_size: int = 2) -> Artifact:
    generation = replace(GENERATION, max_new_tokens=new, batch_size=batch_size)
    return eval_run(ctx, house.model, ITEMS, EvalConfig(generation=generation)).artifact


def ablate(ctx: Context, house: House, strength: float = 1.0, batch_size: int = 2) -> Artifact:
    generation = replace(GENERATION, batch_size=batch_size)
    config = AblationConfig(
        Hookpoint(1), (0, 1), doses=(strength,), strength=strength, controls=1,
        eval=EvalConfig(generation=generation),
    )  # fmt: skip
    return ablate_run(ctx, house.model, house.saes, ITEMS[:4], config).artifact


Run = Callable[..., Artifact]


@dataclass(frozen=True)
class Case:
    run: Run
    where: tuple[Any, str]
    """What is called in every step."""
    at: int
    """The call that ends the run early, with work to go on from."""
    option: str
    """Named where memory is too little."""
    other: dict[str, Any]
    """Another option of the result."""
    payload: str


CASES = {
    # Four steps of the plan come first.
    "train": Case(train, (LayerTrainer, "step"), 4 + 2 * 4 + 1, "--memory-limit",
                  {"sae": replace(SAE, latents=32)}, "**/sae.safetensors"),
    "activity": Case(measure, (Tally, "add"), 3 + 2 * 4 + 1, "--memory-limit",
                     {"examples": 1}, "features.parquet"),
    "tune": Case(tune, (loop, "seed_batch"), 4, "--gradient-checkpointing",
                 {"rank": 1}, "adapter_model.safetensors"),
    "eval": Case(answer, (HFEngine, "_decode"), 3, "--batch-size", {"new": 5}, "samples.parquet"),
    "ablate": Case(ablate, (HFEngine, "_decode"), 4, "--batch-size",
                   {"strength": 0.5}, "plain.parquet"),
}  # fmt: skip
each_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    folder = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=576, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512,
        initializer_range=0.2,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((data_path("tiny-reasoner") / name).read_bytes())
    model = load_model(str(folder))
    ctx = Context(Workspace(folder / "workspace"), Notes())
    ctx.models[f"{folder}|"] = model
    saes = train_run(ctx, model, LAYERS, SAE, CORPUS)
    made = House(folder, model, saes, {})
    made.whole.update({name: case.run(ctx, made) for name, case in CASES.items()})
    return made


@pytest.fixture(autouse=True)
def often() -> Iterator[None]:
    """Keep a checkpoint after every step, and one thread."""
    with (
        patch("resa_lens.saes.checkpoint.SHARE", 10**9),
        patch("resa_lens.saes.checkpoint.UNNOTICED_S", 10**9),
    ):
        yield
    torch.set_num_threads(1)


def ended_early(
    case: Case, house: House, place: Path, error: BaseException, **options: Any
) -> tuple[Context, BaseException]:
    """Run a stage that meets an error on its way."""
    owner, name = case.where
    real, calls = getattr(owner, name), [0]

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == case.at:
            raise error
        return real(*args, **kwargs)

    ctx = house.ctx(place, **options)
    with patch.object(owner, name, failing), pytest.raises((type(error), RunFailedError)) as caught:
        case.run(ctx, house)
    return ctx, caught.value


def work_of(place: Path) -> Path:
    (work,) = place.rglob(".work-*")
    return work


def contents(artifact: Artifact, case: Case) -> list[bytes]:
    files = sorted(artifact.path.glob(case.payload))
    assert files
    return [file.read_bytes() for file in files]


def said(ctx: Context, text: str) -> bool:
    return any(text in line for line in ctx.reporter.lines)  # type: ignore[attr-defined]


ERRORS = {
    "train": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "activity": MemoryError(),
    "tune": RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate "
                         "memory: you tried to allocate 9 bytes."),
    "eval": torch.OutOfMemoryError("CUDA out of memory."),
    "ablate": RuntimeError("CUDA error: out of memory"),
}  # fmt: skip


@each_case
def test_out_of_memory_keeps_the_work_and_names_an_option(house: House, tmp_path: Path, name: str):
    case = CASES[name]
    ctx, error = ended_early(case, house, tmp_path, ERRORS[name])
    assert isinstance(error, RunFailedError)
    assert len(str(error).splitlines()) <= 3
    assert case.option in str(error)
    assert said(ctx, "what was finished is kept")
    # It would run out of memory again.
    assert not said(ctx, "the same command goes on")
    ctx = house.ctx(tmp_path)
    artifact = case.run(ctx, house)
    assert said(ctx, "going on with the run in")
    if name != "ablate" and name != "eval":
        assert contents(artifact, case) == contents(house.whole[name], case)
    assert artifact.manifest.identity == house.whole[name].manifest.identity
    assert not list(tmp_path.rglob(".work-*"))


@each_case
def test_other_threads_are_refused_and_the_same_restored(house: House, tmp_path: Path, name: str):
    case = CASES[name]
    ended_early(case, house, tmp_path, KeyboardInterrupt())
    before = sorted(work_of(tmp_path).rglob("*"))
    with pytest.raises(BadInputError) as caught:
        case.run(house.ctx(tmp_path, threads=2), house)
    assert "began with 1 threads, --threads is 2" in str(caught.value)
    assert "--force" in str(caught.value)
    assert sorted(work_of(tmp_path).rglob("*")) == before
    # This process has others now, and nobody asked for any.
    torch.set_num_threads(2)
    artifact = case.run(house.ctx(tmp_path), house)
    assert artifact.manifest.threads == 1
    assert torch.get_num_threads() == 2


@each_case
@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [("torch", "1.0", "Install that version"), ("kernel_path", "cpu Z80", "Go on where it began")],
)
def test_another_machine_is_refused_wherever_the_work_lies(
    house: House, tmp_path: Path, name: str, key: str, value: str, remedy: str
):
    case = CASES[name]
    ended_early(case, house, tmp_path, KeyboardInterrupt())
    work = work_of(tmp_path)
    # What lies nearest to the work: a checkpoint, the log of answers, else the run's own record.
    nearest = [*work.rglob("state.json"), *work.glob("answers.jsonl")] or [work / BEGUN]
    first, *rest = nearest[0].read_text().splitlines()
    if nearest[0].name == "answers.jsonl":
        line = json.loads(first)
        line["settings"][key] = value
        nearest[0].write_text("\n".join([json.dumps(line), *rest, ""]))
    else:
        state = json.loads(nearest[0].read_text())
        assert key in state
        nearest[0].write_text(json.dumps({**state, key: value}))
    with pytest.raises(BadInputError) as caught:
        case.run(house.ctx(tmp_path), house)
    now = torch.__version__ if key == "torch" else "cpu "
    for part in (value, now, remedy, "--force"):
        assert part in str(caught.value)
    assert work.exists()
    artifact = case.run(house.ctx(tmp_path, force=True), house)
    assert artifact.manifest.identity == house.whole[name].manifest.identity


@each_case
def test_another_result_option_begins_a_new_run_and_says_so(
    house: House, tmp_path: Path, name: str
):
    case = CASES[name]
    ended_early(case, house, tmp_path, KeyboardInterrupt())
    work = work_of(tmp_path)
    ctx = house.ctx(tmp_path)
    artifact = case.run(ctx, house, **case.other)
    assert artifact.manifest.identity != house.whole[name].manifest.identity
    assert said(ctx, f"a new run; an unfinished one is in {work} (")
    (line,) = (line for line in ctx.reporter.lines if "a new run" in line)  # type: ignore[attr-defined]
    assert " there, " in line
    assert work.exists()


@each_case
def test_a_second_starter_at_the_end_does_nothing_again(house: House, tmp_path: Path, name: str):
    """It looked before the first one had finished, and takes the lock after it."""
    case = CASES[name]
    real, looks = Stage.done, []

    def done(stage: Stage, *, again: bool = False) -> Artifact | None:
        if stage.kind is not house.whole[name].kind:
            return real(stage, again=again)
        looks.append(again)
        if not again:
            # Between the two looks the other process finishes.
            shutil.copytree(house.whole[name].path, stage.folder)
            return None
        return real(stage, again=again)

    with (
        patch.object(Stage, "done", done),
        patch.object(Stage, "_make", side_effect=AssertionError("it is made again")),
    ):
        artifact = case.run(house.ctx(tmp_path), house)
    assert looks == [False, True]
    assert artifact.manifest.created == house.whole[name].manifest.created
    assert not list(tmp_path.rglob(".work-*"))


@each_case
def test_a_disk_that_is_too_small_is_seen_before_the_work(house: House, tmp_path: Path, name: str):
    case = CASES[name]
    with (
        patch.object(limits, "free_disk_mb", lambda _: -1.0),
        pytest.raises(BadInputError) as caught,
    ):
        case.run(house.ctx(tmp_path), house)
    assert "MB of disk are needed, -1 MB are free" in str(caught.value)
    assert "--workspace" in str(caught.value)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob(".work-*"))


@pytest.mark.parametrize("name", ["eval", "ablate"])
def test_room_for_answers_at_their_longest_is_no_condition(house: House, tmp_path: Path, name: str):
    ctx = house.ctx(tmp_path)
    with patch("resa_lens.stages.scores.answers_mb", lambda *_: 2e12):
        CASES[name].run(ctx, house)
    (line,) = (line for line in ctx.reporter.lines if "MB of disk" in line)  # type: ignore[attr-defined]
    assert "warning: " in line
    assert "--max-new-tokens" in line


@pytest.mark.parametrize("name", ["tune", "eval", "ablate"])
def test_too_little_memory_is_said_before_the_work(house: House, tmp_path: Path, name: str):
    case = CASES[name]
    ctx = house.ctx(tmp_path)
    with patch.object(Meter, "available", lambda _: 0.0):
        case.run(ctx, house)
    (warning,) = {line for line in ctx.reporter.lines if "memory are needed" in line}  # type: ignore[attr-defined]
    assert "0 MB are free" in warning
    assert case.option in warning


@pytest.mark.parametrize("name", ["train", "activity", "tune"])
def test_a_disk_that_fills_up_keeps_the_last_checkpoint(house: House, tmp_path: Path, name: str):
    case = CASES[name]
    full = OSError(errno.ENOSPC, "No space left on device")
    where = "resa_lens.tuning.state" if name == "tune" else "resa_lens.saes.checkpoint"
    real = loop.TuningState if name == "tune" else sae_training.Checkpoints
    write = real.write

    def failing(store: Any, step: int, *args: Any) -> None:
        if step == 3:
            with patch(f"{where}.save_file", side_effect=full):
                write(store, step, *args)
        write(store, step, *args)

    ctx = house.ctx(tmp_path)
    with patch.object(real, "write", failing), pytest.raises(RunFailedError) as caught:
        case.run(ctx, house)
    assert "the disk is full" in str(caught.value)
    assert "--workspace" in str(caught.value)
    assert said(ctx, "what was finished is kept")
    work = work_of(tmp_path)
    assert [path.name for path in work.rglob("checkpoint-*")] == ["checkpoint-2"]
    # Nothing half-written takes room.
    assert not list(work.rglob(".filling-*"))
    assert contents(case.run(house.ctx(tmp_path), house), case) == contents(house.whole[name], case)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("tune", {"gradient_checkpointing": True}),
        ("eval", {"batch_size": 3}),
        ("ablate", {"batch_size": 4}),
    ],
)
def test_an_execution_option_may_change_on_the_way(
    house: House, tmp_path: Path, name: str, other: dict[str, Any]
):
    case = CASES[name]
    ended_early(case, house, tmp_path, KeyboardInterrupt())
    ctx = house.ctx(tmp_path)
    artifact = case.run(ctx, house, **other)
    assert said(ctx, "going on with the run in")
    assert artifact.manifest.identity == house.whole[name].manifest.identity


@pytest.mark.parametrize("name", ["train", "activity"])
def test_a_smaller_memory_limit_goes_on_in_smaller_groups(house: House, tmp_path: Path, name: str):
    case = CASES[name]
    ended_early(case, house, tmp_path, KeyboardInterrupt())
    steps = [int(p.name.split("-")[1]) for p in work_of(tmp_path).rglob("checkpoint-*")]
    assert max(steps) >= 2
    ctx = house.ctx(tmp_path)
    # One layer and no second one has room.
    if name == "train":
        real = sae_plan.plan_training

        def narrow(*args: Any, **options: Any) -> TrainingPlan:
            assert options["memory_limit_mb"] == 77.0
            return replace(real(*args, **{**options, "memory_limit_mb": None}),
                           groups=((1,), (2,)))  # fmt: skip

        with patch.object(sae_plan, "plan_training", narrow):
            artifact = case.run(ctx, house, memory_limit_mb=77.0)
        assert artifact.manifest.results["groups"] == [[1], [2]]
        # Ends of documents are read and not trained on.
        kept = artifact.manifest.results["resumed_at_tokens"]
        assert (max(steps) - 1) * 128 < kept < max(steps) * 128
    else:
        mb = 2**20
        with (
            patch.object(activity, "needed_bytes", lambda *_: 100 * mb),
            patch.object(Meter, "now", lambda _: 500.0),
        ):
            artifact = case.run(ctx, house, memory_limit_mb=500.0 + 150 + activity.ROOM_MB)
        assert artifact.manifest.results["resumed_at"] == 2 * max(steps)
    assert contents(artifact, case) == contents(house.whole[name], case)


@each_case
def test_deterministic_is_recorded_and_changes_no_identity(house: House, tmp_path: Path, name: str):
    case = CASES[name]
    ended_early(case, house, tmp_path, KeyboardInterrupt(), deterministic=True)
    # Restored: nobody has to ask for it again.
    artifact = case.run(house.ctx(tmp_path), house)
    assert artifact.manifest.deterministic
    assert not house.whole[name].manifest.deterministic
    assert not torch.are_deterministic_algorithms_enabled()
    assert artifact.manifest.identity == house.whole[name].manifest.identity
    if name not in ("eval", "ablate"):
        assert contents(artifact, case) == contents(house.whole[name], case)


@pytest.mark.slow
def test_a_sweep_keeps_the_threads_that_it_began_with(house: House, tmp_path: Path):
    shared = TuneJob(
        str(house.folder), lora=TuneConfig(rank=2, learning_rate=1e-3), elicitation=CORPUS,
        trigger=CORPUS, steps=1, saes=str(house.saes.folder), allow_mismatch=True,
        evaluation=EvalConfig(limit=6, generation=GENERATION),
    )  # fmt: skip
    config = SweepConfig(shared, layers=(1,), seeds=2, effects=False)
    real, calls = Tunings.__call__, []

    def one(self: Tunings, name: str) -> list[list[str]]:
        calls.append(name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, name)

    with patch.object(Tunings, "__call__", one):
        with pytest.raises(KeyboardInterrupt):
            sweep_run(house.ctx(tmp_path), config)
        with pytest.raises(BadInputError, match="began with 1 threads, --threads is 2"):
            sweep_run(house.ctx(tmp_path, threads=2), config)
        torch.set_num_threads(2)
        ctx = house.ctx(tmp_path)
        sweep_run(ctx, config)
    assert said(ctx, "going on with the run in")
    # What was finished is not done again.
    assert calls == ["L01-s0", "L01-s1", "L01-s1"]
    made = {a.manifest.threads for a in ctx.workspace.artifacts() if a.manifest.kind == "adapter"}
    assert made == {1}


def test_a_model_that_does_not_fit_is_one_sentence(house: House, tmp_path: Path):
    error = RuntimeError("unable to mmap 8 bytes: Cannot allocate memory (12)")
    with (
        patch("resa_lens.artifacts.stage.load_model", side_effect=error),
        pytest.raises(RunFailedError) as caught,
    ):
        Context(Workspace(tmp_path)).model(str(house.folder))
    assert "--dtype" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("error", [ValueError("no"), RuntimeError("shape"), OSError(2, "no file")])
def test_other_errors_are_no_matter_of_memory(error: Exception):
    with pytest.raises(type(error)) as caught, memory_errors("work", "remedy"):
        raise error
    assert caught.value is error
