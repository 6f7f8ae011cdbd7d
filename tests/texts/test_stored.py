"""Records on the disk are those in memory, to the last bit of every batch made of them."""

from __future__ import annotations

import itertools
import json
import os
import random
import time
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from resa_lens.errors import BadInputError, DamagedError, RunFailedError
from resa_lens.models.host import load_model
from resa_lens.stages.saes import split_records
from resa_lens.texts import corpora, stored
from resa_lens.texts.corpora import BEGINNING, CorpusConfig, Position, Record
from resa_lens.texts.phases import (
    PhasedBatch,
    permutation,
    phased_batches,
    phased_texts,
    stored_batches,
)
from resa_lens.texts.stored import Selection, StoredRecords
from resa_lens.texts.tables import iterate_rows, read_table

ROWS = [
    {
        "question": f"What is {n} + {n}?\u2028½ 题",
        "answer": str(2 * n) if n % 50 else "any number such as that",
        "steps": f"{n} + {n} = {2 * n}" if n % 3 else "",
        "level": n % 4,
    }
    for n in range(1, 261)
]
CONFIG = CorpusConfig(sequence=48, thought_share=0.5, seed=3)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_model("tiny-reasoner").tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(stored, "SETTLED_S", 0.0)
    return tmp_path / "cache" / "resa-lens" / "records"


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=100)
    elif path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(f'"{v}"' for v in r.values()) for r in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def both(monkeypatch: pytest.MonkeyPatch, path: Path) -> tuple[list[Record], StoredRecords]:
    listed = corpora.load_records(str(path))
    monkeypatch.setattr(stored, "IN_MEMORY", 0)
    large = corpora.load_records(str(path))
    assert isinstance(listed, list)
    assert isinstance(large, StoredRecords)
    return listed, large


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "folder"])
def test_the_same_records_hash_split_and_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Any, form: str
) -> None:
    path = tmp_path / ("shards" if form == "folder" else f"data.{form}")
    if form == "folder":
        for shard, first in enumerate(range(0, len(ROWS), 90)):
            write(path / "data" / f"train-{shard}.parquet", ROWS[first : first + 90])
    else:
        write(path, ROWS)
    listed, large = both(monkeypatch, path)
    assert list(large) == listed
    assert len(listed) == len(ROWS)
    assert corpora.hash_records(large) == corpora.hash_records(listed)
    assert corpora.doubtful(large, "d") == corpora.doubtful(listed, "d") != []
    loose = CorpusConfig(thought_share=None)
    assert corpora.settled(loose, large) == corpora.settled(loose, listed)
    for mine, theirs in zip(split_records(large), split_records(listed), strict=True):
        assert list(mine) == list(theirs)
        a, b = (
            list(corpora.batches(tokenizer, part, CONFIG, tokens=6000, batch=2))
            for part in (mine, theirs)
        )
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert list(phased_texts(mine, CONFIG)) == list(phased_texts(theirs, CONFIG))


def test_order_and_split_are_those_of_lists_of_records() -> None:
    """As they were drawn before records could lie on the disk: old identities stay right."""
    records = [Record(f"q{n}", str(n)) for n in range(220)]
    rng, order = random.Random("corpus/3"), list(records)
    expected = []
    for _ in range(2):
        rng.shuffle(order)
        expected += [(record, rng.random() < 0.5) for record in order]
    drawn = itertools.islice(corpora.epochs(records, CONFIG), 440)
    assert [(record, system is not None) for record, system in drawn] == expected
    numbers = list(range(220))
    random.Random("held out").shuffle(numbers)
    training, held_out = split_records(records)
    assert list(held_out) == [records[n] for n in sorted(numbers[:11])]
    assert list(training) == [records[n] for n in sorted(numbers[11:])]


@pytest.mark.parametrize("count", [0, 1, 5, 6, 21, 22, 500])
def test_a_permutation_is_pythons_sample_and_leaves_the_same_state(count: int) -> None:
    ours, theirs = random.Random(7), random.Random(7)
    assert list(permutation(ours, count)) == theirs.sample(range(count), count)
    if count:
        assert ours.random() == theirs.random()


def test_texts_and_half_characters_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = write(tmp_path / "texts.jsonl", [{"text": "a\nb"}, {"text": "c"}])
    listed, large = both(monkeypatch, texts)
    assert list(large) == listed == [Record("", "", text="a\nb"), Record("", "", text="c")]
    half = tmp_path / "half.jsonl"
    half.write_text(json.dumps({"question": "q", "answer": '["\\ud800"]'}) + "\n")
    assert list(corpora.load_records(str(half))) == [Record("q", "\ud800")]
    assert large[-1] == large[1] == large[1:][0]
    with pytest.raises(IndexError):
        large[2]


# Positions


class Watched(Sequence[Record]):
    """Records that remember which of them were looked up."""

    def __init__(self, count: int) -> None:
        self.records = [Record(f"What is {n} + 1?", str(n + 1)) for n in range(count)]
        self.seen: list[int] = []

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        self.seen.append(index)
        return self.records[index]


