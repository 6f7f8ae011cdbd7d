"""The loop: the same bits after any stop, an update is the mean of its batches, a log as stated."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from resa_lens.errors import BadInputError, RunFailedError
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model, load_model
from resa_lens.saes import checkpoint
from resa_lens.saes.baselines import Noise
from resa_lens.saes.coder import new_coder
from resa_lens.saes.world import World
from resa_lens.tuning import collapse
from resa_lens.tuning.log import LOG, Log, read_log
from resa_lens.tuning.loop import TuneConfig, fit, rate_share
from resa_lens.tuning.objective import preset
from resa_lens.tuning.state import TuningState
from resa_lens.tuning.train import tune

STEPS = 6
FAST = TuneConfig(rank=4, alpha=8, learning_rate=1e-2, accumulation=2)


def batches(count: int = STEPS * 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, 500, (1, 24), generator=generator) for _ in range(count)]


def tuned(model: Model, config: TuneConfig = FAST, **options: Any) -> tuple[Any, Any]:
    """Tune with a control that draws noise and with dropout: both must come back after a stop."""
    coder = Noise(new_coder(32, 64, 4, seed=0).requires_grad_(False), 0)
    data = options.pop("data", None) or batches()
    objective = preset(options.pop("objective", "paper"))
    # A model of random weights has nothing to lose: any rise of its loss is a collapse here.
    times, nats = (1.0, 0.0) if options.pop("touchy", False) else (collapse.TIMES, collapse.NATS)
    with patch.multiple(collapse, TIMES=times, NATS=nats):
        return tune(model, coder, Hookpoint(1), data, STEPS, objective, config, **options)


def adapters(peft: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in peft.named_parameters() if p.requires_grad}


def assert_equal(first: nn.Module, second: nn.Module) -> None:
    a, b = adapters(first), adapters(second)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


class StopError(Exception):
    """Stands for a kill, at a chosen update."""


def stop_after(count: int) -> Callable[[int], None]:
    done = [0]

    def advance(by: int) -> None:
        done[0] += by
        if done[0] == count:
            raise StopError

    return advance


# Resume


@pytest.mark.parametrize(("every", "at"), [(1, 4), (2, 3), (4, 5), (5, 1)])
def test_goes_on_to_the_same_bits(
    small: Callable[[], Model],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    every: int,
    at: int,
) -> None:
    monkeypatch.setattr(checkpoint, "SHARE", STEPS / every)
    monkeypatch.setattr(checkpoint, "COST", 0.0)
    monkeypatch.setattr(checkpoint, "UNNOTICED_S", 10**9)
    whole_peft, whole = tuned(small())
    with pytest.raises(StopError):
        tuned(small(), folder=tmp_path, advance=stop_after(at))
    peft, course = tuned(small(), folder=tmp_path)
    assert course.resumed_at == at // every * every
    assert (course.losses, course.grad_norms) == (whole.losses, whole.grad_norms)
    assert (course.steps, course.tokens) == (STEPS, STEPS * 2 * 24)
    assert_equal(peft, whole_peft)
    # Each update once, though some were made twice.
    lines = read_log(tmp_path / LOG)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines] == list(whole.losses)


def test_a_finished_run_is_found_finished(small: Callable[[], Model], tmp_path: Path) -> None:
    first_peft, first = tuned(small(), folder=tmp_path)

    def nothing() -> Iterator[torch.Tensor]:
        for _ in batches():
            yield torch.zeros(0)

    peft, again = tuned(small(), folder=tmp_path, data=nothing())
    assert again.resumed_at == STEPS
    assert (again.losses, again.seconds) == (first.losses, first.seconds)
    assert_equal(peft, first_peft)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]


KILLED = """
import sys, time
from pathlib import Path
from tests_tuning_loop import tuned
from resa_lens.models.host import load_model
from resa_lens.saes import checkpoint
checkpoint.COST, checkpoint.SHARE, checkpoint.UNNOTICED_S = 0.0, 6, 10**9
peft, course = tuned(load_model(sys.argv[1]), folder=Path(sys.argv[2]),
                     advance=lambda done: (print("at", flush=True), time.sleep(0.1)))
print("end", course.resumed_at, flush=True)
"""


def run_killed(small_folder: Path, folder: Path, after: int, late: float) -> bool:
    """Start a run and kill it so many updates and seconds in; return whether it was killed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tests_tuning_loop.py").write_text(Path(__file__).read_text())
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(small_folder), str(folder / "run")],
        stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)},
    )  # fmt: skip
    assert process.stdout is not None
    for _ in range(after + 1):
        assert process.stdout.readline() == "at\n"
    time.sleep(late)
    os.kill(process.pid, signal.SIGKILL)
    out, _ = process.communicate()
    assert "end" not in out
    return process.returncode == -signal.SIGKILL


