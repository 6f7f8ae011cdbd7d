"""What running work says: notes and progress bars; of a command on stderr, never on stdout."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Advance = Callable[[int], None]


def local(text: str) -> str:
    """Return a text with the paths below the current folder relative to it."""
    here = str(Path.cwd())
    return text.replace(f"{here}/", "") if here != "/" else text


class Reporter:
    """Says nothing; the base of the one that does."""

    def note(self, text: str) -> None:
        """Say one line."""

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Advance]:
        """Open a progress bar; the yielded function advances it."""
        yield lambda done: None


class PrintedReporter(Reporter):
    """Notes on stdout, and a line where a bar would begin: a notebook shows stderr in red."""

    def note(self, text: str) -> None:
        """Print one line."""
        print(text, flush=True)

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Advance]:
        """Say what begins."""
        self.note(f"{label} ...")
        yield lambda done: None


class ConsoleReporter(Reporter):
    """Notes and bars on stderr; bars only on a terminal, else one line at each end."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(file=sys.stderr, highlight=False)

    def note(self, text: str) -> None:
        """Print one line."""
        # Soft: a path must stay in one piece to be copied.
        self.console.print(local(text), markup=False, soft_wrap=True)

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Advance]:
        """Show label, bar, percentage, elapsed time and time left."""
        from rich.progress import (
            BarColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        if not self.console.is_terminal:
            self.note(f"{label} ...")
            yield lambda done: None
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(label, total=total)
            yield lambda done: progress.advance(task, done)


SILENT = Reporter()


class Unforecast(Reporter):
    """Says what a reporter says, but for forecasts: the demo has given one of the whole."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.bar = reporter.bar

    def note(self, text: str) -> None:
        """Say one line that is no forecast."""
        if not text.startswith("expected: "):
            self.reporter.note(text)
