"""Record what every command makes and prints at a tiny shape, and compare two such recordings.

    python benchmarks/guard.py record OUT [--python PY] [--checkout DIR] [--only LABEL,LABEL]
    python benchmarks/guard.py compare A B [--tolerance 1e-9]

The commands run one after the other in one fresh workspace, each in a process of its own with one
thread: about six minutes.  OUT/record.json holds all of it as it came; what two runs of the same
code do not share is taken out by `normalised` when two recordings are compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODEL = ["--model", "tiny-reasoner", "--threads", "1"]
SHAPE = ["--tokens", "8192", "--latents", "512", *MODEL]
SAES = ["--layers", "3-5", *SHAPE]
SCORED = ["--limit", "8", "--max-new-tokens", "48"]
STEPS = ["--steps", "2", "--learning-rate", "1e-3", *SCORED]
TUNE = ["--layer", "4", *SHAPE, *STEPS]
TEXT = ["--text-tokens", "3000"]
CONTROLS = ["--controls", "noise,cot", "--control-layers", "4", "--no-effects"]
CHECKPOINTS = "{data}/paper/tables36_61_layer_checkpoints.csv"
MIXTURE = ["fit-mixture", "{data}/paper/table6_hookpoints.csv", "--draws", "20", "--column"]
COMMANDS: dict[str, list[str]] = {
    "saes": ["train-saes", *SAES, "--seeds", "2"],
    "counts": ["count-features", *SAES],
    "layers": ["recommend-layers", *SAES],
    "layers-causal": ["recommend-layers", "--layers", "4", *SHAPE, "--rule", "either",
                      "--selector", "causal"],
    "falsify": ["falsify", *SAES, "--texts", "6", "--shuffles", "4"],
    "stability": ["stability", *SAES],
    "activity": ["activity", *SAES, *TEXT, "--examples", "2"],
    "activity-answers": ["activity", *SAES, "--generations", "2", "--max-new-tokens", "32"],
    "scores": ["score-features", *SAES, *TEXT, "--draws", "50"],
    "matches": ["match-features", "seed:0", "seed:1", "--layers", "3-5", *MODEL, *TEXT],
    "ablate": ["ablate", "--layer", "4", *SHAPE, *SCORED, "--rule", "either",
               "--doses", "1", "--control-sets", "2"],
    "attribute": ["attribute", "--layer", "4", "--rule", "either", *SHAPE, *TEXT, "--top", "5"],
    "tune": ["tune", *TUNE],
    "tune-noise": ["tune", *TUNE, "--control", "noise"],
    "tune-cot": ["tune", *TUNE, "--control", "cot"],
    "eval-base": ["eval", *MODEL, *SCORED],
    "eval-adapter": ["eval", *MODEL, "--adapter", "{adapter tune 1}", "--scale", "9", *SCORED],
    "compare": ["compare", "{eval tune 1}", "{eval eval-adapter 1}"],
    "compare-many": ["compare", "{eval tune 1}", "{eval tune 2}", "{eval tune-noise 1}"],
    "sweep": ["sweep", "--layers", "4,5", "--seeds", "1", *SHAPE, *STEPS, *CONTROLS],
    "fit-mixture": [*MIXTURE, "feature_count"],
    "fit-paper": [*MIXTURE, "feature_count", "--recipe", "paper", "--restarts", "5"],
    "regret": ["regret", MIXTURE[1], "--column", "average", "--counts-column", "feature_count",
               "--checkpoints", CHECKPOINTS, "--draws", "20"],
    "audit": ["audit", CHECKPOINTS, "--group-column", "layer_1_indexed", "--draws", "200"],
    "convert": ["convert", "{saes saes 1}", "{place}/converted", "--to", "saelens"],
    "convert-back": ["convert", "{place}/converted", "{place}/back", "--to", "sparsify"],
    "merge": ["merge", "{place}/whole", "--model", "tiny-reasoner", "--adapter",
              "{adapter tune 1}"],
    "demo": ["demo", "--budget", "test", "--threads", "1"],
    "cost": ["cost", "--usd-per-hour", "0.5"],
    "cost-adapter": ["cost", "--adapter", "{adapter tune 1}"],
    "runs": ["runs"],
    "doctor": ["doctor", "--model", "tiny-reasoner"],
    "wrong-usage": ["eval", "--limit", "0"],
    "wrong-layer": ["tune", *TUNE, "--layer", "40"],
    "wrong-model": ["count-features", "--model", "/nowhere"],
    "wrong-run": ["compare", "nothing", "{eval tune 1}"],
    "wrong-table": [*MIXTURE, "height"],
}  # fmt: skip
"""By label, in an order in which each finds what it needs; `{kind label n}` is an artifact."""
AGAIN = {"saes", "counts", "layers", "falsify", "stability", "activity", "scores",
         "matches", "ablate", "attribute", "tune", "sweep", "demo"}  # fmt: skip
"""Run a second time at once: the same command finds what it made."""
PLACELESS = {"fit-mixture", "regret", "audit", "convert", "merge"}
"""Commands without a workspace."""
VOLATILE = re.compile(
    r".*seconds|.*_mb|.*_per_second|megabytes|created|versions|commit|platform|cost|usd|watt_hours"
)
"""Keys that are dropped wherever they stand."""


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser()
    parts = parser.add_subparsers(dest="do", required=True)
    recording = parts.add_parser("record", help="run every command and keep what came of it")
    recording.add_argument("out", type=Path)
    recording.add_argument("--python", default=sys.executable)
    recording.add_argument("--checkout", type=Path, default=Path(__file__).resolve().parents[1])
    recording.add_argument("--only", help="labels by commas, with those of what they need")
    comparing = parts.add_parser("compare", help="print what differs; exit code 1 if anything does")
    comparing.add_argument("a", type=Path)
    comparing.add_argument("b", type=Path)
    comparing.add_argument("--tolerance", type=float, default=0.0, help="relative, of floats")
    options = parser.parse_args()
    if options.do == "record":
        labels = options.only.split(",") if options.only else list(COMMANDS)
        record(options.out, options.python, options.checkout.resolve(), labels)
        return
    lines = list(differences(load(options.a), load(options.b), options.tolerance))
    print("\n".join(lines) or "no differences")
    sys.exit(1 if lines else 0)


def record(out: Path, python: str, checkout: Path, labels: list[str]) -> None:
    """Run the commands of a checkout and write OUT/record.json."""
    out.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="guard-"))
    names = {"data": str(checkout / "data"), "place": str(place)}
    keys: dict[str, str] = {}
    commands: dict[str, dict[str, Any]] = {}
    jobs = [(label, label) for label in COMMANDS if label in labels]
    jobs += [(label, f"{label} again") for label in labels if label in AGAIN]
    for source, label in sorted(jobs, key=lambda job: list(COMMANDS).index(job[0])):
        argv = [
            re.sub(r"\{(.+?)\}", lambda m: names.get(m[1], m[0]), word) for word in COMMANDS[source]
        ]
        argv += ["--json", *([] if argv[0] in PLACELESS else ["--workspace", f"{place}/workspace"])]
        commands[label] = run(python, argv, place, checkout)
        print(f"{label:18} exit {commands[label]['exit']} ", end="")
        print(f"{commands[label]['cpu_seconds']:6.2f} s of CPU", flush=True)
        manifests = [f for f in place.rglob("manifest.json") if str(f.parent) not in keys]
        for file in sorted(manifests, key=lambda f: f.stat().st_mtime_ns):
            kind = json.loads(file.read_text()).get("kind", "unknown")
            n = 1 + sum(key.startswith(f"{kind} {label} ") for key in names)
            keys[str(file.parent)] = f"{kind} {label} {n}"
            names[f"{kind} {label} {n}"] = str(file.parent)
    artifacts: dict[str, dict[str, Any]] = {}
    for file in sorted(f for f in place.rglob("*") if f.is_file()):
        owner = next((p for p in file.parents if str(p) in keys), place)
        key = keys.get(str(owner), "loose")
        artifacts.setdefault(key, {})[str(file.relative_to(owner))] = payload(file)
    whole = {"place": str(place), "checkout": str(checkout), "keys": keys}
    whole |= {"commands": commands, "artifacts": artifacts}
    (out / "record.json").write_text(json.dumps(whole, indent=1))
    shutil.rmtree(place)
    print(f"{sum(c['cpu_seconds'] for c in commands.values()):.0f} s of CPU in all")


def run(python: str, argv: list[str], place: Path, checkout: Path) -> dict[str, Any]:
    """Run a command; its arguments, exit code, object, last lines of stderr and CPU time."""
    environment = {
        **os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200", "NO_COLOR": "1",
    }  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [python, "-m", "resa_lens", *argv],
        cwd=place, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    try:
        printed = json.loads(done.stdout)
    except json.JSONDecodeError:
        printed = done.stdout
    return {
        "argv": argv, "exit": done.returncode, "json": printed, "cpu_seconds": round(cpu, 2),
        "stderr": done.stderr.splitlines()[-20:],
    }  # fmt: skip


def payload(file: Path) -> Any:
    """Return what a file says: JSON whole, tables and weights by column and tensor, texts."""
    if file.suffix in (".json", ".jsonl"):
        lines = file.read_text().splitlines()
        return json.loads("\n".join(lines)) if file.suffix == ".json" else [*map(json.loads, lines)]
    if file.suffix == ".parquet":
        import pyarrow.parquet as pq

        table = pq.read_table(file)
        return {field.name: column(field, table[field.name]) for field in table.schema}
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return {name: weights(tensor) for name, tensor in load_file(file).items()}
    if file.suffix in (".md", ".csv", ".html"):
        # Without the drawing library that a page carries.
        parts = re.split(r"(?<=</script>)|(?=<script)", file.read_text())
        return "".join(part for part in parts if len(part) < 10**6).splitlines()
    return digest(file.read_bytes())


def weights(tensor: Any) -> dict[str, Any]:
    """Return a tensor's shape, type and digest, and the sums for a tolerance."""
    import torch

    raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return {
        "shape": list(tensor.shape), "dtype": str(tensor.dtype), "digest": digest(raw),
        "sum": tensor.double().sum().item(), "absolute": tensor.double().abs().sum().item(),
    }  # fmt: skip


