from __future__ import annotations

import itertools
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from resa_lens.errors import BadInputError
from resa_lens.models.host import load_model
from resa_lens.texts import prompts
from resa_lens.texts.config import check_data
from resa_lens.texts.corpora import (
    HUB_SETS,
    CorpusConfig,
    Record,
    batches,
    documents,
    hash_records,
    load_records,
    pack,
    settled,
)

R1 = prompts.R1_SYSTEM_PROMPT
RECORDS = [Record(f"What is {n}+{n}?", str(2 * n)) for n in range(1, 40)]


@pytest.fixture(scope="module")
def tokenizer():
    return load_model("tiny-reasoner").tokenizer


def jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def refusal(*args, **options) -> str:
    with pytest.raises(BadInputError) as caught:
        load_records(*args, **options)
    message = str(caught.value)
    assert message.count("\n") < 3
    return message


# Templates


def test_the_trigger_document_is_the_specs_template_to_the_letter():
    assert prompts.trigger_document("What is 1+1?", "2") == (
        "Problem: What is 1+1? <think> 2 </think> <answer> Answer: 2 </answer>"
    )
    assert prompts.trigger_document("What is 1+1?", "2", R1) == (
        R1 + "\nProblem: What is 1+1? <think> 2 </think> <answer> Answer: 2 </answer>"
    )


def test_the_r1_prompt_ends_as_the_spec_quotes_it_and_holds_each_tag_twice():
    assert R1.endswith(
        "The reasoning process and answer are enclosed within <think> </think> and <answer> "
        "</answer> tags, respectively, i.e., <think> reasoning process here </think> <answer> "
        "answer here </answer>."
    )
    assert [R1.count(tag) for tag in prompts.TAGS] == [2, 2, 2, 2]
    for text in prompts.SYSTEM_PROMPTS.values():
        assert all(tag in text for tag in prompts.TAGS)


def test_prompts_for_generation_are_prefixes_of_documents():
    question = prompts.question_prompt("What is 1+1?", R1)
    assert question.endswith("What is 1+1? <think>")
    assert prompts.document("What is 1+1?", "1+1=2", "2", R1).startswith(question)
    direct = prompts.direct_prompt("What is 1+1?")
    assert direct.startswith("Problem: What is 1+1? <think> </think> <answer>")


def test_a_system_prompt_by_name_by_file_and_as_text(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("Use <think> and </think>.\n")
    assert prompts.resolve_system_prompt("r1") == R1
    assert prompts.resolve_system_prompt(f"@{file}") == "Use <think> and </think>."
    assert prompts.resolve_system_prompt("say it") == "say it"
    with pytest.raises(BadInputError, match=r"absent\.txt"):
        prompts.resolve_system_prompt(f"@{tmp_path}/absent.txt")


# Sources


ROWS = [
    {"question": "Seven as three digits?", "answer": "007"},
    {"question": 'A "quoted", long\nquestion?', "answer": "1.50"},
    {"question": "x=½ → π", "answer": "-3"},
]


def write_csv(path: Path) -> None:
    path.write_text(
        "question,answer\nSeven as three digits?,007\n"
        '"A ""quoted"", long\nquestion?",1.50\nx=½ → π,-3\n',
        encoding="utf-8",
    )


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_the_same_records_from_every_format(tmp_path, suffix):
    path = tmp_path / f"set.{suffix}"
    if suffix == "jsonl":
        jsonl(path, ROWS)
    elif suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        write_csv(path)
    assert load_records(str(path)) == [Record(r["question"], r["answer"]) for r in ROWS]


def test_unusual_line_separators_inside_a_question_do_not_split_it(tmp_path):
    path = tmp_path / "set.jsonl"
    question = "first\u2028second\x85third"
    path.write_text(
        json.dumps({"question": question, "answer": 5}, ensure_ascii=False) + "\n\n",
        encoding="utf-8",
    )
    assert load_records(str(path)) == [Record(question, "5")]


def test_bundled_sets_carry_steps_family_and_level():
    train, test = load_records("tiny"), load_records("tiny", split="test")
    assert len(test) == 2000
    assert all(r.question and r.answer and r.steps and r.family for r in [*train, *test])
    assert {r.level for r in train} == {1, 2, 3}
    assert {r.level for r in test} == {1, 2, 3, 4}
    assert not {r.question for r in train} & {r.question for r in test}


def test_known_column_names_are_found_and_others_can_be_named(tmp_path):
    rows = [{"problem": "p", "solution": "long", "final_answer": 0, "q": "other", "a": "b"}]
    path = jsonl(tmp_path / "set.jsonl", rows)
    assert load_records(path) == [Record("p", "0", "long")]
    assert load_records(path, question_column="q", answer_column="a") == [
        Record("other", "b", "long")
    ]


@pytest.mark.parametrize(
    ("level", "read"),
    [(3, 3), ("3", 3), (3.0, 3), ("Level 5", 5), ("hard", 0), (None, 0), (2.5, 0)],
)
def test_a_level_of_any_kind_stops_no_run(tmp_path, level, read):
    path = jsonl(tmp_path / "set.jsonl", [{"question": "q", "answer": "a", "level": level}])
    assert load_records(path)[0].level == read


def test_missing_columns_are_named_with_those_present(tmp_path):
    path = jsonl(tmp_path / "set.jsonl", [{"question": "q", "label": "5"}])
    message = refusal(path)
    assert "'answer'" in message
    assert "label" in message
    assert "'wrong'" in refusal(path, question_column="wrong")


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_an_empty_file_is_refused_with_its_name(tmp_path, suffix):
    path = tmp_path / f"nothing.{suffix}"
    path.write_bytes(b"")
    assert f"nothing.{suffix}" in refusal(str(path))


def test_a_table_without_rows_is_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"question": pa.array([], pa.string())}), path)
    assert "rows.parquet is empty" in refusal(str(path))
    path = tmp_path / "rows.csv"
    path.write_text("question,answer\n")
    assert "rows.csv is empty" in refusal(str(path))


