"""A feature's neighbours in its SAE, and its counterparts in other layers, seeds and models.

Decoder directions are read from the SAEs of the workspace, one decoder at a time; features of other
models come from what `resa-lens match-features` recorded.  Each stands beside what chance gives.
Nothing is measured and nothing written, and nothing here loads torch: the app draws from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

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

SAME, ADJACENT, OTHERS = "this SAE", "adjacent layers", "other SAEs of this layer"
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
class Location:
    """One SAE: a layer of SAEs of the workspace."""

    saes: str
    """Workspace-relative path of the SAEs."""
    artifact: Artifact | None
    """None where the workspace does not have them."""
    layer: int
    """0-based."""

    @property
    def folder(self) -> Path:
        """The SAE's folder.

        Raises:
            BadInputError: the workspace does not have it.
        """
        if self.artifact is None:
            raise BadInputError(f"the SAEs {self.saes} are not in this workspace")
        return self.artifact.path / Hookpoint(self.layer, self.artifact.results.site).sparsify

    @property
    def decoder(self) -> Decoder:
        """The decoder, opened.

        Raises:
            BadInputError: missing, damaged, changed or of a layout that cannot be read here.
        """
        decoder = open_decoder(self.folder)
        if self.artifact and decoder.file.stat().st_size <= CHECKED_BYTES:
            self.artifact.file(str(decoder.file.relative_to(self.artifact.path)))
        return decoder

    @property
    def file(self) -> Path | None:
        """The file with its weights; None where there is none."""
        try:
            return weights_file(self.folder)
        except BadInputError:
            return None


@dataclass(frozen=True)
class Place:
    """One decoder in which the neighbours of a feature are looked for."""

    group: str
    """SAME, ADJACENT or OTHERS."""
    name: str
    """Which of the OTHERS it is; empty in the feature's own SAEs."""
    own: Location
    """The feature's."""
    other: Location
    """Where is looked."""


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
    """Which SAE or model it is in; empty for the SAEs of the feature that it is near to."""
    layer: int
    """0-based."""
    feature: int
    similarities: tuple[Similarity, ...]
    run: str
    """Workspace-relative path of its activity run; empty where none was measured."""
    profile: Profile | None
    """None where its activity was not measured, or it never fired."""


def places(listing: Listing, saes: str, layer: int) -> tuple[list[Place], int]:
    """Return the decoders in which a feature's neighbours can be looked for.

    Those are its own, the next ones below and above it in its run, and those of up to `MOST_SAES`
    other SAEs of the same model, site and layer: of its own number of latents first, which are
    those of other seeds.

    Args:
        listing: the workspace.
        saes: workspace-relative path of the feature's SAEs.
        layer: the feature's, 0-based.

    Returns:
        The decoders, and how many other SAEs are left out.
    """
    own = _location(listing, saes, layer)
    artifact, same = own.artifact, Place(SAME, "", own, own)
    if artifact is None:
        return [same], 0
    layers = _layers(artifact)
    below, above = [n for n in layers if n < layer], [n for n in layers if n > layer]
    others = [
        other
        for other in listing.of(Saes, artifact.weights)
        if artifact.weights
        and other.relative != saes
        and other.results.site == artifact.results.site
        and layer in _layers(other)
    ]
    size = artifact.settings.sae.latents
    others.sort(key=lambda other: (other.settings.sae.latents != size, other.settings.sae.seed))
    adjacent = [*below[-1:], *above[:1]]
    return [
        same,
        *(Place(ADJACENT, "", own, Location(saes, artifact, n)) for n in adjacent),
        *(
            Place(OTHERS, _name(other, size), own, Location(other.relative, other, layer))
            for other in others[:MOST_SAES]
        ),
    ], len(others[MOST_SAES:])


def _location(listing: Listing, saes: str, layer: int) -> Location:
    known = listing.at(saes)
    return Location(saes, known if known and known.kind is Saes else None, layer)


def _layers(saes: Artifact) -> list[int]:
    return sorted(row.layer for row in saes.results.layers)


def _name(saes: Artifact, latents: int) -> str:
    training = saes.settings.sae
    width = "" if training.latents == latents else f"{training.latents:,} latents, "
    return f"{width}seed {training.seed} ({short_id(saes)})"


def nearest(
    place: Place, feature: int, known: Sequence[tuple[int, float]] | None = None
) -> Ranking:
    """Return the features of a decoder whose directions are nearest to a feature's.

    Args:
        place: the decoder.
        feature: of its own SAE.
        known: of its own SAE the neighbours that a table keeps, with their cosines: then the
            decoder gives the bound alone, and they stand without it where it cannot be read.

    Raises:
        BadInputError: an SAE is missing or damaged, or has another width.
    """
    own, count = place.group == SAME, PER_PLACE[place.group]
    cosines = tuple(known or ())[:count]
    try:
        decoder = place.other.decoder
    except BadInputError as error:
        if cosines:
            return Ranking(cosines, None, str(error))
        raise
    if not cosines:
        direction = (decoder if own else place.own.decoder).row(feature)
        cosines = tuple(decoder.nearest(direction, count, without=feature if own else None))
    return Ranking(cosines, chance_bound(max(1, decoder.d_sae - own), decoder.d_in))


