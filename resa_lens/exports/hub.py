"""SAEs and adapters as a folder for a hub, with a card that says what they are, and the push."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.kinds.adapter import WEIGHTS, Adapter
from resa_lens.artifacts.kinds.counts import RULES, Counts
from resa_lens.artifacts.kinds.falsification import Falsification, Tally
from resa_lens.artifacts.kinds.quality import Figures, Quality
from resa_lens.artifacts.kinds.saes import Saes
from resa_lens.artifacts.listing import Listing
from resa_lens.errors import BadInputError, RunFailedError
from resa_lens.models.hookpoints import describe_layer
from resa_lens.publishing import filled
from resa_lens.stages.card import base_name, code_span, escaped, table_of

CARD = "README.md"
_SHARED = frozenset({"cfg.json", "sae.safetensors", "adapter_config.json", WEIGHTS})
"""Files that go out; others name paths of this machine, or are of use to nobody else."""


@dataclass(frozen=True)
class Package:
    """A folder for a hub."""

    target: Path
    kind: str
    files: tuple[str, ...]
    megabytes: float
    url: str | None = None
    """Of the repository it was pushed to."""


def write_package(listing: Listing, artifact: Artifact, target: Path) -> Package:
    """Write SAEs or an adapter with its card as a folder, whole or not at all.

    Args:
        listing: the workspace, for what was measured of them.
        artifact: SAEs or an adapter.
        target: the folder to make.

    Raises:
        BadInputError: another kind, or a damaged file.
    """
    if artifact.kind not in (Saes, Adapter):
        raise BadInputError(
            f"{artifact.relative} is {artifact.kind.title}; a hub takes SAEs and adapters"
        )
    names = sorted(
        str(file.relative_to(artifact.path))
        for file in artifact.path.rglob("*")
        if file.name in _SHARED
    )
    with filled(target) as folder:
        for name in names:
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artifact.file(name, cached=False), place)
        if artifact.kind is Saes:
            (folder / CARD).write_text(sae_card(listing, artifact), encoding="utf-8")
        elif (card := artifact.path / CARD).is_file():
            shutil.copyfile(card, folder / CARD)
        else:
            raise BadInputError(
                f"{artifact.relative} has no card yet; `resa-lens tune` writes it when it has "
                "scored the adapter"
            )
        check_card(folder / CARD)
    files = sorted(str(f.relative_to(target)) for f in target.rglob("*") if f.is_file())
    size = sum((target / name).stat().st_size for name in files) / 1e6
    return Package(target, artifact.kind.name, tuple(files), size)


def check_card(file: Path) -> ModelCard:
    """Read a card back as a hub does.

    Raises:
        BadInputError: its front matter is not what a hub reads, or names no base model.
    """
    try:
        card = ModelCard.load(file)
    except ValueError as error:
        raise BadInputError(f"{file} is no card that a hub reads: {error!s:.200}") from error
    if not card.data.to_dict().get("base_model"):
        raise BadInputError(f"{file} names no base model")
    return card


def push(package: Package, repository: str, *, private: bool = True, endpoint: str = "") -> Package:
    """Push a package to a repository, which is made where there is none.

    Args:
        package: written before.
        repository: owner/name.
        private: of a repository that is made.
        endpoint: of another hub than the default one.

    Raises:
        BadInputError: no such name, or no right to write there.
        RunFailedError: the hub cannot be reached, or fails.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository, re.ASCII):
        raise BadInputError(f"repository {repository!a:.80} is none; write owner/name")
    api = HfApi(endpoint=endpoint or None)
    try:
        created = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=package.target,
            commit_message=f"{package.kind} by resa-lens",
        )  # fmt: skip
    except (HFValidationError, LocalTokenNotFoundError) as error:
        raise BadInputError(f"{repository}: {_first_line(error)}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise BadInputError(
                f"{repository}: no right to write there ({status}); `hf auth login` signs in"
            ) from error
        raise RunFailedError(f"{repository}: the hub answered {_first_line(error)}") from error
    except OSError as error:
        raise RunFailedError(
            f"{repository}: the hub cannot be reached ({type(error).__name__}); the folder "
            f"{package.target} is complete and can be pushed later"
        ) from error
    return Package(package.target, package.kind, package.files, package.megabytes, str(created))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def sae_card(listing: Listing, saes: Artifact) -> str:
    """Return the card of SAEs: what they are, their quality by phase, counts and the counts' null.

    Raises:
        BadInputError: a file that it speaks of is damaged.
    """
    results, config = saes.results, saes.manifest.config
    training, corpus = config.get("sae", {}), config.get("corpus", {})
    base = base_name(results.model)
    front = ModelCardData(
        base_model=base, library_name="sparsify", tags=["sparse-autoencoder", "resa-lens"]
    )
    where = ", ".join(str(row.layer) for row in results.layers)
    share = corpus.get("thought_share") or 0.0
    data = (
        f"{results.tokens:,} tokens of {code_span(base_name(str(corpus.get('source'))))} (hash "
        f"{code_span(str(config.get('data'))[:16])}), {100 * share:g} % of the documents with "
        "worked steps"
    )
    parts = [
        f"---\n{front.to_yaml().strip()}\n---",
        f"# Sparse autoencoders of {escaped(base)}",
        f"Site {code_span(results.site)}, layers {where} (0-based, of {results.n_layers}), "
        f"{training.get('latents')} latents, k {training.get('k')}, "
        f"{escaped(training.get('activation'))}, seed {training.get('seed')}. Trained on {data}. "
        'Layout of sparsify: `Sae.load_from_disk("layers.N.mlp")` reads one.',
        "## Quality",
        *_quality(listing, saes),
        "## Think-tag exclusive features",
        *_counts(listing, saes),
        f"Identity {code_span(saes.manifest.identity)}: a hash of all that they were made from.",
    ]
    return "\n\n".join(parts) + "\n"


