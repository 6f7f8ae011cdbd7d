"""A sweep in words and pictures: the same sentences on the terminal and on the page."""

from __future__ import annotations

from pathlib import Path

from resa_lens.artifacts.kinds.sweep import ControlRow, Interval, SweepTables
from resa_lens.figures.page import Section, Table, write_page
from resa_lens.figures.scores import sweep_figure
from resa_lens.models.hookpoints import describe_layer

PAGE = "sweep.html"
LEVEL = 0.05


def points(value: float, ci: Interval | None = None) -> str:
    """Return a difference of accuracies in points, with its interval."""
    interval = f" ({100 * ci[0]:+.1f} to {100 * ci[1]:+.1f})" if ci else ""
    return f"{100 * value:+.1f}{interval}"


def findings(sweep: SweepTables) -> list[str]:
    """Return what the sweep shows, a sentence each, whichever way it went."""
    said = []
    best = max(sweep.layers, key=lambda row: row["difference"])
    changed = [row for row in sweep.layers if row["adjusted_p"] < LEVEL]
    tests = f"{len(sweep.layers)} layers, {best['seeds']} seeds, n = {sweep.n}"
    if changed:
        places = ", ".join(f"{row['layer']} ({points(row['difference'])})" for row in changed)
        said.append(
            f"Layers (0-based) that differ from the base model after correction: {places}; {tests}."
        )
    else:
        least = min(row["adjusted_p"] for row in sweep.layers)
        said.append(
            f"No layer differs from the base model after correction (smallest adjusted p "
            f"{least:.2g}; {tests})."
        )
    where = describe_layer(best["layer"], sweep.n_layers)
    said.append(
        f"The highest score is that of {where}: {points(best['difference'], best['ci'])} points "
        f"against the base model by itself, "
        f"{points(best['difference'], best['simultaneous_ci'])} as one of {len(sweep.layers)}."
    )
    effect = sweep.effect
    f = effect and effect["anova"]
    if effect and f and f["f_statistic"] is None:
        said.append("Layers against seeds: F is not defined, the seeds of each layer score alike.")
    elif effect and not f:
        said.append(
            f"Layers against seeds: not tested, there is one seed; labels shuffled inside each "
            f"question p = {effect['question_p']:.2g}, which does not know how far seeds differ."
        )
    elif effect and f:
        said.append(
            f"Layers against seeds: F({f['df_between']},{f['df_within']}) = "
            f"{f['f_statistic']:.2f}, p = {f['p_value']:.2g}; whole runs shuffled over layers "
            f"p = {effect['run_p']:.2g}."
        )
    for rule, found in sweep.correlations.items():
        if len(set(sweep.counts[rule].values())) < 2:
            said.append(f"Counts of rule {rule}: the same at every layer, so they predict nothing.")
            continue
        low, high = found["ci"]
        said.append(
            f"Counts of rule {rule} against scores: rho = {found['rho']:+.2f} "
            f"({low:+.2f} to {high:+.2f}), p = {found['p_value']:.2g}, n = {found['n']} layers."
        )
    if sweep.correlations:
        said.append(
            "The p of each rule stands by itself and takes layers for exchangeable: a trend over "
            "depth that counts and scores share is enough for it."
        )
    said += _of_controls(sweep)
    power = sweep.power
    said.append(
        f"This sweep sees, in 80 of 100 cases, a difference of "
        f"{points(power['one_layer'])[1:]} points at one layer chosen before, "
        f"{points(power['any_layer'])[1:]} at any."
    )
    if sweep.failed:
        said.append(f"Left out, since they failed: {', '.join(sweep.failed)}.")
    return said


