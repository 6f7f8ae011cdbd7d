"""A tuning without an anchor that destroys the model ends, and leaves the last good adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import load_model
from resa_lens.texts import corpora
from resa_lens.texts.corpora import CorpusConfig
from resa_lens.tuning.collapse import CollapseWatch
from resa_lens.tuning.objective import preset
from resa_lens.tuning.train import TuneConfig, tune

POINT, STEPS = Hookpoint(8, "mlp_out"), 20
HARSH = TuneConfig(rank=4, alpha=64, dropout=0.0, learning_rate=0.1, batch=2)


class Shift:
    """In place of an SAE: another direction for every token, so that the two sides differ."""

    def __call__(self, x: Tensor) -> Tensor:
        return x + 3 * x.roll(1, dims=-1)


def run(
    folder: Path | None = None,
    *,
    name: str = "paper",
    config: TuneConfig = HARSH,
    advance: Callable[[int], None] = lambda done: None,
) -> tuple[Any, Any, list[str]]:
    model = load_model("tiny-reasoner")
    corpus = CorpusConfig(sequence=96, thought_share=1.0)
    rows = corpora.load_records("tiny")[:200]
    batches = corpora.batches(model.tokenizer, rows, corpus, tokens=STEPS * 2 * 96, batch=2)
    said: list[str] = []
    peft, course = tune(
        model, Shift(), POINT, batches, STEPS, preset(name), config, folder=folder,
        advance=advance, note=said.append,
    )  # fmt: skip
    return peft, course, said


def adapters(peft: Any) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in peft.named_parameters() if "lora_" in name}


def test_a_collapse_ends_the_run_and_keeps_what_was_good() -> None:
    peft, course, said = run()
    assert 0 < course.collapsed_at < STEPS
    assert course.collapsed_at == course.steps
    assert course.kept_step < course.collapsed_at
    assert any("collapsed at step" in line and "learning rate" in line for line in said)
    # Fresh adapters do nothing; later ones are those after `kept_step` updates.
    if course.kept_step == 0:
        assert not any(w.any() for name, w in adapters(peft).items() if "lora_B" in name)


def test_a_gentle_run_is_left_alone() -> None:
    gentle = TuneConfig(**{**vars(HARSH), "learning_rate": 1e-4})
    _, course, said = run(config=gentle)
    assert (course.collapsed_at, course.kept_step, course.steps) == (0, STEPS, STEPS)
    assert not any("collapsed" in line for line in said)


@pytest.mark.parametrize("name", ["reference", "distil"])
def test_an_anchored_objective_is_not_watched(name: str) -> None:
    objective_site = preset(name).site
    if objective_site != POINT.site:
        pytest.skip("of a block's output")
    _, course, _ = run(name=name)
    assert course.collapsed_at == 0


def test_a_killed_run_collapses_at_the_same_step(tmp_path: Path) -> None:
    class KilledError(Exception):
        pass

    finished = 0

    def kill(count: int) -> None:
        nonlocal finished
        finished += count
        if finished == course.collapsed_at - 1:
            raise KilledError

    slow = TuneConfig(**{**vars(HARSH), "learning_rate": 0.005})
    straight, course, _ = run(config=slow)
    assert course.collapsed_at > 2
    (tmp_path / "work").mkdir()
    with pytest.raises(KilledError):
        run(tmp_path / "work", config=slow, advance=kill)
    resumed, again, _ = run(tmp_path / "work", config=slow)
    assert (again.collapsed_at, again.kept_step) == (course.collapsed_at, course.kept_step)
    assert again.losses == course.losses
    for name, weight in adapters(resumed).items():
        assert torch.equal(weight, adapters(straight)[name]), name
    finished_before, third, _ = run(tmp_path / "work", config=slow)
    assert third.collapsed_at == course.collapsed_at
    for name, weight in adapters(finished_before).items():
        assert torch.equal(weight, adapters(straight)[name]), name


def test_the_watch_puts_back_what_it_remembers() -> None:
    weights = {"a": torch.ones(3)}
    losses = iter([1.0, 5.0])
    watch = CollapseWatch(lambda: next(losses), base=1.0)
    watch.remember(0, weights)
    weights["a"].fill_(2.0)
    assert not watch.collapsed(4, weights)
    weights["a"].fill_(7.0)
    assert watch.collapsed(8, weights)
    assert weights["a"].tolist() == [2.0, 2.0, 2.0]
    assert (watch.step, watch.seen) == (4, 5.0)
    assert [step for step in range(1, 41) if watch.due(step, 40)] == list(range(4, 41, 4))
