"""Evaluations side by side: read from the workspace, compared, told, kept as a page or table."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resa_lens import stats
from resa_lens.artifacts.artifact import Artifact, checked
from resa_lens.artifacts.kinds.eval import Asking, Eval
from resa_lens.artifacts.manifest import MANIFEST
from resa_lens.errors import BadInputError
from resa_lens.evals.compare import (
    Comparison,
    Comparisons,
    Flip,
    RunScores,
    compare_groups,
    run_scores,
)
from resa_lens.files import named_path
from resa_lens.publishing import filled
from resa_lens.stats import GroupDifference, Interval

if TYPE_CHECKING:
    # The feature explorer says the same sentences, and never loads torch.
    from resa_lens.artifacts.workspace import Workspace
    from resa_lens.progress import Reporter

SUFFIXES = (".html", ".csv")
SLOW = 20_000
"""Scores of more than two runs whose comparison takes seconds."""


@dataclass(frozen=True)
class Line:
    """One difference, as a row of a table, a file or a picture."""

    label: str
    difference: float
    ci: Interval
    p_value: float
    holm_p: float | None
    """Corrected for the lines of its kind; None for a difference that stands alone."""
    n: int
    changed: int
    gained: int | None
    """None for settings of several runs, whose means differ by fractions."""
    lost: int | None


@dataclass(frozen=True)
class Setting:
    """A named group of runs beside the first group."""

    name: str
    base: str
    runs: tuple[str, ...]
    base_runs: tuple[str, ...]
    found: GroupDifference
    holm_p: float


def open_runs(workspace: Workspace, names: Sequence[str], reporter: Reporter) -> list[RunScores]:
    """Read evaluations by their folders, or their names in the workspace's evals/.

    Raises:
        BadInputError: no evaluation, one given twice, or samples missing.
    """
    from resa_lens.stages.scores import read_eval

    folders: dict[Path, str] = {}
    for name in names:
        given = named_path(name, "evaluation")
        folder = given if given.exists() else workspace.path(Eval.folder, name)
        if not folder.exists() and (known := workspace.folder_of_id(Eval, name)):
            folder = known
        if (place := folder.resolve()) in folders:
            raise BadInputError(
                f"{name} is the same run as {folders[place]}: compare two different evaluations"
            )
        folders[place] = name
    # Two workspaces may hold a run of one name.
    short = len({place.name for place in folders}) == len(folders)
    opened = [read_eval(workspace, place) for place in folders]
    runs = [
        run_scores(place.name if short else str(place), run.result.samples)
        for place, run in zip(folders, opened, strict=True)
    ]
    asked = [_harness(run.artifact) for run in opened]
    for key in sorted(set[str]().union(*asked)):
        values = list(dict.fromkeys(str(one.get(key)) for one in asked))
        if len(values) > 1:
            reporter.note(
                f"warning: the runs differ in {key} ({' / '.join(value[:40] for value in values)}):"
                " a difference may be of that and not of the models"
            )
    if len(runs) > 2 and (questions := runs[0].means.size) * len(runs) > SLOW:
        reporter.note(f"comparing {len(runs)} runs on {questions} questions")
    return runs


def _harness(artifact: Artifact) -> dict[str, Any]:
    """Return how a run asked; seeds, and what only chooses the questions, are left out."""
    config = artifact.manifest.config
    if "eval" not in config:
        return {}
    checked(Asking, config["eval"], artifact.path / MANIFEST)
    values = {"chat_template": False, "extraction": "resa", **config["eval"]}
    generation = {"timeout": None, **values.pop("generation", {})}
    kept = {
        "engine": config.get("engine", "hf"),
        "dtype": config.get("dtype"),
        "rules of grading": artifact.manifest.ingredients.get("recipe", 1),
    }
    left_out = ("limit", "levels", "question_seed", "samples", "seed", "batch_size")
    return {k: v for k, v in {**kept, **values, **generation}.items() if k not in left_out}


def parse_groups(values: Sequence[str]) -> dict[str, list[str]]:
    """Read "A=run1,run2" options, the first group being the base.

    Raises:
        BadInputError: another form, a name twice, or fewer than two groups.
    """
    groups: dict[str, list[str]] = {}
    for value in values:
        name, _, listed = value.partition("=")
        runs = [part.strip() for part in listed.split(",") if part.strip()]
        if not name.strip() or not runs:
            raise BadInputError(f'--group "{value}": give NAME=RUN,RUN,... with one run or more')
        if name.strip() in groups:
            raise BadInputError(f'--group "{name.strip()}" is given twice: use another name')
        groups[name.strip()] = runs
    if len(groups) < 2:
        raise BadInputError(f"{len(groups)} group: give two or more, the base first")
    return groups


def compare_settings(
    workspace: Workspace,
    groups: Mapping[str, Sequence[str]],
    margin: float,
    paired_seeds: bool,
    reporter: Reporter,
) -> list[Setting]:
    """Compare every group of runs with the first one, over seeds and questions.

    Raises:
        BadInputError: as `open_runs`, or runs on different questions.
    """
    opened = iter(open_runs(workspace, [run for runs in groups.values() for run in runs], reporter))
    loaded = {name: [next(opened) for _ in runs] for name, runs in groups.items()}
    (base, first), *others = loaded.items()
    found = [compare_groups(first, runs, margin=margin, paired_seeds=paired_seeds)
             for _, runs in others]  # fmt: skip
    corrected = stats.holm([each.p_value for each in found])
    return [
        Setting(
            name, base, tuple(r.name for r in runs), tuple(r.name for r in first), each, float(p)
        )
        for (name, runs), each, p in zip(others, found, corrected, strict=True)
    ]


def lines_of(made: Comparison | Comparisons | Sequence[Setting]) -> list[Line]:
    """Return all differences of a comparison, the main ones first."""
    if isinstance(made, Comparison):
        rows = [("all questions", made.paired, None, made.paired.ci)]
        rows += [(row.group, row.paired, row.holm_p, row.paired.ci) for row in made.by_task]
        rows += [(f"level {r.group}", r.paired, r.holm_p, r.paired.ci) for r in made.by_level]
    elif isinstance(made, Comparisons):
        rows = [(run.name, run.paired, run.holm_p, run.simultaneous_ci) for run in made.runs]
    else:
        return [
            Line(
                f"{s.name} - {s.base}", s.found.difference, s.found.ci, s.found.p_value, s.holm_p,
                s.found.n, s.found.changed, None, None,
            )
            for s in made
        ]  # fmt: skip
    return [
        Line(label, p.difference, ci, p.p_value, holm, p.n, p.changed, p.gained, p.lost)
        for label, p, holm, ci in rows
    ]


def points(share: float) -> str:
    """Return a difference in points."""
    return f"{100 * share:+.1f}"


def span(ci: Interval) -> str:
    """Return an interval of a difference in points."""
    return f"{points(ci[0])} to {points(ci[1])}"


def answers_of(flip: Flip) -> tuple[str, str]:
    """Return a flip's answers before and after as text; several samples side by side."""
    before, after = (
        ", ".join("none" if answer is None else answer for answer in answers)
        for answers in (flip.answers_before, flip.answers_after)
    )
    return before, after


