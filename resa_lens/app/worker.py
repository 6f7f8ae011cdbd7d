"""The process that runs what needs a model: `python -m resa_lens.app.worker`.

JSON lines in, JSON lines out, one request after the other:

    {"id": 1, "do": "respond", "with": {...}}
    {"id": 1, "progress": {"label": "...", "done": 3, "total": 160, "text": "..."}}
    {"id": 1, "result": {...}}    or    {"id": 1, "error": "one message"}
    {"cancel": 1}    a request that is not begun is skipped, without an answer

A request holds all that it needs, so a new process can answer it; this one keeps the model and the
SAEs between two of them.  It ends when its input does, whatever it is at: with the app, also where
that is killed.  Nothing is written to the workspace.

With `command ARGUMENTS ...` it is a `resa-lens` command that ends in the same way.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from resa_lens.errors import ResaLensError

if TYPE_CHECKING:
    from resa_lens.evals.engines import HFEngine
    from resa_lens.hookpoints import Hookpoint
    from resa_lens.models import Model
    from resa_lens.pipeline.lab import Document
    from resa_lens.pipeline.lab_changes import Change, Changed
    from resa_lens.pipeline.saes import SaeRun
    from resa_lens.saes.coder import SparseCoder

HELD_BYTES = 2**30
"""Of SAEs that are kept; one of 65,536 latents and width 1,536 is 0.8 GB."""
IDLE_S = 900
"""Without a request for so long the process ends, and its memory is free: a page may be forgotten,
and the next request starts a new one."""
PAUSE_S = 0.1
"""Between two progress messages."""

Tell = Callable[..., None]
"""Called with label, done, total and text."""


class Bench:
    """Answers requests, and keeps what the next one may need: one model and its SAEs."""

    def __init__(self) -> None:
        self._asked: str | None = None
        self._model: Model | None = None
        self._engine: HFEngine | None = None
        self._read: list[Path] = []
        self._state = 0
        self._coders: OrderedDict[tuple[str, int, bool], SparseCoder] = OrderedDict()

    def answer(self, do: str, values: dict[str, Any], tell: Tell) -> dict[str, Any]:
        """Do one of the requests below."""
        if "torch" not in sys.modules:
            tell("loading the libraries", 0, 3)
        known = (self.respond, self.layer, self.sum, self.change)
        return {each.__name__: each for each in known}[do](tell, **values)

    def respond(
        self,
        tell: Tell,
        *,
        model: str,
        text: str,
        raw: bool,
        generation: dict[str, Any],
        question: dict[str, Any] | None,
    ) -> dict[str, Any]:
        """Let the model go on with a prompt."""
        from resa_lens.pipeline import lab

        host, engine = self._host(model, tell)
        config = _generation(generation)
        asked = _asked(text, raw, question)
        written = _written(host, config.max_new_tokens, tell)
        made = lab.respond(host, engine, asked, config, written=written)
        return {"document": asdict(made), "prompt": asked.prompt, "model": _facts(host)}

    def layer(
        self, tell: Tell, *, model: str, saes: dict[str, Any], layer: int, ids: list[int]
    ) -> dict[str, Any]:
        """Return a layer's active features, token by token."""
        from resa_lens.hookpoints import Hookpoint
        from resa_lens.pipeline import lab

        host, _ = self._host(model, tell)
        run = _run(host, saes)
        tell("reading the SAE of the layer", 0, 1)
        point = Hookpoint(layer, run.points[0].site)
        coder = self._coder(host, run, point, decoder=False)
        acts = lab.activations(host, point, coder, ids)
        return {
            "starts": acts.starts.tolist(),
            "features": acts.latents.tolist(),
            "values": [float(f"{value:.5g}") for value in acts.values.tolist()],
            "size": acts.d_sae,
        }

    def sum(
        self,
        tell: Tell,
        *,
        model: str,
        saes: dict[str, Any],
        wanted: dict[str, list[int]],
        ids: list[int],
    ) -> dict[str, Any]:
        """Return the summed activations of some features of some layers, token by token."""
        from resa_lens.hookpoints import Hookpoint
        from resa_lens.pipeline import lab

        host, _ = self._host(model, tell)
        run = _run(host, saes)
        places = {Hookpoint(int(k), run.points[0].site): some for k, some in wanted.items()}
        total = lab.summed_values(
            host,
            places,
            lambda point: self._coder(host, run, point, decoder=False),
            ids,
            lambda done, total: tell("encoding layers", done, total),
        )
        return {"values": [float(f"{value:.5g}") for value in total.tolist()]}

    def change(
        self,
        tell: Tell,
        *,
        model: str,
        saes: dict[str, Any],
        text: str,
        raw: bool,
        generation: dict[str, Any],
        question: dict[str, Any] | None,
        document: dict[str, Any],
        wanted: dict[str, list[int]],
        how: dict[str, Any],
        draws: int,
    ) -> dict[str, Any]:
        """Let the model go on under a change, and with `draws` under that of random features."""
        from resa_lens.pipeline import lab_changes

        host, engine = self._host(model, tell)
        run = _run(host, saes)
        made = _change(wanted, how, run.points[0].site)
        plain = _document(document)
        asked, config = _asked(text, raw, question), _generation(generation)
        tell("reading the SAEs of the change", 0, 1)
        coders = {p: self._coder(host, run, p, decoder=True) for p in made.features}
        written = _written(host, config.max_new_tokens, tell)
        held = (host, engine, asked, config, plain, made, coders)
        changed = lab_changes.change(*held, written=written)
        beside = []
        if draws:
            beside = lab_changes.random_changes(
                *held,
                draws=draws,
                seed=config.seed,
                progress=lambda done, total: tell("random features", done, total),
            )
        return {
            "changed": _changed(changed),
            "random": [
                {
                    **_changed(one.changed),
                    "places": [
                        {"layer": point.layer, "features": c.features, "mass": c.mass["all"]}
                        for point, c in one.controls.items()
                    ],
                }
                for one in beside
            ],
        }

    def _host(self, name: str, tell: Tell) -> tuple[Model, HFEngine]:
        """Return the model, loaded once for as long as its files stay, and its engine."""
        held = self._asked == name and self._state == _state(self._read)
        if not held or self._model is None or self._engine is None:
            import torch

            from resa_lens.evals.engines import HFEngine
            from resa_lens.models import load_model
            from resa_lens.pipeline.context import NARROW

            # The old one goes before the new one comes: two may not fit.
            self._asked = self._model = self._engine = None
            self._coders.clear()
            tell("loading the model", 1, 3)
            # Before: what is replaced meanwhile is seen the next time.
            self._read = _sources(name)
            self._state = _state(self._read)
            host = load_model(name)
            if host.d_model <= NARROW:
                torch.set_num_threads(1)
            tell("preparing the model", 2, 3)
            _ = host.bridge
            self._model, self._engine = host, HFEngine(host.model, host.tokenizer)
            self._asked = name
        return self._model, self._engine

    def _coder(self, host: Model, run: SaeRun, point: Hookpoint, *, decoder: bool) -> SparseCoder:
        """Return one SAE; a few are kept, the last used ones."""
        folder = run.place(point)
        state = _state([folder])
        for whole in (decoder, True):
            key = (str(folder), state, whole)
            if key in self._coders:
                self._coders.move_to_end(key)
                return self._coders[key]
        made = run.coders(host, [point.layer], decoder=decoder)[point]
        self._coders[str(folder), state, decoder] = made
        while len(self._coders) > 1 and sum(map(_size, self._coders.values())) > HELD_BYTES:
            self._coders.popitem(last=False)
        return made


