from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from resa_lens.artifacts.kinds.eval import Grading
from resa_lens.errors import BadInputError
from resa_lens.evals.engines import Generation, GenerationConfig
from resa_lens.evals.run import (
    SAMPLE_SCHEMA,
    SETTINGS,
    EvalConfig,
    answerable,
    ask,
    build_prompt,
    evaluate,
    read_samples,
    write_samples,
)
from resa_lens.evals.tasks import EvalItem
from resa_lens.stats import bootstrap_mean_interval, wilson_interval
from resa_lens.texts.chat import chat_prompts
from resa_lens.texts.prompts import R1_SYSTEM_PROMPT

ITEMS = [
    EvalItem(f"q{i}", f"What is {i}+1?", str(i + 1), "sum" if i % 2 else "odd", 1 + i % 3)
    for i in range(12)
]


class ScriptedEngine:
    """Answers by a function of (prompt, stream); keeps what it was asked."""

    def __init__(self, answer) -> None:
        self.answer = answer
        self.asked = []

    def generate(self, prompts, config, progress=None, *, streams=None):
        self.asked += list(zip(prompts, streams, strict=True))
        found = []
        for prompt, stream in zip(prompts, streams, strict=True):
            text = self.answer(prompt, stream)
            found.append(Generation(text, (1,) * 5, 5, text.endswith("</answer>")))
            if progress is not None:
                progress(len(found))
        return found


def number(prompt: str) -> int:
    return int(prompt.rpartition("What is ")[2].partition("+")[0])


def right_below(bound):
    def answer(prompt, _stream):
        i = number(prompt)
        shown = i + 1 if i < bound else 0
        return f" {i}+1={shown} </think> <answer> Answer: {shown} </answer>"

    return answer


def test_accuracy_groups_and_interval():
    seen = []
    result = evaluate(
        ScriptedEngine(right_below(9)), ITEMS, EvalConfig(), lambda *done: seen.append(done)
    )
    assert (result.accuracy, result.n, result.tokens) == (0.75, 12, 60)
    assert result.ci == wilson_interval(9, 12)
    assert {k: (s.correct, s.n) for k, s in result.by_task.items()} == {
        "odd": (5, 6),
        "sum": (4, 6),
    }
    assert {k: (s.correct, s.n) for k, s in result.by_level.items()} == {
        1: (3, 4),
        2: (3, 4),
        3: (3, 4),
    }
    assert result.by_task["odd"].accuracy == pytest.approx(5 / 6)
    assert result.by_task["odd"].ci == wilson_interval(5, 6)
    assert seen == [(i + 1, 12) for i in range(12)]
    row = result.samples[10]
    assert (row["id"], row["gold"], row["answer"], row["correct"]) == ("q10", "11", "0", False)
    assert row["prompt"] == "Problem: What is 10+1? <think>"


def test_to_dict_is_json_without_samples():
    result = evaluate(ScriptedEngine(right_below(9)), ITEMS, EvalConfig())
    values = json.loads(json.dumps(result.to_dict()))
    assert {"accuracy", "n", "ci", "by_task", "by_level"} <= set(values)
    assert "samples" not in values
    assert values["by_level"]["1"]["n"] == 4


def test_direct_style_is_graded_from_the_open_answer():
    engine = ScriptedEngine(lambda prompt, _: f" {number(prompt) + 1} </answer>")
    result = evaluate(engine, ITEMS, EvalConfig(prompt_style="direct"))
    assert result.accuracy == 1.0
    assert result.samples[0]["prompt"].endswith("<think> </think> <answer>")
    assert result.samples[0]["answer"] == "1"


def test_tags_of_the_system_prompt_are_no_answer():
    """The R1 prompt holds closed tags and an example answer; a runaway thought stays unanswered."""
    result = evaluate(
        ScriptedEngine(lambda prompt, _: f" so {number(prompt) + 1}"),
        ITEMS,
        EvalConfig(system_prompt=R1_SYSTEM_PROMPT),
    )
    assert result.accuracy == 0.0
    assert {row["answer"] for row in result.samples} == {None}
    assert result.samples[0]["prompt"].startswith(R1_SYSTEM_PROMPT + "\nProblem: ")


