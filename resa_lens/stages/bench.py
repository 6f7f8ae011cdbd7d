"""Requests of a prompt lab, answered one after the other with what the last one left loaded.

A request and its answer are plain values, as JSON has them.  A request holds all that it needs, so
a new bench can answer it; the model and the SAEs stay between two of them.  Nothing is written to
the workspace, and what takes long to import is imported by the first request.
"""

from __future__ import annotations

import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from resa_lens.evals.engines import GenerationConfig, HFEngine
    from resa_lens.evals.run import Asked
    from resa_lens.models.hookpoints import Hookpoint
    from resa_lens.models.host import Model
    from resa_lens.saes.coder import SparseCoder
    from resa_lens.stages.saes import SaeRun

CODER_BYTES = 2**30
"""Of SAEs that are kept; one of 65,536 latents and width 1,536 is 0.8 GB."""
PAUSE_S = 0.1
"""Between two progress messages."""

FACTS = {
    "name": "name", "slug": "slug", "weights": "weights_hash", "base": "base_hash",
    "layers": "n_layers", "width": "d_model", "device": "device", "dtype": "dtype",
    "notes": "notes",
}  # fmt: skip
"""What an answer says of the model, and the name of it there."""

Tell = Callable[..., None]
"""Called with label, done, total and text."""


class Bench:
    """Answers requests, and keeps what the next one may need: one model and its SAEs."""

    def __init__(self) -> None:
        self._loaded: tuple[str, int, Model, HFEngine] | None = None
        self._read: list[Path] = []
        self._coders: OrderedDict[tuple[str, int, bool], SparseCoder] = OrderedDict()

    def answer(self, do: str, values: dict[str, Any], tell: Tell) -> dict[str, Any]:
        """Do one of the requests below."""
        if "torch" not in sys.modules:
            tell("loading the libraries", 0, 3)
        known = (self.respond, self.read, self.layer, self.token, self.sum, self.change)
        return {each.__name__: each for each in known}[do](tell, **values)

    def respond(self, tell: Tell, **request: Any) -> dict[str, Any]:
        """Let the model go on with a prompt; see `_parts` for the request's values."""
        from resa_lens.stages import lab

        host, engine, prompt, config = self._parts(tell, **request)
        written = _written(host, config.max_new_tokens, tell)
        document = lab.respond(host, engine, prompt, config, written=written)
        return {"document": asdict(document), "prompt": prompt.prompt, "model": _facts(host)}

    def read(self, tell: Tell, *, model: str, prompt: str, written: str) -> dict[str, Any]:
        """Return a text that was written before, token by token."""
        from resa_lens.stages import lab

        host, _ = self._host(model, tell)
        return {"document": asdict(lab.read(host, prompt, written)), "model": _facts(host)}

    def layer(
        self, tell: Tell, *, model: str, saes: dict[str, Any], layer: int, ids: list[int]
    ) -> dict[str, Any]:
        """Return a layer's active features, token by token, and the tokens' texts."""
        from resa_lens.stages import lab

        host, _ = self._host(model, tell)
        run = _run(host, saes)
        tell("reading the SAE of the layer", 0, 1)
        point = replace(run.points[0], layer=layer)
        acts = lab.activations(host, point, self._coder(host, run, point), ids)
        return {
            "tokens": lab.token_texts(host.tokenizer, ids),
            "starts": acts.starts.tolist(),
            "features": acts.latents.tolist(),
            "values": _rounded(acts.values),
            "size": acts.d_sae,
        }

    def token(
        self, tell: Tell, *, model: str, saes: dict[str, Any], ids: list[int], most: int
    ) -> dict[str, Any]:
        """Return the features of all layers at the last token of a text, the strongest first."""
        from resa_lens.stages import lab

        host, _ = self._host(model, tell)
        run = _run(host, saes)
        coder, progress = partial(self._coder, host, run), partial(tell, "encoding layers")
        ranking = lab.ranked(host, run.points, coder, ids, most, progress)
        return {"features": [asdict(one) for one in ranking]}

    def sum(
        self,
        tell: Tell,
        *,
        model: str,
        saes: dict[str, Any],
        targets: dict[str, list[int]],
        ids: list[int],
    ) -> dict[str, Any]:
        """Return the summed activations of some features of some layers, token by token."""
        from resa_lens.stages import lab

        host, _ = self._host(model, tell)
        run = _run(host, saes)
        coder, progress = partial(self._coder, host, run), partial(tell, "encoding layers")
        total = lab.summed_values(host, _places(run, targets), coder, ids, progress)
        return {"values": _rounded(total)}

    def change(
        self,
        tell: Tell,
        *,
        saes: dict[str, Any],
        document: dict[str, Any],
        targets: dict[str, list[int]],
        how: dict[str, Any],
        draws: int,
        **request: Any,
    ) -> dict[str, Any]:
        """Let the model go on under a change, and with `draws` under that of random features."""
        from pydantic import TypeAdapter

        from resa_lens.errors import BadInputError
        from resa_lens.stages import lab_changes
        from resa_lens.stages.lab import Document

        host, engine, prompt, config = self._parts(tell, **request)
        run = _run(host, saes)
        edit = lab_changes.Change(_places(run, targets), **{**how, "phases": tuple(how["phases"])})
        plain = TypeAdapter(Document).validate_python(document)
        tell("reading the SAEs of the change", 0, 1)
        coders = {p: self._coder(host, run, p, decoder=True) for p in edit.features}
        written = _written(host, config.max_new_tokens, tell)
        trial = lab_changes.Trial(host, engine, prompt, config, plain, edit, coders)
        changed, random, lacking = trial.changed(written=written), [], None
        if draws:
            progress = partial(tell, "random features")
            # What the named features do is known all the same.
            try:
                random = trial.random(draws=draws, seed=config.seed, progress=progress)
            except BadInputError as error:
                lacking = str(error)
        return {
            "changed": asdict(changed),
            "random_lacking": lacking,
            "random": [
                {
                    **asdict(one.changed),
                    "places": [
                        {"layer": point.layer, "features": c.features, "mass": c.mass["all"]}
                        for point, c in one.controls.items()
                    ],
                }
                for one in random
            ],
        }

    def _parts(
        self,
        tell: Tell,
        *,
        model: str,
        text: str,
        raw: bool,
        generation: dict[str, Any],
        question: dict[str, Any] | None,
    ) -> tuple[Model, HFEngine, Asked, GenerationConfig]:
        """Return the model and its engine, the prompt, and how it is to go on."""
        from resa_lens.evals.engines import GenerationConfig
        from resa_lens.evals.tasks import EvalItem
        from resa_lens.stages import lab

        host, engine = self._host(model, tell)
        prompt = lab.ask(text, raw=raw, question=EvalItem(**question) if question else None)
        return host, engine, prompt, GenerationConfig(**generation)

    def _host(self, name: str, tell: Tell) -> tuple[Model, HFEngine]:
        """Return the model, loaded once for as long as its files stay, and its engine."""
        if self._loaded is None or self._loaded[:2] != (name, _state(self._read)):
            import torch

            from resa_lens.artifacts.placement import NARROW
            from resa_lens.evals.engines import HFEngine
            from resa_lens.models.host import load_model

            # The old one goes before the new one comes: two may not fit.
            self._loaded = None
            self._coders.clear()
            tell("loading the model", 1, 3)
            # Before: what is replaced meanwhile is seen the next time.
            self._read = _sources(name)
            state = _state(self._read)
            host = load_model(name)
            if host.d_model <= NARROW:
                torch.set_num_threads(1)
            tell("preparing the model", 2, 3)
            _ = host.bridge
            self._loaded = name, state, host, HFEngine(host.model, host.tokenizer)
        return self._loaded[2:]

    def _coder(
        self, host: Model, run: SaeRun, point: Hookpoint, *, decoder: bool = False
    ) -> SparseCoder:
        """Return one SAE; a few are kept, the last used ones."""
        folder = run.place(point)
        state = _state([folder])
        for whole in (decoder, True):
            key = (str(folder), state, whole)
            if key in self._coders:
                self._coders.move_to_end(key)
                return self._coders[key]
        coder = run.coders(host, [point.layer], decoder=decoder)[point]
        self._coders[str(folder), state, decoder] = coder
        while len(self._coders) > 1 and sum(map(_size, self._coders.values())) > CODER_BYTES:
            self._coders.popitem(last=False)
        return coder