def digest(content: bytes) -> str:
    """Return a hash of ours, in capitals: `normalised` leaves it as it is."""
    return hashlib.sha256(content).hexdigest().upper()


def column(field: Any, values: Any) -> dict[str, Any]:
    """Return a column's type, rows and digest, and the sum of floats for a tolerance."""
    rows = values.to_pylist()
    whole = digest(json.dumps(rows, default=str).encode())
    about = {"type": str(field.type), "rows": len(rows), "digest": whole}
    floats = [value for value in rows if isinstance(value, float) and value == value]
    return about | ({"sum": sum(floats)} if floats else {})


def load(folder: Path) -> dict[str, Any]:
    """Return a recording's commands and artifacts, normalised."""
    raw = json.loads((folder / "record.json").read_text())
    known = {raw["place"]: "<place>", raw["checkout"]: "<checkout>"}
    for path, key in raw["keys"].items():
        known[path] = f"<{key}>"
        if (below := path.removeprefix(f"{raw['place']}/workspace/")) != path:
            known[below] = known[Path(path).name] = f"<{key}>"
    # The longest first, so that a name inside a path is not taken for itself.
    pattern = re.compile("|".join(map(re.escape, sorted(known, key=len, reverse=True))))
    commands = {
        label: {
            "argv": done["argv"], "exit": done["exit"], "json": done["json"],
            "errors": done["stderr"] if done["exit"] else [],
            "done before": [line for line in done["stderr"] if "done before" in line],
        }
        for label, done in raw["commands"].items()
    }  # fmt: skip
    return normalised({"commands": commands, "artifacts": raw["artifacts"]}, pattern, known)


