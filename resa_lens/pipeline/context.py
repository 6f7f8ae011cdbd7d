"""What every stage needs: the workspace, who to tell, seed, device, and the loaded models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from resa_lens import cost
from resa_lens.models import Model, load_model
from resa_lens.progress import SILENT, Advance, Reporter
from resa_lens.workspace import MANIFEST, Manifest, Workspace

NARROW = 256
"""Up to this width one thread is faster than several: the products are too small to share."""


@dataclass
class Context:
    """What every stage needs besides its own configuration."""

    workspace: Workspace
    reporter: Reporter = SILENT
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    force: bool = False
    threads: int | None = None
    models: dict[str, Model] = field(default_factory=dict)
    spent: list[dict[str, Any]] = field(default_factory=list, init=False)
    """What was metered since the last manifest."""
    metering: bool = field(default=False, init=False)

    def model(
        self,
        name: str,
        base: str | None = None,
        *,
        adapters: Sequence[str] = (),
        scale: float | Sequence[float] = 1.0,
    ) -> Model:
        """Load a model, with adapters on it, once and say what it is and where it runs."""
        key = f"{name}|{base or ''}" + (f"|{list(adapters)}|{scale}" if adapters else "")
        if key not in self.models:
            model = load_model(
                name, device=self.device, dtype=self.dtype, base=base, adapters=adapters,
                scale=scale,
            )  # fmt: skip
            threads = self.threads or (
                1 if model.d_model <= NARROW else max(1, torch.get_num_threads())
            )
            torch.set_num_threads(threads)
            self.reporter.note(
                f"model {model.slug}: {model.n_layers} layers x {model.d_model}, {model.dtype} on "
                f"{model.device} ({model.reason}), {threads} thread{'s' if threads > 1 else ''}"
            )
            self.models[key] = model
        return self.models[key]

    @contextmanager
    def bar(self, label: str, total: int, *, devices: int = 1) -> Iterator[Advance]:
        """Open a progress bar over metered work: the next manifest holds what it cost."""
        with self.reporter.bar(label, total) as advance, self.metered(devices):
            yield advance

    @contextmanager
    def metered(self, devices: int = 1) -> Iterator[None]:
        """Measure work; the next manifest holds what it cost.  Inside metered work nothing more."""
        if self.metering:
            yield
            return
        self.metering = True
        device = next((model.device for model in self.models.values()), "cpu")
        try:
            with cost.meter(device, devices=devices) as meter:
                yield
        finally:
            self.metering = False
        self.spent.append(meter.to_dict())

    def manifest(self, kind: str, model: Model, **fields: Any) -> Manifest:
        """Start the manifest of an artifact made with a model."""
        spent = cost.combined(self.spent)
        self.spent.clear()
        if spent:
            spent["tokens"] = fields.get("results", {}).get("tokens")
        hashes = {"weights": model.weights_hash, **fields.pop("hashes", {})}
        return Manifest(
            kind=kind,
            seed=self.seed,
            threads=torch.get_num_threads(),
            device=model.device,
            dtype=model.dtype,
            kernel_path=f"{model.attention if 'bridge' in vars(model) else 'plain'} attention",
            hashes=hashes,
            cost=spent,
            **fields,
        )

    def done(self, folder: Path, *parents: Path) -> Manifest | None:
        """Return the manifest of a finished artifact, unless the work is to start anew.

        An artifact older than one of the folders it was made from does not count as finished.
        """
        if self.force or not (found := self.workspace.manifest(folder)):
            return None
        made = (folder / MANIFEST).stat().st_mtime_ns
        for parent in parents:
            files = (file for file in parent.rglob("*") if file.is_file())
            if max((file.stat().st_mtime_ns for file in files), default=0) > made:
                return None
        return found
