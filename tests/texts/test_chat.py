"""Chat templates of the kinds that models come with; the process around them is tested apart."""

from __future__ import annotations

import json
from typing import Any

import pytest

from resa_lens.errors import BadInputError
from resa_lens.evals.run import EvalConfig, ask
from resa_lens.evals.tasks import EvalItem
from resa_lens.features.exclusive import CountConfig, tag_prompt
from resa_lens.models.host import Model, load_model
from resa_lens.texts import chat, chat_worker
from resa_lens.texts.prompts import R1_SYSTEM_PROMPT, SYSTEM_PROMPTS

LOOP = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
START = "{% if add_generation_prompt %}<assistant>\n"
END = "{% endif %}"
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
)
NEEDS_USER = (
    "{% if messages | selectattr('role', 'equalto', 'user') | list | length == 0 %}"
    "{{ raise_exception('No user query found in messages.') }}{% endif %}"
)
NO_THINK = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
STRIPS = LOOP.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
DROPS = LOOP.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
QWEN3 = LOOP + START + NO_THINK + END + END
QWEN3_THINKING = LOOP + START + NO_THINK + "{% else %}<think>\n" + END + END
DEEPSEEK_31 = LOOP + START + "{% if thinking %}<think>{% else %}</think>{% endif %}" + END
R1_DISTILL = LOOP + START + "<think>\n" + END
EMPTY_PAIR = LOOP + START + "<think>\n\n</think>\n\n" + END
EMPTY_PAIR_IN_A_LINE = LOOP + START + "<think></think>" + END


class Tokenizer:
    """A tokenizer's part that makes chats."""

    bos_token, bos_token_id = "<s>", 1
    special_tokens_map = {"bos_token": "<s>"}  # noqa: RUF012

    def __init__(self, template: str) -> None:
        self.chat_template = template

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [1]}

    def get_chat_template(self) -> str:
        return self.chat_template


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Render here: a process a template costs two seconds."""

    def reply(request: str, seconds: int) -> dict[str, Any]:
        return json.loads(json.dumps(chat_worker.answer(json.loads(request), chat.LONGEST)))

    monkeypatch.setattr(chat, "_reply", reply)


def prompts(template: str, system: str | None = None, direct: bool = False) -> tuple[str, ...]:
    """Return the prompts of two questions, then the notes."""
    notes: list[str] = []
    texts = chat.chat_prompts(
        Tokenizer(template), ["1+1?", "1+2?"], system, direct=direct, note=notes.append
    )
    return (*texts, *notes)


@pytest.mark.parametrize(
    "template", [NO_SYSTEM + LOOP, DROPS, DROPS.replace("!=", "in ['user'] and m.role !=")]
)
def test_the_system_text_goes_into_the_users_turn_and_that_is_said(template):
    assert prompts(template + START + END, "Think.") == (
        "<user>Think.\n\n1+1?\n<assistant>\n",
        "<user>Think.\n\n1+2?\n<assistant>\n",
        chat.IN_USERS_TURN,
    )
    # Without a system text there is nothing to move, and nothing to say.
    assert prompts(template + START + END) == (
        "<user>1+1?\n<assistant>\n", "<user>1+2?\n<assistant>\n",
    )  # fmt: skip


def test_a_system_role_is_used_where_there_is_one():
    assert prompts(LOOP, "Think.") == (
        "<system>Think.\n<user>1+1?\n",
        "<system>Think.\n<user>1+2?\n",
    )
    # What is escaped is not left out.
    escaped = LOOP.replace("m.content", "m.content | tojson")
    assert prompts(escaped, "Think.")[0] == '<system>"Think."\n<user>"1+1?"\n'
    assert prompts("{{ messages[0].content }}", "Think.")[0] == "Think.\n\n1+1?"


@pytest.mark.parametrize(
    ("template", "system", "says"),
    [
        ("{% for m in messages %}{{ m.role }}{% endfor %}", None, "one text for different"),
        (LOOP.replace("m.content", "m.content | tojson"), 'Say "x".', "another text"),
        (STRIPS, R1_SYSTEM_PROMPT, "another text than the system prompt"),
        ("{% for m in messages %}", "Think.", "TemplateSyntaxError"),
        ("{{ raise_exception('no') }}", None, "fails: no;"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "Think.", "RecursionError"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(template, system, says):
    with pytest.raises(BadInputError, match=says) as raised:
        prompts(template, system)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (QWEN3, "<assistant>\n<think>\n\n</think>\n\n"),
        (QWEN3_THINKING, "<assistant>\n<think>\n\n</think>\n\n"),
        (DEEPSEEK_31, "<assistant>\n</think>"),
        (EMPTY_PAIR, "<assistant>\n<think>\n\n</think>\n\n"),
        (EMPTY_PAIR_IN_A_LINE, "<assistant>\n<think></think>"),
        (R1_DISTILL, "<assistant>\n<think>\n\n</think>\n\n<answer>"),
        (LOOP + START + "<think>" + END, "<assistant>\n<think> </think> <answer>"),
        (LOOP + START + END, "<assistant>\n<think> </think> <answer>"),
        (LOOP + "<assistant>", "<assistant> <think> </think> <answer>"),
    ],
)
def test_direct_writes_the_models_own_form_once(template, end):
    first, _ = prompts(template, direct=True)
    assert first == f"<user>1+1?\n{end}"
    assert first.count("</think>") == 1
    config = EvalConfig(chat_template=True, prompt_style="direct")
    (asked,) = ask([EvalItem("a", "1+1?", "2")], config, Tokenizer(template))
    assert asked.prompt == first
    assert asked.opened == end.removeprefix("<assistant>").strip()


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (QWEN3, ""),
        (QWEN3_THINKING, "<think>\n"),
        (DEEPSEEK_31, "<think>"),
        (R1_DISTILL, "<think>\n"),
        (EMPTY_PAIR, "<think>\n\n</think>\n\n"),
        (EMPTY_PAIR_IN_A_LINE, "<think></think>"),
    ],
)
def test_reasoning_is_as_the_template_begins_it(template, end):
    first, _, *notes = prompts(template)
    assert first == f"<user>1+1?\n<assistant>\n{end}"
    assert notes == ([chat.ANSWERS_AT_ONCE] if "</think>" in end else [])
    (asked,) = ask(
        [EvalItem("a", "1+1?", "2")], EvalConfig(chat_template=True), Tokenizer(template)
    )
    assert asked.opened == end.strip()


@pytest.fixture(scope="module")
def tiny() -> Model:
    return load_model("tiny-reasoner")


@pytest.mark.parametrize("template", [NO_SYSTEM + LOOP, NEEDS_USER + LOOP, DROPS])
@pytest.mark.parametrize("prompt", ["r1", "short"])
def test_counting_sends_the_prompt_as_the_users_where_it_must(tiny, monkeypatch, template, prompt):
    monkeypatch.setattr(tiny.tokenizer, "chat_template", template)
    tagged = tag_prompt(tiny, CountConfig(prompt, chat_template=True))
    assert tagged.text == f"<user>{SYSTEM_PROMPTS[prompt]}\n"
    assert tagged.notes == (chat.IN_USERS_TURN,)
    assert len(tagged.open_spans) == SYSTEM_PROMPTS[prompt].count("<think>")


def test_counting_refuses_a_template_that_strips_the_tags(tiny, monkeypatch):
    monkeypatch.setattr(tiny.tokenizer, "chat_template", STRIPS)
    with pytest.raises(BadInputError, match="tiny-reasoner drops <think>"):
        tag_prompt(tiny, CountConfig(chat_template=True))