def test_several_samples_are_resampled_by_question():
    def answer(prompt, stream):
        shown = number(prompt) + 1 if stream[1] < number(prompt) % 3 else 0
        return f" </think> <answer> {shown} </answer>"

    config = EvalConfig(samples=2, generation=GenerationConfig(temperature=0.6))
    engine = ScriptedEngine(answer)
    result = evaluate(engine, ITEMS, config)
    means = np.array([min(2, i % 3) / 2 for i in range(12)])
    assert result.accuracy == pytest.approx(means.mean())
    assert (result.n, len(result.samples)) == (12, 24)
    assert result.ci == pytest.approx(bootstrap_mean_interval(means))
    streams = [stream for _, stream in engine.asked]
    assert len(set(streams)) == 24


def test_samples_that_are_all_right_leave_an_interval():
    config = EvalConfig(samples=2, generation=GenerationConfig(temperature=0.6))
    result = evaluate(ScriptedEngine(right_below(12)), ITEMS, config)
    assert result.ci == wilson_interval(12, 12)
    assert result.by_task["odd"].ci == wilson_interval(6, 6)


def test_a_questions_stream_does_not_depend_on_the_others():
    def streams(items, **options):
        engine = ScriptedEngine(right_below(12))
        evaluate(engine, items, EvalConfig(**options))
        return dict(engine.asked)

    everything = streams(ITEMS)
    part = streams(ITEMS[::-1], limit=5)
    assert len(part) == 5
    assert part.items() <= everything.items()
    assert len(streams(ITEMS, levels=(2,))) == 4


def test_samples_survive_the_file(tmp_path):
    items = [*ITEMS, EvalItem("plain", "What is 50+1?", "51")]
    result = evaluate(ScriptedEngine(right_below(9)), items, EvalConfig())
    assert set(result.by_task) == {"odd", "sum"}
    write_samples(result, tmp_path / "samples.parquet")
    assert read_samples(tmp_path / "samples.parquet") == result.samples
    assert [p.name for p in tmp_path.iterdir()] == ["samples.parquet"]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    result = evaluate(ScriptedEngine(right_below(9)), ITEMS, EvalConfig())

    def full(_table, where, **_):
        where.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("resa_lens.evals.run.pq.write_table", full)
    with pytest.raises(OSError, match="No space"):
        write_samples(result, tmp_path / "samples.parquet")
    assert list(tmp_path.iterdir()) == []


def test_bad_sample_files(tmp_path):
    with pytest.raises(BadInputError, match="is no file"):
        read_samples(tmp_path / "none.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1xx")
    with pytest.raises(BadInputError, match="no readable parquet"):
        read_samples(tmp_path / "broken.parquet")


def test_bad_configs():
    with pytest.raises(BadInputError, match="prompt_style 'chat' is unknown"):
        EvalConfig(prompt_style="chat")  # pyright: ignore[reportArgumentType]
    with pytest.raises(BadInputError, match="2 samples at temperature 0"):
        EvalConfig(samples=2)
    with pytest.raises(BadInputError, match="samples 0 is out of range"):
        EvalConfig(samples=0)
    with pytest.raises(BadInputError, match="no questions"):
        evaluate(ScriptedEngine(right_below(1)), [], EvalConfig())


def test_scores_of_several_tasks():
    items = [
        EvalItem("a0", "What is 1+1?", "2", "sum", None, "one"),
        EvalItem("a1", "What is 2+1?", "9", "sum", None, "one"),
        EvalItem("b0", "What is 3+1?", "4", None, None, "two"),
    ]
    result = evaluate(ScriptedEngine(right_below(9)), items, EvalConfig())
    assert {k: (s.correct, s.n) for k, s in result.by_task.items()} == {
        "one": (1, 2), "two": (1, 1), "one:sum": (1, 2),
    }  # fmt: skip
    alone = evaluate(ScriptedEngine(right_below(9)), items[2:], EvalConfig())
    assert list(alone.by_task) == ["two"]


