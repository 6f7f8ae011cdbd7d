"""resa-lens: find where in a language model reasoning lives, and tune through what was found.

import resa_lens as rl

lab = rl.open("runs/")
model = lab.model("tiny-reasoner")
saes = lab.train_saes(model, layers="1-10")
counts = lab.count_features(model, saes)
recommendation = lab.recommend(counts)
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resa_lens import figures as figures
    from resa_lens import stats as stats
    from resa_lens.evals.grading import is_chosen as is_chosen
    from resa_lens.evals.grading import is_correct as is_correct
    from resa_lens.evals.tasks import load_questions as load_questions
    from resa_lens.layers import read_table as read_table
    from resa_lens.resources import data_path as data_path
    from resa_lens.session.lab import Lab as Lab
    from resa_lens.session.lab import open_lab as open  # noqa: F401 - its name here is open
    from resa_lens.session.plain import audit as audit
    from resa_lens.session.plain import fit_mixture as fit_mixture
    from resa_lens.session.plain import load_sae as load_sae
    from resa_lens.session.plain import planted_checkpoints as planted_checkpoints
    from resa_lens.session.plain import possible_counts as possible_counts
    from resa_lens.session.plain import recommend as recommend
    from resa_lens.texts.corpora import documents as documents
    from resa_lens.texts.corpora import load_records as load_records

__version__ = "0.1.0"

# Said in red by the first import of tqdm in a notebook without ipywidgets, which needs none here.
warnings.filterwarnings("ignore", message="IProgress not found")

_PUBLIC = {
    "open": "session.lab.open_lab",
    "Lab": "session.lab.Lab",
    "fit_mixture": "session.plain.fit_mixture",
    "load_sae": "session.plain.load_sae",
    "audit": "session.plain.audit",
    "recommend": "session.plain.recommend",
    "possible_counts": "session.plain.possible_counts",
    "planted_checkpoints": "session.plain.planted_checkpoints",
    "read_table": "layers.read_table",
    "data_path": "resources.data_path",
    "is_correct": "evals.grading.is_correct",
    "is_chosen": "evals.grading.is_chosen",
    "load_questions": "evals.tasks.load_questions",
    "load_records": "texts.corpora.load_records",
    "documents": "texts.corpora.documents",
}
"""Public names by their place, which is imported at the first use: `import resa_lens` is quick."""
_ROOMS = ("figures", "stats")
"""Rooms of the house that notebooks use whole: `rl.stats.spearman`, `rl.figures.forest_figure`."""


def __getattr__(name: str) -> Any:
    """Return a public name from its module."""
    if name in _ROOMS:
        return import_module(f"resa_lens.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'resa_lens' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].rpartition(".")
    return getattr(import_module(f"resa_lens.{module}"), attribute)


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted({*globals(), *_PUBLIC, *_ROOMS})