def sentences(made: Comparison | Comparisons | Sequence[Setting]) -> list[str]:
    """Say in plain words what was found, and what could have been seen."""
    if isinstance(made, Comparison):
        return _two(made)
    if isinstance(made, Comparisons):
        return _many(made)
    return [text for setting in made for text in _setting(setting)]


def _two(made: Comparison) -> list[str]:
    paired, same, power = made.paired, made.equivalence, made.power
    margin = f"{100 * same.margin:g} points"
    said = [f"p = {paired.p_value:.3g} ({paired.note}); interval: {paired.interval}"]
    if same.equivalent:
        said.append(f"equally good to within {margin} (p = {same.p_equivalent:.2g}; {same.method})")
    else:
        said.append(
            f"not shown to be equally good to within {margin} (p = {same.p_equivalent:.2g}; "
            f"{same.method}); worse by {margin} or more is "
            + ("ruled out" if same.noninferior else "not ruled out")
            + f" (p = {same.p_noninferior:.2g})"
        )
    share = f"{100 * power.discordance:.1f} % of {power.n} questions changed"
    seen = (
        f"{share}: differences from {100 * power.detectable:.1f} points on are seen at "
        f"{100 * power.power:.0f} % power"
        if power.detectable is not None
        else f"{share}: too few for any difference to be seen at {100 * power.power:.0f} % power"
    )
    if power.questions is None:
        needed = f"fewer answers change than {margin}"
    else:
        low, high = power.questions_ci
        needed = f"{margin} need {power.questions} questions"
        if low is not None and high is not None:
            needed += f" ({low} to {high})"
    return [*said, f"{seen}; {needed}"]


def _many(made: Comparisons) -> list[str]:
    best, runs = made.best, len(made.runs)
    least = min(made.runs, key=lambda run: run.holm_p)
    return [
        f"omnibus: p = {made.omnibus_p:.3g} of no difference between the {runs + 1} runs (labels "
        "shuffled inside each question); another seed of each is not in it",
        f"smallest p of {runs} after Holm: {least.holm_p:.3g} ({least.name}); intervals hold for "
        "all runs at once",
        f"best of {best.runs}: {best.chosen}, chosen on {best.dev.n} questions, scores "
        f"{100 * best.test.value:.1f} % ({100 * best.test.ci[0]:.1f} to "
        f"{100 * best.test.ci[1]:.1f}) on the other {best.test.n}",
        f"chosen and scored on all {best.naive.n}: {best.naive_chosen} with "
        f"{100 * best.naive.value:.1f} %, too high by {100 * best.optimism:.1f} points (bootstrap; "
        f"{100 * best.noise:.1f} if all runs were equally good)",
    ]


