"""Answers kept as they come, so that a killed or crashed evaluation goes on where it was.

One JSON line an answer, appended as the answer ends.  A line that a kill cut short is dropped.
Questions have random streams of their own, so what is generated later does not depend on what was
kept; only the rounding of a batch's other composition can, as it does with another batch size.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

from resa_lens.errors import BadInputError, RunFailedError
from resa_lens.evals.engines import Generation, GenerationConfig, StreamingEngine
from resa_lens.files import write_errors


class Named(Protocol):
    """A prompt with the name of its answer."""

    @property
    def prompt(self) -> str:
        """The text to continue."""
        ...

    @property
    def stream(self) -> tuple[int, ...]:
        """What names its random stream."""
        ...

    @property
    def key(self) -> tuple[str, int]:
        """The question's id and the sample's number."""
        ...


class AnswerLog:
    """The file of answers; a context in which it is open for appending.

    Args:
        path: comes into being with the first answer's run.
        settings: what a later run must repeat besides its configuration, as the threads; of a
            file that is there already, its own are kept.
    """

    def __init__(self, path: Path, settings: dict[str, Any] | None = None) -> None:
        self.path = path
        self.answers: dict[tuple[str, int], Generation] = {}
        self.settings: dict[str, Any] = settings or {}
        self.seconds = 0.0
        """Spent so far, in all runs."""
        self._began = time.perf_counter()
        self._stream: TextIO | None = None
        if path.exists():
            self._read()

    def _read(self) -> None:
        lines = self.path.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        try:
            values = [json.loads(line) for line in whole]
            if values:
                self.settings = values[0]["settings"]
            for value in values[1:]:
                self.answers[value["id"], value["sample"]] = Generation(
                    value["text"],
                    tuple(value["token_ids"]),
                    value["tokens"],
                    value["finished"],
                    value["timed_out"],
                )
                self.seconds = max(self.seconds, value["seconds"])
        except (ValueError, KeyError, TypeError) as error:
            raise BadInputError(
                f"{self.path} is damaged ({error}); remove it, or start anew with --force"
            ) from error
        if len(whole) < len(lines):
            with self.path.open("rb+") as stream:
                stream.truncate(sum(map(len, whole)))

    def __enter__(self) -> AnswerLog:
        with write_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            empty = not self.path.exists() or not self.path.stat().st_size
            self._stream = self.path.open("a", encoding="utf-8")
            if empty:
                self._write({"settings": self.settings})
        self._began = time.perf_counter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._stream is not None:
            self._stream.close()
        self.seconds += time.perf_counter() - self._began
        self._stream = None

    def add(self, key: tuple[str, int], answer: Generation) -> None:
        """Keep an answer.

        Raises:
            RunFailedError: the disk is full, or another write error.
        """
        self.answers[key] = answer
        elapsed = self.seconds + time.perf_counter() - self._began
        with write_errors(self.path):
            self._write(
                {
                    "id": key[0],
                    "sample": key[1],
                    "text": answer.text,
                    "token_ids": answer.token_ids,
                    "tokens": answer.tokens,
                    "finished": answer.finished,
                    "timed_out": answer.timed_out,
                    "seconds": round(elapsed, 3),
                }
            )

    def _write(self, value: dict[str, Any]) -> None:
        assert self._stream is not None, "answers are added inside the log's context"
        # ASCII: a lone surrogate, which a model can write, has no UTF-8.
        self._stream.write(json.dumps(value) + "\n")
        self._stream.flush()


def answer_all(
    engine: StreamingEngine,
    asked: Sequence[Named],
    config: GenerationConfig,
    log: AnswerLog,
    advance: Callable[[int], None] | None = None,
) -> list[Generation]:
    """Generate the answers that the log lacks, keep each as it ends, and return all.

    Args:
        engine: generates the answers.
        asked: the prompts, in the order of the result.
        config: how to generate.
        log: the open file of answers.
        advance: called with the number of answers that came since the last call; those that are
            there come first.

    Raises:
        BadInputError: what the engine refuses before it begins.
        RunFailedError: the engine failed; what it had finished is kept.
    """
    missing = [one for one in asked if one.key not in log.answers]
    total = len(asked)
    done = total - len(missing)

    def answered(index: int, answer: Generation) -> None:
        nonlocal done
        log.add(missing[index].key, answer)
        done += 1
        if advance is not None:
            advance(1)

    if advance is not None and done:
        advance(done)
    try:
        if missing:
            engine.generate(
                [one.prompt for one in missing],
                config,
                streams=[one.stream for one in missing],
                answered=answered,
            )
    except BadInputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or "no message"
        raise RunFailedError(
            f"the engine failed after {done} of {total} answers "
            f"({type(error).__name__}: {reason[:300]}).\n"
            "The finished answers are kept; the same command goes on with the others"
        ) from error
    return [log.answers[one.key] for one in asked]
