"""Options that commands share, and what they open with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from resa_lens.cli.options import check_layer_options, options, part, running
from resa_lens.config import goes_with, setting
from resa_lens.errors import BadInputError
from resa_lens.evals.config import EvalConfig, GenerationConfig, TextEngine
from resa_lens.features.config import CountConfig, Rule
from resa_lens.files import check_path, check_workspace
from resa_lens.jobs.cluster import Cluster, check_ray
from resa_lens.models.bounds import check_shapes
from resa_lens.models.hookpoints import check_layers, parse_layers
from resa_lens.processes import is_silent_rank
from resa_lens.saes.config import SaeConfig, check_saes
from resa_lens.stages.config import Recipe, Selector
from resa_lens.texts.config import CorpusConfig, check_data
from resa_lens.tuning.config import Objective, TuneConfig, check_adapter, check_scales

if TYPE_CHECKING:
    from resa_lens.artifacts.stage import Context
    from resa_lens.artifacts.workspace import Workspace
    from resa_lens.evals.tasks import EvalItem
    from resa_lens.models.host import Model
    from resa_lens.progress import Reporter
    from resa_lens.stages.saes import SaeRun
    from resa_lens.stages.tune_job import TuneJob


@options("Output")
class Output:
    """How the result is printed."""

    as_json: bool = setting(False, "Print one JSON object to stdout.", "--json")

    def pick(self, *names: str) -> dict[str, Any]:
        """Return options by name, as the keywords of a function or a configuration."""
        return {name: getattr(self, name) for name in names}


@options("Output")
class Place:
    """Where the results lie."""

    workspace: str | None = setting(
        None, "Folder of all results [RESA_LENS_WORKSPACE, else ./resa-workspace].",
        check=check_workspace,
    )  # fmt: skip

    def open(self) -> tuple[Workspace, Reporter]:
        """Open the workspace to read it, which may be a read-only one, and say where it is."""
        from resa_lens.artifacts.workspace import Workspace
        from resa_lens.progress import SILENT, ConsoleReporter

        # Of the processes that torchrun starts only the first speaks.
        reporter = SILENT if is_silent_rank() else ConsoleReporter()
        workspace = Workspace(self.workspace)
        reporter.note(f"workspace: {workspace.root}")
        return workspace, reporter


@options("Machine")
class Seeded:
    """A draw of random numbers that can be repeated."""

    seed: int = setting(0, "Seed of everything that is drawn.", min=0, max=2**32 - 1)


@options("Machine")
class Run(Seeded, Place, Output):
    """A stage that makes an artifact."""

    device: str = setting("auto", "auto, cpu or cuda.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "Numbers of the model's weights."
    )
    threads: int | None = setting(
        None, "CPU threads; one for narrow models by default.", min=1, max=4096
    )
    deterministic: bool = setting(False, "Promise the same bits on CUDA too; slower there.")
    force: bool = setting(False, "Make this command's result anew, even if it is done.")

    def context(self, device: str | None = None) -> Context:
        """Open the workspace, which can be written, for stages on this or another device."""
        from resa_lens.artifacts.workspace import Workspace

        Workspace(self.workspace).check_writable()
        from resa_lens.artifacts.stage import Context
        from resa_lens.models.host import choose_device

        device = device or self.device
        choose_device(device, self.dtype)
        command = running()
        return Context(
            *self.open(), self.seed, device, self.dtype, self.force, self.threads,
            self.deterministic, command=command.words, options=command.options,
        )  # fmt: skip


@options("Model")
class NamedModel:
    """The model that is looked at."""

    model: str = setting(
        "tiny-reasoner",
        "tiny-reasoner, a hub id, a local folder, a .gguf file or a PEFT adapter folder.",
        "--model", "-m", check=check_path,
    )  # fmt: skip


@options("Model")
class AdapterBase:
    """The model below an adapter."""

    base: str | None = setting(None, "Base model of an adapter folder.", check=check_path)


@options("Model")
class Adapters:
    """Adapters on the model."""

    adapter: list[str] | None = setting(
        None, "PEFT adapter folder to put onto the model; may be repeated: their sum.",
        check=check_adapter,
    )  # fmt: skip
    scale: list[float] | None = setting(
        None, "Factor on the adapters: one for all, or one each [1].", max=10**6
    )

    def __post_init__(self) -> None:
        """Raise BadInputError where the scales are neither one nor one each."""
        check_scales(self.adapter, self.scale)


@options("Model")
class OnModel(NamedModel, Run):
    """A stage that runs a model."""

    second_model = ""
    """The option of another model that is loaded."""
    one_shape = False
    """Whether it must have as many layers as the first, and as wide ones."""

    def names(self) -> list[tuple[str, str | None]]:
        """Return the names of the models, the first with its base."""
        second = getattr(self, self.second_model, None) if self.second_model else None
        return [(self.model, getattr(self, "base", None)), *([(second, None)] if second else ())]

    def check(self, ctx: Context) -> None:
        """Raise BadInputError where the models cannot do what is asked; none is loaded for it."""
        models = [ctx.unloaded(*name) for name in self.names()]
        for model in models:
            check_layer_options(self, model.n_layers)
        if self.one_shape:
            check_shapes(models[-1], models[0])

    def load(self, device: str | None = None) -> tuple[Context, Model]:
        """Open the workspace, check what is asked for, and load the first model."""
        ctx = self.context(device)
        self.check(ctx)
        return ctx, ctx.model(*self.names()[0])


COLUMNS = "question_column answer_column steps_column text_column rows"
"""Options of the rows and columns of data."""
DATA = f"source {COLUMNS} seed"
"""Options of documents."""


@options("Data")
class OnData(OnModel):
    """A stage that runs a model over documents.

    The options of the data are the fields of `CorpusConfig` that are named here.
    """

    corpus: CorpusConfig = part(CorpusConfig, DATA, "Data")

    def check(self, ctx: Context) -> None:
        """Raise BadInputError where data cannot be read, too."""
        super().check(ctx)
        check_data(self.corpus)


@options("SAEs")
class SaeFit(OnData):
    """SAEs by folder or by the figures of their training."""

    saes: str | None = setting(
        None, "Folder of SAEs in sparsify's layout (layers.N.mlp/), or a hub id.", check=check_saes
    )
    sae: SaeConfig = part(SaeConfig, "site latents k tokens seed", "SAEs")
    corpus: CorpusConfig = part(
        CorpusConfig, f"{DATA} packing thought_share", "Data", thought_share=None
    )


@options("SAEs")
class SaeUse(SaeFit):
    """A stage that needs SAEs, and trains those that are missing."""

    allow_site_mismatch: bool = setting(
        False, "Use an SAE that does not fit its place, with a warning."
    )

    def obtain(
        self, ctx: Context, model: Model, layers: Sequence[int], only: Sequence[int] | None
    ) -> SaeRun:
        """Return SAEs at the layers; `only` are those of a folder that are opened."""
        from resa_lens.stages.sae_training import saes_for

        return saes_for(
            ctx, model, layers, self.sae, self.corpus, self.saes,
            allow_mismatch=self.allow_site_mismatch, only=only,
        )  # fmt: skip


@options("Layers")
class AtLayers:
    """The layers that are looked at."""

    layers: str | None = setting(
        None, '"1-26", "all", "3,5,13th" or "layers.*.mlp"; all but first and last.',
        layers=check_layers,
    )  # fmt: skip

    def indices(self, model: Model) -> list[int]:
        """Return the layers, 0-based."""
        return parse_layers(self.layers, model.n_layers)

    def explicit(self, model: Model) -> list[int] | None:
        """Return the layers that the option names, None where it is left out."""
        return self.indices(model) if self.layers else None


@options("Layers")
class WithSaesAt(AtLayers, SaeUse):
    """A stage that looks through SAEs at several layers."""

    def find(self, ctx: Context, model: Model) -> SaeRun:
        """Return the SAEs at the layers."""
        return self.obtain(ctx, model, self.indices(model), self.explicit(model))

    def scope(self, model: Model) -> list[int] | None:
        """Return the layers that are looked at, None for all that a folder of SAEs has."""
        return None if self.saes and self.layers is None else self.indices(model)


@options("Counting")
class Ruled:
    """The counting rule."""

    rule: Rule = setting("all", "Counting rule; all is the strict one.")


@options("Counting")
class Recommending:
    """How a layer is chosen from counts."""

    selector: Selector = setting("mixture", "What chooses the layer.")
    recipe: Recipe = setting("robust", "Of the mixture: robust, or paper for the published one.")


COUNTING = "prompt chat_template threshold ignore_first"
"""Options of a count."""


@options("Counting")
class Counting(OnModel):
    """A stage that counts features on a prompt."""

    count: CountConfig = part(CountConfig, COUNTING, "Counting")

    def check(self, ctx: Context) -> None:
        """Raise BadInputError where the model's tokenizer cannot mark the tags, too."""
        super().check(ctx)
        from resa_lens.features.exclusive import tag_prompt

        tag_prompt(ctx.unloaded(*self.names()[0]), self.count)

    def load(self, device: str | None = None) -> tuple[Context, Model]:
        """Open the workspace and load the model, if the prompt is not too long for it."""
        from resa_lens.features.exclusive import tag_prompt

        ctx, model = super().load(device)
        tag_prompt(model, self.count)
        return ctx, model