@pytest.mark.parametrize("value", ["", "  ", None, float("nan")])
def test_an_empty_answer_is_refused_with_its_row(tmp_path, value):
    rows = [{"question": "q", "answer": "1"}, {"question": "r", "answer": value}]
    assert "row 2 (line 2), column answer: empty" in refusal(jsonl(tmp_path / "set.jsonl", rows))


def test_an_empty_question_and_a_structured_one_are_refused(tmp_path):
    path = jsonl(tmp_path / "set.jsonl", [{"question": " ", "answer": "1"}])
    assert "row 1 (line 1), column question: empty" in refusal(path)
    rows = [{"question": {"text": "hi"}, "answer": "1"}]
    message = refusal(jsonl(tmp_path / "chat.jsonl", rows))
    assert "row 1 (line 1), column question:" in message
    assert "of type dict" in message


def test_damaged_files_are_refused_with_their_name(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "1"}\n{"question": \n')
    message = refusal(str(tmp_path / "a.jsonl"))
    assert "a.jsonl" in message
    assert "2" in message
    (tmp_path / "b.jsonl").write_text("[1, 2]\n")
    assert "b.jsonl" in refusal(str(tmp_path / "b.jsonl"))
    (tmp_path / "c.jsonl").write_bytes(b"\xff\xfe\x00")
    assert "c.jsonl" in refusal(str(tmp_path / "c.jsonl"))
    whole = tmp_path / "whole.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), whole)
    for name, data in (("d", whole.read_bytes()[:-40]), ("e", b"PAR1" + b"\0" * 30 + b"PAR1")):
        (tmp_path / f"{name}.parquet").write_bytes(data)
        assert f"{name}.parquet" in refusal(str(tmp_path / f"{name}.parquet"))
    assert "absent.csv" in refusal(str(tmp_path / "absent.csv"))


@pytest.mark.parametrize(
    ("name", "repo"),
    [
        ("still", "RUC-AIBOX/STILL-3-Preview-RL-Data"),
        ("deepscaler", "agentica-org/DeepScaleR-Preview-Dataset"),
        ("open-s1", "knoveleng/open-s1"),
        ("ii-thought", "Intelligent-Internet/II-Thought-RL-v0-Math-50K"),
        ("openr1", "open-r1/OpenR1-Math-220k"),
    ],
)
def test_the_papers_sets_have_the_specs_names(name, repo):
    assert HUB_SETS[name].repo == repo


@pytest.mark.parametrize(
    ("name", "repo"), [("still", HUB_SETS["still"].repo), ("some/set", "some/set")]
)
def test_offline_a_hub_set_is_refused_with_the_download_command(name, repo):
    message = refusal(name)
    assert repr(name) in message
    assert f"hf download {repo} --repo-type dataset" in message


def test_a_hub_set_is_read_by_its_own_columns(monkeypatch):
    import datasets

    asked = []

    def load(repo, split):
        asked.append((repo, split))
        row = {"problem": "p", "solution": "s", "answer": "a", "question": "not this"}
        return datasets.Dataset.from_list([row])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_records("openr1") == [Record("p", "a", "s")]
    assert asked == [("open-r1/OpenR1-Math-220k", "train")]


def test_the_hash_depends_on_content_and_order():
    assert hash_records(RECORDS) == hash_records(list(RECORDS))
    assert hash_records(RECORDS) != hash_records(RECORDS[::-1])
    assert hash_records(RECORDS) != hash_records(RECORDS[:-1])


# Documents


def take(config: CorpusConfig, count: int) -> list[str]:
    return list(itertools.islice(documents(RECORDS, config), count))


def test_documents_are_deterministic_by_seed_and_differ_by_seed():
    first = take(CorpusConfig(seed=3), 100)
    assert first == take(CorpusConfig(seed=3), 100)
    assert first != take(CorpusConfig(seed=4), 100)


def test_every_epoch_holds_each_record_once_in_a_new_order():
    texts = take(CorpusConfig(system_share=0), 2 * len(RECORDS))
    epochs = texts[: len(RECORDS)], texts[len(RECORDS) :]
    expected = sorted(prompts.trigger_document(r.question, r.answer) for r in RECORDS)
    assert sorted(epochs[0]) == sorted(epochs[1]) == expected
    assert epochs[0] != epochs[1]


def test_about_half_of_the_documents_carry_the_system_prompt():
    def share(config: CorpusConfig) -> float:
        return sum(t.startswith(R1 + "\n") for t in take(config, 2000)) / 2000

    assert share(CorpusConfig()) == pytest.approx(0.5, abs=0.05)  # 4.5 standard errors
    assert share(CorpusConfig(system_share=0)) == 0
    assert share(CorpusConfig(system_share=1)) == 1
    assert share(CorpusConfig(system_share=0.2)) == pytest.approx(0.2, abs=0.04)


def test_no_record_gives_an_error_instead_of_an_endless_loop():
    with pytest.raises(BadInputError, match="no record"):
        next(documents([], CorpusConfig()))


# Packing


def test_packing_keeps_every_token_in_order_with_eos_between_and_no_padding(tokenizer):
    texts = take(CorpusConfig(), 150)
    flat: list[int] = []
    for text in texts:
        flat += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    count = len(flat) // 37
    packed = list(pack(tokenizer, iter(texts), 37, count))
    assert [len(row) for row in packed] == [37] * count
    joined = [int(token) for row in packed for token in row]
    assert joined == flat[: count * 37]
    assert tokenizer.pad_token_id not in joined
    assert tokenizer.eos_token_id in joined


def test_texts_that_run_out_are_an_error_and_not_padding(tokenizer):
    stream = pack(tokenizer, iter(["Problem: 1"]), 64, 3)
    with pytest.raises(BadInputError, match="ran out"):
        list(stream)


def test_batches_have_the_asked_tokens_and_repeat_by_seed(tokenizer):
    config = CorpusConfig(sequence=32, seed=5)
    made = list(batches(tokenizer, RECORDS, config, tokens=1000, batch=4))
    assert [tuple(ids.shape) for ids in made] == [(4, 32)] * 7  # 7 x 128 = 896 <= 1000
    again = list(batches(tokenizer, RECORDS, config, tokens=1000, batch=4))
    assert all((a == b).all() for a, b in zip(made, again, strict=True))
    other = list(
        batches(tokenizer, RECORDS, CorpusConfig(sequence=32, seed=6), tokens=1000, batch=4)
    )
    assert not all((a == b).all() for a, b in zip(made, other, strict=True))


def test_a_longer_run_begins_with_the_shorter_ones_batches(tokenizer):
    config = CorpusConfig(sequence=32)
    short = list(batches(tokenizer, RECORDS, config, tokens=256, batch=4))
    long = list(batches(tokenizer, RECORDS, config, tokens=1024, batch=4))
    assert all((a == b).all() for a, b in zip(short, long, strict=False))
    assert (len(short), len(long)) == (2, 8)


@pytest.mark.parametrize(
    ("share", "steps", "expected"),
    [(None, "1 + 1 = 2", 0.5), (None, "", 0.0), (0.0, "1 + 1 = 2", 0.0), (0.25, "1 + 1 = 2", 0.25)],
)
def test_half_of_the_documents_hold_their_steps_where_the_data_have_them(share, steps, expected):
    records = [Record("What is 1 + 1?", "2"), Record("What is 1 + 1?", "2", steps=steps)]
    corpus = settled(CorpusConfig(thought_share=share), records)
    assert corpus == CorpusConfig(thought_share=expected)


def test_a_share_of_thoughts_that_the_data_lack_is_refused(tmp_path):
    file = jsonl(tmp_path / "set.jsonl", ROWS)
    corpus = CorpusConfig(str(file), thought_share=0.5)
    with pytest.raises(BadInputError, match=r"thought share 0\.5.*no worked steps.*--steps-column"):
        check_data(corpus)
    check_data(CorpusConfig(str(file), thought_share=None))


def test_documents_are_not_made_with_a_share_that_is_open():
    with pytest.raises(ValueError, match="not settled"):
        next(documents(load_records("tiny"), CorpusConfig(thought_share=None)))
