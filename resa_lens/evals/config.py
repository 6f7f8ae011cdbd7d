"""What a model is asked, and how its answers are drawn: the configurations alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from resa_lens.config import Config, data_source, execution, setting
from resa_lens.errors import BadInputError
from resa_lens.texts.prompts import ANSWER_CLOSE, resolve_system_prompt

PromptStyle = Literal["reason", "direct"]
"""`reason` ends at `<think>`; `direct` leaves the think tags empty and asks for the answer."""
EngineName = Literal["hf", "vllm", "lighteval"]
TextEngine = Literal["hf", "vllm"]
"""What generates texts; `lighteval` is `hf` inside a harness of scores."""
Extraction = Literal["resa", "lighteval", "boxed"]
"""By whose rules an answer is found in a text (`evals.extraction`)."""


@dataclass(frozen=True)
class GenerationConfig(Config):
    """How to generate; temperature 0 is greedy."""

    max_new_tokens: int = setting(160, "Longest answer, in tokens.", min=1, max=2**20)
    temperature: float = setting(0.0, "Temperature of the draws; 0 is greedy.", min=0)
    top_p: float = setting(1.0, "Nucleus: share of the probability that is drawn from.",
                           over=0, max=1)  # fmt: skip
    batch_size: int = execution(64, "Answers at a time; vllm has its own way.", min=1, max=2**16)
    seed: int = setting(0, "Seed of everything that is drawn.", min=0, max=2**32 - 1)
    stop: tuple[str, ...] = (ANSWER_CLOSE,)
    """Generation ends after any of these strings, which stay in the text."""
    timeout: float | None = setting(
        None, "Seconds that an answer may take; a longer one counts as wrong.", over=0
    )
    """From the start of its batch or, where the engine has no batches, from its first token."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            BadInputError: a value is out of its range.
        """
        super().__post_init__()
        if isinstance(self.stop, str) or not all(self.stop):
            raise BadInputError(f"stop is {self.stop!r}; use a tuple of strings that are not empty")


@dataclass(frozen=True)
class EvalConfig(Config):
    """What is asked and how."""

    limit: int | None = data_source(
        None, "Questions at most, of each task; drawn where there are more.", min=1
    )
    """As in `tasks.select`; None takes all."""
    levels: tuple[int, ...] | None = data_source(
        None, 'Levels of the questions, for example "1,2,3" or "4".'
    )
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    prompt_style: PromptStyle = "reason"
    system_prompt: str | None = setting(
        None, "Prompt before the question: r1, steps, short, a text, or @file.", "--prompt",
        check=resolve_system_prompt,
    )  # fmt: skip
    """Stands before the problem, or is the chat template's system message."""
    samples: int = setting(1, "Answers a question, each by a seed of its own.", min=1, max=100_000)
    question_seed: int = data_source(0)
    """Draws the questions where there is a limit; the generation has its own seed."""
    chat_template: bool = setting(False, "Send the prompt through the model's chat template.")
    extraction: Extraction = setting(
        "resa",
        "Rules by which an answer is read: resa, lighteval, or boxed for the last box alone.",
    )

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            BadInputError: a value out of its range, or several samples that would be equal.
        """
        super().__post_init__()
        if self.samples > 1 and self.generation.temperature == 0:
            raise BadInputError(
                f"{self.samples} samples at temperature 0 are the same answer; set a temperature"
            )


@dataclass(frozen=True)
class Setting:
    """A named way to sample, for options that are not given."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 160
    samples: int = 1
    chat_template: bool = False


SETTINGS = {
    "greedy": Setting(),
    "paper": Setting(0.6, 0.95, 32_768, 1, chat_template=True),
}
"""`paper` is the evaluation of arXiv 2506.09967; `greedy` suits the bundled model."""


def preset(name: str, seed: int = 0) -> EvalConfig:
    """Return the configuration of a named setting.

    Args:
        name: one of `SETTINGS`.
        seed: of its draws.

    Raises:
        BadInputError: no such setting.
    """
    if name not in SETTINGS:
        raise BadInputError(f"setting {name!r} is unknown; use {', '.join(SETTINGS)}")
    harness = SETTINGS[name]
    generation = GenerationConfig(
        harness.max_new_tokens, harness.temperature, harness.top_p, seed=seed
    )
    return EvalConfig(
        generation=generation, samples=harness.samples, chat_template=harness.chat_template
    )
