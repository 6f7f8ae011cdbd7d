"""A run that was stopped anywhere goes on to the same bits; two processes do not share one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resa_lens.errors import BadInputError
from resa_lens.files import run_lock
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model
from resa_lens.saes import checkpoint
from resa_lens.saes.checkpoint import Checkpoints, newest, read_state, restore_threads
from resa_lens.saes.train import SaeConfig, TrainedSaes, train_saes
from resa_lens.texts import corpora
from resa_lens.texts.corpora import CorpusConfig, Record

STEPS = 12


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, 500, (2, 32), generator=generator) for _ in range(STEPS)]


class StopError(Exception):
    """Stands for a kill, at a chosen step."""


class Stopping(Checkpoints):
    """Writes after every `every` steps and stops after one of them."""

    every, at = 1, STEPS

    def keep(self, step: int, steps: int, trainers) -> None:
        if step % self.every == 0:
            self.write(step, trainers)
        if step == self.at:
            raise StopError


VARIANTS = {
    "signum": SaeConfig(latents=64, k=4),
    "adam": SaeConfig(latents=64, k=4, optimizer="adam", schedule="linear", warmup=3),
    "batchtopk": SaeConfig(latents=64, k=4, activation="batchtopk"),
    "feature-choice": SaeConfig(
        latents=64,
        k=4,
        activation="feature-choice",
        allocation="zipf",
        aux="zipf",
        auxk_alpha=0.1,
        dead_threshold=128,
    ),
    "auxk": SaeConfig(latents=64, k=4, auxk_alpha=0.1, dead_threshold=70, multi_topk=True),
}


def train(model: Model, config: SaeConfig, store: Checkpoints | None = None) -> TrainedSaes:
    return train_saes(
        model, [2, 5], batches(), [], config.for_width(model.d_model), steps=STEPS, store=store
    )


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("every", "at"), [(1, 7), (4, 7), (5, 11)])
def test_goes_on_to_the_same_bits(
    tiny: Model, tmp_path: Path, name: str, every: int, at: int
) -> None:
    whole = train(tiny, VARIANTS[name])
    stopping = Stopping(tmp_path)
    stopping.every, stopping.at = every, at
    with pytest.raises(StopError):
        train(tiny, VARIANTS[name], stopping)
    resumed = train(tiny, VARIANTS[name], Checkpoints(tmp_path))
    assert resumed.resumed_at_tokens == at // every * every * 64
    assert (whole.resumed_at_tokens, resumed.tokens) == (0, whole.tokens)
    assert resumed.losses == whole.losses
    assert resumed.quality[0].dead_share == whole.quality[0].dead_share
    for point, coder in whole.coders.items():
        other = resumed.coders[point]
        ours, theirs = (torch.as_tensor(getattr(c, "threshold", 0)) for c in (coder, other))
        assert torch.equal(ours, theirs)
        for key, value in coder.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), (point, key)


def simulated(
    seconds: float, write: float, steps: int, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> list[int]:
    """Return the steps at which a run of so many seconds writes, by a clock of its own."""
    clock, written = [0.0], []
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])

    def note(self: Checkpoints, step: int, _: object) -> None:
        written.append(step)
        clock[0] += write
        self.last_step, self.last_time, self.write_seconds = step, clock[0], write

    monkeypatch.setattr(Checkpoints, "write", note)
    store = Checkpoints(folder, last_time=0.0, write_seconds=write)
    for step in range(1, steps + 1):
        clock[0] += seconds / steps
        store.keep(step, steps, {})
    return written


@pytest.mark.parametrize("write", [0.01, 1.0, 84.0])
@pytest.mark.parametrize("hours", [0.01, 0.3, 24.0])
def test_checkpoints_take_a_twentieth_of_the_time_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: float, write: float
) -> None:
    """42 GB at 500 MB/s are 84 s: of 18 minutes eleven of them would be most."""
    seconds = hours * 3600
    written = simulated(seconds, write, 1000, monkeypatch, tmp_path)
    assert len(written) * write <= 0.05 * (seconds + len(written) * write)
    planned = checkpoint.planned_writes(seconds, write, 1000)
    assert planned == pytest.approx(len(written), abs=1)
    if 12 * write <= 0.05 * seconds:
        assert max(b - a for a, b in zip([0, *written], [*written, 1000], strict=True)) < 100


def test_a_short_write_is_made_however_short_the_run_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = simulated(0.2, 0.05, STEPS, monkeypatch, tmp_path)
    assert written == list(range(1, STEPS))


def test_a_corpus_goes_on_at_its_position(tiny: Model, tmp_path: Path) -> None:
    """To the same bits, and without tokenising again what was trained on."""
    records = [Record(f"What is {n} + 1?", str(n + 1)) for n in range(300)]
    config, seen = CorpusConfig(sequence=32), []

    class Watching(corpora.Batches):
        def go_on(self, done: int, position: corpora.Position) -> None:
            seen.append((done, position))
            super().go_on(done, position)

    def train_on(store: Checkpoints | None = None) -> TrainedSaes:
        data = Watching(tiny.tokenizer, records, config, tokens=STEPS * 64, batch=2)
        options = SaeConfig(latents=64, k=4).for_width(tiny.d_model)
        return train_saes(tiny, [2], data, [], options, steps=STEPS, store=store)

    whole = train_on()
    stopping = Stopping(tmp_path)
    stopping.every, stopping.at = 1, 7
    with pytest.raises(StopError):
        train_on(stopping)
    state = read_state(tmp_path)
    assert state is not None
    older = shutil.copytree(tmp_path, tmp_path.with_name("older"))
    seen.clear()
    resumed = train_on(Checkpoints(tmp_path))
    assert seen == [(0, corpora.BEGINNING), (7, corpora.Position(*state["position"]))]
    assert seen[1][1].document > 0
    # A checkpoint from before there were positions: the batches are counted.
    file = newest(older)
    assert file is not None
    del state["position"]
    (file / checkpoint.STATE).write_text(json.dumps(state))
    counted = train_on(Checkpoints(older))
    for other in (resumed, counted):
        assert 0 < other.resumed_at_tokens <= 7 * 64
        assert other.losses == whole.losses
        for point, coder in whole.coders.items():
            for key, value in coder.state_dict().items():
                assert torch.equal(value, other.coders[point].state_dict()[key]), key


def test_the_first_large_one_waits_for_what_a_trial_of_the_disk_says(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[float] = []
    monkeypatch.setattr(checkpoint, "TRIAL_MB", 0.0)
    monkeypatch.setattr(checkpoint, "write_seconds", lambda _, size: sizes.append(size) or 3600.0)
    train(tiny, VARIANTS["signum"], Checkpoints(tmp_path))
    # Two SAEs of 64 latents: weights, their state, and the tokens since each fired.
    assert sizes == [pytest.approx(2 * (4 * 64 * 128 * 4) / 2**20, rel=0.1)]
    assert not list(tmp_path.glob("checkpoint-*"))


def test_only_the_newest_is_kept_and_a_half_written_one_is_not_read(
    tiny: Model, tmp_path: Path
) -> None:
    stopping = Stopping(tmp_path)
    stopping.at = 3
    with pytest.raises(StopError):
        train(tiny, VARIANTS["signum"], stopping)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / ".filling-10").mkdir()
    held = newest(tmp_path)
    assert held is not None
    assert held.name == "checkpoint-3"


def test_a_damaged_checkpoint_is_named(tiny: Model, tmp_path: Path) -> None:
    stopping = Stopping(tmp_path)
    stopping.at = 3
    with pytest.raises(StopError):
        train(tiny, VARIANTS["signum"], stopping)
    file = tmp_path / "checkpoint-3" / f"{Hookpoint(5).sparsify}.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(BadInputError, match=r"layers\.5\.mlp.*--force"):
        train(tiny, VARIANTS["signum"], Checkpoints(tmp_path))


def state(folder: Path, **changes: object) -> None:
    file = folder / "checkpoint-4" / "state.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    held = {
        "step": 4,
        "layers": {},
        "threads": torch.get_num_threads(),
        "processes": 1,
        "kernel_path": checkpoint.kernel_path("cpu"),
        "torch": torch.__version__,
    }
    file.write_text(json.dumps({**held, **changes}))


def test_threads_come_back_from_the_checkpoint(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        assert restore_threads(tmp_path, "cpu", None) is None
        state(tmp_path, threads=2)
        assert restore_threads(tmp_path, "cpu", None) == 2
        assert torch.get_num_threads() == 2
        with pytest.raises(BadInputError, match=r"2 threads, --threads is 1"):
            restore_threads(tmp_path, "cpu", 1)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("key", "value"), [("kernel_path", "another CPU"), ("torch", "2.9.0")])
def test_other_kernels_or_torch_are_refused(tmp_path: Path, key: str, value: str) -> None:
    state(tmp_path, **{key: value})
    with pytest.raises(BadInputError, match=f"(?s){value}.*--force"):
        restore_threads(tmp_path, "cpu", None)


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    state(tmp_path, processes=2)
    with pytest.raises(BadInputError, match="2 processes"):
        Checkpoints(tmp_path).load({})
    found = read_state(tmp_path)
    assert found is not None
    assert found["step"] == 4


HOLD = """
import sys, time
from pathlib import Path
from resa_lens.files import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_refuses_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with (
            pytest.raises(BadInputError, match=f"process {process.pid} is training"),
            run_lock(tmp_path),
        ):
            pass
    finally:
        process.kill()
        process.communicate()
    with run_lock(tmp_path):
        pass
