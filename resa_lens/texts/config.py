"""Which records are read, and how they become sequences: the configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from resa_lens.config import Config, data_source, resolved, setting
from resa_lens.errors import BadInputError
from resa_lens.files import named_path
from resa_lens.texts import prompts


@dataclass(frozen=True)
class HubSet:
    """A data set of the paper on the hub."""

    repo: str
    question: str
    answer: str


HUB_SETS: dict[str, HubSet] = {
    "still": HubSet("RUC-AIBOX/STILL-3-Preview-RL-Data", "question", "answer"),
    "deepscaler": HubSet("agentica-org/DeepScaleR-Preview-Dataset", "problem", "answer"),
    "open-s1": HubSet("knoveleng/open-s1", "problem", "answer"),
    "ii-thought": HubSet("Intelligent-Internet/II-Thought-RL-v0-Math-50K", "problem", "answer"),
    "openr1": HubSet("open-r1/OpenR1-Math-220k", "problem", "answer"),
}
"""The paper's data sets (spec section 3); the columns may be overridden."""
FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
Packing = Literal["joined", "separate"]
"""`joined`: documents in one sequence attend to each other, as in the authors' code; `separate`:
positions restart with each document and attention stays inside it."""


def check_source(source: str) -> None:
    """Check that data of a name can be meant, before anything is loaded.

    Raises:
        BadInputError: no bundled set, no file that is there, no short name and no hub id.
    """
    if source in ("tiny", *HUB_SETS):
        return
    path = named_path(source, "data")
    if path.exists():
        return
    # Names without an owner are formats to the `datasets` library: it would read whatever files of
    # that format lie in the folder where the command runs.
    owner, slash, name = source.partition("/")
    if path.suffix in FILES or not (owner and slash and name) or "/" in name or source[0] in ".~":
        raise BadInputError(
            f"data {source!r} does not exist; use tiny, a {', '.join(FILES)} file, "
            f"a folder of them, {', '.join(HUB_SETS)} or a hub id (owner/name)"
        )


@dataclass(frozen=True)
class CorpusConfig(Config):
    """Which records, and how they become sequences."""

    source: str = data_source(
        "tiny",
        "Documents: tiny, a .jsonl, .json, .csv, .tsv or .parquet file or a folder of them, still, "
        "deepscaler, open-s1, ii-thought, openr1 or a hub id.",
        "--data", check=check_source,
    )  # fmt: skip
    question_column: str | None = data_source(
        None, 'Column of the question in files; a dot leads inside ("extra_info.question").'
    )
    answer_column: str | None = data_source(
        None, "Column of the answer in files; of a worked solution its result is the answer."
    )
    steps_column: str | None = data_source(None, "Column of the worked steps in --data.")
    text_column: str | None = data_source(
        None, "Column of whole documents in --data, where no question and answer are needed."
    )
    rows: int | None = data_source(
        None,
        "First rows of --data that are read, all by default; of a hub set these alone are fetched.",
        "--data-rows", min=1,
    )  # fmt: skip
    system_prompt: str = resolved(
        "r1", prompts.resolve_system_prompt, "A name in prompts.SYSTEM_PROMPTS or a text."
    )
    system_share: float = setting(
        0.5, "Share of documents that carry the system prompt.", min=0, max=1
    )
    """Without it in the data, the SAE's FVU on the prompt is 0.36 to 0.77 on a tiny model (0.02 to
    0.05 with one half)."""
    thought_share: float | None = setting(
        0.0,
        "Share of documents whose think tags hold the worked steps of --data; the others hold the "
        "answer alone. By default a half where the data have steps; 0 is the paper's setting.",
        min=0, max=1, later=True,
    )  # fmt: skip
    """0: CoT-free documents alone, on which an SAE never sees a thought.  None, an SAE's
    default: what `corpora.settled` makes of it."""
    own_thoughts: int = setting(
        0,
        "Of so many questions of --data the model's own thoughts, right or wrong, are the steps; "
        "--plan says what writing them takes.",
        min=0, max=10**6, later=True,
    )  # fmt: skip
    sequence: int = setting(256, "Tokens a sequence.", min=2, max=2**20)
    seed: int = setting(0, "Seed of everything that is drawn.", min=0, max=2**32 - 1)
    packing: Packing = setting(
        "joined",
        "Whether documents of one sequence attend to each other (joined, as in the authors' code) "
        "or not (separate).",
        later=True,
    )


def check_data(*corpora_read: CorpusConfig) -> None:
    """Read documents of files, so that what is wrong with them is refused before a model is loaded.

    Raises:
        BadInputError: a file that cannot be read, has no such columns, or no steps where a share of
            thoughts is asked for.
    """
    from resa_lens.texts.corpora import read_records, settled

    for corpus in dict.fromkeys(corpora_read):
        if corpus.source != "tiny" and named_path(corpus.source, "data").exists():
            settled(corpus, read_records(corpus))
