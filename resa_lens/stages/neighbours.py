"""A feature's neighbours in its SAE, and its counterparts in other layers, seeds and models.

Decoder directions are read from the SAEs of the workspace, one decoder at a time; features of other
models come from what `resa-lens match-features` recorded.  Each stands beside what chance gives.
Nothing is measured and nothing written, and nothing here loads torch: the app draws from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc

from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.feature_tables import FEATURES, Groups, edges_of, open_groups
from resa_lens.artifacts.kinds.activity import Activity
from resa_lens.artifacts.kinds.matches import AllMatches, Matches
from resa_lens.artifacts.kinds.saes import Saes
from resa_lens.artifacts.listing import Listing, short_id
from resa_lens.errors import BadInputError
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.saes.decoders import Decoder, open_decoder, weights_file
from resa_lens.stats.directions import chance_bound

SAME, ADJACENT, OTHERS, RECORDED = "this SAE", "adjacent layers", "other SAEs", "recorded matches"
"""Where a feature's neighbours are looked for."""
PER_PLACE = {SAME: 4, ADJACENT: 2, OTHERS: 2}
"""Features of one decoder."""
MOST_SAES = 4
"""Other SAEs of the layer whose decoders are read."""
MOST_RECORDED = 8
"""Recorded matches of a feature, those of the largest value."""
CHECKED_BYTES = 64 * 2**20
"""Of an SAE's file up to which its hash is looked at; a larger one is checked for its form and for
finite numbers alone, because to hash it takes longer than to read its decoder."""
TOKENS = 5
"""Of a profile."""

OpenTable = Callable[[Artifact, str], Groups]
"""Opens a table of an artifact by its name."""


@dataclass(frozen=True)
class Place:
    """One decoder in which the neighbours of a feature are looked for."""

    group: str
    """SAME, ADJACENT or OTHERS."""
    name: str
    """What tells it from the others of its group."""
    own: Artifact
    """The feature's SAEs."""
    layer: int
    """The feature's, 0-based."""
    saes: Artifact
    """Those that are looked in."""
    other_layer: int
    """0-based."""

    @property
    def folders(self) -> tuple[Path, Path]:
        """Folder of the feature's SAE, and of the one that is looked in."""
        return _folder(self.own, self.layer), _folder(self.saes, self.other_layer)


@dataclass(frozen=True)
class Ranking:
    """The features of one decoder that are nearest to a direction."""

    cosines: tuple[tuple[int, float], ...]
    """Feature and cosine, nearest first."""
    chance: float | None
    """`stats.directions.chance_bound` of the best of them; None where the decoder is unreadable."""
    note: str = ""
    """Why there is no such bound."""


@dataclass(frozen=True)
class Similarity:
    """How alike two features are, beside what chance gives."""

    measure: str
    """cosine, of decoder directions, or correlation, of activations on the same tokens."""
    value: float
    chance: float | None
    """Of cosines the bound that 95 of 100 random directions stay below with their best; of
    correlations the mean best where the tokens are shifted.  None where it is not known."""


@dataclass(frozen=True)
class Profile:
    """What an activity run says of a feature, in short."""

    run: str
    """Workspace-relative path of the activity run."""
    tokens: tuple[str, ...]
    """At which it fires most often; of older runs those that it raises most."""
    histogram: tuple[int, ...]
    """Tokens in each bin of activation; empty where the run kept none."""
    edges: tuple[float, ...]
    """Of the bins, one more than there are bins."""


@dataclass(frozen=True)
class Neighbour:
    """A feature that is near another."""

    name: str
    """Which SAE, layer or model it is in."""
    layer: int
    """0-based."""
    feature: int
    similarities: tuple[Similarity, ...]
    profile: Profile | None
    """None where its activity was not measured, or it never fired."""


