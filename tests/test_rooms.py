"""The house: a room imports only from rooms below it, and there are no circles."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "resa_lens"
ROOMS = (
    "errors", "config", "processes", "claims", "files", "publishing", "hashes", "resources",
    "progress", "jobs", "stats", "texts", "models", "machine", "saes", "features", "layers",
    "tuning", "evals", "experts", "artifacts", "figures", "stages", "exports", "session", "cli",
    "app",
)  # fmt: skip
"""From the ground up; the first nine are single files."""
ABOVE_ALL = ("__init__", "__main__", "corpora")
"""The package's front: public names under their first addresses."""


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imports(file: Path) -> set[str]:
    """Modules of the package that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.startswith("resa_lens.")}


def all_imports() -> list[tuple[str, str, str]]:
    """(file, its room, the room it imports from)."""
    rows = []
    for file in sorted(PACKAGE.rglob("*.py")):
        relative = file.relative_to(PACKAGE)
        if relative.parts[0] == "_data":
            continue
        room = relative.parts[0].removesuffix(".py")
        rows += [(str(relative), room, room_of(name)) for name in imports(file)]
    return rows


def test_every_file_stands_in_a_room():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.stem not in ("__pycache__", "_data")}
    assert rooms == {*ROOMS, *ABOVE_ALL}


def test_a_room_imports_only_from_rooms_below_it():
    wrong = {
        f"{file} imports from {target}"
        for file, room, target in all_imports()
        if room in ROOMS and target in ROOMS and ROOMS.index(target) > ROOMS.index(room)
    }
    assert not wrong


def test_the_check_sees_an_upward_import():
    assert ("stages/saes.py", "stages", "artifacts") in all_imports()
    assert ROOMS.index("artifacts") < ROOMS.index("stages")


def test_no_file_is_two_rooms():
    long = {
        str(file.relative_to(PACKAGE)): lines
        for file in PACKAGE.rglob("*.py")
        if (lines := len(file.read_text().splitlines())) > 500
    }
    assert not long


def test_public_names_come_without_torch():
    code = "import sys, resa_lens as rl; assert 'torch' not in sys.modules; print(rl.is_correct)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "is_correct" in done.stdout


def test_public_names_are_what_they_were():
    import resa_lens as rl
    from resa_lens.corpora import documents, load_records

    assert (rl.documents, rl.load_records) == (documents, load_records)
    assert rl.is_chosen("B", "B")
    assert callable(rl.load_questions)
