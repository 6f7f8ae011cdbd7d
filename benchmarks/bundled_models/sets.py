"""Write the bundled question sets: `python -m benchmarks.bundled_models.sets --out data/tiny`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.bundled_models.questions import TRAIN_LEVELS, draw_unique

TRAIN_QUESTIONS, TEST_QUESTIONS = 4_002, 2_000
SEED = 20_261_122


def main(
    out: Annotated[Path, typer.Option(help="Folder for train.jsonl and test.jsonl.")],
) -> None:
    """Write 4,002 training questions of levels 1 to 3 and 2,000 test questions of levels 1 to 4."""
    out.mkdir(parents=True, exist_ok=True)
    sets = {
        "train": dict.fromkeys(TRAIN_LEVELS, TRAIN_QUESTIONS // 3),
        "test": dict.fromkeys((1, 2, 3, 4), TEST_QUESTIONS // 4),
    }
    for split, per_level in sets.items():
        rows = draw_unique(SEED, split, per_level)
        lines = "".join(json.dumps(row.to_dict()) + "\n" for row in rows)
        (out / f"{split}.jsonl").write_text(lines)


if __name__ == "__main__":
    typer.run(main)