def test_choices_are_graded_by_letter_and_asked_with_their_prompt():
    item = EvalItem("c", "Which?", "B", query="Answer by letter.\n\nWhich?", choice=True)
    engine = ScriptedEngine(lambda *_: " hm </think> <answer> Answer: (B) </answer>")
    result = evaluate(engine, [item], EvalConfig())
    assert (result.accuracy, result.samples[0]["answer"]) == (1.0, "B")
    assert engine.asked[0][0] == "Problem: Answer by letter.\n\nWhich? <think>"


def test_a_timed_out_answer_is_wrong_and_counted():
    class Late(ScriptedEngine):
        def generate(self, prompts, config, progress=None, *, streams=None):
            right = Generation(" </think> <answer> 1 </answer>", (1,), 1, False, True)
            return [right, *super().generate(prompts[1:], config, streams=streams[1:])]

    result = evaluate(Late(right_below(9)), ITEMS[:4], EvalConfig())
    assert (result.timed_out, result.unfinished, result.accuracy) == (1, 1, 0.75)
    assert [row["timed_out"] for row in result.samples] == [True, False, False, False]


class Chat:
    """A tokenizer's part that makes chat prompts."""

    bos_token, bos_token_id = "<s>", 1

    def __init__(self, template, adds=True):
        self.chat_template, self.adds = template, adds

    def __call__(self, text):
        return {"input_ids": [1] if self.adds else []}

    def get_chat_template(self):
        return self.chat_template

    special_tokens_map = {"bos_token": "<s>"}  # noqa: RUF012


def chat_prompt(tokenizer, question, system=None, *, direct=False):
    (text,) = chat_prompts(tokenizer, [question], system, direct=direct)
    return text


TEMPLATE = "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[me]"


def test_chat_template():
    assert chat_prompt(Chat(TEMPLATE), "q") == "[user]q[me]"  # the tokenizer adds its own <s>
    assert chat_prompt(Chat(TEMPLATE, adds=False), "q") == "<s>[user]q[me]"
    assert chat_prompt(Chat(TEMPLATE), "q", "s") == "[system]s[user]q[me]"
    thinking = Chat(TEMPLATE + "<think>\n")
    closed = "[user]q[me]<think> </think> <answer>"  # jinja drops the template's last newline
    assert chat_prompt(thinking, "q", direct=True) == closed
    assert chat_prompt(Chat(TEMPLATE), "q", direct=True).endswith("[me] <think> </think> <answer>")
    config = EvalConfig(chat_template=True)
    assert [a.opened for a in ask(ITEMS[:1], config, thinking)] == ["<think>"]
    assert [a.opened for a in ask(ITEMS[:1], config, Chat(TEMPLATE))] == [""]


def test_the_bundled_models_template(tiny):
    (one,) = ask(ITEMS[:1], EvalConfig(chat_template=True), tiny.tokenizer)
    assert (one.prompt, one.opened) == ("Problem: What is 0+1? <think>", "<think>")


def test_no_chat_template_where_one_is_asked_for():
    for tokenizer in (None, Chat(None)):
        with pytest.raises(BadInputError, match="no chat template; leave out --chat-template"):
            ask(ITEMS, EvalConfig(chat_template=True), tokenizer)
    refusing = Chat("{{ raise_exception('no system role') }}")
    with pytest.raises(BadInputError, match="no system role"):
        chat_prompt(refusing, "q", "s")


def test_the_papers_setting():
    paper = SETTINGS["paper"]
    assert (paper.temperature, paper.top_p, paper.max_new_tokens) == (0.6, 0.95, 32768)
    assert (paper.samples, paper.chat_template) == (1, True)


