"""What the page of layers reads beside the counts: sweeps, verdicts, and the SAEs' quality."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import scipy
import streamlit as st
from pydantic import BaseModel, Field, RootModel

from resa_lens.app import data
from resa_lens.app.data import Artifact, Listing, state
from resa_lens.errors import BadInputError
from resa_lens.pipeline.sweep_tables import SWEEP, Sweep
from resa_lens.stats import Interval

WEAKEST = "either"
"""The rule that counts what any rule counts."""
_LEVEL = 0.95

# The models -----------------------------------------------------------------------------------


def models_of(listing: Listing) -> list[str]:
    """Slugs of the models with something by layer, those with counts first."""
    slugs = [run.slug for kind in ("counts", "saes") for run in listing.of(kind)]
    slugs += [_target(run) for run in listing.of("sweep")]
    return [slug for slug in dict.fromkeys(slugs) if slug]


def _target(sweep: Artifact) -> str:
    return str(sweep.manifest.config.get("target", ""))


# Sweeps ---------------------------------------------------------------------------------------


class SweepRow(BaseModel):
    """Of a sweep's layer or control, what the page shows."""

    accuracy: float
    difference: float
    ci: Interval
    adjusted_p: float
    seeds: int


class SweepLayer(SweepRow):
    """One layer of a sweep."""

    layer: int
    simultaneous_ci: Interval


class SweepPair(BaseModel):
    """The SAE beside a control in its place."""

    difference: float
    ci: Interval
    adjusted_p: float


class SweepControl(SweepRow):
    """One control of a sweep."""

    control: str
    layer: int | None
    sae_minus_control: SweepPair | None


class SweepJob(BaseModel):
    """One run of a sweep."""

    name: str
    layer: int | None
    control: str | None
    accuracy: float


class SweepAnova(BaseModel):
    """Layers against seeds."""

    f_statistic: float | None
    p_value: float | None
    df_between: int
    df_within: int


class SweepEffect(BaseModel):
    """The layer effect."""

    anova: SweepAnova | None
    run_p: float | None
    question_p: float | None


class SweepCorrelation(BaseModel):
    """Counts with scores, over layers."""

    rho: float
    p_value: float
    ci: Interval
    n: int


class SweepSelector(BaseModel):
    """A selector's answer, held against the sweep; points."""

    selector: str
    layer: int
    score: float
    regret: float
    ci: Interval | None
    gain: float
    gain_ci: Interval | None


class SweepRegrets(BaseModel):
    """All selectors."""

    selectors: list[SweepSelector]
    random: float
    random_ci: Interval | None


class SweepPower(BaseModel):
    """What the sweep could have seen."""

    one_layer: float
    any_layer: float


class StoredSweep(BaseModel):
    """sweep.json, as far as it is shown; the rest is read as it is."""

    n: int
    n_layers: int
    base: data.StoredScore
    jobs: list[SweepJob]
    layers: list[SweepLayer] = Field(min_length=1)
    controls: list[SweepControl]
    effect: SweepEffect | None
    correlations: dict[str, SweepCorrelation]
    regrets: SweepRegrets
    reasons: dict[str, str]
    power: SweepPower
    counts: dict[str, dict[int, float]]
    fvu: dict[int, float]
    failed: dict[str, str]


def weights_of(listing: Listing, slug: str) -> str:
    """Hash of a model's weights, as what was made of it says."""
    return next(
        (
            artifact.weights
            for kind in ("counts", "saes", "sweep")
            for artifact in listing.of(kind)
            if slug in (artifact.slug, artifact.manifest.config.get("target"))
        ),
        "",
    )


def sweeps_of(listing: Listing, slug: str, site: str | None = None) -> list[Artifact]:
    """The sweeps that tuned a model or used its SAEs: its site's first, then by layers."""

    def rank(sweep: Artifact) -> tuple[bool, bool, int]:
        asked = sweep.manifest.config.get("sweep")
        layers = asked.get("layers") if isinstance(asked, dict) else None
        here = site is None or sweep.manifest.results.get("site") == site
        own = sweep.manifest.config.get("source") == slug
        return not here, not own, -len(layers if isinstance(layers, list) else ())

    found = [
        s for s in listing.of("sweep") if slug in (_target(s), s.manifest.config.get("source"))
    ]
    return sorted(found, key=rank)


def read_sweep(artifact: Artifact) -> Sweep:
    """Read a sweep's results, once for each state of the file.

    Raises:
        BadInputError: missing, damaged, or of another version.
    """
    file = artifact.path / SWEEP
    data.read(StoredSweep, file)
    try:
        return _sweep(str(artifact.path), state(file))
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInputError(
            f"{file} is damaged or of another version; the sweep's command makes it again"
        ) from error


@st.cache_data(show_spinner=False, max_entries=50)
def _sweep(folder: str, changed: int) -> Sweep:
    return Sweep.read(Path(folder))


def said_of(sweep: Artifact) -> str:
    """Say what a sweep tuned through which SAEs."""
    config, results = sweep.manifest.config, sweep.manifest.results
    target, source = config.get("target"), config.get("source")
    saes = "its own SAEs" if source == target else f"the SAEs of {source}"
    return (
        f"{target} tuned through {saes}, site {results.get('site')}, preset "
        f"{results.get('preset')}; {sweep.manifest.created[:10]}"
    )