def test_a_killed_process_goes_on_to_the_same_bits(
    small: Callable[[], Model], small_folder: Path, tmp_path: Path
) -> None:
    assert run_killed(small_folder, tmp_path, after=3, late=0.0)
    expected_peft, expected = tuned(small())
    peft, course = tuned(small(), folder=tmp_path / "run")
    assert course.resumed_at >= 2
    assert course.losses == expected.losses
    assert_equal(peft, expected_peft)


@pytest.mark.parametrize(
    "seed",
    [pytest.param(0, marks=pytest.mark.slow)]
    + [pytest.param(seed, marks=pytest.mark.recorded) for seed in range(1, 5)],
)
def test_killed_at_any_moment(
    small: Callable[[], Model], small_folder: Path, tmp_path: Path, seed: int
) -> None:
    """Twice, at random moments: before an update, in it, while the state is written."""
    draw = random.Random(seed)
    assert run_killed(small_folder, tmp_path, draw.randrange(4), draw.uniform(0, 0.25))
    run_killed(small_folder, tmp_path, draw.randrange(2), draw.uniform(0, 0.25))
    expected_peft, expected = tuned(small())
    peft, course = tuned(small(), folder=tmp_path / "run")
    assert course.losses == expected.losses
    assert_equal(peft, expected_peft)
    lines = read_log(tmp_path / "run" / LOG)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda: {"config": replace(FAST, learning_rate=2e-2)}, r"learning_rate 0.01.*0.02"),
        (lambda: {"identity": {"data": "b"}}, "data a.*has b"),
        (lambda: {"config": replace(FAST, accumulation=4)}, "accumulation 2.*4"),
    ],
)
def test_a_state_of_another_run_is_refused(
    small: Callable[[], Model],
    tmp_path: Path,
    change: Callable[[], dict[str, Any]],
    named: str,
) -> None:
    tuned(small(), folder=tmp_path, identity={"data": "a"})
    with pytest.raises(BadInputError, match=rf"(?s){named}.*--force"):
        tuned(small(), **{"folder": tmp_path, "identity": {"data": "a"}, **change()})


def test_a_state_of_another_dtype_is_refused(
    small: Callable[[], Model], small_folder: Path, tmp_path: Path
) -> None:
    tuned(small(), folder=tmp_path)
    with pytest.raises(BadInputError, match=r"dtype torch.float32.*torch.bfloat16"):
        tuned(load_model(str(small_folder), dtype="bfloat16"), folder=tmp_path)


@pytest.mark.parametrize(
    ("key", "value"), [("kernel_path", "cpu AVX2, other"), ("torch", "2.9.0"), ("processes", 2)]
)
def test_a_state_of_another_machine_is_refused(
    small: Callable[[], Model], tmp_path: Path, key: str, value: Any
) -> None:
    tuned(small(), folder=tmp_path)
    file = tmp_path / f"checkpoint-{STEPS}" / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(BadInputError, match=rf"(?s){value}.*--force"):
        tuned(small(), folder=tmp_path)


def test_threads_come_back_from_the_state(small: Callable[[], Model], tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        tuned(small(), folder=tmp_path)
        torch.set_num_threads(before + 1)
        tuned(small(), folder=tmp_path)
        assert torch.get_num_threads() == before
    finally:
        torch.set_num_threads(before)


def test_a_damaged_state_is_named_and_a_half_written_one_not_read(
    small: Callable[[], Model], tmp_path: Path
) -> None:
    tuned(small(), folder=tmp_path)
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / ".filling-checkpoint-10").mkdir()
    tuned(small(), folder=tmp_path)
    file = tmp_path / f"checkpoint-{STEPS}" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(BadInputError, match=r"cannot be read.*--force"):
        tuned(small(), folder=tmp_path)


def test_a_folder_in_use_is_refused(small: Callable[[], Model], tmp_path: Path) -> None:
    from resa_lens.files import run_lock

    with run_lock(tmp_path), pytest.raises(BadInputError, match="is tuning at layer 1 into"):
        tuned(small(), folder=tmp_path)


def test_a_twelfth_of_the_run_is_lost_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    monkeypatch.setattr(checkpoint, "COST", 0.0)
    monkeypatch.setattr(checkpoint, "UNNOTICED_S", 10**9)
    monkeypatch.setattr(
        TuningState,
        "write",
        lambda self, step, *_: (written.append(step), setattr(self, "last_step", step)),
    )
    store: Any = TuningState(tmp_path, {})
    for step in range(1, 1001):
        store.keep(step, 1000, {}, None, None)
    assert max(b - a for a, b in zip([0, *written], [*written, 1000], strict=True)) <= 84
    other: Any = TuningState(tmp_path, {}, world=World(1, 2))
    written.clear()
    other.keep(999, 1000, {}, None, None)
    other.finish(1000, {}, None, None)
    assert written == []