def neighbours(
    listing: Listing,
    place: Place,
    ranking: Ranking,
    open_table: OpenTable | None = None,
    viewed: str = "",
) -> tuple[list[Neighbour], list[str]]:
    """Return the features of a ranking, each with what its activity run says.

    Args:
        listing: the workspace.
        place: the decoder of the ranking.
        ranking: of `nearest`.
        open_table: opens a table; from its file by default.
        viewed: path of the activity run that is preferred where it is of the same SAE; the newest
            by default.

    Returns:
        The features, and a line where their activity cannot be read: then they have no profile.
    """
    features = [feature for feature, _ in ranking.cosines]
    reader = _Profiles(listing, open_table or _open, viewed)
    run, profiles = reader.of(place.other, features)
    return [
        Neighbour(
            place.name,
            place.other.layer,
            feature,
            (Similarity("cosine", cosine, ranking.chance),),
            run,
            profiles.get(feature),
        )
        for feature, cosine in ranking.cosines
    ], reader.notes


def recorded(
    listing: Listing,
    saes: str,
    layer: int,
    feature: int,
    open_table: OpenTable | None = None,
    viewed: str = "",
) -> tuple[list[Neighbour], list[str]]:
    """Return what `match-features` recorded of a feature, as the source of a match or its target.

    Args:
        listing: the workspace.
        saes: workspace-relative path of the feature's SAEs.
        layer: 0-based.
        feature: of that layer.
        open_table: opens a table; from its file by default.
        viewed: as of `neighbours`.

    Returns:
        Up to `MOST_RECORDED` features, those of the largest value first, and a line for each file
        that cannot be read and for what is left out.
    """
    reader = _Profiles(listing, open_table or _open, viewed)
    rows: list[tuple[float, Neighbour]] = []
    notes: list[str] = []
    for run in listing.of(Matches):
        pair = run.settings.saes
        if len(pair) != 2 or saes not in pair:
            continue
        try:
            for side in (0, 1):
                if pair[side] == saes:
                    rows += _matches(reader, run, side, layer, feature)
        except BadInputError as error:
            notes.append(str(error))
    notes += dict.fromkeys(reader.notes)
    rows.sort(key=lambda row: -row[0])
    if left_out := len(rows[MOST_RECORDED:]):
        notes.append(f"{left_out} more recorded matches, of smaller values, are left out.")
    return [neighbour for _, neighbour in rows[:MOST_RECORDED]], notes


def _matches(
    reader: _Profiles, run: Artifact, side: int, layer: int, feature: int
) -> list[tuple[float, Neighbour]]:
    """Return the features that a run matched with one, which is on this side of it."""
    listing, groups = reader.listing, reader.open_table(run, "matches.parquet")
    own = "feature" if side == 0 else "{}_match"
    table = groups.rows_of(layer)
    similarities: dict[int, list[Similarity]] = {}
    summary = run.read("matches.json", AllMatches).root
    totals = next((row for row in summary if row.layer == layer), None)
    there = _location(listing, run.settings.saes[1 - side], layer)
    for measure in ("cosine", "correlation"):
        mine = pa.array(table[own.format(measure)].to_numpy() == feature)
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
    activity, profiles = reader.of(there, list(similarities))
    models = run.results.models
    model = models[1 - side] if len(models) == 2 else ""
    seed = f", seed {there.artifact.settings.sae.seed}" if there.artifact else ""
    name = f"{'matched from' if side else 'match in'} {model}{seed}"
    return [
        (
            max(one.value for one in alike),
            Neighbour(name, layer, other, tuple(alike), activity, profiles.get(other)),
        )
        for other, alike in similarities.items()
    ]


def _recorded_bound(listing: Listing, run: Artifact, layer: int) -> float | None:
    """The bound of a match by cosine; None where the SAE in which it was sought is unreadable.

    Matches are one to one in small SAEs: their chance is below that of the nearest.
    """
    try:
        decoder = _location(listing, run.settings.saes[1], layer).decoder
    except BadInputError:
        return None
    return chance_bound(decoder.d_sae, decoder.d_in)


def _open(artifact: Artifact, name: str) -> Groups:
    return open_groups(artifact.file(name), artifact.kind.files[name])


@dataclass(frozen=True)
class _Profiles:
    """Reads what activity runs say of features."""

    listing: Listing
    open_table: OpenTable
    viewed: str
    """Path of the run that is preferred to newer ones."""
    notes: list[str] = field(default_factory=list)
    """A line for each table that could not be read."""

    def of(self, location: Location, features: Sequence[int]) -> tuple[str, dict[int, Profile]]:
        """Return the path of an SAE's activity run, and what it says of some features."""
        runs = [
            run
            for run in self.listing.of(Activity)
            if location.saes in run.manifest.parents
            and location.layer in [row.layer for row in run.results.layers]
        ]
        runs.sort(key=lambda run: run.relative != self.viewed)  # else the newest stays first
        if not runs:
            return "", {}
        try:
            return runs[0].relative, self._read(runs[0], location.layer, features)
        except BadInputError as error:
            self.notes.append(str(error))
            return runs[0].relative, {}

    def _read(self, run: Artifact, layer: int, features: Sequence[int]) -> dict[int, Profile]:
        if not features:
            return {}
        groups = self.open_table(run, FEATURES)
        wide = ("layer", "feature", "histogram", "fires_on", "top_tokens")
        names = [name for name in wide if name in groups.schema.names]
        edges = tuple(edges_of(groups.schema, groups.file))
        profiles = {}
        for row in groups.rows_of(layer, features, names).to_pylist():
            tokens = row.get("fires_on") or row.get("top_tokens") or ()
            counts = tuple(count or 0 for count in row["histogram"] or ())
            words = tuple(token or "" for token in tokens[:TOKENS])
            whole = len(counts) + 1 == len(edges)
            profiles[row["feature"]] = Profile(words, counts if whole else (), edges)
        return profiles