def places(listing: Listing, saes: Artifact, layer: int) -> tuple[list[Place], int]:
    """Return the decoders in which a feature's neighbours can be looked for.

    Those are its own, the next ones below and above it in its run, and those of up to `MOST_SAES`
    other SAEs of the same model, site and layer: of its own number of latents first, which are
    those of other seeds.

    Args:
        listing: the workspace.
        saes: the feature's SAEs.
        layer: the feature's, 0-based.

    Returns:
        The decoders, and how many other SAEs are left out.
    """
    layers = _layers(saes)
    below, above = (side for side in ([n for n in layers if n < layer], layers))
    near = [*below[-1:], *[n for n in above if n > layer][:1]]
    others = [
        other
        for other in listing.of(Saes, saes.weights)
        if saes.weights
        and other.relative != saes.relative
        and other.results.site == saes.results.site
        and layer in _layers(other)
    ]
    size = saes.settings.sae.latents
    others.sort(key=lambda other: (other.settings.sae.latents != size, other.settings.sae.seed))
    return [
        Place(SAME, f"layer {layer}", saes, layer, saes, layer),
        *(Place(ADJACENT, f"layer {n}", saes, layer, saes, n) for n in near),
        *(
            Place(OTHERS, _name(other, size), saes, layer, other, layer)
            for other in others[:MOST_SAES]
        ),
    ], len(others[MOST_SAES:])


def _layers(saes: Artifact) -> list[int]:
    return sorted(row.layer for row in saes.results.layers)


def _name(saes: Artifact, latents: int) -> str:
    training = saes.settings.sae
    width = "" if training.latents == latents else f"{training.latents:,} latents, "
    return f"{width}seed {training.seed} ({short_id(saes)})"


def _folder(saes: Artifact, layer: int) -> Path:
    return saes.path / Hookpoint(layer, saes.results.site).sparsify


def _decoder(saes: Artifact, layer: int) -> Decoder:
    """Open a decoder of SAEs of the workspace.

    Raises:
        BadInputError: missing, damaged, changed or of a layout that cannot be read here.
    """
    decoder = open_decoder(_folder(saes, layer))
    if decoder.file.stat().st_size <= CHECKED_BYTES:
        saes.file(str(decoder.file.relative_to(saes.path)))
    return decoder


def nearest(
    place: Place, feature: int, known: Sequence[tuple[int, float]] | None = None
) -> Ranking:
    """Return the features of a decoder whose directions are nearest to a feature's.

    Args:
        place: the decoder.
        feature: of its own SAE at `place.layer`.
        known: of its own SAE the neighbours that a table keeps, with their cosines: then the
            decoder gives the bound alone, and they stand without it where it cannot be read.

    Raises:
        BadInputError: an SAE is missing or damaged, or has another width.
    """
    own = place.group == SAME
    try:
        decoder = _decoder(place.saes, place.other_layer)
    except BadInputError as error:
        if known:
            return Ranking(tuple(known)[: PER_PLACE[place.group]], None, str(error))
        raise
    chance = chance_bound(max(1, decoder.d_sae - own), decoder.d_in)
    cosines = list(known or ())
    if not cosines:
        direction = (decoder if own else _decoder(place.own, place.layer)).row(feature)
        cosines = decoder.nearest(
            direction, PER_PLACE[place.group], without=feature if own else None
        )
    return Ranking(tuple(cosines)[: PER_PLACE[place.group]], chance)


def neighbours(
    listing: Listing, place: Place, ranking: Ranking, open_table: OpenTable | None = None
) -> list[Neighbour]:
    """Return the features of a ranking, each with what its activity run says.

    Args:
        listing: the workspace.
        place: the decoder of the ranking.
        ranking: of `nearest`.
        open_table: opens a table; from its file by default.

    Raises:
        BadInputError: the table of the activity is missing or damaged.
    """
    features = [feature for feature, _ in ranking.cosines]
    profiles = _profiles(
        listing, place.saes.relative, place.other_layer, features, open_table or _open
    )
    return [
        Neighbour(
            place.name,
            place.other_layer,
            feature,
            (Similarity("cosine", cosine, ranking.chance),),
            profiles.get(feature),
        )
        for feature, cosine in ranking.cosines
    ]


def recorded(
    listing: Listing, saes: str, layer: int, feature: int, open_table: OpenTable | None = None
) -> tuple[list[Neighbour], list[str]]:
    """Return what `match-features` recorded of a feature, as the source of a match or its target.

    Args:
        listing: the workspace.
        saes: workspace-relative path of the feature's SAEs.
        layer: 0-based.
        feature: of that layer.
        open_table: opens a table; from its file by default.

    Returns:
        Up to `MOST_RECORDED` features, those of the largest value first, and a line for each record
        that cannot be read and for what is left out.
    """
    use = open_table or _open
    rows: list[tuple[float, Neighbour]] = []
    notes: list[str] = []
    for run in listing.of(Matches):
        pair = run.settings.saes
        if len(pair) != 2 or saes not in pair:
            continue
        try:
            for side in (0, 1):
                if pair[side] == saes:
                    rows += _matches(listing, run, side, layer, feature, use)
        except BadInputError as error:
            notes.append(str(error))
    rows.sort(key=lambda row: -row[0])
    if left_out := len(rows[MOST_RECORDED:]):
        notes.append(f"{left_out} more recorded matches, of smaller values, are left out.")
    return [neighbour for _, neighbour in rows[:MOST_RECORDED]], notes