# Adapters on the way


def test_adapters_on_the_way_are_plain_peft(
    small: Callable[[], Model], small_folder: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    config = replace(FAST, checkpoint_every=2)
    peft, _ = tuned(small(), config, folder=tmp_path)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-2", "step-4", "step-6"]
    outputs = []
    for step in (2, 4, 6):
        plain: Any = AutoModelForCausalLM.from_pretrained(small_folder, dtype=torch.float32)
        loaded = PeftModel.from_pretrained(plain, tmp_path / f"step-{step}").eval()
        with torch.no_grad():
            outputs.append(loaded(ids).logits)
    with torch.no_grad():
        torch.testing.assert_close(outputs[-1], peft(ids).logits, atol=1e-5, rtol=0)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-2
    # The one in the middle is where a run of so many updates of this schedule stands.
    with pytest.raises(StopError):
        tuned(small(), config, folder=tmp_path / "b", advance=stop_after(4))
    for file in ("step-4/adapter_model.safetensors", "step-2/adapter_model.safetensors"):
        a, b = load_file(tmp_path / file), load_file(tmp_path / "b" / file)
        assert all(torch.equal(a[key], b[key]) for key in a)


# Updates


def line(weights: torch.Tensor) -> nn.Module:
    module = nn.Linear(3, 1, bias=False)
    module.weight.data.copy_(weights)
    return module


def squares(model: nn.Module) -> Any:
    return lambda x: ((model(x) ** 2).mean(), {"tokens": len(x), "size": x.abs().mean()})


def test_an_update_is_the_mean_over_its_batches() -> None:
    start, x = torch.ones(1, 3), torch.randn(8, 3)
    config = TuneConfig(learning_rate=0.1, accumulation=4)
    parts = line(start)
    course = fit(parts, x.split(2), 1, squares(parts), config, schedule="constant")
    whole = line(start)
    other = fit(whole, [x], 1, squares(whole), replace(config, accumulation=1))
    torch.testing.assert_close(parts.weight, whole.weight)
    assert course.losses[0] == pytest.approx(other.losses[0])
    assert course.grad_norms[0] == pytest.approx(other.grad_norms[0])
    assert (course.tokens, other.tokens) == (8, 8)


def test_adamw_clipping_and_schedule_are_those_written_out() -> None:
    start = torch.tensor([[1.0, -2.0, 3.0]])
    x = [torch.randn(4, 3, generator=torch.Generator().manual_seed(n)) for n in range(5)]
    ours = line(start)
    config = TuneConfig(learning_rate=0.1)
    fit(ours, x, 5, squares(ours), config, schedule="cosine", clip_norm=0.5)
    plain = line(start)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1)
    for step, batch in enumerate(x):
        optimizer.param_groups[0]["lr"] = 0.1 * rate_share(step, 5, "cosine", config)
        optimizer.zero_grad()
        (plain(batch) ** 2).mean().backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
    assert torch.equal(ours.weight, plain.weight)


def test_what_a_batch_draws_follows_from_seed_and_number() -> None:
    seen: list[tuple[float, float, float]] = []
    model = line(torch.ones(1, 3))

    def loss_of(x: torch.Tensor) -> Any:
        seen.append((torch.rand(()).item(), float(np.random.rand()), random.random()))
        return squares(model)(x)

    random.seed(1)
    states = random.getstate(), torch.random.get_rng_state()
    data = [torch.ones(1, 3)] * 4
    fit(model, data, 2, loss_of, TuneConfig(accumulation=2))
    assert random.getstate() == states[0]
    assert torch.equal(torch.random.get_rng_state(), states[1])
    first = seen.copy()
    assert len({draw for triple in first for draw in triple}) == 12
    fit(model, data, 4, loss_of, TuneConfig())
    assert seen[4:] == first
    fit(model, data, 4, loss_of, TuneConfig(seed=1))
    assert set(seen[8:]).isdisjoint(first)


def test_too_few_batches() -> None:
    model = line(torch.ones(1, 3))
    data = [torch.ones(1, 3)] * 3
    with pytest.raises(BadInputError, match="gave 3 batches, an update takes 4"):
        fit(model, data, 2, squares(model), TuneConfig(accumulation=4))
    # A rest that is smaller than an update is not used.
    assert fit(model, data, 2, squares(model), TuneConfig(accumulation=2)).steps == 1


def test_more_processes_than_divide() -> None:
    model = line(torch.ones(1, 3))
    with pytest.raises(BadInputError, match=r"accumulation of 3.*2 processes; use 4"):
        fit(model, [], 1, squares(model), TuneConfig(accumulation=3), world=World(0, 2))


