"""A model's answers to questions, and its accuracy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from resa_lens.artifacts.artifact import Artifact, Kind
from resa_lens.artifacts.kinds.adapter import WEIGHTS, Adapter

Point = tuple[float, tuple[float, float], int]
"""An accuracy, its 95 % interval, and the number of questions."""
SAMPLES = "samples.parquet"
"""A row a generation, as `evals.run.SAMPLE_SCHEMA`; the first files lack its last columns."""


class StoredScore(BaseModel):
    """Accuracy over some questions, 0 to 1."""

    accuracy: float
    n: int
    """Questions."""
    ci: tuple[float, float]
    correct: int = 0
    """Right answers."""

    def point(self) -> Point:
        """Return the accuracy as figures take it."""
        return self.accuracy, self.ci, self.n


class JudgedAnswer(BaseModel):
    """An answer on which our verdict and math-verify's differ."""

    id: str
    sample: int
    gold: str
    answer: str | None
    correct: bool
    math_verify: bool
    refused: str | None = None


class Grading(BaseModel):
    """How the two verdicts differ, over all samples."""

    compared: int
    """Answers with both verdicts; letters have ours alone."""
    differing: int
    only_math_verify: int
    only_resa_lens: int
    refused: int
    """Answers that were not compared to the end: too long, or beyond time or memory."""
    answers: list[JudgedAnswer]


class EvalScores(StoredScore):
    """results.json."""

    by_task: dict[str, StoredScore]
    by_level: dict[int, StoredScore]
    seconds: float
    tokens: int
    unfinished: int = 0
    timed_out: int = 0
    peer: dict[str, Any] | None = None
    grading: Grading | None = None
    truncated_share: float = 0.0
    """Of the generations, those that were cut off."""
    unanswerable: int = 0
    """Questions whose prompts the model's context does not hold: they were not asked."""
    unanswerable_share: float = 0.0

    def groups(self) -> dict[str, Point]:
        """Return all questions, then levels, then families."""
        groups = {"all": self.point()}
        groups |= {f"level {level}": row.point() for level, row in sorted(self.by_level.items())}
        return groups | {name: row.point() for name, row in sorted(self.by_task.items())}


class Results(EvalScores):
    """Results of the manifest."""

    model: str
    """As it was named; of an adapter, its folder."""
    slug: str


class Generation(BaseModel):
    """How answers are drawn; what is not named here is compared too."""

    model_config = ConfigDict(extra="allow")

    temperature: float = 0.0


class Asking(BaseModel):
    """How questions are asked; what is not named here is compared too."""

    model_config = ConfigDict(extra="allow")

    generation: Generation = Field(default_factory=Generation)
    prompt_style: str = "reason"
    system_prompt: str | None = None
    samples: int = 1
    chat_template: bool = False
    extraction: str = "resa"


class Settings(BaseModel):
    """Configuration of the manifest."""

    eval: Asking = Field(default_factory=Asking)
    source: str = ""
    questions: str
    """Digest of the questions: runs are paired where it is the same."""


class Eval(Kind):
    """An evaluation."""

    name = "eval"
    folder = "evals"
    by_model = False
    title, titles = "evaluation", "evaluations"
    column = "Evaluated"
    command = ("eval",)
    recipe = 3  # questions that do not fit the context are not asked
    lighter = "A smaller --batch-size of eval goes on with what is kept."
    Results = Results
    Settings = Settings
    files = {"results.json": EvalScores, SAMPLES: None}  # noqa: RUF012 - declared once

    @classmethod
    def sentence(cls, artifact: Artifact) -> str:
        """Say how many questions were answered right."""
        results: Results = artifact.results
        low, high = (100 * bound for bound in results.ci)
        return (
            f"{results.model} answered {results.n:,} questions: {100 * results.accuracy:.1f} % "
            f"right (95 % {low:.1f} to {high:.1f} %)."
        )

    @classmethod
    def detail(cls, artifact: Artifact, *, one_based: bool = False) -> str:
        """Name the accuracy."""
        return f"{100 * artifact.results.accuracy:.1f} % of {artifact.results.n}"


def adapter_name(evaluation: Artifact) -> str:
    """Return the folder's name of the adapter that an evaluation names as its model, or ""."""
    path = PurePosixPath(str(evaluation.manifest.results.get("model", "")))
    return path.name if path.parent.name == Adapter.folder else ""


def adapter_scales(evaluation: Artifact) -> dict[str, float]:
    """Return the scales of the adapters that were scored, by the hash of their weights.

    An older evaluation does not say: there is its name alone.
    """
    if not evaluation.verifiable:
        return {}
    parts = evaluation.manifest.ingredients.get("model", {}).get("adapters", ())
    return {part["weights"]: part["scale"] for part in parts}


def is_adapted(artifact: Artifact) -> bool:
    """Return whether an artifact is an evaluation of a model with adapters."""
    if artifact.manifest.kind != Eval.name:
        return False
    return bool(adapter_scales(artifact) or adapter_name(artifact))


def by_adapter(adapters: Iterable[Artifact]) -> dict[str, Artifact]:
    """Return adapters by the hash of their weights, and by their folder's name."""
    table: dict[str, Artifact] = {}
    for adapter in adapters:
        for key in (adapter.path.name, adapter.manifest.files.get(WEIGHTS)):
            if key:
                table.setdefault(key, adapter)
    return table


def adapter_of(evaluation: Artifact, known: Mapping[str, Artifact]) -> Artifact | None:
    """Return the first adapter that was scored, where it is known: by its weights, or its name.

    Args:
        evaluation: the evaluation; the workspace may have been moved since.
        known: as `by_adapter` gives them.
    """
    keys = (*adapter_scales(evaluation), adapter_name(evaluation))
    return next((known[key] for key in keys if key in known), None)


def is_as_tuned(evaluation: Artifact) -> bool:
    """Return whether adapters were scored as they were tuned: one alone, at scale 1."""
    return list(adapter_scales(evaluation).values()) in ([], [1.0])
