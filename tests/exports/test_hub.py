"""SAEs and adapters for a hub: what the folder holds, its card read back, and a push to a hub."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from resa_lens.artifacts.kinds.adapter import Adapter
from resa_lens.artifacts.kinds.counts import Counts
from resa_lens.artifacts.kinds.saes import Saes
from resa_lens.artifacts.listing import scan
from resa_lens.errors import BadInputError
from resa_lens.exports.hub import check_card, write_package
from resa_lens.saes.formats import load_coder

REPOSITORY = "someone/saes"


class Hub(BaseHTTPRequestHandler):
    """What `huggingface_hub` asks of a hub to make a repository and commit files to it."""

    files: dict[str, bytes]
    refuse: int

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        server: Any = self.server
        url = f"http://127.0.0.1:{server.server_port}/{REPOSITORY}"
        if server.refuse:
            self.answer({"error": "no"}, server.refuse)
        elif self.path == "/api/repos/create":
            server.asked = json.loads(body)
            self.answer({"url": url})
        elif "preupload" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for f in json.loads(body)["files"]]  # fmt: skip
            self.answer({"files": files})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    server.files[entry["value"]["path"]] = content
            self.answer({"commitUrl": f"{url}/commit/1", "commitOid": "1" * 40, "success": True})
        else:
            self.answer({"errors": [], "warnings": []})

    def do_GET(self) -> None:
        self.answer({"id": REPOSITORY, "sha": "0" * 40, "siblings": []})

    def answer(self, value: dict[str, Any], status: int = 200) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def hub() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.refuse, server.asked = {}, 0, {}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def pushed(demo: Any, hub: Any, target: Path, source: str, **env: str) -> Any:
    return subprocess.run(
        [sys.executable, "-m", "resa_lens", "export", source, str(target), "--to", "hub", "--push",
         REPOSITORY, "--workspace", str(demo.workspace), "--json"],
        capture_output=True, text=True,
        env={**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_TOKEN": "x",
             "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **env},
    )  # fmt: skip


def test_saes_with_their_card_are_read_back(demo: Any, tmp_path: Path) -> None:
    listing = scan(demo.workspace)
    saes = next(a for a in listing.of(Saes) if listing.made_of(a, Counts))
    package = write_package(listing, saes, tmp_path / "out")
    card = check_card(tmp_path / "out" / "README.md")
    assert card.data.to_dict()["base_model"] == "tiny-reasoner"
    assert card.data.to_dict()["library_name"] == "sparsify"
    text = card.text
    for row in saes.results.layers:
        assert f"| {row.fvu:.4f} |" in text
    counts = listing.made_of(saes, Counts)[0]
    total = sum(counts.results.table("either").values())
    assert f"| either | {total} |" in text
    assert str(demo.workspace) not in text
    # What is read from the folder is what lies in the workspace.
    for row in saes.results.layers:
        name = f"layers.{row.layer}.mlp"
        ours, theirs = load_coder(saes.path / name), load_coder(tmp_path / "out" / name)
        for key, value in ours.state_dict().items():
            assert torch.equal(value, theirs.state_dict()[key])
    assert not any("manifest" in name for name in package.files)


def test_an_adapter_goes_out_with_the_card_that_it_has(demo: Any, tmp_path: Path) -> None:
    listing = scan(demo.workspace)
    adapter = listing.of(Adapter)[0]
    package = write_package(listing, adapter, tmp_path / "out")
    assert package.files == ("README.md", "adapter_config.json", "adapter_model.safetensors")
    assert "## Lineage" in check_card(tmp_path / "out" / "README.md").text
    with pytest.raises(BadInputError, match="a hub takes SAEs and adapters"):
        write_package(listing, listing.of(Counts)[0], tmp_path / "no")


def test_a_push_commits_every_file(demo: Any, hub: Any, tmp_path: Path) -> None:
    source = scan(demo.workspace).of(Adapter)[0]
    done = pushed(demo, hub, tmp_path / "out", source.relative)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert hub.asked["visibility"] == "private"
    assert set(result["files"]) == set(hub.files) - {".gitattributes"}
    for name in result["files"]:
        assert hub.files[name] == (tmp_path / "out" / name).read_bytes()
    assert REPOSITORY in result["url"]


@pytest.mark.slow
def test_a_hub_that_refuses_or_is_not_there_is_one_line(
    demo: Any, hub: Any, tmp_path: Path
) -> None:
    source = scan(demo.workspace).of(Adapter)[0].relative
    hub.refuse = 403
    done = pushed(demo, hub, tmp_path / "out", source)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: someone/saes: no right to write")
    done = pushed(demo, hub, tmp_path / "off", source, HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "cannot be reached" in done.stderr
    # The folder is whole all the same.
    assert (tmp_path / "off" / "README.md").exists()
