"""Kill training runs at random moments and hold them to the bits of an uninterrupted one.

    python benchmarks/kill_resume.py --runs 20

Each run is started as a user would, killed by SIGKILL after a random time, started again, and so on
up to three times; then it may end, and every weight is compared with the uninterrupted run's.
Prints a row a run and exits with 1 on the first difference.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import typer

CLI = [sys.executable, "-m", "resa_lens", "train-saes", "--json"]


def weights(folder: str) -> dict[str, bytes]:
    """Return the bytes of every weight file of a run."""
    return {p.parent.name: p.read_bytes() for p in Path(folder).glob("*/sae.safetensors")}


def main(
    runs: int = 20,
    seed: int = 0,
    layers: str = "3,6",
    tokens: int = 61_440,
    latents: int = 1024,
    optimizer: str = "signum",
    device: str = "cpu",
) -> None:
    """Run it and print the table."""
    options = ["--layers", layers, "--tokens", str(tokens), "--latents", str(latents)]
    options += ["--optimizer", optimizer, "--threads", "1", "--device", device]
    options += ["--deterministic"] if device.startswith("cuda") else []
    rng = random.Random(seed)
    print(f"{date.today()}, {' '.join(options)}")
    with tempfile.TemporaryDirectory() as root:
        began = time.monotonic()
        command = [*CLI, *options, "--workspace", f"{root}/whole"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        whole = time.monotonic() - began
        expected = weights(json.loads(done.stdout)["folder"])
        # The training itself ends after the start of the process and before its end.
        trained = json.loads(done.stdout)["seconds"]
        print(f"uninterrupted: {whole:.1f} s as a process, {trained:.1f} s of training")
        for number in range(runs):
            place = Path(root) / str(number)
            command = [*CLI, *options, "--workspace", str(place)]
            kills: list[float] = []
            out = None
            while out is None:
                process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
                )
                # From its first file on the run is under way.
                while process.poll() is None and not list(place.rglob("groups.json")):
                    time.sleep(0.01)
                patience = rng.uniform(0.05, 0.9 * trained) if len(kills) < 3 else None
                try:
                    out, _ = process.communicate(timeout=patience)
                    if not kills:
                        # Faster than the first run: too late to kill it, so it does not count.
                        shutil.rmtree(place)
                        trained, out = trained / 2, None
                except subprocess.TimeoutExpired:
                    os.kill(process.pid, signal.SIGKILL)
                    process.communicate()
                    kills.append(patience or 0.0)
            result = json.loads(out)
            same = weights(result["folder"]) == expected
            when = ", ".join(f"{k:.1f}" for k in kills)
            print(
                f"{number + 1:3}: killed {when} s into training; resumed at "
                f"{result['resumed_at_tokens']} of {result['tokens']} tokens; "
                f"{'bit-identical' if same else 'DIFFERENT'}",
                flush=True,
            )
            if not same:
                raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
