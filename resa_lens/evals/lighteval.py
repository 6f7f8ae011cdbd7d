"""Our engines and questions inside lighteval 0.13, offline, and the six benchmarks as its tasks.

Imports lighteval at once: import this module only where it is wanted.  What of lighteval is
replaced, and why: its registry imports every bundled task, one of which downloads and another
calls what is gone; its sample cache is keyed by the configuration and not by the weights; its
transformers backend is silently greedy.  So: a registry of our tasks, no cache, our engines.

`TASKS_TABLE` holds the benchmarks of `benchmarks.py` for lighteval's own command line
(`--custom-tasks` with this file), as `resa_aime24` and so on.
"""

from __future__ import annotations

import copy
import logging
import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from lighteval.logging.evaluation_tracker import (  # pyright: ignore[reportMissingImports]
    EvaluationTracker,
)
from lighteval.metrics.metrics import Metrics  # pyright: ignore[reportMissingImports]
from lighteval.metrics.metrics_sample import (  # pyright: ignore[reportMissingImports]
    SampleLevelComputation,
    SamplingMetric,
)
from lighteval.metrics.utils.metric_utils import (  # pyright: ignore[reportMissingImports]
    SampleLevelMetric,
)
from lighteval.models.abstract_model import (  # pyright: ignore[reportMissingImports]
    LightevalModel,
    ModelConfig,
)
from lighteval.models.model_input import (  # pyright: ignore[reportMissingImports]
    GenerationParameters,
)
from lighteval.models.model_output import ModelResponse  # pyright: ignore[reportMissingImports]
from lighteval.pipeline import (  # pyright: ignore[reportMissingImports]
    ParallelismManager,
    Pipeline,
    PipelineParameters,
)
from lighteval.tasks.lighteval_task import (  # pyright: ignore[reportMissingImports]
    LightevalTask,
    LightevalTaskConfig,
)
from lighteval.tasks.registry import Registry  # pyright: ignore[reportMissingImports]
from lighteval.tasks.requests import Doc, SamplingMethod  # pyright: ignore[reportMissingImports]

from resa_lens.evals.benchmarks import BENCHMARKS, LETTERS, Benchmark, question_of
from resa_lens.evals.engines import Generation, GenerationConfig
from resa_lens.evals.extraction import Extraction
from resa_lens.evals.grading import grade
from resa_lens.evals.run import Asked

METRIC, OURS = "extractive_match", "resa_lens"
"""Names of lighteval's metric and of our grading in its results."""
SHOWN = 20
"""Answers on which the two differ that are kept in the result; all are in the details."""


class PerSample(SamplingMetric, SampleLevelComputation):
    """Mean over the samples of a question; each sample's value stays in the document.

    Args:
        name: key of the values in `doc.specific`.
        samples: a question.
        judge: called with the document and one text.
    """

    def __init__(self, name: str, samples: int, judge: Callable[[Any, str], float]) -> None:
        super().__init__()
        self.name, self.samples, self.judge = name, samples, judge

    def compute(self, doc: Any, model_response: Any, **_: Any) -> float:
        """Judge every sample."""
        values = [float(self.judge(doc, text)) for text in self.texts(model_response)]
        doc.specific = {**(doc.specific or {}), self.name: values}
        return float(np.mean(values))

    def texts(self, response: Any) -> Sequence[str]:
        """Return what is judged: without reasoning, as lighteval does."""
        return response.final_text

    def num_samples(self) -> int:
        """Samples that a question needs."""
        return self.samples


class Graded(PerSample):
    """Our grading, of the whole text."""

    def texts(self, response: Any) -> Sequence[str]:
        """Return what is judged."""
        return response.text


def _theirs(choice: bool) -> Callable[[Any, str], float]:
    """Return lighteval's extractive match for expressions or letters."""
    stock = Metrics.gpqa_instruct_pass_at_k if choice else Metrics.pass_at_k_math
    metric = copy.deepcopy(stock.value.sample_level_fn)
    metric.k = metric.n = 1
    return lambda doc, text: metric.compute(doc=doc, model_response=ModelResponse(text=[text]))


def _ours(choice: bool, extraction: Extraction) -> Callable[[Any, str], float]:
    def judge(doc: Any, text: str) -> float:
        gold = LETTERS[doc.gold_index] if choice else doc.specific["gold"]
        return float(grade(text, gold, choice=choice, extraction=extraction).correct)

    return judge