def _sources(name: str) -> list[Path]:
    """Return the folders or files that a model is read from: its own, and an adapter's base.

    Raises:
        BadInputError: they are not there.
    """
    from resa_lens.models.files import find_folder, resolve_base

    path = find_folder(name)
    adapted = (path / "adapter_config.json").exists()
    return [path, resolve_base(path, None)] if adapted else [path]


def _state(places: Sequence[Path]) -> int:
    """Return a number that is another one when a file of some folders was replaced."""
    folders = [sorted(place.iterdir()) if place.is_dir() else [place] for place in places]
    # The time of change too: copies keep the other.
    stats = [(str(file), file.stat()) for files in folders for file in files if file.is_file()]
    return hash(tuple((n, s.st_mtime_ns, s.st_ctime_ns, s.st_size) for n, s in stats))


def _facts(host: Model) -> dict[str, Any]:
    return {name: getattr(host, key) for name, key in FACTS.items()}


def _size(coder: SparseCoder) -> int:
    return sum(tensor.nbytes for tensor in coder.state_dict().values())


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]


def _places(run: SaeRun, targets: dict[str, list[int]]) -> dict[Hookpoint, tuple[int, ...]]:
    """Return features by the SAEs' places, as a request names them by layer."""
    site = run.points[0]
    return {replace(site, layer=int(layer)): tuple(some) for layer, some in targets.items()}


def _run(host: Model, saes: dict[str, Any]) -> SaeRun:
    """Open SAEs of a workspace that were trained on this model, or on an adapter's base.

    Raises:
        BadInputError: they are gone, damaged, or of another model.
    """
    from resa_lens.artifacts.kinds.saes import Saes
    from resa_lens.artifacts.workspace import Workspace
    from resa_lens.errors import BadInputError
    from resa_lens.stages.saes import sae_run

    folder = Path(saes["folder"])
    artifact = Workspace(saes["root"]).read(folder)
    if artifact is None or artifact.kind is not Saes:
        raise BadInputError(f"{folder} holds no SAEs any more; choose others")
    if artifact.weights not in (host.weights_hash, host.base_hash):
        raise BadInputError(
            f"the SAEs in {folder} were trained on weights {artifact.weights[:8]}, {host.name} has "
            f"{host.weights_hash[:8]}; choose SAEs of this model"
        )
    return sae_run(artifact, artifact.results.site)


def _written(host: Model, most: int, tell: Tell) -> Callable[[Sequence[int]], None]:
    """Return what tells how far the model is, with the text so far, now and then."""
    from resa_lens.evals.engines.text import text_of

    last = [0.0]

    def written(ids: Sequence[int]) -> None:
        if time.monotonic() - last[0] > PAUSE_S:
            last[0] = time.monotonic()
            tell("writing", len(ids), most, text_of(host.tokenizer, ids))

    return written
