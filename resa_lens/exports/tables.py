"""What the exports of features read: an activity run, and what was counted and judged of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.feature_tables import (
    EXAMPLE_SCHEMA,
    EXAMPLES,
    FEATURE_SCHEMA,
    FEATURES,
    STRONGEST,
    Groups,
    edges_of,
    open_groups,
)
from resa_lens.artifacts.kinds.activity import Activity
from resa_lens.artifacts.kinds.counts import Counts, Features
from resa_lens.artifacts.kinds.falsification import Falsification, Verdict, Verdicts
from resa_lens.artifacts.kinds.saes import Saes
from resa_lens.artifacts.listing import Listing
from resa_lens.artifacts.notes import Key, Note, read_notes, saes_key
from resa_lens.errors import BadInputError
from resa_lens.features.words import STANDS, WORDS
from resa_lens.models.hookpoints import parse_feature

ALL, COUNTED, STANDING = "all", "counted", "standing"
Chosen = Collection[tuple[int, int]]
"""Pairs of a 0-based layer and a feature."""


@dataclass(frozen=True)
class Feature:
    """One feature that fired, and all that was kept of it."""

    row: dict[str, Any]
    """Of features.parquet."""
    examples: list[dict[str, Any]]
    """Of examples.parquet, the strongest first, then those drawn."""
    rules: list[str]
    """That count it, the strictest first."""
    verdict: Verdict | None
    note: Note = field(default_factory=Note)
    """Of a person."""

    @property
    def place(self) -> tuple[int, int]:
        """0-based layer and feature."""
        return self.row["layer"], self.row["feature"]


@dataclass(frozen=True)
class Tables:
    """An activity run with the counts and verdicts of the same SAEs."""

    run: Artifact
    features: Groups
    examples: Groups
    edges: list[float]
    """Of the histograms' bins."""
    saes: Artifact | None
    """None where they do not lie in the workspace."""
    counted: Features
    verdicts: tuple[Verdict, ...]
    notes: Mapping[Key, Note]

    def choose(self, spec: str) -> Chosen | None:
        """Return the features that a person means; None for all.

        Args:
            spec: all, counted, standing, or LAYER:FEATURE by commas.

        Raises:
            BadInputError: no such feature, or none is counted or stands.
        """
        if spec == ALL:
            return None
        if spec == COUNTED:
            chosen = {
                (row.layer, feature)
                for row in self.counted.layers
                for features in row.features.values()
                for feature in features
            }
        elif spec == STANDING:
            chosen = {(v.layer, v.feature) for v in self.verdicts
                      if v.verdict in WORDS and WORDS[v.verdict].group == STANDS}  # fmt: skip
        else:
            results = self.run.results
            sizes = {row.layer: row.latents for row in results.layers}
            chosen = {parse_feature(text, results.n_layers) for text in spec.split(",")}
            for layer, feature in sorted(chosen):
                if feature >= sizes.get(layer, 0):
                    raise BadInputError(
                        f"feature {layer}:{feature} is none of {self.run.relative}, which holds "
                        f"layers {', '.join(map(str, sizes))}"
                    )
        if not chosen:
            raise BadInputError(
                f"no feature of {self.run.relative} is {spec}; --features all, or some by name"
            )
        return chosen

    def read(self, chosen: Chosen | None) -> Iterator[Feature]:
        """Yield the features that fired, by layer and number; a row group is read at a time.

        Raises:
            BadInputError: a table is damaged.
        """
        verdicts = {(v.layer, v.feature): v for v in self.verdicts}
        key = saes_key(self.saes, self.saes.relative if self.saes else "")
        for group in range(self.features.metadata.num_row_groups):
            rows = self.features.read([group]).to_pylist()
            if chosen is not None:
                rows = [row for row in rows if (row["layer"], row["feature"]) in chosen]
            for layer in dict.fromkeys(row["layer"] for row in rows):
                mine = [row for row in rows if row["layer"] == layer]
                examples = self._examples(layer, [row["feature"] for row in mine])
                for row in mine:
                    place = layer, row["feature"]
                    yield Feature(
                        row, examples.get(row["feature"], []), self.counted.rules_of(*place),
                        verdicts.get(place), self.notes.get((key, *place), Note()),
                    )  # fmt: skip

    def _examples(self, layer: int, features: list[int]) -> dict[int, list[dict[str, Any]]]:
        kept: dict[int, list[dict[str, Any]]] = {}
        for row in self.examples.rows_of(layer, features).to_pylist():
            kept.setdefault(row["feature"], []).append({"interval": STRONGEST, **row})
        return {name: sorted(rows, key=lambda row: row["rank"]) for name, rows in kept.items()}


def open_tables(listing: Listing, run: Artifact, notes: Path | None = None) -> Tables:
    """Open an activity run's tables, and read the newest counts and verdicts of the same SAEs.

    Args:
        listing: the workspace.
        run: of activity.
        notes: a person's file of labels.

    Raises:
        BadInputError: not an activity run, or a damaged file.
    """
    if run.kind is not Activity:
        raise BadInputError(
            f"{run.relative} is {run.kind.title}; features are exported from an activity run, "
            "which `resa-lens activity` makes"
        )
    features = open_groups(run.file(FEATURES), FEATURE_SCHEMA)
    saes = listing.parent(run, Saes)
    counts = listing.made_of(saes, Counts) if saes else []
    judged = [(a, test) for a in counts for test in listing.made_of(a, Falsification)[:1]]
    # The newest counts that were judged, else the newest.
    first = judged[0][0] if judged else next(iter(counts), None)
    return Tables(
        run,
        features,
        open_groups(run.file(EXAMPLES), EXAMPLE_SCHEMA),
        edges_of(features.schema, features.file),
        saes,
        first.read("features.json", Features) if first else Features(layers=[]),
        tuple(judged[0][1].read("verdicts.json", Verdicts).features) if judged else (),
        read_notes(notes) if notes else {},
    )
