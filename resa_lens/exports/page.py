"""Chosen features as one self-contained page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from resa_lens.errors import BadInputError
from resa_lens.exports.neuronpedia import Exported, label
from resa_lens.exports.tables import Chosen, Feature, Tables
from resa_lens.features.words import STANDS, WORDS
from resa_lens.figures.features import activation_figure
from resa_lens.figures.page import Block, Chips, Passage, Section, Table, Verdict, write_page
from resa_lens.figures.tokens import visible
from resa_lens.models.hookpoints import describe_layer
from resa_lens.texts.prompts import PHASES

MOST = 200
"""Features on one page."""
EXAMPLES = 12
"""Examples of a feature on the page; the phases and intervals take turns."""


def write_features(
    tables: Tables,
    target: Path,
    chosen: Chosen | None,
    advance: Callable[[int], None] = lambda done: None,
) -> Exported:
    """Write the page, whole or not at all.

    Args:
        tables: the run.
        target: the file, whose name ends in .html.
        chosen: features; None for all that fired.
        advance: called for each feature.

    Raises:
        BadInputError: more than 200 features, another name, none of them fired, a damaged table.
    """
    if target.suffix != ".html":
        raise BadInputError(f"{target} is no name of a page; it should end in .html")
    features = list(islice(tables.read(chosen), MOST + 1))
    if len(features) > MOST:
        raise BadInputError(
            f"more than {MOST} features make a page that nobody reads; choose with --features, or "
            "export --to neuronpedia, which takes them all"
        )
    if not features:
        raise BadInputError(f"none of these features fired on the documents of {tables.run.path}")
    results = tables.run.results
    sections: list[Section] = []
    for feature in features:
        layer, index = feature.place
        title = f"{results.model}, {describe_layer(layer, results.n_layers)}, feature {index}"
        sections.append((title, list(_blocks(feature, tables))))
        advance(1)
    lead = (
        f"Site {results.site}; {sum(results.tokens.values()):,} tokens of {results.documents:,} "
        f"documents; activity run {tables.run.relative}. The deeper the orange, the stronger; the "
        "peak of an example is framed."
    )
    write_page(target, f"{len(features)} features of {results.model}", lead, sections)
    absent = 0 if chosen is None else len(chosen) - len(features)
    return Exported(target, len(features), 1, absent)


def _blocks(feature: Feature, tables: Tables) -> Iterator[Block]:
    row = feature.row
    verdict, note = feature.verdict, feature.note
    if not note.empty:
        tags = f" [{', '.join(note.tags)}]" if note.tags else ""
        yield ". ".join(text for text in (note.label, note.note) if text) + tags
    if verdict:
        word = WORDS.get(verdict.verdict)
        stands = word is not None and word.group == STANDS
        yield Verdict(verdict.verdict, verdict.sentence or verdict.reason, stands)
    else:
        yield (label(feature) or "not counted by any rule").capitalize() + "."
    if words := [word or "" for word in row.get("fires_on") or []]:
        yield "Tokens at which it fires, with their share of its firings in percent:"
        yield Chips(words, [100 * (share or 0.0) for share in row["fires_on_share"]])
    yield Table(
        ("phase", "fires at", "density, %", "mean where it fires", "maximum"),
        [
            (phase, row[f"tokens_fired_{phase}"], f"{100 * row[f'density_{phase}']:.3g}",
             f"{row[f'mean_{phase}']:.3g}", f"{row[f'max_{phase}']:.3g}")
            for phase in PHASES
        ],
    )  # fmt: skip
    for example in _turns(feature.examples)[:EXAMPLES]:
        note = f"{example['phase']}, {example['interval']}, {example['value']:.3g}"
        yield Passage(
            [token or "" for token in example["tokens"] or []],
            [value or 0.0 for value in example["acts"] or []],
            example["position"] - example["start"], row["max"], note,
        )  # fmt: skip
    for side, name in (("top", "raises"), ("bottom", "lowers")):
        if row[f"{side}_tokens"]:
            pairs = zip(row[f"{side}_tokens"], row[f"{side}_logits"], strict=True)
            text = ", ".join(f"{visible(token)} {value:+.2f}" for token, value in list(pairs)[:10])
            yield f"Its direction {name} by the logit lens: {text}."
    if row["histogram"]:
        yield activation_figure(tables.edges, row["histogram"])


def _turns(examples: list[dict]) -> list[dict]:
    """Return examples so that phases and intervals take turns, the strongest of each first."""
    seen: dict[tuple[str, str], int] = {}
    turns = []
    for place, row in enumerate(examples):
        key = row["phase"], row["interval"]
        seen[key] = seen.get(key, 0) + 1
        turns.append((seen[key], place))
    return [examples[place] for _, place in sorted(turns)]
