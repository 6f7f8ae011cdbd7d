"""The process in which a chat template runs: a script that imports nothing of resa-lens."""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

Chat = list[dict[str, str]]


def folded(chat: Chat) -> Chat:
    """Return a chat whose system text stands before the user's."""
    if chat[0]["role"] != "system":
        return chat
    system, user, *rest = [*chat, {"role": "user", "content": ""}][: max(2, len(chat))]
    content = "\n\n".join(text for text in (system["content"], user["content"]) if text)
    return [{"role": "user", "content": content}, *rest]


def render(chats: list[Chat], options: dict[str, Any], longest: int) -> dict[str, Any]:
    """Return the texts, and whether the system text had to go into the user's turn."""

    def written(chats: list[Chat]) -> list[str]:
        rendered: Any = render_jinja_template(conversations=chats, **options)
        texts: list[str] = rendered[0]
        if (length := max(map(len, texts))) > longest:
            raise ValueError(f"it writes {length} characters, more than {longest}")
        if len(set(texts)) < len({json.dumps(chat) for chat in chats}):
            raise ValueError("it writes one text for different questions")
        return texts

    def part(texts: list[str], role: str) -> bool:
        return all(
            message["content"].strip() in text
            for chat, text in zip(chats, texts, strict=True)
            for message in chat
            if message["role"] == role
        )

    if all(chat[0]["role"] != "system" for chat in chats):
        return {"texts": written(chats), "folded": False}
    texts = None
    with contextlib.suppress(Exception):  # a template may raise what it likes
        texts = written(chats)
    if texts is not None and part(texts, "system"):
        return {"texts": texts, "folded": False}
    try:
        in_users = written([folded(chat) for chat in chats])
    except Exception:
        if texts is None:
            raise
        in_users = texts
    if texts is None or part(in_users, "system"):
        return {"texts": in_users, "folded": True}
    # Of a template that escapes all texts neither is there as it was said.
    if len(chats[0]) > 1 and part(texts, "user"):
        raise ValueError("it writes another text than the system prompt")
    return {"texts": texts, "folded": False}


def answer(request: dict[str, Any], longest: int) -> dict[str, Any]:
    """Return what is replied to a request: texts, or the error that the template makes."""
    try:
        return render(request.pop("conversations"), request, longest)
    except Exception as error:  # noqa: BLE001 - a template may raise what it likes
        message, name = " ".join(str(error).split())[:200], type(error).__name__
        plain = name in ("TemplateError", "ValueError")
        return {"error": f"{name}: {message}" if message and not plain else message or name}


if __name__ == "__main__":
    seconds, memory, longest = map(int, sys.argv[1:])
    # Other prints must not be taken for the reply.
    replies, sys.stdout = sys.stdout, sys.stderr
    for kind, limit in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory)):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (limit if hard < 0 else min(limit, hard), hard))
    replies.write(json.dumps(answer(json.load(sys.stdin), longest)))