def test_from_every_position_the_same_batches_follow(tokenizer: Any) -> None:
    """Over three epochs; what lies before the position is not looked up again."""

    def whole() -> corpora.Batches:
        return corpora.batches(tokenizer, records, CONFIG, tokens=4800, batch=2)

    records = Watched(30)
    stream = whole()
    assert stream.position == BEGINNING
    expected, positions = [], []
    for batch in stream:
        expected.append(batch)
        positions.append(stream.position)
    assert len(expected) == 50
    assert positions[-1].document > 60
    drawn = len(records.seen)
    for done, position in enumerate(positions, start=1):
        again, records.seen = whole(), []
        again.go_on(done, Position(*json.loads(json.dumps(position))))
        following = list(again)
        assert len(following) == 50 - done
        assert all(torch.equal(a, b) for a, b in zip(following, expected[done:], strict=True))
        assert len(records.seen) <= max(64, drawn - position.document + 64)
    assert records.seen == []  # behind the last batch nothing is read


def test_stored_tokens_are_the_batches_in_memory_and_are_tokenised_once(
    tmp_path: Path, tokenizer: Any
) -> None:
    texts = [f"Problem: {n} <think> {'1 ' * (n % 9)} </think> {n}" for n in range(150)]
    listed = phased_batches(tokenizer, texts, tokens=1500, longest=14)
    kept = stored_batches(tmp_path / "t", tokenizer, texts, tokens=1500, longest=14)

    def same(a: Sequence[PhasedBatch], b: Sequence[PhasedBatch]) -> bool:
        pairs = zip(a, b, strict=True)
        return all(torch.equal(x, y) for p, q in pairs for x, y in zip(p, q, strict=True))

    assert same(kept, listed)
    assert same(kept[3:5], listed[3:5])
    assert kept.tokens == sum(batch.ids.numel() for batch in listed)
    assert kept[kept.largest].ids.numel() == max(batch.ids.numel() for batch in listed)
    ids, phases = kept.document(0)
    assert tokenizer.decode(ids).startswith("Problem: 0")
    assert len(ids) == len(phases)
    # After a kill no text is needed any more.
    assert same(stored_batches(tmp_path / "t", tokenizer, iter(()), tokens=1500), listed)


# Folders of shards


def test_a_folder_is_the_table_of_its_training_shards(tmp_path: Path) -> None:
    write(tmp_path / "set" / "data" / "train-1.jsonl", ROWS[5:9])
    write(tmp_path / "set" / "data" / "train-0.jsonl", ROWS[:5])
    write(tmp_path / "set" / "data" / "test-0.jsonl", ROWS[20:])
    write(tmp_path / "set" / ".cache" / "train.jsonl", ROWS[30:])
    (tmp_path / "set" / "dataset_infos.json").write_text("{}")
    records = corpora.load_records(str(tmp_path / "set"))
    assert [r.answer for r in records] == [r["answer"] for r in ROWS[:9]]
    write(tmp_path / "plain" / "constraints.csv", ROWS[:2])
    assert len(corpora.load_records(str(tmp_path / "plain"))) == 2


def test_what_is_wrong_with_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInputError, match=r"empty holds no \.jsonl, \.parquet"):
        corpora.load_records(str(tmp_path / "empty"))
    write(tmp_path / "two" / "a.jsonl", ROWS[:1])
    write(tmp_path / "two" / "b.csv", ROWS[:1])
    with pytest.raises(BadInputError, match=r"two holds \.csv and \.jsonl files"):
        corpora.load_records(str(tmp_path / "two"))
    write(tmp_path / "odd" / "a.jsonl", ROWS[:2])
    write(tmp_path / "odd" / "b.jsonl", [{"question": "q", "answer": ""}])
    with pytest.raises(BadInputError, match=r"odd, b\.jsonl, row 1 \(line 1\), column answer"):
        corpora.load_records(str(tmp_path / "odd"))


def test_errors_of_large_files_are_those_of_small_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    files = {
        "empty.jsonl": b"",
        "cell.jsonl": b'{"question": "q", "answer": "1"}\n{"question": "q", "answer": [1, 2]}\n',
        "json.jsonl": b'{"question": "q", "answer": "1"}\n{"question": \n',
        "bytes.jsonl": b'{"question": "q", "answer": "1"}\n{"question": "\xff"}\n',
        "columns.csv": b"frage,antwort\n1,2\n",
        "cells.csv": b"question,answer\n1,2,3\n",
    }
    for name, content in files.items():
        path, messages = tmp_path / name, []
        path.write_bytes(content)
        for limit in (2**20, -1):
            monkeypatch.setattr(stored, "IN_MEMORY", limit)
            with pytest.raises(BadInputError) as caught:
                corpora.load_records(str(path))
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
    assert list(cache.iterdir()) == []


# The cache


