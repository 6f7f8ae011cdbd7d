"""Two processes on the CPU train what one trains: rows divided, and layers divided."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resa_lens.errors import BadInputError
from resa_lens.saes.world import ALONE, World

OPTIONS = ["--layers", "2,5", "--tokens", "12288", "--latents", "512", "--threads", "1", "--json"]
# At the automatic rate for so few latents the first steps overshoot (FVU above 20) and carry the
# last bits, in which the sums differ, up to 1e-3.
OPTIONS += ["--learning-rate", "0.001"]


def launch(workspace: Path, *options: str, processes: int = 2) -> dict:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--master-port", "0", "--standalone"] if processes > 1 else ["--standalone"]
    command += ["-m", "resa_lens", "train-saes", "--workspace", str(workspace), *options]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # The second process says nothing.
    return json.loads(done.stdout)


def losses(folder: str) -> dict[str, list[float]]:
    return json.loads((Path(folder) / "losses.json").read_text())


def train_alone(workspace: Path, *options: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "resa_lens", "train-saes", "--workspace", str(workspace), *options],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


ROWS = ["--activation", "batchtopk", "--auxk-alpha", "0.1", "--dead-threshold", "2048"]
CHOICE = [
    "--activation", "feature-choice", "--allocation", "zipf", "--aux", "zipf",
    "--auxk-alpha", "0.1", "--dead-threshold", "2048",
]  # fmt: skip


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param(ROWS, marks=pytest.mark.slow, id="rows"),
        pytest.param(CHOICE, marks=pytest.mark.recorded, id="feature-choice"),
        pytest.param(["--spread-layers"], marks=pytest.mark.slow, id="layers"),
    ],
)
def test_the_loss_curve_is_that_of_one_process(tmp_path: Path, extra: list[str]) -> None:
    options = [*OPTIONS, *extra]
    alone = train_alone(tmp_path / "alone", *options)
    both = launch(tmp_path / "both", *options)
    ours, theirs = losses(both["folder"]), losses(alone["folder"])
    assert list(ours) == list(theirs) == ["2", "5"]
    for layer, curve in theirs.items():
        assert len(curve) == 12
        torch.testing.assert_close(
            torch.tensor(ours[layer]), torch.tensor(curve), atol=1e-4, rtol=0
        )
    assert [row["layer"] for row in both["saes"]] == [2, 5]
    manifest = json.loads((Path(both["folder"]) / "manifest.json").read_text())
    assert manifest["results"]["processes"] == 2


def test_one_process_leaves_everything_as_it_is() -> None:
    x = torch.randn(3, 2)
    assert ALONE.sum_(x) is x
    assert ALONE.any_(x) is x
    assert ALONE.part(x) is x
    assert ALONE.to_owner(x, 0) is x
    assert (ALONE.agree("a"), ALONE.gather("a")) == ("a", ["a"])


def test_a_batch_that_does_not_divide() -> None:
    with pytest.raises(BadInputError, match="3 sequences does not divide among 2"):
        World(0, 2).part(torch.zeros(3, 4))
    parts = [World(r, 2).part(torch.arange(8).view(4, 2)) for r in (0, 1)]
    assert torch.equal(torch.cat(parts), torch.arange(8).view(4, 2))