def normalised(value: Any, pattern: re.Pattern[str], known: dict[str, str]) -> Any:
    """Return a value without what two runs of the same code do not share.

    Keys that `VOLATILE` matches are dropped.  In texts, the places and names of artifacts become
    kind, command and number, other places the name of their root, hashes, times and amounts of
    seconds and memory become marks.  `target_modules` is sorted: PEFT writes a set, whose order is
    another one in each process.  All else stays, floats with all their digits.
    """
    if isinstance(value, dict):
        return {
            normalised(key, pattern, known): normalised(
                sorted(inner) if key == "target_modules" and isinstance(inner, list) else inner,
                pattern, known,
            )
            for key, inner in value.items()
            if not VOLATILE.fullmatch(key)
        }  # fmt: skip
    if isinstance(value, list):
        return [normalised(inner, pattern, known) for inner in value]
    if not isinstance(value, str):
        return value
    text = pattern.sub(lambda match: known[match[0]], value)
    text = re.sub(r"\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(\+\d\d:\d\d)?", "<time>", text)
    text = re.sub(r"\b[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}\b", "<uuid>", text)
    text = re.sub(r"(?<![^\W_])(?=\d*[a-f])(?=[a-f]*\d)[0-9a-f]{8,64}\b", "<hash>", text)
    return re.sub(r"\b\d[\d.,]* (s|MB|GB)\b", r"<\1>", text)


def differences(a: Any, b: Any, tolerance: float, path: str = "") -> Iterator[str]:
    """Yield a line for each place where two normalised values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a | b:
            # With a tolerance the sums decide of what has them.
            if tolerance and key == "digest" and "sum" in a and "sum" in b:
                continue
            here = f"{path} / {key}" if path else key
            if key not in a or key not in b:
                yield f"{here}: only in {'the first' if key in a else 'the second'}"
            else:
                yield from differences(a[key], b[key], tolerance, here)
    elif isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            yield f"{path}: {len(a)} entries, {len(b)} entries"
        for n, (left, right) in enumerate(zip(a, b, strict=False)):
            yield from differences(left, right, tolerance, f"{path} [{n}]")
    elif type(a) is not type(b) or not _same(a, b, tolerance):
        left, right = str(a), str(b)
        pairs = enumerate(zip(left, right, strict=False))
        start = max(0, next((n for n, (x, y) in pairs if x != y), 0) - 40)
        yield f"{path}: {left[start : start + 160]!r}, {right[start : start + 160]!r}"


def _same(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (a != a and b != b) or abs(a - b) <= tolerance * max(abs(a), abs(b))
    return a == b


if __name__ == "__main__":
    main()