def test_a_table_is_read_once_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path, capsys: Any
) -> None:
    path = write(tmp_path / "data.jsonl", ROWS)
    _, large = both(monkeypatch, path)
    assert "are read once" in capsys.readouterr().err
    monkeypatch.setattr(stored, "_fill", None)
    assert corpora.hash_records(corpora.load_records(str(path))) == large.facts.hash
    assert capsys.readouterr().err == ""
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(stored, "SETTLED_S", 0.0)
    monkeypatch.setattr(stored, "IN_MEMORY", 0)
    write(path, ROWS[1:])
    changed = corpora.load_records(str(path))
    assert (len(changed), len(large)) == (len(ROWS) - 1, len(ROWS))
    assert list(cache.iterdir()) == [changed.folder]
    # Other columns are other records.
    other = corpora.load_records(str(path), answer_column="level")
    assert [r.answer for r in other[:3]] == ["2", "3", "0"]
    assert len(list(cache.iterdir())) == 2
    assert large[0] == Record("What is 1 + 1?\u2028½ 题", "2", "1 + 1 = 2", "", 1)


def test_a_changed_byte_is_named_and_a_cut_file_is_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "data.jsonl", ROWS)
    listed, large = both(monkeypatch, path)
    file = large.folder / stored.RECORDS
    content = bytearray(file.read_bytes())
    content[large.offsets[7] + 20] ^= 1
    file.write_bytes(content)
    assert large[6] == listed[6]
    with pytest.raises(DamagedError, match=r"records\.jsonl, line 8 is damaged; remove"):
        large[7]
    file.write_bytes(content[:-1])
    assert list(corpora.load_records(str(path))) == listed
    (large.folder / stored.FACTS).write_text("{")
    assert list(corpora.load_records(str(path))) == listed


def test_of_two_readers_at_once_one_file_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    path, real = write(tmp_path / "data.jsonl", ROWS), stored._fill
    first: list[StoredRecords] = []

    def fill(*args: Any) -> None:
        real(*args)
        monkeypatch.setattr(stored, "_fill", real)
        if not first:  # while this one reads, another process is ready
            first.append(stored.stored_records(read_table(path), "data"))

    monkeypatch.setattr(stored, "_fill", fill)
    second = stored.stored_records(read_table(path), "data")
    assert [*cache.iterdir()] == [second.folder] == [first[0].folder]
    assert list(second) == list(first[0])


def test_what_a_killed_reader_left_is_removed_after_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    for name, age in ((".filling-old", 90_000), (".filling-new", 60)):
        (cache / name).mkdir(parents=True)
        (cache / name / stored.RECORDS).write_text("")
        when = time.time() - age
        for place in (cache / name / stored.RECORDS, cache / name):
            os.utime(place, (when, when))
    _, large = both(monkeypatch, write(tmp_path / "data.jsonl", ROWS))
    assert {place.name for place in cache.iterdir()} == {".filling-new", large.folder.name}


def test_without_a_cache_folder_a_temporary_one_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(stored, "_TEMPORARY", {})
    listed, large = both(monkeypatch, write(tmp_path / "data.jsonl", ROWS))
    assert list(large) == listed
    assert corpora.load_records(str(tmp_path / "data.jsonl")) is large


def test_a_full_disk_leaves_nothing_and_says_where_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    path = write(tmp_path / "data.jsonl", ROWS)
    monkeypatch.setattr(stored, "IN_MEMORY", 0)
    monkeypatch.setattr(stored.np, "save", full)
    with pytest.raises(RunFailedError, match=r"No space left.*\n.*XDG_CACHE_HOME"):
        corpora.load_records(str(path))
    assert list(cache.iterdir()) == []


def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    path = write(tmp_path / "data.jsonl", ROWS)
    monkeypatch.setattr(stored, "IN_MEMORY", 0)
    real = stored.np.save

    def save(*args: Any) -> None:
        real(*args)
        write(path, ROWS[:10])

    monkeypatch.setattr(stored.np, "save", save)
    with pytest.raises(BadInputError, match=r"data\.jsonl changed while it was read"):
        corpora.load_records(str(path))
    assert list(cache.iterdir()) == []


def test_a_hub_set_beyond_memory_is_read_from_its_arrow_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "set")
    loaded = datasets.load_from_disk(str(tmp_path / "set"))
    monkeypatch.setattr(datasets, "load_dataset", lambda repo, split: loaded)
    listed, large = both(monkeypatch, Path("some/set"))
    assert list(large) == listed


# Memory


def test_of_one_row_group_a_page_is_in_memory(tmp_path: Path) -> None:
    rows = 8000
    table = pa.table({"question": ["q" * 2000] * rows, "answer": [str(n) for n in range(rows)]})
    path = tmp_path / "one.parquet"
    pq.write_table(table, path, row_group_size=rows, use_dictionary=False, compression="none")
    del table
    assert read_table(path).nbytes > 16e6
    before = pa.total_allocated_bytes()
    peaks = [pa.total_allocated_bytes() - before for _ in iterate_rows(path)]
    assert len(peaks) == rows
    assert max(peaks) < 6e6


def test_a_selection_copies_no_record() -> None:
    records = Watched(1000)
    training, held_out = split_records(records)
    assert (len(training), len(held_out)) == (950, 50)
    assert records.seen == []
    assert isinstance(training, Selection)
    assert isinstance(training.indices, array)
    assert training.indices.itemsize == 8