def same_counts(sweep: Artifact, counts: Artifact | None) -> bool:
    """Whether a sweep's counts are those of the counts run."""
    return counts is not None and counts.relative in sweep.manifest.parents


# Verdicts -------------------------------------------------------------------------------------


class AtRandom(BaseModel):
    """What the rule counts at the layer with random weights."""

    counted: int = Field(ge=0)
    active: int = Field(ge=0)


class StoredVerdict(BaseModel):
    """A counted feature."""

    layer: int
    feature: int
    rule: str
    verdict: str
    random_weights: AtRandom | None = None


class StoredTally(BaseModel):
    """What is left of a rule's count."""

    rule: str
    counted: int
    verdicts: dict[str, int]
    survivors: int
    ci: Interval
    by_texts: int
    active: int
    null_counted: int | None
    null_by_texts: int | None
    null_active: int | None
    p_value: float | None
    p_counted: float | None


class StoredSummary(BaseModel):
    """All rules."""

    rules: list[StoredTally]
    reason: str


class Verdicts(BaseModel):
    """verdicts.json of a falsification."""

    features: list[StoredVerdict]
    summary: StoredSummary
    trials: dict[str, int]
    skipped: list[str]

    def by_layer(self, layers: Sequence[int]) -> dict[int, dict[str, int]]:
        """{0-based layer: {verdict: features}}, every layer that was counted."""
        found: dict[int, dict[str, int]] = {layer: {} for layer in layers}
        for feature in self.features:
            row = found.setdefault(feature.layer, {})
            row[feature.verdict] = row.get(feature.verdict, 0) + 1
        return dict(sorted(found.items()))

    def null(self) -> dict[str, dict[int, tuple[int, int]]]:
        """{rule: {layer: (counted, active)}} with random weights.

        Known where a feature stands under the rule: the artifact keeps it beside each feature.
        """
        found: dict[str, dict[int, tuple[int, int]]] = {}
        for feature in self.features:
            if beside := feature.random_weights:
                found.setdefault(feature.rule, {})[feature.layer] = beside.counted, beside.active
        return found


def verdicts_of(listing: Listing, counts: Artifact) -> Artifact | None:
    """The newest falsification of a counts run."""
    return _made_of(listing, "falsification", "counts", counts)


def read_verdicts(artifact: Artifact) -> Verdicts:
    """Read a falsification.

    Raises:
        BadInputError: missing, damaged, or of another version.
    """
    return data.read(Verdicts, artifact.path / "verdicts.json")


# Quality --------------------------------------------------------------------------------------


class PhaseFigures(BaseModel):
    """An SAE on the tokens of one phase."""

    tokens: int
    documents: int
    fvu: float | None
    l0: float | None
    dead_share: float | None
    loss_change: float | None
    loss_change_se: float | None
    loss_recovered: float | None


class StoredQuality(RootModel[dict[int, dict[str, PhaseFigures]]]):
    """quality.json: figures by layer and phase."""


def quality_of(listing: Listing, saes: Artifact) -> Artifact | None:
    """The newest quality report of SAEs."""
    return _made_of(listing, "quality", "saes", saes)


def read_quality(artifact: Artifact) -> dict[int, dict[str, PhaseFigures]]:
    """Read a quality report, {0-based layer: {phase: figures}}.

    Raises:
        BadInputError: missing, damaged, or of another version.
    """
    return data.read(StoredQuality, artifact.path / "quality.json").root


def _made_of(listing: Listing, kind: str, key: str, parent: Artifact) -> Artifact | None:
    found = (a for a in listing.of(kind) if a.manifest.config.get(key) == parent.relative)
    return next(found, None)


# What a selector saw --------------------------------------------------------------------------


def effects_of(config: Mapping[str, Any]) -> dict[int, tuple[float, float | None, float | None]]:
    """The causal effects that a recommendation was made of: {layer: (effect, low, high)}.

    Ends are None where no standard error is known.

    Raises:
        BadInputError: they are no numbers by layer.
    """
    held = config.get("causal")
    if not isinstance(held, dict):
        return {}
    found: dict[int, tuple[float, float | None, float | None]] = {}
    try:
        for layer, effect in held.items():
            parts = [float(part) for part in (effect if isinstance(effect, list) else [effect])]
            found[int(layer)] = parts[0], *interval(*parts)
    except (TypeError, ValueError, IndexError) as error:
        raise BadInputError(
            f"the recommendation's causal effects are no numbers by layer: {held!r:.80}"
        ) from error
    return dict(sorted(found.items()))


def interval(
    value: float | None, error: float | None = None, freedom: float = math.inf
) -> tuple[float | None, float | None]:
    """Student's 95 % interval of a mean with its standard error; no ends where one is unknown."""
    if value is None or error is None or freedom <= 0:
        return None, None
    reach = float(scipy.stats.t.ppf(0.5 + _LEVEL / 2, freedom)) * error
    return value - reach, value + reach
