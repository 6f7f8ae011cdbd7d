"""Names are nouns of the field: no new name points at something instead of saying what it is.

`found`, `held`, `made` and their like say how a value came to be here, and nothing of what it is.
Those that are there are counted by room; a count may only fall, so that no new one gets in.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "resa_lens"
POINTERS = frozenset(
    ("found", "held", "made", "asked", "told", "given", "beside", "wanted", "said", "shown",
     "stuff", "thing", "things", "tried", "meant", "taken")
)  # fmt: skip
TERMS = ("held_out",)
"""Terms of the field that hold such a word: held-out data."""
ALLOWED: dict[str, int] = {
    "app": 5, "artifacts": 7, "cli": 3, "config": 3, "evals": 16, "features": 52, "figures": 4,
    "files": 1, "layers": 36, "machine": 4, "resources": 1, "saes": 21, "stages": 83, "stats": 2,
    "tuning": 18,
}  # fmt: skip
"""Bindings of such names by room, 256 on 2026-11-30.  Lower a number when you have renamed
some; never raise one."""


NAMED = (
    ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler, ast.MatchAs,
    ast.MatchStar,
)  # fmt: skip


def bindings(tree: ast.AST) -> Iterator[str]:
    """Every name that code gives: to variables, parameters, fields, functions and classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, NAMED) and node.name:
            yield node.name
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname


def points(name: str) -> bool:
    """Whether a name, or a word of it, is a pointer."""
    plain = name.lower()
    for term in TERMS:
        plain = plain.replace(term, "")
    return not POINTERS.isdisjoint(plain.split("_"))


def by_room() -> Counter[str]:
    counts: Counter[str] = Counter()
    for file in sorted(PACKAGE.rglob("*.py")):
        relative = file.relative_to(PACKAGE)
        if relative.parts[0] != "_data":
            room = relative.parts[0].removesuffix(".py")
            counts[room] += sum(map(points, bindings(ast.parse(file.read_text()))))
    return +counts


def test_no_new_name_points():
    counts = by_room()
    grown = {room: n for room, n in counts.items() if n > ALLOWED.get(room, 0)}
    assert not grown, f"name what it is (docs/glossary.md); too many in {grown}"


def test_the_allowance_is_no_larger_than_what_is_there():
    """A rename that is not recorded would leave room for new ones."""
    counts = by_room()
    tighter = {room: min(n, counts[room]) for room, n in ALLOWED.items() if counts[room]}
    assert tighter == ALLOWED, f"fewer now: put ALLOWED = {tighter}"


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("found = 1", ["found"]),
        ("def held(asked): ...", ["held", "asked"]),
        ("for made, x in y: pass", ["made"]),
        ("with a as given: pass", ["given"]),
        ("[told for told in y]", ["told"]),
        ("self.beside = 1", ["beside"]),
        ("class A:\n    found_again: int = 0", ["found_again"]),
        ("try: pass\nexcept E as said: pass", ["said"]),
        ("import a as thing", ["thing"]),
        ("lambda found: found", ["found"]),
        ("held_out = 1; print(found); foundation = 2; x.made()", []),
    ],
)
def test_the_check_sees_every_binding(code, names):
    assert [name for name in bindings(ast.parse(code)) if points(name)] == names