def _sources(name: str) -> list[Path]:
    """Return the folders or files that a model is read from: its own, and an adapter's base.

    Raises:
        BadInputError: they are not there.
    """
    from resa_lens.model_files import find_folder, resolve_base

    path = find_folder(name)
    adapted = (path / "adapter_config.json").exists()
    return [path, resolve_base(path, None)] if adapted else [path]


def _state(places: Sequence[Path]) -> int:
    """Return a number that is another one when a file of some folders was replaced."""
    files = [
        file
        for place in places
        for file in (sorted(place.iterdir()) if place.is_dir() else [place])
        if file.is_file()
    ]
    # The time of change too: copies keep the other.
    stats = [(str(file), file.stat()) for file in files]
    return hash(tuple((n, s.st_mtime_ns, s.st_ctime_ns, s.st_size) for n, s in stats))


def _size(coder: SparseCoder) -> int:
    return sum(tensor.nbytes for tensor in coder.state_dict().values())


def _facts(host: Model) -> dict[str, Any]:
    return {
        "name": host.name,
        "slug": host.slug,
        "weights": host.weights_hash,
        "base": host.base_hash,
        "layers": host.n_layers,
        "width": host.d_model,
        "device": host.device,
        "dtype": host.dtype,
        "notes": list(host.notes),
    }


def _asked(text: str, raw: bool, question: dict[str, Any] | None) -> Any:
    from resa_lens.evals.tasks import EvalItem
    from resa_lens.pipeline import lab

    return lab.ask(text, raw=raw, question=EvalItem(**question) if question else None)


def _generation(values: dict[str, Any]) -> Any:
    from resa_lens.evals.engines import GenerationConfig

    return GenerationConfig(**values)


def _document(values: dict[str, Any]) -> Document:
    from resa_lens.pipeline.lab import Document

    lists = {key: tuple(values[key]) for key in ("ids", "tokens", "phases")}
    return Document(**{**values, **lists})


