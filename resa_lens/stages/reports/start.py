"""The demo and the machine, in tables and sentences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from resa_lens.features.config import RULES
from resa_lens.figures.grids import grid, table
from resa_lens.models.hookpoints import describe_layer

if TYPE_CHECKING:
    from pathlib import Path

    from resa_lens.artifacts.artifact import Artifact
    from resa_lens.machine.doctor import Diagnosis
    from resa_lens.machine.needs import Needs
    from resa_lens.stages.demo import DemoResult


def demo_of(result: DemoResult) -> Iterator[Any]:
    """Yield what the demo found, where it lies and what it means."""
    from resa_lens.stages.demo import meaning, places, score_rows

    tuned, saes = result.tuned, result.discovery.saes
    recommendation = result.discovery.recommendation.recommendation
    yield grid("Layers", result.discovery.counts.counts.layers, {
        "layer": lambda row: describe_layer(row.layer, recommendation.n_layers),
        **{rule: lambda row, rule=rule: len(row.features[rule]) for rule in RULES},
        "SAE FVU": lambda row: f"{saes.quality[row.layer]['fvu']:.4f}",
        "": lambda row: "tuned" if row.layer == tuned.layer else "",
    })  # fmt: skip
    yield f"verdict: {result.fits['all'].verdict}"
    yield recommendation.reason
    yield table("Scores", "", "accuracy", "95 % interval", "n", rows=score_rows(tuned))
    yield "the results lie in:"
    lie = {**places(result), "page": result.page}
    yield from (f"  {name:<15} {path}" for name, path in lie.items())
    yield "next: resa-lens app"
    yield from meaning(result)


def diagnosis_of(diagnosis: Diagnosis, needs: Needs | None) -> Iterator[Any]:
    """Yield what was looked at on this machine, and what a model needs."""
    areas = [finding.area for finding in diagnosis.findings]
    firsts = {areas.index(area) for area in areas}
    yield grid("What is here", enumerate(diagnosis.findings), {
        "": lambda row: row[1].area if row[0] in firsts else "",
        "<what": lambda row: row[1].name, "<found": lambda row: row[1].found,
        "<state": lambda row: row[1].state,
    })  # fmt: skip
    for state, lead in (("problem", "to mend"), ("note", "to have")):
        for finding in diagnosis.findings:
            if finding.state == state and finding.remedy:
                yield f"{lead}: {finding.name}: {finding.found}\n    {finding.remedy}"
    if needs:
        yield from _needs(needs)
    problems = len(diagnosis.problems)
    yield (
        f"{problems} problem(s): the main job cannot run as it is"
        if problems
        else "the main job can run: resa-lens demo"
    )


def _needs(needs: Needs) -> Iterator[Any]:
    shape, fits = needs.shape, needs.fits()
    memory = (
        ("loading", needs.load_mb, fits["load"]),
        ("counting features", needs.count_mb, fits["count"]),
        ("training SAEs, all layers at once", needs.train_mb, needs.train_mb <= needs.available_mb),
        ("training SAEs, one layer at a time", needs.train_one_mb, fits["train-saes"]),
        ("tuning, preset paper", needs.tune_mb, fits["tune"]),
    )
    yield table(
        f"What {shape.name} will need ({needs.device}, {needs.dtype})",
        "stage", "memory, GB", "fits",
        rows=[(stage, f"{mb / 1024:.2f}", "yes" if room else "no") for stage, mb, room in memory],
    )  # fmt: skip
    disk = "enough" if fits["disk"] else "not enough"
    yield (
        f"{shape.layers} layers x {shape.width}, {shape.parameters / 1e6:,.1f} M parameters, "
        f"stored as {shape.dtype} ({shape.stored_mb:,.0f} MB); "
        f"{needs.available_mb / 1024:.1f} GB of memory are free"
    )
    yield (
        f"SAEs of {needs.latents:,} latents: {needs.sae_mb:,.0f} MB each, "
        f"{needs.saes_disk_mb:,.0f} MB on disk for all layers but the first and the last; an "
        f"adapter {needs.adapter_disk_mb:,.1f} MB; {needs.free_disk_mb / 1024:.1f} GB of disk are "
        f"free: {disk}"
    )
    if shape.positions:
        too_long = (shape.prompt or 0) > shape.positions
        yield f"{shape.positions} learned positions: a longer text is refused" + (
            f", and the prompt r1 has {shape.prompt} tokens: count on a shorter --prompt"
            if too_long
            else ""
        )
    yield "estimates from headers: `resa-lens train-saes --plan` measures on this machine"


UNMADE = "no command made it: it comes from Python, or from an older version"


def artifact(root: Path, artifact: Artifact, again: str | None) -> Iterator[str]:
    """Yield what an artifact is."""
    yield artifact.kind.sentence(artifact)
    yield f"path: {root / artifact.relative}"
    yield f"identity: {artifact.manifest.identity or 'not known, of an older version'}"
    yield from (f"made from: {parent}" for parent in artifact.manifest.parents)
    yield f"made by: {again or UNMADE}"


def runs(rows: list[dict[str, Any]], verify: bool) -> Iterator[Any]:
    """Yield the artifacts of a workspace, and with `verify` what is wrong with them."""
    if rows:
        yield grid("Runs", rows, {
            "id": "{id}", "<kind": lambda row: row["kind"].partition(", ")[0], "<layer": "{layer}",
            "<control": "{control}", "<score": "{score}",
            # The state stands in the column of the time.
            "<date (UTC)": lambda row: row["created"][:10]
            or row["kind"].partition(", ")[2],
        })  # fmt: skip
        yield "one of them, and the command that makes it again: resa-lens runs ID"
    else:
        yield "the workspace is empty; begin with: resa-lens demo"
    if old := [row["path"] for row in rows if row.get("verifiable") is False]:
        yield (
            f"origin not verifiable: {len(old)} artifacts of an older version do not say by "
            "contents what they were made from; they are read, and never count as done"
        )
    if verify:
        for row in rows:
            yield from row.get("damaged", [])
        for row in rows:
            for name in row.get("foreign", []):
                yield f"{row['path']}/{name} is foreign: no part of the artifact"
        whole = sum(row.get("damaged") == [] and row["verifiable"] for row in rows)
        yield f"{whole} artifacts are whole: every file is as it was written"
