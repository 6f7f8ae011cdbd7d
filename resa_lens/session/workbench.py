"""What every method of the lab works with: a workspace, and the options of a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from resa_lens.artifacts.stage import Context
from resa_lens.errors import BadInputError
from resa_lens.models.hookpoints import parse_layers
from resa_lens.models.host import Model
from resa_lens.models.unloaded import UnloadedModel
from resa_lens.session.discovery import SAEs
from resa_lens.session.options import COMMON
from resa_lens.session.scores import Tuned

Layers = str | int | Sequence[int] | None
"""Layers as "1-10", "3,5,13th", 5 or [3, 5], 0-based, or None for the default."""


class Workbench:
    """A workspace with its device and seed."""

    def __init__(self, context: Context) -> None:
        """Work in a context: its workspace, device and seed."""
        self.context = context

        self.workspace = context.workspace

    def __repr__(self) -> str:
        """Say where the results lie."""
        return f"Lab in {self.workspace.root}"

    def _context(self, options: dict[str, Any]) -> Context:
        """Take seed and force from the options of a call."""
        own = {name: options.pop(name) for name in COMMON if name in options}
        return replace(self.context, **own)

    def model(
        self,
        model: str | Path | Tuned = "tiny-reasoner",
        *,
        base: str | None = None,
        adapters: Sequence[str | Path] = (),
        scale: float | Sequence[float] = 1.0,
    ) -> Model:
        """Load a model onto its host; a second call returns the same object.

        >>> lab.model("tiny-reasoner").n_layers
        12

        Args:
            model: a bundled name, a hub id, a folder, a .gguf file, a PEFT adapter folder, or what
                `tune` returned.
            base: the base model of an adapter folder that does not say it.
            adapters: adapter folders to put onto the model.
            scale: a factor on the adapters, or one for each.

        Raises:
            BadInputError: no such model, or one that is damaged or not supported.
        """
        name = str(model)
        if isinstance(model, Tuned):
            name, own = _place(model)
            base = base or own
        folders = [str(adapter) for adapter in adapters]
        return self.context.model(name, base, adapters=folders, scale=scale)

    def _unloaded(self, model: Tuned) -> Model | UnloadedModel:
        """Return a tuned model as its files say it: no weight is read for it."""
        return self.context.unloaded(*_place(model))


def _place(model: Tuned) -> tuple[str, str]:
    """Return the folder of a tuned model's adapter, and the name of its base."""
    return str(model.path), model.run.model.name


def layers_of(layers: Layers, model: Model) -> list[int]:
    """Return layers of a model, 0-based."""
    return parse_layers([layers] if isinstance(layers, int) else layers, model.n_layers)


def place_of(saes: str | Path | SAEs | None) -> str | None:
    """Return the folder of SAEs, or the name that stands for it."""
    return None if saes is None else str(saes.path if isinstance(saes, SAEs) else saes)


def one_of(what: str, value: str, known: Sequence[str]) -> None:
    """Raise BadInputError where a value is none of those that are known."""
    if value not in known:
        raise BadInputError(f"{what} {value!r} is unknown; use {', '.join(known)}")
