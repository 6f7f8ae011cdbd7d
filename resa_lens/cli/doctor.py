"""The command doctor: what is installed, what this machine can do, what a model will need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from resa_lens.cli import common
from resa_lens.cli.common import BaseOption, JsonOption, LatentsOption, WorkspaceOption

if TYPE_CHECKING:
    from resa_lens.pipeline.doctor import Diagnosis
    from resa_lens.pipeline.needs import Needs


def doctor(
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Say what this model will need; only its headers are read."
        ),
    ] = None,
    base: BaseOption = None,
    latents: LatentsOption = None,
    workspace: WorkspaceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what is installed, what is missing, which device and engines are usable.

    With --model it says too what that model will need: memory of each stage and disk. Exit code 1
    where something that the main job needs is broken, with its remedy.

    Example: resa-lens doctor --model tiny-reasoner
    """
    from resa_lens.pipeline.doctor import diagnose
    from resa_lens.pipeline.needs import needs_of, read_shape

    broken = False

    def job() -> tuple[dict[str, Any], Any]:
        nonlocal broken
        # First: a model that is not at hand needs no look at the machine.
        shape = read_shape(model, base) if model else None
        found = diagnose(workspace)
        broken = bool(found.problems)
        needs = None
        if shape:
            device = found.devices[0] if found.devices else None
            needs = needs_of(
                shape,
                device=device["device"] if device else "cpu",
                available_mb=device["free_mb"] if device else found.available_mb,
                free_disk_mb=found.free_disk_mb,
                latents=latents,
            )
        result = found.to_dict()
        if needs:
            result["model"] = needs.to_dict()
        return result, lambda: _show(found, needs)

    common.run(job, as_json)
    if broken:
        raise typer.Exit(1)


def _show(found: Diagnosis, needs: Needs | None) -> None:
    made = common.table("What is here", "", "what", "found", "state")
    for column in made.columns:
        column.justify = "left"
    area = ""
    for finding in found.findings:
        made.add_row(
            finding.area if finding.area != area else "", finding.name, finding.found, finding.state
        )
        area = finding.area
    parts: list[Any] = [made]
    for state, lead in (("problem", "to mend"), ("note", "to have")):
        parts += [
            f"{lead}: {f.name}: {f.found}\n    {f.remedy}"
            for f in found.findings
            if f.state == state and f.remedy
        ]
    if needs:
        parts += _needs(needs)
    problems = len(found.problems)
    parts.append(
        f"{problems} problem(s): the main job cannot run as it is"
        if problems
        else "the main job can run: resa-lens demo"
    )
    common.show_all(*parts)


def _needs(needs: Needs) -> list[Any]:
    shape, fits = needs.shape, needs.fits()
    made = common.table(f"What {shape.name} will need ({needs.device}, {needs.dtype})",
                        "stage", "memory, GB", "fits")  # fmt: skip
    for stage, need, key in (
        ("loading", needs.load_mb, "load"),
        ("counting features", needs.count_mb, "count"),
        ("training SAEs, all layers at once", needs.train_mb, ""),
        ("training SAEs, one layer at a time", needs.train_one_mb, "train-saes"),
        ("tuning, preset paper", needs.tune_mb, "tune"),
    ):
        room = fits[key] if key else need <= needs.available_mb
        made.add_row(stage, f"{need / 1024:.2f}", "yes" if room else "no")
    disk = "enough" if fits["disk"] else "not enough"
    return [
        made,
        f"{shape.layers} layers x {shape.width}, {shape.parameters / 1e6:,.1f} M parameters, "
        f"stored as {shape.dtype} ({shape.stored_mb:,.0f} MB); "
        f"{needs.available_mb / 1024:.1f} GB of memory are free",
        f"SAEs of {needs.latents:,} latents: {needs.sae_mb:,.0f} MB each, "
        f"{needs.saes_disk_mb:,.0f} MB on disk for all layers but the first and the last; an "
        f"adapter {needs.adapter_disk_mb:,.1f} MB; {needs.free_disk_mb / 1024:.1f} GB of disk are "
        f"free: {disk}",
        "estimates from headers: `resa-lens train-saes --plan` measures on this machine",
    ]
