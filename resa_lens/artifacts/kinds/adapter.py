"""A LoRA adapter: tuned through an SAE, with a control in its place, or on texts."""

from __future__ import annotations

from pydantic import BaseModel, Field

from resa_lens.artifacts.artifact import Artifact, Kind
from resa_lens.models.hookpoints import describe_layer, list_layers

WEIGHTS = "adapter_model.safetensors"


class Results(BaseModel):
    """Results of the manifest."""

    model: str
    """The base."""
    n_layers: int
    layer: int | None = None
    """0-based; None where texts were imitated in place of SAE-Tuning."""
    site: str | None = None
    losses: list[float] = Field(default_factory=list)
    """Of each step."""
    warnings: list[str] = Field(default_factory=list)
    collapsed_at: int = 0
    """The step after which the model had collapsed; 0 where it did not."""
    kept_step: int = 0
    """After a collapse, the step whose adapters these are."""


class Settings(BaseModel):
    """Configuration of the manifest."""

    control: str | None = None
    """What stood in the SAE's place, or which texts were imitated."""
    steps: int | None = None


class Adapter(Kind):
    """An adapter, in PEFT's layout."""

    name = "adapter"
    folder = "adapters"
    by_model = False
    title, titles = "adapter", "adapters"
    column = "Tuned"
    command = ("tune", "--layer", "auto")
    recipe = 2  # a run that collapses ends, with the last good adapters
    lighter = (
        "--gradient-checkpointing of tune goes on with what is kept; a smaller --batch begins anew."
    )
    Results = Results
    Settings = Settings
    files = {  # noqa: RUF012 - declared once, never changed
        "adapter_config.json": None,
        WEIGHTS: None,
        "log.jsonl": None,
    }
    beside = ("README.md",)

    @classmethod
    def sentence(cls, artifact: Artifact) -> str:
        """Say what it was tuned through, and where."""
        results: Results = artifact.results
        settings: Settings = artifact.settings
        if results.layer is None:
            return f"A LoRA adapter for {results.model}, fine-tuned on texts: {settings.control}."
        steps = "" if settings.steps is None else f", {settings.steps} steps"
        return (
            f"A LoRA adapter for {results.model}, tuned with {settings.control or 'the SAE'} at "
            f"{describe_layer(results.layer, results.n_layers)}, site {results.site}{steps}."
        )

    @classmethod
    def through(cls, artifact: Artifact) -> str:
        """Say in half a sentence what it was made with."""
        results: Results = artifact.results
        control: str | None = artifact.settings.control
        if results.layer is None:
            return f"Fine-tuned in place of SAE-Tuning: {control}"
        place = f"{describe_layer(results.layer, results.n_layers)}, site {results.site}"
        if control:
            return f"Tuned with the control {control} in the SAE's place: {place}"
        return f"Tuned through the SAE of {place}"

    @classmethod
    def detail(cls, artifact: Artifact, *, one_based: bool = False) -> str:
        """Name the layer and the control."""
        layer, control = artifact.results.layer, artifact.settings.control
        parts = [] if layer is None else [list_layers([layer], one_based=one_based)]
        return ", ".join([*parts, *([f"control {control}"] if control else [])])
