"""The first rows of a hub data set: what is asked of a hub on localhost, and what is kept."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from resa_lens.cli.options import build, options_of
from resa_lens.cli.tuning import Tune
from resa_lens.errors import BadInputError
from resa_lens.evals.tasks import load_questions
from resa_lens.models.unloaded import read_unloaded
from resa_lens.stages.expert_texts import expert_data
from resa_lens.texts import corpora, stored
from resa_lens.texts.config import CorpusConfig
from resa_lens.texts.records import Record

REPO = "someone/problems"
SHARDS, GROUPS, ROWS = 3, 5, 100
"""Of the data set: files, row groups of each, and rows of each of those."""
READ = """
import json, sys
from resa_lens.texts import corpora, hub
hub.ROWS_A_FILE, hub.TIMEOUT_S, hub.WAIT_S = 150, 3, 0.1
rows = int(sys.argv[2]) or None
records = corpora.load_records(sys.argv[1], rows=rows)
print(json.dumps([corpora.hash_records(records), len(records), records[-1].question[:12]]))
"""


def rows_of(shard: int) -> list[dict[str, str]]:
    rows = range(shard * GROUPS * ROWS, (shard + 1) * GROUPS * ROWS)
    return [{"question": f"q{n:06d} {'why ' * 50}", "answer": str(n)} for n in rows]


class Hub(BaseHTTPRequestHandler):
    """What `datasets` asks of a hub to stream the parquet files of a data set."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        paths = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
        files: Any = self.server
        known = [self.entry(path) for path in paths if path in files.content]
        self.answer(json.dumps(known).encode())

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        server: Any = self.server
        path = unquote(urlparse(self.path).path)
        if match := re.match(rf"/datasets/{REPO}/resolve/[^/]+/(.*)", path):
            self.file(server.content.get(match[1]), match[1], body)
        elif "/tree/" in path:
            below = path.split("/tree/")[1].partition("/")[2]
            folder = {"type": "directory", "path": "data", "size": 0, "oid": "c" * 40}
            entries = [self.entry(name) for name in server.content] if below else [folder]
            self.answer(json.dumps(entries).encode())
        elif server.silent:
            self.answer(b"", 503)
        elif path.startswith(f"/api/datasets/{REPO}"):
            siblings = [{"rfilename": name} for name in server.content]
            info = {"id": REPO, "sha": server.commit, "siblings": siblings, "tags": []}
            self.answer(json.dumps(info).encode())
        else:
            self.answer(b"{}", 404)

    def entry(self, path: str) -> dict[str, Any]:
        server: Any = self.server
        return {"type": "file", "path": path, "size": len(server.content[path]), "oid": "b" * 40}

    def file(self, content: bytes | None, name: str, body: bool) -> None:
        server: Any = self.server
        if content is None:
            self.answer(b"", 404, **{"X-Error-Code": "EntryNotFound"})
            return
        headers = {"ETag": f'"{zlib.crc32(content)}"', "X-Repo-Commit": server.commit}
        if asked := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("range") or ""):
            first, last = int(asked[1]), int(asked[2] or len(content) - 1)
            whole, content = len(content), content[first : last + 1]
            headers["content-range"] = f"bytes {first}-{first + len(content) - 1}/{whole}"
        if body:
            server.sent[name] = server.sent.get(name, 0) + len(content)
            if server.most is not None and sum(server.sent.values()) > server.most:
                self.answer(b"", 403)
                return
        self.answer(content, 206 if asked else 200, body=body, **headers)

    def answer(self, text: bytes, status: int = 200, body: bool = True, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"content-type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        if body:
            self.wfile.write(text)


@pytest.fixture
def hub() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.sent, server.commit, server.most, server.content = {}, "a" * 40, None, {}
    server.silent = False
    for shard in range(SHARDS):
        file = io.BytesIO()
        table = pa.Table.from_pylist(rows_of(shard))
        pq.write_table(table, file, row_group_size=ROWS, compression="none", use_dictionary=False)
        server.content[f"data/train-{shard:05d}-of-{SHARDS:05d}.parquet"] = file.getvalue()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


class Reader:
    """A process that reads the first rows of a data set."""

    def __init__(self, hub: Any, home: Path) -> None:
        self.hub, self.home = hub, home

    def start(self, rows: int, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", READ, REPO, str(rows)], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{self.hub.server_port}",
                 "HF_HOME": str(self.home / "hf"), "XDG_CACHE_HOME": str(self.home / "cache"),
                 "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **env},
        )  # fmt: skip

    def __call__(self, rows: int, **env: str) -> Any:
        """Return the hash, the number and the last question; or what was said where it failed."""
        process = self.start(rows, **env)
        out, err = process.communicate(timeout=120)
        return json.loads(out) if process.returncode == 0 else err

    @property
    def files(self) -> list[Path]:
        """What is kept of the stream."""
        return sorted((self.home / "cache" / "resa-lens" / "streams").rglob("*.jsonl"))


@pytest.fixture
def read(hub: Any, tmp_path: Path) -> Reader:
    return Reader(hub, tmp_path)


OFFLINE = {"HF_HUB_OFFLINE": "1"}
NOWHERE = {"HF_ENDPOINT": "http://127.0.0.1:9"}


def expected(count: int) -> str:
    """Return the hash of the first records."""
    rows = [row for shard in range(SHARDS) for row in rows_of(shard)][:count]
    return corpora.hash_records([Record(row["question"].strip(), row["answer"]) for row in rows])


def test_no_more_is_fetched_than_the_rows_asked_for_and_offline_they_are_there(
    hub: Any, read: Reader
) -> None:
    assert read(450) == [expected(450), 450, "q000449 why "]
    first, *others = hub.content
    # Of the first file its columns and then its rows, of the later ones nothing.
    assert [hub.sent.get(name, 0) for name in others] == [0, 0]
    assert hub.sent[first] < 2.5 * len(hub.content[first])
    assert [file.name for file in read.files] == [f"{n:012d}.jsonl" for n in (0, 150, 300)]
    hub.sent.clear()
    assert read(200, **OFFLINE) == [expected(200), 200, "q000199 why "]
    assert hub.sent == {}


@pytest.mark.slow
def test_without_an_answer_what_is_kept_is_read_and_nothing_else_fetched(
    hub: Any, read: Reader
) -> None:
    assert read(450)[1] == 450
    hub.sent.clear()
    assert f"hf download {REPO} --repo-type dataset" in read(451, **OFFLINE)
    # A hub that cannot be reached, and one that does not answer.
    assert read(450, **NOWHERE) == [expected(450), 450, "q000449 why "]
    hub.silent = True
    assert read(450) == [expected(450), 450, "q000449 why "]
    assert "450 are kept here; pass --data-rows 450, or run it once" in read(451)
    assert hub.sent == {}


@pytest.mark.slow
def test_the_whole_set_has_the_same_records(hub: Any, read: Reader) -> None:
    assert read(0) == read(2000) == [expected(1500), 1500, "q001499 why "]


@pytest.mark.slow
def test_a_stream_that_breaks_off_goes_on_where_it_stood(hub: Any, read: Reader) -> None:
    size = max(map(len, hub.content.values()))
    hub.most = int(2.5 * size)
    said = read(1200)
    assert f"the stream of {REPO} broke off after 450 of 1,200 rows" in said
    assert "run again to go on" in said
    assert len(read.files) == 3
    hub.most = None
    # Two processes at once: one fetches, the other waits for it.
    crew = [read.start(1200) for _ in range(2)]
    ended = [process.communicate(timeout=120) for process in crew]
    assert [json.loads(out) for out, _ in ended] == [[expected(1200), 1200, "q001199 why "]] * 2
    assert sum("rows are fetched; 450 are here" in err for _, err in ended) == 1
    assert len(read.files) == 8


@pytest.mark.slow
def test_a_damaged_file_is_fetched_again_and_a_short_data_set_is_whole(
    hub: Any, read: Reader
) -> None:
    whole = [expected(1500), 1500, "q001499 why "]
    assert read(10_000) == whole
    # Cut off at its end it is fetched again; what is foreign beside it is not looked at.
    middle = read.files[4]
    middle.write_bytes(middle.read_bytes()[:-1])
    (middle.parent / "notes.jsonl").mkdir()
    assert read(10_000) == whole
    # A changed byte inside is seen where it is read.
    middle.write_bytes(middle.read_bytes().replace(b"q000600", b"q000601", 1))
    assert "was damaged, and is removed; run again" in read(10_000)
    assert read(10_000) == whole
    # All of it is known to be here: nothing is asked for again.
    hub.sent.clear()
    assert read(20_000) == whole
    assert hub.sent == {}


@pytest.mark.slow
def test_rows_of_any_types_are_those_of_the_whole_set_and_a_missing_split_is_bad_input(
    hub: Any, read: Reader
) -> None:
    rows = [
        {"question": f"q{n:06d} {'why ' * 50}", "answer": n, "half": n / 2, "none": None,
         "extra": {"a": 1} if n % 2 else {"b": "x"}, "list": [n]} for n in range(40)
    ]  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in rows)
    hub.content = {"data/train.jsonl": text.encode()}
    assert read(0) == read(40) == [expected(40), 40, "q000039 why "]
    hub.content, hub.commit = {"data/test.jsonl": text.encode()}, "b" * 40
    said = read(40)
    assert "BadInputError" in said
    assert "Bad split: train" in said