def _metrics(choice: bool, samples: int, extraction: Extraction = "resa") -> list[Any]:
    return [
        SampleLevelMetric(
            metric_name=name,
            higher_is_better=True,
            category=SamplingMethod.GENERATIVE,
            sample_level_fn=kind(name, samples, judge),
            corpus_level_fn=np.mean,
        )
        for name, kind, judge in (
            (METRIC, PerSample, _theirs(choice)),
            (OURS, Graded, _ours(choice, extraction)),
        )
    ]


def _doc(task: str, query: str, gold: str, choice: bool, specific: dict[str, Any]) -> Any:
    # An expression is found between dollars only.
    choices = list(LETTERS) if choice else [f"${gold}$"]
    return Doc(
        task_name=task,
        query=query,
        choices=choices,
        gold_index=LETTERS.index(gold) if choice else 0,
        specific={"gold": gold, **specific},
    )


def benchmark_doc(benchmark: Benchmark, line: dict[str, Any], task_name: str = "") -> Any:
    """Return a row of a benchmark as lighteval's document: what our own engines ask."""
    question = question_of(benchmark, line)
    return _doc(task_name, question.query, question.gold, benchmark.kind == "choice", {})


def benchmark_task(benchmark: Benchmark, samples: int = 1) -> Any:
    """Return a benchmark as lighteval's task, named resa_<name> beside its own ones."""
    return LightevalTaskConfig(
        name=f"resa_{benchmark.name}",
        prompt_function=partial(benchmark_doc, benchmark),
        hf_repo=benchmark.repo,
        hf_subset=benchmark.subset,
        hf_avail_splits=[benchmark.split],
        evaluation_splits=[benchmark.split],
        generation_size=32_768,
        metrics=_metrics(benchmark.kind == "choice", samples),
        stop_sequence=[],
        version=1,
    )


TASKS_TABLE = [benchmark_task(benchmark) for benchmark in BENCHMARKS.values()]
"""What lighteval's registry reads from a file of custom tasks."""


class _NoCache:
    """In place of lighteval's sample cache, which would answer for other weights."""

    def _init_registry(self, registry: Any) -> None:
        pass


class EngineModel(LightevalModel):
    """One of our engines as lighteval's model.

    Args:
        answer: returns the generations of the questions as they were asked.
        asked: every sample of every question.
        name: shown in lighteval's results.
        tokenizer: the engine's.
        generation: how the engine generates, for lighteval's record.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Asked]], list[Generation]],
        asked: Sequence[Asked],
        name: str,
        tokenizer: Any,
        generation: GenerationConfig,
    ) -> None:
        self.config = ModelConfig(
            model_name=name,
            generation_parameters=GenerationParameters(
                temperature=generation.temperature,
                top_p=generation.top_p,
                max_new_tokens=generation.max_new_tokens,
                seed=generation.seed,
                stop_tokens=list(generation.stop),
            ),
        )
        self._cache = _NoCache()
        self._tokenizer, self._answer, self._asked = tokenizer, answer, asked
        self.generations: list[Generation] = []

    @property
    def tokenizer(self) -> Any:
        """The engine's tokenizer."""
        return self._tokenizer

    @property
    def add_special_tokens(self) -> bool:
        """As the engine does."""
        return True

    @property
    def max_length(self) -> int:
        """Longest text, of which the engine takes care."""
        return int(self._tokenizer.model_max_length)

    def greedy_until(self, docs: list[Any]) -> list[Any]:
        """Return the engine's answers; lighteval calls sampling by this name too."""
        self.generations = self._answer(self._asked)
        by_id: dict[str, list[tuple[Asked, Generation]]] = {}
        for one, generation in zip(self._asked, self.generations, strict=True):
            by_id.setdefault(one.item.id, []).append((one, generation))
        return [
            ModelResponse(
                input=doc.query,
                # With the tags that the prompt opened: lighteval removes only whole pairs.
                text=[one.opened + answer.text for one, answer in by_id[doc.specific["id"]]],
                output_tokens=[list(answer.token_ids) for _, answer in by_id[doc.specific["id"]]],
            )
            for doc in docs
        ]

    def loglikelihood(self, docs: list[Any]) -> list[Any]:
        """Refuse: our tasks are generative."""
        raise NotImplementedError("the engines generate; they give no likelihoods")

    def loglikelihood_rolling(self, docs: list[Any]) -> list[Any]:
        """Refuse: our tasks are generative."""
        raise NotImplementedError("the engines generate; they give no likelihoods")