def test_samples_of_the_first_files_are_read(tmp_path):
    result = evaluate(ScriptedEngine(right_below(9)), ITEMS, EvalConfig())
    table = pa.Table.from_pylist(result.samples, schema=SAMPLE_SCHEMA)
    pq.write_table(table.drop_columns(["task", "timed_out"]), tmp_path / "old.parquet")
    assert read_samples(tmp_path / "old.parquet") == result.samples


def test_prompts():
    assert build_prompt("q", "direct") == "Problem: q <think> </think> <answer>"
    assert build_prompt("q", "reason", "s") == "s\nProblem: q <think>"


def test_the_result_lists_what_two_gradings_judge_differently(tmp_path):
    said = {
        "What is 1+1?": "\\boxed{2}",
        "A third?": "\\boxed{0.333333}",  # math-verify rounds, we do not
        "Ten metres?": "\\boxed{10 cm}",
        "Too long?": "\\boxed{" + "1+" * 20_000 + "1}",
        "Which?": "Answer: B",
    }
    items = [
        EvalItem("a", "What is 1+1?", "2"),
        EvalItem("b", "A third?", "\\frac{1}{3}"),
        EvalItem("c", "Ten metres?", "10 m"),
        EvalItem("d", "Too long?", "5"),
        EvalItem("e", "Which?", "B", choice=True),
    ]

    def answer(prompt, _stream):
        return " </think> " + next(text for asked, text in said.items() if asked in prompt)

    result = evaluate(ScriptedEngine(answer), items, EvalConfig())
    assert [row["correct"] for row in result.samples] == [True, False, False, False, True]
    grading = result.to_dict()["grading"]
    assert grading["compared"] == 3  # a letter and a refused answer have no second verdict
    assert grading["refused"] == 1
    assert [row["id"] for row in grading["answers"]] == ["b", "c"]
    assert (grading["differing"], grading["only_math_verify"], grading["only_resa_lens"]) == (
        2,
        2,
        0,
    )
    assert "40,001" in result.samples[3]["refused"]
    write_samples(result, tmp_path / "samples.parquet")
    assert read_samples(tmp_path / "samples.parquet") == result.samples
    assert Grading.model_validate(grading).answers[0].math_verify


def test_extraction_by_name():
    def boxed_first(_prompt, _stream):
        return " </think> It is $\\boxed{7}$. No: Answer: 8"

    items = [EvalItem("q", "What is 3+4?", "7")]
    for name, answer in (("resa", "7"), ("boxed", "7"), ("lighteval", "7")):
        (row,) = evaluate(ScriptedEngine(boxed_first), items, EvalConfig(extraction=name)).samples
        assert row["answer"] == answer
    (row,) = evaluate(
        ScriptedEngine(lambda *_: " </think> Answer: 7"), items, EvalConfig(extraction="boxed")
    ).samples
    assert (row["answer"], row["correct"]) == (None, False)
    with pytest.raises(BadInputError, match="'theirs'"):
        EvalConfig(extraction="theirs")  # pyright: ignore[reportArgumentType]


def test_questions_that_fit_a_context():
    def tokenizer(texts):
        return {"input_ids": [text.split() for text in texts]}

    items = [EvalItem(str(n), "x " * n + "y", "1") for n in (1, 3, 8)]
    asked = ask(items, EvalConfig(samples=2, generation=GenerationConfig(temperature=1.0)))
    lengths = [len(one.prompt.split()) for one in asked]
    for context, left in ((lengths[-1] + 1, 0), (lengths[-1], 1), (lengths[0] + 1, 2), (None, 0)):
        fitting, left_out = answerable(asked, tokenizer, context)
        assert (left_out, len(fitting)) == (left, 6 - 2 * left)
    with pytest.raises(BadInputError, match=f"shortest prompt has {lengths[0]} tokens"):
        answerable(asked, tokenizer, lengths[0])
