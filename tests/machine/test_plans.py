"""A plan's words, sums and warnings; trials of time and disk."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from resa_lens.machine import plans
from resa_lens.machine.plans import (
    DAY,
    Part,
    Plan,
    Trial,
    duration,
    part_of,
    timed,
    write_seconds,
)  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0 s"), (0.35, "0.3 s"), (3, "3 s"), (48.6, "49 s"), (89, "89 s"),
        (90, "1.5 minutes"), (1200, "20 minutes"), (3600, "60 minutes"), (2 * 3600, "2 hours"),
        (35 * 3600, "35 hours"), (36 * 3600, "1.5 days"), (777_600, "9 days"),
        (40 * DAY, "40 days"),
    ],
)  # fmt: skip
def test_a_duration_is_said_in_the_unit_that_people_count_in(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def planned(*parts: Part, **changes: Any) -> Plan:
    values: dict[str, Any] = {
        "stage": "sweep", "model": "m", "device": "cpu", "parts": parts, "available_mb": 1000.0,
        "free_disk_mb": 500.0, "levers": ("fewer --seeds: each takes 3 days",),
    }  # fmt: skip
    return Plan(**{**values, **changes})


TUNING = part_of("tuning", 100, "updates", Trial(8 * DAY, 7 * DAY), 900.0, disk_mb=30.0)
ANSWERS = part_of("answers", 500, "answers", Trial(DAY, DAY), 950.0, at_most=True, disk_mb=3.0)


def test_totals_are_sums_and_the_largest_peak() -> None:
    plan = planned(TUNING, ANSWERS)
    assert (plan.seconds, plan.cpu_seconds) == (9 * DAY, 8 * DAY)
    assert (plan.peak_memory_mb, plan.disk_mb) == (950.0, 33.0)
    line = plan.describe()
    assert line.startswith("expected: at most 9 days, 950 MB of memory at the peak")
    values = plan.to_dict()
    assert values["seconds"] == 9 * DAY
    assert [part["name"] for part in values["parts"]] == ["tuning", "answers"]


def test_what_takes_more_than_a_day_says_what_would_make_it_shorter() -> None:
    assert planned(TUNING).shorter == ("fewer --seeds: each takes 3 days",)
    short = part_of("tuning", 1, "updates", Trial(DAY / 2), 900.0)
    assert planned(short).shorter == ()


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({}, ()),
        ({"available_mb": 800.0}, ("900 MB of memory are planned for, 800 MB are free",)),
        ({"work_disk_mb": 480.0}, ("510 MB of disk are needed, 500 MB are free",)),
    ],
)
def test_too_little_memory_or_disk_is_a_warning(
    changes: dict[str, Any], texts: tuple[str, ...]
) -> None:
    assert planned(TUNING, **changes).warnings == tuple(f"warning: {text}" for text in texts)


def test_a_trial_of_the_disk_leaves_nothing_and_grows_with_the_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(plans.os, "fsync", lambda file: sizes.append(os.fstat(file).st_size))
    absent = tmp_path / "not" / "yet"
    assert 0 < write_seconds(absent, 2.0) < write_seconds(absent, 2000.0)
    assert sizes == [2 * 2**20, 64 * 2**20]
    assert not list(tmp_path.iterdir())


def test_the_clock_is_read_when_the_gpu_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    with timed("cpu") as trial:
        sum(range(200_000))
    assert not waited
    assert trial[0].cpu_seconds > 0
    assert trial[0].seconds > 0

    def slow(device: str) -> None:
        waited.append(device)
        time.sleep(0.02)

    monkeypatch.setattr(torch.cuda, "synchronize", slow)
    with timed("cuda:0") as trial:
        pass
    assert waited == ["cuda:0", "cuda:0"]
    # What was queued before is not of the block; what it queued is.
    assert trial[0].seconds >= 0.02