@options("Machine")
class Generating:
    """What generates texts, where the model is left as it is."""

    engine: TextEngine = setting("hf", "Generates texts: hf here, or vllm in a process of its own.")


@options("Output")
class Planned:
    """A long stage, which can be planned."""

    plan: bool = setting(
        False, "Only say what it will take, from a short trial: time, memory, disk."
    )


@options("Many machines")
class ManyMachines(Run):
    """A list of independent jobs, which other processes may share."""

    join: bool = setting(
        False, "Work on it as one of several equal workers: leave when others are at all that is "
        "left; the last one writes the result.",
    )  # fmt: skip
    ray: str | None = setting(
        None, "Let Ray do the jobs: its address (host:port or auto), or local.", metavar="ADDRESS"
    )
    gpus_per_job: float | None = setting(
        None, "Of --ray; may be a part of one. One where the cluster has any.", min=0, max=64
    )

    def __post_init__(self) -> None:
        """Raise BadInputError where options of many machines contradict each other."""
        if self.join and self.ray is not None:
            raise BadInputError(f"--join and --ray {self.ray}: give one")
        if self.force and (self.join or self.ray is not None):
            raise BadInputError(
                f"--force with --{'join' if self.join else 'ray'}: workers would make anew what "
                "others have just done; remove the result's folder, or give --force alone"
            )
        goes_with(self, "gpus_per_job", "ray")
        if self.ray is not None:
            check_ray(self.ray)

    def cluster(self) -> Cluster | None:
        """Return the Ray cluster that does the jobs, if one does."""
        if self.ray is None:
            return None
        return Cluster(self.ray, self.threads or 1, self.gpus_per_job)