@contextmanager
def _our_tasks(configs: dict[str, Any], rows: dict[str, list[dict[str, Any]]]) -> Iterator[None]:
    """Let lighteval see these tasks and rows and no others; global random states come back."""
    loaders = Registry.load_all_task_configs, LightevalTask.download_dataset_worker
    states = random.getstate(), np.random.get_state()
    level = logging.getLogger("lighteval").level
    Registry.load_all_task_configs = staticmethod(lambda *_, **__: configs)
    LightevalTask.download_dataset_worker = staticmethod(lambda task: {"test": rows[task.name]})
    logging.getLogger("lighteval").setLevel(logging.ERROR)
    try:
        yield
    finally:
        Registry.load_all_task_configs = staticmethod(loaders[0])
        LightevalTask.download_dataset_worker = staticmethod(loaders[1])
        random.setstate(states[0])
        np.random.set_state(states[1])
        logging.getLogger("lighteval").setLevel(level)


def run_lighteval(
    answer: Callable[[Sequence[Asked]], list[Generation]],
    asked: Sequence[Asked],
    generation: GenerationConfig,
    folder: Path,
    *,
    name: str,
    tokenizer: Any,
    extraction: Extraction = "resa",
) -> tuple[list[Generation], dict[str, Any]]:
    """Let lighteval's pipeline ask the questions, judge the answers and write its own results.

    Args:
        answer: returns the generations of the questions as they were asked.
        asked: every sample of every question.
        generation: how the engine generates, for lighteval's record.
        folder: gets lighteval's folders results/ and details/.
        name: of the model in lighteval's results.
        tokenizer: the engine's.
        extraction: by whose rules our grading finds the answers; its judging process runs in the
            environment that has math-verify (`judge.judge_python`).

    Returns:
        The generations, and what lighteval's metric says of them: accuracy, and how many samples
        it judges otherwise than our grading, with the first of these.
    """
    samples = 1 + max(one.sample for one in asked)
    rows: dict[str, list[dict[str, Any]]] = {}
    configs: dict[str, Any] = {}
    for one in asked:
        if one.sample:
            continue
        task = re.sub(r"[^A-Za-z0-9_.-]", "-", one.item.task or "questions")
        rows.setdefault(task, []).append(
            {"id": one.item.id, "query": one.prompt, "gold": one.item.answer}
        )
        if task not in configs:
            configs[task] = _asked_task(
                task, _metrics(one.item.choice, samples, extraction), one.item.choice, generation
            )
    model = EngineModel(answer, asked, name, tokenizer, generation)
    tracker = EvaluationTracker(output_dir=str(folder), save_details=True)
    parameters = PipelineParameters(launcher_type=ParallelismManager.NONE, bootstrap_iters=0)
    with _our_tasks(configs, rows):
        pipeline = Pipeline(
            tasks=",".join(f"{task}|0" for task in configs),
            pipeline_parameters=parameters,
            evaluation_tracker=tracker,
            model=model,
        )
        pipeline.evaluate()
        pipeline.save_and_push_results()
        details = pipeline.get_details()
    docs = [detail.doc for group in details.values() for detail in group]
    return model.generations, _compared(docs, asked, model.generations)


def _asked_task(task: str, metrics: list[Any], choice: bool, generation: GenerationConfig) -> Any:
    def prompt(line: dict[str, Any], task_name: str = "") -> Any:
        return _doc(task_name, line["query"], line["gold"], choice, {"id": line["id"]})

    return LightevalTaskConfig(
        name=task,
        prompt_function=prompt,
        hf_repo="resa-lens",
        hf_subset="default",
        hf_avail_splits=["test"],
        evaluation_splits=["test"],
        generation_size=generation.max_new_tokens,
        metrics=metrics,
        stop_sequence=list(generation.stop),
        version=1,
    )


def _compared(
    docs: Sequence[Any], asked: Sequence[Asked], generations: Sequence[Generation]
) -> dict[str, Any]:
    """Return lighteval's accuracy beside ours, and the samples that the two judge differently."""
    values = {doc.specific["id"]: doc.specific for doc in docs}
    differing = []
    for one, generation in zip(asked, generations, strict=True):
        theirs = bool(values[one.item.id][METRIC][one.sample])
        ours = bool(values[one.item.id][OURS][one.sample])
        if theirs != ours:
            differing.append(
                {
                    "id": one.item.id,
                    "sample": one.sample,
                    "gold": one.item.answer,
                    "text": generation.text[-200:],
                    METRIC: theirs,
                    OURS: ours,
                }
            )
    return {
        "harness": f"lighteval {version('lighteval')}",
        "metric": METRIC,
        "accuracy": float(np.mean([v for metrics in values.values() for v in metrics[METRIC]])),
        "differing": len(differing),
        "only_lighteval": sum(row[METRIC] for row in differing),
        "only_resa_lens": sum(row[OURS] for row in differing),
        "examples": differing[:SHOWN],
    }