@pytest.mark.parametrize("name", ["rank", "batch", "accumulation", "checkpoint_every"])
def test_impossible_values(name: str) -> None:
    with pytest.raises(BadInputError, match=f"{name} 0"):
        TuneConfig(**{name: 0})


def test_a_run_that_diverges_keeps_its_log(tmp_path: Path) -> None:
    model = line(torch.ones(1, 3))
    data = [torch.ones(1, 3), torch.full((1, 3), float("nan"))]
    with pytest.raises(RunFailedError, match=r"SFT: the loss is nan at step 1.*1e-06"):
        fit(model, data, 2, squares(model), TuneConfig(), doing="SFT", folder=tmp_path)
    assert [line["step"] for line in read_log(tmp_path / LOG)] == [1]


# Log


def test_the_log_s_lines(small: Callable[[], Model], tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    _, course = tuned(small(), folder=tmp_path, trackers=[seen.append])
    lines = read_log(tmp_path / LOG)
    assert lines == seen
    assert len(lines) == STEPS
    for number, found in enumerate(lines):
        assert set(found) == {
            "step", "loss", "tokens", "kl_per_token", "fvu", "grad_norm", "learning_rate",
            "tokens_per_second", "peak_memory_mb",
        }  # fmt: skip
        assert found["loss"] == course.losses[number]
        # The paper's loss is a mean over tokens already.
        assert found["kl_per_token"] == pytest.approx(found["loss"], rel=1e-6)
        assert found["grad_norm"] == course.grad_norms[number]
        assert found["tokens"] == 48
        assert found["fvu"] > 0
        assert found["peak_memory_mb"] > 50
        share = rate_share(number, STEPS, "cosine", FAST)
        assert found["learning_rate"] == pytest.approx(1e-2 * share)


def test_a_torn_line_and_later_ones_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / LOG
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    assert [found["step"] for found in read_log(file)] == [1, 2, 3]
    log = Log(file, after=2)
    log.write({"step": 3, "loss": 1.0})
    # Before it is closed.
    assert read_log(file) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.0}]
    log.close()


# Processes

PROCESSES = """
import json, sys
from pathlib import Path
from tests_tuning_loop import CASES, adapters, tuned
from safetensors.torch import save_file
from resa_lens.models.host import load_model
from resa_lens.tuning.loop import join_processes
world = join_processes("cpu")
for name, options in CASES.items():
    out = Path(sys.argv[2]) / name
    trackers = [lambda line: (out / f"tracked-{world.rank}").touch()]
    peft, course = tuned(
        load_model(sys.argv[1]), folder=out / "run", world=world, trackers=trackers, **options
    )
    save_file(adapters(peft), out / f"rank-{world.rank}.safetensors")
    figures = [world.size, course.losses, course.collapsed_at, course.kept_step]
    (out / f"rank-{world.rank}.json").write_text(json.dumps(figures))
"""
CASES: dict[str, dict[str, Any]] = {
    "paper": {},
    "distil": {"objective": "distil"},
    "collapse": {"config": replace(FAST, learning_rate=0.3), "touchy": True},
}
"""Options of tunings that several processes must do as one does."""


@pytest.mark.slow
def test_two_processes_make_the_updates_of_one(
    small: Callable[[], Model], small_folder: Path, tmp_path: Path
) -> None:
    """Dropout and noise too: what a batch draws does not depend on who has it."""
    (tmp_path / "tests_tuning_loop.py").write_text(Path(__file__).read_text())
    (tmp_path / "main.py").write_text(PROCESSES)
    for name in CASES:
        (tmp_path / name).mkdir()
    done = subprocess.run(
        [
            # What `accelerate launch` starts too, which on a CPU wants MPI for it.
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
            "--master-port", "0", "--standalone",
            str(tmp_path / "main.py"), str(small_folder), str(tmp_path),
        ],
        capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for case, options in CASES.items():
        folder = tmp_path / case
        alone_peft, alone = tuned(small(), **options)
        assert (alone.collapsed_at > 0) == (case == "collapse")
        for rank in (0, 1):
            size, losses, *ends = json.loads((folder / f"rank-{rank}.json").read_text())
            assert size == 2
            assert ends == [alone.collapsed_at, alone.kept_step]
            assert losses == pytest.approx(alone.losses, rel=1e-4)
            held = load_file(folder / f"rank-{rank}.safetensors")
            for name, value in adapters(alone_peft).items():
                torch.testing.assert_close(held[name], value, atol=1e-4, rtol=1e-3)
        # Both hold the same bits, and one wrote.
        first, second = (load_file(folder / f"rank-{r}.safetensors") for r in (0, 1))
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert (folder / "tracked-0").exists()
        assert not (folder / "tracked-1").exists()
        assert len(read_log(folder / "run" / LOG)) == alone.steps