def _setting(setting: Setting) -> list[str]:
    found = setting.found
    counts = f"{found.seeds[0]} runs of {setting.base}, {found.seeds[1]} of {setting.name}"
    spread = ", ".join("unknown" if s is None else f"{100 * s:.2f}" for s in found.seed_sd)
    kind = "of the difference" if found.paired_seeds else f"{setting.base}, {setting.name}"
    said = [
        f"{setting.name}: difference of expected scores over seeds and questions; {counts}, "
        f"n = {found.n}; t with {found.freedom:.1f} degrees of freedom, se "
        f"{100 * found.se:.2f} points; p = {found.p_value:.3g}"
    ]
    said.append(f"{setting.name}: standard deviation between seeds ({kind}), points: {spread}")
    if 1 in found.seeds:
        alone = " and ".join(
            dict.fromkeys(
                name
                for name, runs in zip((setting.base, setting.name), found.seeds, strict=True)
                if runs == 1
            )
        )
        said.append(
            f"{setting.name}: {alone} with one run is taken as that run, its seed fixed: p and "
            "interval know nothing of its other seeds"
        )
    if found.single_run_alarms is not None:
        said.append(
            f"{setting.name}: if that run was trained as the {max(found.seeds)} others were, up to "
            f"{100 * found.single_run_alarms:.0f} % of such comparisons find a difference at 5 % "
            "where there is none; give it as many runs"
        )
    target = f"{100 * found.target:g} points"
    needed = (
        f"{target} need {found.questions} questions"
        if found.questions is not None
        else f"{target} need more seeds: these vary too much, or are too few"
    )
    said.append(
        f"{setting.name}: differences from {100 * found.detectable:.1f} points on are seen at 80 % "
        f"power; with these seeds {needed}"
    )
    return said


def check_target(path: Path) -> None:
    """Raise BadInputError where a comparison cannot be kept as such a file."""
    if path.suffix.lower() not in SUFFIXES:
        raise BadInputError(f"--save {path}: give a file that ends in {' or '.join(SUFFIXES)}")


def save(path: Path, made: Comparison | Comparisons | Sequence[Setting], margin: float) -> None:
    """Write a comparison as a page (.html) or a table of its differences (.csv).

    Raises:
        BadInputError: another ending, or no permission.
    """
    check_target(path)
    rows = lines_of(made)
    if path.suffix.lower() == ".csv":
        _write_csv(path, rows)
    else:
        _write_page(path, made, rows, margin)


def _write_csv(path: Path, rows: Sequence[Line]) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(
        ("label", "difference", "ci_low", "ci_high", "p_value", "holm_p", "n", "changed", "gained",
         "lost")
    )  # fmt: skip
    for r in rows:
        table.writerow(
            (r.label, r.difference, *r.ci, r.p_value, r.holm_p, r.n, r.changed, r.gained, r.lost)
        )
    with filled(path) as temporary:
        temporary.write_text(text.getvalue())


def _write_page(
    path: Path,
    made: Comparison | Comparisons | Sequence[Setting],
    rows: Sequence[Line],
    margin: float,
) -> None:
    from resa_lens.figures.page import Section, Table, write_page
    from resa_lens.figures.scores import forest_figure

    if isinstance(made, Comparison):
        title, lead = "Two runs, question by question", f"{made.other} minus {made.base}."
        kind = "95 % intervals, each by itself"
    elif isinstance(made, Comparisons):
        title, kind = "Several runs beside the first", "95 % intervals that hold for all runs"
        lead = f"Every run minus {made.base.name}; {made.n} questions."
    else:
        title, kind = "Settings over seeds and questions", "95 % intervals over seeds and questions"
        lead = "; ".join(f"{s.name}: {', '.join(s.runs)}" for s in made)
        lead = f"Every setting minus {made[0].base} ({', '.join(made[0].base_runs)}). {lead}."
    figure = forest_figure(
        [(r.label, r.difference, r.ci) for r in rows], margin, "Difference to the base",
        f"{kind}; diamonds: 0 is outside; band: {100 * margin:g} points",
    )  # fmt: skip
    table = Table(
        ("", "difference, points", "95 %", "p", "p, Holm", "n", "changed"),
        [
            (
                r.label, points(r.difference), span(r.ci), f"{r.p_value:.3g}",
                "" if r.holm_p is None else f"{r.holm_p:.3g}", r.n, r.changed,
            )
            for r in rows
        ],
    )  # fmt: skip
    sections: list[Section] = [("Differences", [figure, table, *sentences(made)])]
    if isinstance(made, Comparison):
        flips = [(f.question, f.gold, *answers_of(f), f.task or "") for f in made.flips]
        header = ("question", "gold", made.base, made.other, "task")
        kept = Table(header, flips) if flips else "No answer changed."
        sections.append(("Questions that changed", [kept]))
    write_page(path, title, lead, sections)
