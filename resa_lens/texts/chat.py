"""Chats written by a model's template, which is a program: it runs under limits, in a process.

The sandbox of transformers keeps a template from the machine, but not from going on for ever.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from resa_lens.errors import BadInputError
from resa_lens.texts.prompts import ANSWER_OPEN, THINK_CLOSE, THINK_OPEN

CPU_S, MEMORY, LONGEST = 10, 2 << 30, 4_000_000
"""Seconds, bytes of address space, and characters of a chat; a page takes a millisecond."""
IN_USERS_TURN = (
    "the model's chat template writes no system message: the system text stands in the user's turn"
)
ANSWERS_AT_ONCE = (
    "warning: the model's chat template closes the think tags before the answer: the model answers "
    "without thinking"
)
_OPENED = re.compile(rf"{THINK_OPEN}\s*$")
_CLOSED = re.compile(rf"(?:{THINK_OPEN}\s*)?{THINK_CLOSE}\s*(?:{ANSWER_OPEN}\s*)?$")
Note = Callable[[str], None]


def render_chats(
    tokenizer: Any,
    chats: Sequence[Sequence[dict[str, str]]],
    *,
    generation: bool,
    thinking: bool | None = None,
    note: Note = lambda text: None,
) -> list[str]:
    """Return chats, each a list of messages, as the tokenizer's template writes them.

    Where the template refuses or leaves out a system message, its text goes before the user's.

    Args:
        tokenizer: whose template is used.
        chats: messages with `role` and `content`.
        generation: whether a text ends where the model's turn begins.
        thinking: what is told to templates that can switch thinking on or off, under the names
            that Qwen's (`enable_thinking`) and DeepSeek's and Granite's (`thinking`) read.
        note: told where the system text stands in the user's turn.

    Raises:
        BadInputError: the template raises, does not end, writes too much, or writes another text
            than the system prompt or one text for all questions.
    """
    request = {
        "conversations": chats,
        "add_generation_prompt": generation,
        **({} if thinking is None else {"enable_thinking": thinking, "thinking": thinking}),
        **{key: str(value) for key, value in tokenizer.special_tokens_map.items()},
    }
    try:
        request["chat_template"] = tokenizer.get_chat_template()
    except ValueError as error:  # several, and none is the default
        reply = {"error": " ".join(str(error).split())[:200]}
    else:
        reply = _reply(json.dumps(request), CPU_S + len(chats) // 50)
    if "error" in reply:
        raise BadInputError(
            f"the model's chat template fails: {reply['error']}; mend it in the model's folder, or "
            "leave out --chat-template"
        )
    if reply["folded"]:
        note(IN_USERS_TURN)
    return list(reply["texts"])


def chat_prompts(
    tokenizer: Any,
    questions: Sequence[str],
    system_prompt: str | None = None,
    *,
    direct: bool = False,
    note: Note = lambda text: None,
) -> list[str]:
    """Return the tokenizer's chat template filled with each question, up to the model's turn.

    Args:
        tokenizer: whose template is used.
        questions: what the user says.
        system_prompt: the system message.
        direct: let the model answer at once, by its own no-think form where the template has one
            (an empty pair of think tags, as Qwen3's), else by a pair and an opened answer tag.
        note: told what is written otherwise than asked.

    Raises:
        BadInputError: there is no template, or it cannot hold these messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise BadInputError(
            "the model has no chat template; leave out --chat-template (and --setting paper, which "
            "asks for it), or put a chat_template.jinja into the model's folder"
        )
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    chats = [[*system, {"role": "user", "content": question}] for question in questions]
    texts = render_chats(tokenizer, chats, generation=True, thinking=not direct, note=note)
    begin = tokenizer.bos_token
    # Tokenising adds the beginning again where it is not only the template that does.
    if begin and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        texts = [text.removeprefix(begin) for text in texts]
    if direct:
        return [_direct(text) for text in texts]
    if any(_CLOSED.search(text) for text in texts):
        note(ANSWERS_AT_ONCE)
    return texts


def opened_tags(prompt: str) -> str:
    """Return the tags at a prompt's end, which belong to the answer's text."""
    tags = _OPENED.search(prompt) or _CLOSED.search(prompt)
    return tags[0].strip() if tags else ""


def _direct(text: str) -> str:
    if _CLOSED.search(text):
        return text
    if _OPENED.search(text):
        # As the template breaks its lines.
        closing = f"\n{THINK_CLOSE}\n\n" if text.endswith("\n") else f" {THINK_CLOSE} "
        return f"{text}{closing}{ANSWER_OPEN}"
    space = "" if text[-1:].isspace() else " "
    return f"{text}{space}{THINK_OPEN} {THINK_CLOSE} {ANSWER_OPEN}"


@lru_cache(maxsize=8)
def _reply(request: str, seconds: int) -> dict[str, Any]:
    worker = Path(__file__).with_name("chat_worker.py")
    command = [sys.executable, "-P", str(worker), *map(str, (seconds, MEMORY, LONGEST))]
    try:
        # By the clock only where the machine is busy elsewhere.
        done = subprocess.run(  # noqa: S603
            command, input=request, capture_output=True, text=True, timeout=60 * seconds
        )
        return json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        return {"error": f"it does not end within {seconds} s and {MEMORY >> 30} GB"}
