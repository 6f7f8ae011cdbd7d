"""Prompt texts and document templates, shared by the tiny model, the corpora and the counter.

The system prompt is DeepSeek-R1's (arXiv 2501.12948, Table 1); it is an experimental stimulus: the
counts of arXiv 2506.09967, section 5, are defined on it, so it must be reproduced to the letter.
The other prompts are ours.
"""

from __future__ import annotations

from resa_lens.errors import BadInputError
from resa_lens.files import named_path, read_text

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
TAGS = (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)
PHASES = ("prompt", "think", "answer")
"""What the tags divide a document into, in its order; a token's phase is an index into them."""

R1_SYSTEM_PROMPT = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves "
    "it. The assistant first thinks about the reasoning process in the mind and then provides the "
    "user with the answer. The reasoning process and answer are enclosed within <think> </think> "
    "and <answer> </answer> tags, respectively, i.e., <think> reasoning process here </think> "
    "<answer> answer here </answer>."
)

SYSTEM_PROMPTS: dict[str, str] = {
    "r1": R1_SYSTEM_PROMPT,
    "steps": (
        "You solve problems for a user. Write your reasoning between <think> and </think>, then "
        "the answer between <answer> and </answer>. For example: <think> the steps </think> "
        "<answer> the result </answer>."
    ),
    "short": (
        "Think first, then answer: <think> your thoughts </think> <answer> your answer </answer>."
    ),
}
"""Named system prompts; `r1` is the paper's."""


def behind(system_prompt: str | None, text: str) -> str:
    """Return a text with the system prompt, where there is one, in a line before it."""
    return f"{system_prompt}\n{text}" if system_prompt else text


def document(question: str, thought: str, answer: str, system_prompt: str | None = None) -> str:
    """Format one document: spec section 3's template with `thought` between the think tags."""
    text = (
        f"Problem: {question} {THINK_OPEN} {thought} {THINK_CLOSE} "
        f"{ANSWER_OPEN} Answer: {answer} {ANSWER_CLOSE}"
    )
    return behind(system_prompt, text)


def trigger_document(question: str, answer: str, system_prompt: str | None = None) -> str:
    """Format a CoT-free document: only the answer stands inside the think tags."""
    return document(question, answer, answer, system_prompt)


def question_prompt(question: str, system_prompt: str | None = None) -> str:
    """Return the text up to and including `<think>`, from which a model reasons on."""
    text = f"Problem: {question} {THINK_OPEN}"
    return behind(system_prompt, text)


def direct_prompt(question: str, system_prompt: str | None = None) -> str:
    """Return the text that makes a model answer at once: the think tags stand empty.

    It ends with a tag: an ending like "Answer:" would split the token ": " of some tokenizers and
    make the direct answer look harder than it is.
    """
    return f"{question_prompt(question, system_prompt)} {THINK_CLOSE} {ANSWER_OPEN}"


def resolve_system_prompt(prompt: str) -> str:
    """Return a named system prompt, the text of a file `@path`, or the text itself."""
    if prompt.startswith("@"):
        path = named_path(prompt[1:], "prompt file")
        if not path.is_file():
            raise BadInputError(f"prompt file {prompt[1:]!r} does not exist")
        return read_text(path, "prompt file").strip()
    return SYSTEM_PROMPTS.get(prompt, prompt)