def _change(wanted: dict[str, list[int]], how: dict[str, Any], site: str) -> Change:
    from resa_lens.hookpoints import Hookpoint
    from resa_lens.pipeline.lab_changes import Change

    features = {Hookpoint(int(k), site): tuple(some) for k, some in wanted.items()}
    return Change(features, **{**how, "phases": tuple(how["phases"])})


def _changed(made: Changed) -> dict[str, Any]:
    return {"document": asdict(made.document), "first": made.first, "moved": made.moved}


def _run(host: Model, saes: dict[str, Any]) -> SaeRun:
    """Open SAEs of a workspace that were trained on this model, or on an adapter's base.

    Raises:
        BadInputError: they are gone, or of another model.
    """
    from resa_lens.errors import BadInputError
    from resa_lens.hookpoints import Hookpoint
    from resa_lens.pipeline.saes import sae_run
    from resa_lens.workspace import Workspace

    folder = Path(saes["folder"])
    manifest = Workspace(saes["root"], recover=False).manifest(folder)
    if manifest is None or manifest.kind != "saes":
        raise BadInputError(f"{folder} holds no SAEs any more; choose others")
    weights = manifest.hashes.get("weights", "")
    if weights not in (host.weights_hash, host.base_hash):
        raise BadInputError(
            f"the SAEs in {folder} were trained on weights {weights[:8]}, {host.name} has "
            f"{host.weights_hash[:8]}; choose SAEs of this model"
        )
    points = [Hookpoint(q["layer"], manifest.results["site"]) for q in manifest.results["layers"]]
    return sae_run(folder, points, manifest, fresh=False)


def _written(host: Model, most: int, tell: Tell) -> Callable[[Sequence[int]], None]:
    """Return what tells how far the model is, with the text so far, now and then."""
    from resa_lens.evals.engines.text import text_of

    last = [0.0]

    def written(ids: Sequence[int]) -> None:
        if time.monotonic() - last[0] > PAUSE_S:
            last[0] = time.monotonic()
            tell("writing", len(ids), most, text_of(host.tokenizer, ids))

    return written


def serve(requests: TextIO, replies: TextIO, bench: Bench) -> None:
    """Answer requests until they end; then the process ends, also in the middle of one.

    Returns:
        After a long time without a request.
    """
    inbox: queue.Queue[dict[str, Any]] = queue.Queue()
    cancelled: set[int] = set()

    def read() -> None:
        try:
            for line in requests:
                message = json.loads(line)
                if "cancel" in message:
                    cancelled.add(message["cancel"])
                else:
                    inbox.put(message)
        finally:
            os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            request = inbox.get(timeout=IDLE_S)
        except queue.Empty:
            return
        if request["id"] not in cancelled:
            _serve_one(request, replies, bench)
        cancelled.discard(request["id"])


def _serve_one(request: dict[str, Any], replies: TextIO, bench: Bench) -> None:
    number = request["id"]

    def say(**message: Any) -> None:
        replies.write(json.dumps({"id": number, **message}) + "\n")
        replies.flush()

    def tell(label: str, done: int = 0, total: int = 0, text: str = "") -> None:
        say(progress={"label": label, "done": done, "total": total, "text": text})

    try:
        result = bench.answer(request["do"], request["with"], tell)
    except ResaLensError as error:
        say(error=str(error))
    except Exception as error:  # noqa: BLE001 - whatever it is, the page is told and goes on
        # The whole of it goes to the app's own log, the page gets one line.
        traceback.print_exc()
        reason = " ".join(str(error).split())[:300]
        say(error=f"the work failed ({type(error).__name__}: {reason}); the app's log has more")
    else:
        say(result=result)


def _private(descriptor: int) -> int:
    """Return a copy of a standard descriptor that no other process inherits."""
    return os.dup(descriptor)


def _watch_parent() -> None:
    """Interrupt this process when its input ends, as a person at a terminal would."""
    held = os.fdopen(_private(0), "rb")

    def watch() -> None:
        held.read()
        with suppress(ProcessLookupError):
            os.killpg(os.getpid(), signal.SIGINT)
            time.sleep(10)
            os.killpg(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: Sequence[str]) -> None:
    """Serve requests, or be a command that ends with its input."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    if arguments[:1] == ["command"]:
        from resa_lens.cli import main as command

        # Of an app in the background it is ignored, and handed down so: Stop would do nothing.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _watch_parent()
        os.dup2(nothing, 0)
        sys.argv = ["resa-lens", *arguments[1:]]
        command()
        return
    # Libraries print what they like, and their own processes read: none of it is the protocol's.
    replies = os.fdopen(_private(1), "w", encoding="utf-8")
    requests = os.fdopen(_private(0), "r", encoding="utf-8")
    os.dup2(2, 1)
    os.dup2(nothing, 0)
    serve(requests, replies, Bench())


if __name__ == "__main__":
    main(sys.argv[1:])