def _of_controls(sweep: SweepTables) -> list[str]:
    said = []

    def name(row: ControlRow) -> str:
        return row["control"] + ("" if row["layer"] is None else f" at layer {row['layer']}")

    if sweep.controls:
        changed = [row for row in sweep.controls if row["adjusted_p"] < LEVEL]
        listed = ", ".join(f"{name(row)} ({points(row['difference'])})" for row in changed)
        said.append(
            f"Controls that differ from the base model after correction for "
            f"{len(sweep.controls)}: {listed or 'none'}."
        )
    if pairs := [(row, row["sae_minus_control"]) for row in sweep.controls
                 if row["sae_minus_control"]]:  # fmt: skip
        listed = ", ".join(
            f"{name(row)} ({points(pair['difference'])})"
            for row, pair in pairs
            if pair["adjusted_p"] < LEVEL
        )
        said.append(
            f"The SAE minus a control in its place, where it differs after correction for "
            f"{len(pairs)}: {listed or 'nowhere'}."
        )
    return said


def layer_cells(sweep: SweepTables) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return header and rows of the table of layers."""
    rules = tuple(sweep.counts)
    header = ("layer", "tuned", "minus base", "among all", "adj. p", *rules, "SAE FVU")
    rows = []
    for row in sweep.layers:
        layer = row["layer"]
        fvu = sweep.fvu.get(layer)
        rows.append(
            (
                describe_layer(layer, sweep.n_layers),
                f"{100 * row['accuracy']:.1f} %",
                points(row["difference"], row["ci"]),
                "{:+.1f} to {:+.1f}".format(*(100 * x for x in row["simultaneous_ci"])),
                f"{row['adjusted_p']:.2g}",
                *(f"{sweep.counts[rule][layer]:.0f}" for rule in rules),
                "-" if fvu is None else f"{fvu:.3f}",
            )
        )
    return header, rows


def control_cells(sweep: SweepTables) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return header and rows of the table of controls."""
    header = (
        "control", "layer", "accuracy", "minus base", "adj. p", "SAE minus control",
        "its adjusted p",
    )  # fmt: skip
    rows = []
    for row in sweep.controls:
        beside = row["sae_minus_control"]
        rows.append(
            (
                row["control"],
                "-" if row["layer"] is None else describe_layer(row["layer"], sweep.n_layers),
                f"{100 * row['accuracy']:.1f} %",
                points(row["difference"], row["ci"]),
                f"{row['adjusted_p']:.2g}",
                points(beside["difference"], beside["ci"]) if beside else "-",
                f"{beside['adjusted_p']:.2g}" if beside else "-",
            )
        )
    return header, rows


def selector_cells(sweep: SweepTables) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return header and rows of the table of selectors, in points."""

    def with_interval(value: float, ci: Interval | None, sign: str = "") -> str:
        interval = f" ({ci[0]:{sign}.1f} to {ci[1]:{sign}.1f})" if ci else ""
        return f"{value:{sign}.1f}{interval}"

    made = sweep.regrets
    header = ("selector", "layer", "accuracy", "regret", "above a random layer")
    rows = [
        (
            row["selector"],
            describe_layer(row["layer"], sweep.n_layers),
            f"{row['score']:.1f} %",
            with_interval(row["regret"], row["ci"]),
            with_interval(row["gain"], row["gain_ci"], "+"),
        )
        for row in made["selectors"]
    ]
    rows.append(("(random)", "any", "", with_interval(made["random"], made["random_ci"]), ""))
    return header, rows


def write_sweep_page(sweep: SweepTables, path: Path, title: str, lead: str) -> None:
    """Write the page: what was found, the picture, the tables."""
    base = sweep.base
    low, high = base["ci"]
    about = (
        f"{lead} Base model {100 * base['accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f} %)."
    )
    sections: list[Section] = [
        ("What it shows", findings(sweep)),
        (
            "Score by layer",
            [
                sweep_figure(sweep.layers, sweep.jobs, sweep.controls, base),
                Table(*layer_cells(sweep)),
            ],
        ),
        (
            "Selectors",
            [
                Table(*selector_cells(sweep)),
                "Regret: the best layer's score minus the chosen one's, in points; the intervals "
                "come from the spread between seeds, on these questions.",
            ],
        ),
    ]
    if sweep.controls:
        sections.insert(2, ("Controls", [Table(*control_cells(sweep))]))
    write_page(path, title, about, sections)