@options("Machine")
class MemoryLimit:
    """The memory that a stage may take."""

    memory_limit: float | None = setting(
        None, "GB that may be taken; by default what is free.", over=0, max=10**6
    )

    @property
    def memory_limit_mb(self) -> float | None:
        """The limit in MB."""
        return None if self.memory_limit is None else self.memory_limit * 1024


@options("Questions")
class Questions:
    """Questions that a model answers."""

    tasks: str = setting(
        "tiny",
        "By commas: tiny (levels 1 to 3), aime24, aime25, math500, gpqa-diamond, amc23, minerva, "
        'math500=FILE, a file as of --data; with ":families=a+b" or ":levels=1+2".',
    )
    asking: EvalConfig = part(EvalConfig, "limit extraction", "Questions", limit=500)
    generation: GenerationConfig = part(GenerationConfig, "max_new_tokens", "Questions")

    def evaluation(self) -> EvalConfig:
        """Return the configuration of the answers."""
        return replace(self.asking, generation=self.generation)


@options("Questions")
class AskedOf(Questions, SaeUse):
    """Questions to a model that SAEs are looked at in."""

    def items(self) -> list[EvalItem]:
        """Return the questions, if the model can be asked them; nothing is loaded for it."""
        from resa_lens.models.unloaded import read_unloaded
        from resa_lens.stages.scores import questions_for

        # A file of questions may have the columns of the data.
        names = ("question_column", "answer_column")
        columns = {name: getattr(self.corpus, name) for name in names}
        model = read_unloaded(*self.names()[0])
        return questions_for(model, self.tasks, self.evaluation(), **columns, required=False)


@options("Tuning")
class Tuning(Generating, AdapterBase, Questions, SaeUse):
    """A tuning of LoRA adapters through SAEs, and its scores."""

    preset: Literal["paper", "reference", "distil"] = setting(
        "paper",
        "The paper's text, reference for the authors' code, or distil: the frozen model with the "
        "SAE teaches the adapted one without it.",
    )
    objective: dict[str, Any] = part(Objective, "site", "Tuning", given="preset")
    lora: TuneConfig = part(TuneConfig, "rank alpha dropout learning_rate batch seed", "Tuning")
    sae: SaeConfig = part(SaeConfig, "latents k tokens seed", "SAEs")
    steps: int | None = setting(
        None, "Updates; two epochs from width 1024 on, else 100.", min=1, max=10**9
    )
    sequence: int | None = setting(
        None,
        "Tokens a sequence that is tuned on; 256, with preset reference 2048 from width 1024 on.",
        min=2, max=2**20,
    )  # fmt: skip
    source_model: str | None = setting(
        None, "Model whose SAE is inserted; the target by default.", check=check_path
    )
    tuning_thoughts: float = setting(
        0.0, "As --thought-share, which is of the SAE's documents, for those that are tuned on.",
        min=0, max=1,
    )  # fmt: skip
    start_check: bool = setting(
        True, "First insert the SAE and tune nothing, and warn where it carries no gain."
    )

    def job(self, model: str) -> TuneJob:
        """Return the tuning of a model."""
        from resa_lens.stages.tune_job import TuneJob, with_sequence
        from resa_lens.tuning.config import preset

        objective = preset(self.preset, **self.objective)
        job = TuneJob(
            model=model, objective=objective, lora=self.lora,
            sae=replace(self.sae, site=objective.site), trigger=self.corpus,
            elicitation=replace(self.corpus, thought_share=self.tuning_thoughts),
            allow_mismatch=self.allow_site_mismatch,
            evaluation=self.evaluation(), eval_source=self.tasks,
            **self.pick("source_model", "steps", "sequence", "saes", "base", "start_check"),
            engine=self.engine,
        )  # fmt: skip
        return with_sequence(job)