def test_the_first_rows_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(0)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert corpora.hash_records(corpora.load_records(str(path), rows=450)) == expected(450)
    monkeypatch.setattr(stored, "IN_MEMORY", 0)
    for count in (450, 7):
        records = corpora.load_records(str(path), rows=count)
        assert isinstance(records, stored.StoredRecords)
        assert (len(records), corpora.hash_records(records)) == (count, expected(count))
    assert len(corpora.load_records("tiny", rows=3)) == 3
    with pytest.raises(BadInputError, match="rows 0: give 1 or more"):
        corpora.load_records("tiny", rows=0)


def test_the_first_rows_are_of_the_data_that_are_named_with_them(tmp_path: Path) -> None:
    first, other = tmp_path / "first.jsonl", tmp_path / "other.jsonl"
    for file in (first, other):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows_of(0)[:9]))
    corpus = CorpusConfig(source=str(first), rows=3)
    values = {name: option.default for name, option in options_of(Tune).items()}
    values |= {"data": str(first), "data_rows": 3}
    assert build(Tune, values).job("tiny-reasoner").trigger.rows == 3
    job = build(Tune, {**values, "trigger_data": str(other)}).job("tiny-reasoner")
    assert (job.elicitation.rows, job.trigger.rows) == (3, None)
    model = read_unloaded("tiny-moe-reasoner")
    data = expert_data(model, corpus, classes=f"{first},{other}")
    assert len(data.records) == 3
    assert [len(records) for records in data.files.values()] == [9, 9]
    assert len(load_questions(str(first), first=4)) == 4
