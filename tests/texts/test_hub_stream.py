"""The first rows of a hub data set: what is asked of a hub on localhost, and what is kept."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from resa_lens.texts import corpora, stored
from resa_lens.texts.records import Record

REPO = "someone/problems"
SHARDS, GROUPS, ROWS = 3, 5, 100
"""Of the data set: files, row groups of each, and rows of each of those."""
READ = """
import json, sys
from resa_lens.texts import corpora, hub
hub.ROWS_A_FILE = 150
records = corpora.load_records(sys.argv[1], rows=int(sys.argv[2]))
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
        headers = {"ETag": '"x"', "X-Repo-Commit": server.commit}
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

    def __call__(self, rows: int, *, offline: bool = False) -> Any:
        """Return the hash, the number and the last question; or what was said where it failed."""
        done = subprocess.run(
            [sys.executable, "-c", READ, REPO, str(rows)], capture_output=True, text=True,
            env={**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{self.hub.server_port}",
                 "HF_HOME": str(self.home / "hf"), "XDG_CACHE_HOME": str(self.home / "cache"),
                 "HF_HUB_OFFLINE": str(int(offline)), "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        )  # fmt: skip
        return json.loads(done.stdout) if done.returncode == 0 else done.stderr

    @property
    def files(self) -> list[Path]:
        """What is kept of the stream."""
        return sorted((self.home / "cache" / "resa-lens" / "streams").rglob("*.parquet"))


@pytest.fixture
def read(hub: Any, tmp_path: Path) -> Reader:
    return Reader(hub, tmp_path)


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
    assert [pq.read_metadata(file).num_rows for file in read.files] == [150, 150, 150]
    hub.sent.clear()
    assert read(450, offline=True) == [expected(450), 450, "q000449 why "]
    assert read(200, offline=True) == [expected(200), 200, "q000199 why "]
    assert hub.sent == {}
    refused = read(451, offline=True)
    assert f"hf download {REPO} --repo-type dataset" in refused


def test_a_stream_that_breaks_off_goes_on_where_it_stood(hub: Any, read: Reader) -> None:
    size = max(map(len, hub.content.values()))
    hub.most = int(2.5 * size)
    said = read(1200)
    assert f"the stream of {REPO} broke off after 450 of 1,200 rows" in said
    assert "run again to go on" in said
    assert len(read.files) == 3
    hub.most = None
    hub.sent.clear()
    assert read(1200) == [expected(1200), 1200, "q001199 why "]
    assert len(read.files) == 8


@pytest.mark.slow
def test_a_damaged_file_is_fetched_again_and_a_short_data_set_is_whole(
    hub: Any, read: Reader
) -> None:
    whole = [expected(1500), 1500, "q001499 why "]
    assert read(10_000) == whole
    middle = read.files[4]
    middle.write_bytes(middle.read_bytes()[:-1] + b"?")
    assert read(10_000) == whole
    # All of it is known to be here: nothing is asked for again.
    hub.sent.clear()
    assert read(20_000) == whole
    assert hub.sent == {}


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
