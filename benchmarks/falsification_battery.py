"""How often the verdicts of falsification are wrong, of planted features.

    python -m benchmarks.falsification_battery            draws 100 to 199, written to data/
    python -m benchmarks.falsification_battery --tune     draws 0 to 9: the bounds and their rivals
    python -m benchmarks.falsification_battery --targets  ends with 1 where a target is missed

A feature is planted as a rule on the trials that `stimuli.trials` makes for the bundled model's
tokenizer and the prompt r1: what the text at its places is (a tag, another delimiter, a word),
what its prompt speaks of, where it stands.  Where the rule holds it fires with its reliability,
elsewhere with its leak, both drawn for each feature: 0.85 to 1 and 0 to 0.05.  In each draw the
trials are drawn again, and another SAE has a copy of each feature with noise of its own.  Its
features of all kinds are searched; where a kind is one seed's alone, the other has none with the
same rule.

A kind is true where what it marks is reasoning, or the tag that marks reasoning: it must not be
refuted.  The others are false: none may get a word that stands.  Two pairs of kinds are alike on
every text (a mark of reasoning that answers to the tag anywhere, and a detector of the tag), so
their word must neither refute nor stand: "token detector" describes.  For every kind `expected`
holds the words that say what it is.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from resa_lens import stats
from resa_lens.features import dependences
from resa_lens.features.counterparts import Counterpart, counterparts
from resa_lens.features.exclusive import CountConfig
from resa_lens.features.falsify import FalsifyConfig, judge
from resa_lens.features.responses import Responses
from resa_lens.features.stimuli import Trial, trials
from resa_lens.features.words import (
    ARTEFACT,
    CONCEPT,
    DELIMITER,
    DETECTOR,
    REFUTED,
    SEED,
    STANDS,
    SURVIVES,
    UNDETERMINED,
    VERDICTS,
    VOCABULARY,
    WORDS,
)
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model, load_model

TUNING, REPORT = range(10), range(100, 200)
FILE = Path(__file__).resolve().parents[1] / "data" / "falsification_battery.json"
POINT = Hookpoint(5, "mlp_out")
RATES = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Shares of tags at which a noisy detector fires."""
TAGGED = frozenset(("original", "injected", "words", "shuffled", "paraphrase", "document"))
DELIMITED = TAGGED | {"neutral", "format"}
ORDERED = frozenset(("original", "paraphrase", "neutral", "untagged", "document", "thought"))
"""Kinds whose texts ask for reasoning in sentences."""
REASONING = re.compile(r"reason|think|thought|chain of|steps?\b|private work|considerations")
NEAR = 4
"""Tokens to either side that a feature of a position allows."""
LATE = 25
"""Tokens of a text after which a feature of late positions fires."""


@dataclass(frozen=True)
class Place:
    """One place of one trial, as a rule sees it."""

    kind: str
    tag: bool
    """The tag itself stands here."""
    delimiter: bool
    """The tag or another delimiter."""
    reasoning: bool
    """The text speaks of reasoning, the tags left out."""
    ordered: bool
    """It does so in sentences."""
    near: bool
    """A tag of the counted prompt stands within NEAR tokens of this position."""
    before: str
    """The word before."""
    position: int
    answers: bool
    """The text has an answer tag."""
    index: int
    """0 where the opening tag is, 1 where the closing tag is."""


Rule = Callable[[Place], bool]


@dataclass(frozen=True)
class Kind:
    """A kind of planted features."""

    true: bool
    rule: Rule
    expected: tuple[str, ...]
    places: tuple[int, ...] = (0,)
    """Where it is counted: at the opening tag (0), the closing tag (1) or both."""
    reliability: tuple[float, float] = (0.85, 1.0)
    leak: tuple[float, float] = (0.0, 0.05)
    twin: bool = True
    """Whether an SAE of another seed has it."""
    by_kind: bool = False
    """Whether it fires at a rate of its own in each kind of trial, with no rule."""


def _exact(place: Place) -> bool:
    return place.tag and place.ordered


def _exact_and_thoughts(place: Place) -> bool:
    return _exact(place) or place.kind == "thought"


def _tag(place: Place) -> bool:
    return place.tag


