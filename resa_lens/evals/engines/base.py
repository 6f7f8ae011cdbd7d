"""What every engine shares: how to generate, what comes back, and the interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Int
from torch import Tensor

from resa_lens.evals.config import GenerationConfig as GenerationConfig

Progress = Callable[[int], None]
"""Called with the number of finished documents."""


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
    """False where `max_new_tokens`, the model's context or the time-out ended it."""
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