def _matches(
    listing: Listing, run: Artifact, side: int, layer: int, feature: int, open_table: OpenTable
) -> list[tuple[float, Neighbour]]:
    """Return the features that a run matched with one, which is on this side of it."""
    groups = open_table(run, "matches.parquet")
    own = "feature" if side == 0 else "{}_match"
    table = groups.read(groups.of(layer)).filter(pc.field("layer") == layer)
    similarities: dict[int, list[Similarity]] = {}
    summary = run.read("matches.json", AllMatches).root
    totals = next((row for row in summary if row.layer == layer), None)
    there = run.settings.saes[1 - side]
    for measure in ("cosine", "correlation"):
        mine = pc.field(own.format(measure)) == feature
        other = f"{measure}_match" if side == 0 else "feature"
        for row in table.filter(mine).select([other, measure]).to_pylist():
            if row[other] is None or row[measure] is None or not math.isfinite(row[measure]):
                continue
            if measure == "cosine":
                chance = _recorded_bound(listing, run, layer)
            else:
                chance = totals.correlation.null_mean if totals else None
            similarities.setdefault(row[other], []).append(
                Similarity(measure, row[measure], chance)
            )
    profiles = _profiles(listing, there, layer, list(similarities), open_table)
    models = run.results.models
    model = models[1 - side] if len(models) == 2 else ""
    kept = listing.at(there)
    seed = f", seed {kept.settings.sae.seed}" if kept and kept.kind is Saes else ""
    name = f"{model}{seed}, layer {layer}" + ("" if side == 0 else "; this is its match")
    return [
        (
            max(one.value for one in alike),
            Neighbour(name, layer, other, tuple(alike), profiles.get(other)),
        )
        for other, alike in similarities.items()
    ]


def _recorded_bound(listing: Listing, run: Artifact, layer: int) -> float | None:
    """The bound of a match by cosine; None where the SAE in which it was sought is unreadable.

    Matches are one to one in small SAEs: their chance is below that of the nearest.
    """
    saes = listing.at(run.settings.saes[1])
    if saes is None or saes.kind is not Saes:
        return None
    try:
        decoder = _decoder(saes, layer)
    except BadInputError:
        return None
    return chance_bound(decoder.d_sae, decoder.d_in)


def _open(artifact: Artifact, name: str) -> Groups:
    return open_groups(artifact.file(name), artifact.kind.files[name])


def _profiles(
    listing: Listing, saes: str, layer: int, features: Sequence[int], open_table: OpenTable
) -> dict[int, Profile]:
    """Return what the newest activity run of SAEs that has the layer says of some features."""
    runs = (run for run in listing.of(Activity) if saes in run.manifest.parents)
    run = next((r for r in runs if layer in [row.layer for row in r.results.layers]), None)
    if run is None or not features:
        return {}
    groups = open_table(run, FEATURES)
    wide = ("layer", "feature", "histogram", "fires_on", "top_tokens")
    names = [name for name in wide if name in groups.schema.names]
    mine = (pc.field("layer") == layer) & pc.field("feature").isin(list(features))
    edges = tuple(edges_of(groups.schema, groups.file))
    profiles = {}
    for row in groups.read(groups.of(layer, features), names).filter(mine).to_pylist():
        tokens = row.get("fires_on") or row.get("top_tokens") or ()
        counts = tuple(count or 0 for count in row["histogram"] or ())
        if len(counts) + 1 != len(edges):
            counts = ()
        words = tuple(token or "" for token in tokens[:TOKENS])
        profiles[row["feature"]] = Profile(run.relative, words, counts, edges)
    return profiles


def states(place: Place) -> list[Path]:
    """Return the files that a ranking is read from: another state of one is another ranking."""
    files = []
    for folder in place.folders:
        try:
            files.append(weights_file(folder))
        except BadInputError:
            files.append(folder)
    return files