def _quality(listing: Listing, saes: Artifact) -> Iterator[str]:
    rows = [
        (describe_layer(row.layer, saes.results.n_layers), f"{row.fvu:.4f}", _number(row.l0),
         _number(row.dead_share))
        for row in saes.results.layers
    ]  # fmt: skip
    yield table_of(("layer", "FVU, held-out", "L0", "dead share"), rows)
    report = next(iter(listing.made_of(saes, Quality)), None)
    if report is None:
        yield "By phase they were not measured."
        return
    yield "By phase, on held-out documents with their worked steps:"
    figures = report.read("quality.json", Figures).root
    lines = [
        (str(layer), phase, f"{one.tokens:,}", _number(one.fvu), _number(one.l0),
         _number(one.loss_change), _number(one.loss_change_se))
        for layer, phases in sorted(figures.items())
        for phase, one in phases.items()
    ]  # fmt: skip
    head = ("layer", "phase", "tokens", "FVU", "L0", "loss change, nats", "its standard error")
    yield table_of(head, lines)


def _counts(listing: Listing, saes: Artifact) -> Iterator[str]:
    counts = next(iter(listing.made_of(saes, Counts)), None)
    if counts is None:
        yield "They were not counted."
        return
    judged = next(iter(listing.made_of(counts, Falsification)), None)
    tallies = {t.rule: t for t in judged.results.summary.rules} if judged else {}
    rows = []
    for rule in RULES:
        tally = tallies.get(rule)
        rows.append(
            (rule, str(sum(counts.results.table(rule).values())), *_null(tally))
        )  # fmt: skip
    yield table_of(
        ("rule", "counted", "counted with random weights", "put to the test", "stand (95 %)"), rows
    )
    if judged is None:
        yield "They were not put to the test: a count alone says nothing of reasoning."
    else:
        yield escaped(judged.results.summary.reason)


def _null(tally: Tally | None) -> tuple[str, str, str]:
    if tally is None:
        return "not measured", "no", "not known"
    null = "not measured" if tally.null_counted is None else str(tally.null_counted)
    low, high = tally.ci
    return null, str(tally.counted), f"{tally.survivors} ({100 * low:.1f} to {100 * high:.1f} %)"


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}"
