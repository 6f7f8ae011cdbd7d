"""What every engine shares: how to generate, what comes back, and the interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Int
from torch import Tensor

from resa_lens.errors import BadInputError
from resa_lens.prompts import ANSWER_CLOSE

Progress = Callable[[int], None]
"""Called with the number of finished documents."""


@dataclass(frozen=True)
class GenerationConfig:
    """How to generate; temperature 0 is greedy."""

    max_new_tokens: int = 160
    temperature: float = 0.0
    top_p: float = 1.0
    batch_size: int = 64
    seed: int = 0
    stop: tuple[str, ...] = (ANSWER_CLOSE,)
    """Generation ends after any of these strings, which stay in the text."""
    timeout: float | None = None
    """Seconds that a document may take, from the start of its batch or, where the engine has no
    batches, from its first token; None is no limit."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            BadInputError: a value is out of its range.
        """
        if self.max_new_tokens < 1 or self.batch_size < 1:
            raise BadInputError(
                f"max_new_tokens is {self.max_new_tokens}, batch_size {self.batch_size}; "
                "both must be at least 1"
            )
        if not self.temperature >= 0:
            raise BadInputError(f"temperature is {self.temperature}; use 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise BadInputError(f"top_p is {self.top_p}; use more than 0 and at most 1")
        if self.seed < 0:
            raise BadInputError(f"seed is {self.seed}; use 0 or more")
        if self.timeout is not None and not self.timeout > 0:
            raise BadInputError(f"timeout is {self.timeout}; use more than 0 seconds, or none")
        if isinstance(self.stop, str) or not all(self.stop):
            raise BadInputError(f"stop is {self.stop!r}; use a tuple of strings that are not empty")


@dataclass(frozen=True)
class Generation:
    """One generated text."""

    text: str
    """With its special tokens, without end-of-sequence and padding; cut after the stop string."""
    token_ids: tuple[int, ...]
    """The ids of the text, without end-of-sequence; uncut."""
    tokens: int
    """Generated tokens, the end-of-sequence token included."""
    finished: bool
    """False where `max_new_tokens` or the time-out ended it."""
    timed_out: bool = False
    """Whether the time-out ended it."""


Answered = Callable[[int, Generation], None]
"""Called with a document's index and its generation as soon as that has ended."""


class GenerationHooks(Protocol):
    """Is told what each forward pass reads, so that hooks on the model know their tokens."""

    def before_forward(
        self,
        rows: Sequence[int],
        positions: Int[Tensor, "row position"],
        phases: Int[Tensor, "row position"],
    ) -> None:
        """Take note of the next inputs.

        Args:
            rows: each row's prompt, as an index; rows leave once they have ended.
            positions: of the inputs in their documents.
            phases: index into `PHASES`; -1 for padding, and for a row that has ended.
        """
        ...


class Engine(Protocol):
    """What evaluation needs of an engine."""

    def generate(
        self,
        prompts: Sequence[str],
        config: GenerationConfig,
        progress: Progress | None = None,
        *,
        streams: Sequence[tuple[int, ...]] | None = None,
    ) -> list[Generation]:
        """Return one generation a prompt, in the prompts' order."""
        ...


class StreamingEngine(Protocol):
    """An engine that hands over every generation as it ends, so that it can be kept."""

    def generate(
        self,
        prompts: Sequence[str],
        config: GenerationConfig,
        progress: Progress | None = None,
        *,
        streams: Sequence[tuple[int, ...]] | None = None,
        answered: Answered | None = None,
    ) -> list[Generation]:
        """Return one generation a prompt, in the prompts' order."""
        ...