KINDS: dict[str, Kind] = {
    "the tag in any text": Kind(True, _tag, (DETECTOR,)),
    "both tags in any text": Kind(True, _tag, (DETECTOR,), (0, 1)),
    "tag and words of reasoning, whatever the order": Kind(
        True, lambda p: p.tag and p.reasoning, (VOCABULARY,)
    ),
    "both tags and words of reasoning, whatever the order": Kind(
        True, lambda p: p.tag and p.reasoning, (VOCABULARY,), (0, 1)
    ),
    "a delimiter of reasoning, however spelled": Kind(
        True, lambda p: p.delimiter and p.ordered, (CONCEPT,)
    ),
    "a delimiter of reasoning, whatever the order": Kind(
        True, lambda p: p.delimiter and p.reasoning, (CONCEPT,), (0, 1)
    ),
    "the tag anywhere, other delimiters of reasoning": Kind(
        True, lambda p: p.tag or (p.delimiter and p.reasoning), (CONCEPT,)
    ),
    "the opening tag where reasoning is asked for": Kind(True, _exact, (SURVIVES,)),
    "the closing tag where reasoning is asked for": Kind(True, _exact, (SURVIVES,), (1,)),
    "both tags where reasoning is asked for": Kind(True, _exact, (SURVIVES,), (0, 1)),
    "the same, and thoughts": Kind(True, _exact_and_thoughts, (SURVIVES,)),
    "the same, less reliable": Kind(True, _exact, (SURVIVES,), reliability=(0.7, 0.85)),
    "this wording alone": Kind(False, lambda p: p.kind == "original", (ARTEFACT,)),
    "this prompt's words, whatever the order": Kind(
        False, lambda p: p.kind in ("original", "shuffled"), (ARTEFACT,)
    ),
    "this prompt's positions, whatever stands there": Kind(
        False, lambda p: p.near, (ARTEFACT, DELIMITER)
    ),
    "the tag at this prompt's positions": Kind(
        False, lambda p: p.tag and p.near, (ARTEFACT,)
    ),
    "the tag after one word": Kind(
        False, lambda p: p.tag and p.before in ("within", "i.e.,"), (ARTEFACT,)
    ),
    "the tag, late in a text": Kind(
        False, lambda p: p.tag and p.position >= LATE, (ARTEFACT, DETECTOR, UNDETERMINED)
    ),
    "the tag in a text with an answer tag": Kind(
        False, lambda p: p.tag and p.answers, (VOCABULARY, UNDETERMINED)
    ),
    "any delimiter": Kind(False, lambda p: p.delimiter, (DELIMITER,)),
    "any delimiter of an instruction": Kind(
        False, lambda p: p.delimiter and (p.ordered or p.kind == "format"), (DELIMITER,)
    ),
    "any word of a prompt about reasoning": Kind(False, lambda p: p.ordered, (ARTEFACT,), (0, 1)),
    "any word": Kind(False, lambda _: True, (ARTEFACT,)),
    "any word, half of the time": Kind(
        False, lambda _: True, (ARTEFACT, UNDETERMINED), reliability=(0.4, 0.6)
    ),
    "a rate of its own in each kind of trial": Kind(
        False, lambda _: True, tuple(n for n in VERDICTS if WORDS[n].group != STANDS),
        by_kind=True,
    ),
    "the exact one, in one seed's SAE": Kind(False, _exact, (SEED,), twin=False),
    **{
        f"the tag at {rate:g} of its places": Kind(
            False, _tag, (DETECTOR, UNDETERMINED, ARTEFACT), reliability=(rate, rate),
            leak=(0.0, 0.0),
        )
        for rate in RATES
    },
}  # fmt: skip
NOISY = tuple(name for name in KINDS if name.startswith("the tag at 0."))


def places_of(texts: Sequence[Trial], model: Model) -> list[list[Place]]:
    """Return the places of each trial as rules see them."""
    tokenizer: Any = model.tokenizer
    own = sorted({position for place in texts[0].places for position in place})
    rows = []
    for trial in texts:
        bare = re.sub(r"</?think>", "", trial.text).lower()
        # Behind the prompt every document speaks of reasoning.
        reasoning = bool(REASONING.search(bare))
        row = []
        for index, positions in enumerate(trial.places):
            start = min(positions, default=0)
            words = tokenizer.decode(list(trial.ids[max(0, start - 12) : start])).split()
            row.append(
                Place(
                    kind=trial.kind,
                    tag=trial.kind in TAGGED,
                    delimiter=trial.kind in DELIMITED,
                    reasoning=reasoning,
                    ordered=trial.kind in ORDERED,
                    near=any(abs(start - position) <= NEAR for position in own),
                    before=words[-1] if words else "",
                    position=start,
                    answers="<answer>" in trial.text,
                    index=index,
                )
            )
        rows.append(row)
    return rows


