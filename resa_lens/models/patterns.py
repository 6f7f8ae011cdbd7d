"""A tokenizer's patterns, which a folder brings along: none may take for ever.

The engine of the library gives a match up after ten million steps, a fifth of a second, and ends
the process's call with a panic.  A pattern that stays below that at every character still takes
hours for a corpus, and no static rule tells it from those of honest tokenizers, which repeat too.
So it is timed on short texts of growing length before anything else is read.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from resa_lens.errors import BadInputError

PACE_S, START_S = 50e-6, 0.05
"""CPU seconds a character and for a text that a tokenizer may take; usual ones take 1e-6 each."""
LONGEST = 1024
RUNS = ("a", "ab ", " ", "\n", " \n", "7", "_", "...", "é", "字", "aB", "<think> 1+2=3\n</think> ")
"""What the texts repeat: each class of characters, and lines of a document."""
END = "§"
"""Their last character: a pattern goes on for long where it does not match."""


def check_patterns(tokenizer: Any, path: Path) -> None:
    """Refuse a tokenizer whose patterns make it slow.

    Args:
        tokenizer: of transformers; one without the library of compiled tokenizers has no patterns.
        path: of the model, for the message.

    Raises:
        BadInputError: it takes more than `PACE_S` a character, or its engine gave up.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    for run in RUNS:
        length = 8
        # Twice as long each time: what the last length took bounds what the next one can take.
        while length <= LONGEST:
            text = (run * length)[: length - 1] + END
            most = START_S + length * PACE_S
            # Twice: the first one may have met something else, such as a collection of garbage.
            if all((seconds := _seconds(backend, text, path)) > most for _ in range(2)):
                raise _refused(path, f"takes {seconds:.1f} s for {length} characters")
            length *= 2


def _seconds(backend: Any, text: str, path: Path) -> float:
    """Return the CPU seconds that a text takes, there and back."""
    began = time.process_time()
    try:
        with _quiet():
            backend.decode(backend.encode(text).ids)
    except BaseException as error:
        # The library's panic is no Exception.
        if type(error).__name__ != "PanicException":
            raise
        raise _refused(path, f"gives up on {text[:12]!r}") from error
    return time.process_time() - began


def _refused(path: Path, what: str) -> BadInputError:
    return BadInputError(
        f"{path}: the tokenizer {what}: a pattern in its tokenizer.json repeats what repeats; "
        "mend it, or use another model"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what a panic prints from the terminal."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
