"""Grade the stored answers of finished runs anew, and say which figures change.

    python benchmarks/regrade.py [WORKSPACE ...] [--base]

Every samples table in the workspaces (by default data/workspace) that holds texts is graded by the
present rules; a row a table says how its accuracy changes.  Sweeps keep verdicts without texts:
with `--base` tiny-reasoner answers their 2,000 questions again (two minutes) and its new verdicts
are compared with the stored ones, question by question.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from resa_lens.evals.grading import grade
from resa_lens.texts.prompts import THINK_OPEN

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {"prompt", "generation", "gold", "correct"}


def opened(prompt: str) -> str:
    """Return the tags that a prompt opened for its answer."""
    place = prompt.rfind(THINK_OPEN)
    return prompt[place:] if place >= 0 else ""


def regraded(file: Path) -> dict[str, Any] | None:
    """Return how a table's verdicts change, None where it holds no texts."""
    if not set(pq.read_schema(file).names) >= TEXTS:
        return None
    rows = pq.read_table(file).to_pylist()
    up, down, differing = [], [], 0
    for row in rows:
        # The letter of an option is graded as one; no shipped run has any.
        verdict = grade(opened(row["prompt"]) + row["generation"], row["gold"])
        correct = verdict.correct and not row.get("timed_out", False)
        differing += verdict.differs
        if correct != row["correct"]:
            (up if correct else down).append(
                (row["id"], row["gold"], row["answer"], verdict.answer)
            )
    right = sum(row["correct"] for row in rows)
    return {"n": len(rows), "right": right, "up": up, "down": down, "differing": differing}


def base_verdicts(sweeps: list[Path]) -> None:
    """Let tiny-reasoner answer the sweeps' questions again and compare with what they kept."""
    import torch

    from resa_lens.evals.engines import HFEngine
    from resa_lens.evals.run import EvalConfig, evaluate
    from resa_lens.evals.tasks import load_tasks
    from resa_lens.models.host import load_model

    torch.set_num_threads(1)  # the model is narrow
    model = load_model("tiny-reasoner")
    items = load_tasks("tiny", levels=(1, 2, 3, 4))
    result = evaluate(HFEngine(model.model, model.tokenizer), items, EvalConfig())
    now = {row["id"]: row["correct"] for row in result.samples}
    print(
        f"\nbase of the sweeps anew: {100 * result.accuracy:.2f} % of {result.n}; {result.grading}"
    )
    for file in sweeps:
        table = pq.read_table(file, columns=["id", "base"]).to_pylist()
        changed = [row["id"] for row in table if float(now[row["id"]]) != float(row["base"])]
        print(
            f"{file.parent.name}: {len(changed)} of {len(table)} base verdicts change {changed[:5]}"
        )


def main() -> None:
    """Print the table, and every answer whose verdict changes."""
    parser = argparse.ArgumentParser(description="grade stored answers anew")
    parser.add_argument("workspaces", nargs="*", type=Path, default=[ROOT / "data" / "workspace"])
    parser.add_argument("--base", action="store_true")
    args = parser.parse_args()
    changes: list[tuple[str, str, Any]] = []
    sweeps: list[Path] = []
    print("answers | n | % before | % now | wrong to right | right to wrong | math-verify differs")
    for workspace in args.workspaces:
        for file in sorted(workspace.rglob("*.parquet")):
            if file.name == "answers.parquet":
                sweeps.append(file)
            if (found := regraded(file)) is None:
                continue
            name = str(file.relative_to(workspace))
            n, right = found["n"], found["right"]
            after = right + len(found["up"]) - len(found["down"])
            print(
                f"{name} | {n} | {100 * right / n:.1f} | {100 * after / n:.1f} | "
                f"{len(found['up'])} | {len(found['down'])} | {found['differing']}"
            )
            changes += [(name, "right now", row) for row in found["up"]]
            changes += [(name, "wrong now", row) for row in found["down"]]
    print(f"\n{len(changes)} verdicts change")
    for name, what, (question, gold, before, after) in changes:
        print(f"- {name}, {question}: {what}; gold {gold!r}, answer was {before!r}, is {after!r}")
    if sweeps:
        print(f"{len(sweeps)} sweeps keep verdicts without texts: they cannot be graded anew")
    if args.base:
        base_verdicts(sweeps)


if __name__ == "__main__":
    main()