def plant(kind: Kind, rows: list[list[Place]], rng: np.random.Generator) -> np.ndarray:
    """Return the activations [trial, place] of one feature of a kind; at the prompt it fires."""
    reliability, leak = rng.uniform(*kind.reliability), rng.uniform(*kind.leak)
    own: dict[str, float] = {}
    return _fired(kind, rows, rng, reliability, leak, own)


def _fired(
    kind: Kind,
    rows: list[list[Place]],
    rng: np.random.Generator,
    reliability: float,
    leak: float,
    own: dict[str, float],
) -> np.ndarray:
    values = np.zeros((len(rows), 2), np.float32)
    for number, row in enumerate(rows):
        for index in kind.places:
            place = row[index]
            rate = reliability if kind.rule(place) else leak
            if kind.by_kind:
                rate = own.setdefault(place.kind, rng.uniform())
            values[number, index] = rng.uniform() < rate
    # It was counted on the prompt.
    values[0, list(kind.places)] = 1.0
    return values * rng.uniform(0.5, 1.5, values.shape).astype(np.float32)


def pair(
    kind: Kind, rows: list[list[Place]], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return a feature and its copy in another SAE, with noise of its own; None where it has none.

    An SAE's copy answers to the same texts: at nine of ten places of a text that both read it does
    what the feature does, elsewhere it is drawn anew.
    """
    reliability, leak = rng.uniform(*kind.reliability), rng.uniform(*kind.leak)
    rates: dict[str, float] = {}
    first = _fired(kind, rows, rng, reliability, leak, rates)
    if not kind.twin:
        return first, None
    again = _fired(kind, rows, rng, reliability, leak, rates)
    same = rng.uniform(size=first.shape) < 0.9
    return first, np.where(same, first * rng.uniform(0.8, 1.2, first.shape), again)


def verdicts_of(
    model: Model, seed: int, per_kind: int = 4, kinds: Sequence[str] = tuple(KINDS)
) -> list[tuple[str, str]]:
    """Plant features of every kind on one draw of the trials; return (kind, verdict)."""
    texts = trials(model, CountConfig(), seed=seed)
    rows = places_of(texts, model)
    rng = np.random.default_rng([seed, 17])
    names = [name for name in kinds for _ in range(per_kind)]
    both = [pair(KINDS[name], rows, rng) for name in names]
    mine = np.stack([first for first, _ in both], 2)

    def responses(values: np.ndarray) -> Responses:
        tensor = torch.from_numpy(values.astype(np.float32))
        return Responses(texts, {POINT: tensor}, {POINT: tuple(range(values.shape[2]))})

    def twins(lost: frozenset[Rule]) -> dict[int, Counterpart]:
        """Search the other SAE without the features of some rules."""
        theirs = np.stack(
            [
                second
                for name, (_, second) in zip(names, both, strict=True)
                if second is not None and KINDS[name].rule not in lost
            ],
            2,
        )
        # Directions that have nothing in common: the search is by activity alone.
        axes = torch.eye(len(names) + theirs.shape[2])
        return counterparts(
            here, responses(theirs), lambda _: (axes[: len(names)], axes[len(names) :])
        )[POINT]

    here = responses(mine)
    alone = frozenset((_exact, _exact_and_thoughts))
    with_all, without = twins(frozenset()), twins(alone)
    partners = {
        number: (with_all if KINDS[name].twin else without)[number]
        for number, name in enumerate(names)
    }
    rules = {POINT: dict.fromkeys(range(len(names)), ("either",))}
    verdicts = judge(here, rules, FalsifyConfig(seed=seed), other_seed={POINT: partners})
    return [(name, verdict.verdict) for name, verdict in zip(names, verdicts, strict=True)]


def rate(hits: int, n: int) -> dict[str, Any]:
    """Return a share with its 95 % interval by Clopper and Pearson."""
    return {"errors": hits, "n": n, "share": hits / n, "ci": list(stats.clopper_pearson(hits, n))}


def report(results: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return the confusion matrix and the error rates of (kind, verdict)."""
    table = {name: Counter(word for kind, word in results if kind == name) for name in KINDS}

    def errors(names: Sequence[str], group: str) -> dict[str, Any]:
        wrong = {
            name: sum(n for word, n in table[name].items() if WORDS[word].group == group)
            for name in names
        }
        total = {name: table[name].total() for name in names}
        every = rate(sum(wrong.values()), sum(total.values()))
        worst = max(names, key=lambda name: wrong[name] / total[name])
        return {**every, "worst_kind": worst, "worst_share": wrong[worst] / total[worst]}

    true = [name for name, kind in KINDS.items() if kind.true]
    false = [name for name in KINDS if name not in true and name not in NOISY]
    fits = {
        name: sum(n for word, n in table[name].items() if word in KINDS[name].expected)
        for name in KINDS
    }
    unsure = sum(table[name][UNDETERMINED] for name in true)
    return {
        "false_kills": errors(true, REFUTED),
        "false_survivals": errors(false, STANDS),
        "noisy_survivals": errors(NOISY, STANDS),
        "noisy_by_rate": {
            f"{share:g}": errors([name], STANDS) for share, name in zip(RATES, NOISY, strict=True)
        },
        "true_undetermined": rate(unsure, sum(table[name].total() for name in true)),
        "kinds": {
            name: {
                "true": kind.true,
                "expected": list(kind.expected),
                "as_expected": fits[name] / table[name].total(),
                "n": table[name].total(),
                "verdicts": {word: table[name][word] for word in VERDICTS if table[name][word]},
            }
            for name, kind in KINDS.items()
        },
    }


TARGETS = {"false_kills": 0.10, "false_survivals": 0.10, "noisy_survivals": 0.05}


def main() -> None:
    """Run the battery; print the matrix and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--targets", action="store_true")
    args = parser.parse_args()
    model = load_model("tiny-reasoner")
    start = time.process_time()
    if args.tune:
        _tune(model)
        return
    by_draw = [verdicts_of(model, seed) for seed in REPORT]
    figures = report([row for rows in by_draw for row in rows])
    settings = FalsifyConfig()
    figures = {
        "draws": [REPORT.start, REPORT.stop - 1],
        "settings": {
            "texts": settings.texts, "shuffles": settings.shuffles, "fires": settings.fires,
            "silent": dependences.SILENT,
        },
        **figures,
        "first_draw": by_draw[0],
    }  # fmt: skip
    _print(figures)
    print(f"{time.process_time() - start:.0f} s of CPU")
    FILE.write_text(json.dumps(figures, indent=1) + "\n")
    missed = [name for name, most in TARGETS.items() if figures[name]["share"] > most]
    if args.targets and missed:
        raise SystemExit(f"missed: {', '.join(missed)}")


def _tune(model: Model) -> None:
    for silent in (0.4, 0.5, 0.6, 0.7, 0.8, 1.0):
        dependences.SILENT = silent
        figures = report([row for seed in TUNING for row in verdicts_of(model, seed)])
        rates = ", ".join(f"{name} {100 * figures[name]['share']:.1f} %" for name in TARGETS)
        fits = np.mean([kind["as_expected"] for kind in figures["kinds"].values() if kind["true"]])
        print(f"silent {silent}: {rates}, true kinds as expected {100 * fits:.1f} %")


def _print(figures: dict[str, Any]) -> None:
    print("| planted | " + " | ".join(VERDICTS) + " |")
    print("|---" * (1 + len(VERDICTS)) + "|")
    for name, kind in figures["kinds"].items():
        cells = " | ".join(str(kind["verdicts"].get(word, "")) for word in VERDICTS)
        print(f"| {name} ({'true' if kind['true'] else 'false'}) | {cells} |")
    for name in (*TARGETS, "true_undetermined"):
        item = figures[name]
        low, high = (100 * bound for bound in item["ci"])
        worst = (
            f", worst {item['worst_kind']} {100 * item['worst_share']:.1f} %"
            if ("worst_kind" in item)
            else ""
        )
        print(f"{name}: {item['errors']} of {item['n']} ({100 * item['share']:.1f} %, "
              f"{low:.1f} to {high:.1f} %){worst}")  # fmt: skip


if __name__ == "__main__":
    main()
