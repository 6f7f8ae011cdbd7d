"""Limits of the machine that a command comes to: each ends in one line."""

from __future__ import annotations

import contextlib
import errno
import resource
import sys
from collections.abc import Iterator
from typing import Any

from resa_lens.errors import ResaLensError, RunFailedError

NEEDS_MB = {"numpy": 480, "torch": 1400}
"""Addresses without which importing a library aborts the process, past any handler."""
_MEMORY = ("map segment", "allocate memory", "enough memory", "start new thread")


class _Gate:
    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> None:
        """Raise RunFailedError before the import of a library that cannot be loaded here."""
        if 0 <= resource.getrlimit(resource.RLIMIT_AS)[0] < NEEDS_MB.get(name, 0) << 20:
            raise RunFailedError(_addresses(f"{name} takes {NEEDS_MB[name]}"))


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Exit with one line where a limit, or an error of the project's own, ends a command."""
    gate: Any = _Gate
    sys.meta_path.insert(0, gate)
    try:
        yield
    except ResaLensError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    except BaseException as error:
        # A panic of a compiled library is no Exception.
        if not isinstance(error, MemoryError | OSError | ImportError | RuntimeError) and (
            type(error).__name__ != "PanicException"
        ):
            raise
        code, text = getattr(error, "errno", None), str(error)
        if code in (errno.EMFILE, errno.ENFILE) or "Too many open files" in text:
            most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            text = f"{most} files may be open at once, and these are not enough; raise ulimit -n"
        elif code == errno.ENAMETOOLONG:
            text = f"a name or path is too long: {text[:60]}...; use a shorter one"
        elif isinstance(error, MemoryError) or any(phrase in text for phrase in _MEMORY):
            text = _addresses("this needs more")
        elif type(error).__name__ == "PanicException":
            text = f"a compiled library gave up: {text[:120]}"
        else:
            raise
        print(f"error: {text}", file=sys.stderr)
        raise SystemExit(1) from error
    finally:
        sys.meta_path.remove(gate)


def _addresses(need: str) -> str:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    there = "no memory is left" if limit < 0 else f"{limit >> 20} MB of addresses may be used"
    return f"{there}, and {need}; " + ("end other programs" if limit < 0 else "raise ulimit -v")
