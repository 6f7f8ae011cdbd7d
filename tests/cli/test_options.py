"""Options made of configurations: written once, the same everywhere, from a file, and recorded."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from typer.testing import CliRunner

from resa_lens.cli import GROUPS, app
from resa_lens.cli.options import CLASSES, NOT_RECORDED, Option, build, options, options_of
from resa_lens.config import bare, choices, setting
from resa_lens.evals.config import EvalConfig, GenerationConfig
from resa_lens.features.config import CountConfig
from resa_lens.saes.config import SaeConfig
from resa_lens.tuning.config import Objective, TuneConfig

CONFIGS = {
    "train-saes": (SaeConfig,), "count-features": (CountConfig,), "tune": (TuneConfig, Objective),
    "eval": (EvalConfig, GenerationConfig),
}  # fmt: skip
INSIDE = {
    "open_tag", "close_tag", "min_rate_share", "preset", "stop", "generation", "prompt_style",
    "question_seed",
}  # fmt: skip
"""Fields that are no options: parts, and what the library alone sets."""


def invoke(*args: str) -> Any:
    return CliRunner().invoke(app, list(args))


def everywhere() -> Iterator[tuple[str, Option]]:
    for name, group in CLASSES.items():
        for option in options_of(group).values():
            yield name, option


# Written once


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_field_of_a_configuration_is_an_option_with_its_help(name: str) -> None:
    options = options_of(CLASSES[name])
    for config in CONFIGS[name]:
        for item in fields(config):
            if item.name in INSIDE:
                continue
            found = [o for o in options.values() if any(f == item.name for _, f in o.targets)]
            assert len(found) == 1, (config.__name__, item.name)
            assert item.name == "seed" or found[0].about is item.metadata, item.name
            assert item.metadata["help"]


def test_every_help_is_a_sentence_and_every_default_is_sound() -> None:
    for name, option in everywhere():
        assert re.match(r"[A-Z\"0-9ILa-z@.]", option.about["help"]), (name, option.key)
        assert option.about["help"].endswith((".", "]")), (name, option.key)
        if option.about.get("check") is None and option.default is not None:
            option.parse(option.default if not isinstance(option.default, tuple) else
                         list(map(str, option.default)))  # fmt: skip


# The same everywhere

OTHERWISE = {
    "--baseline": "a score of one column; of audit, of several benchmarks by their names",
}
"""Options whose type differs between commands."""


def test_an_option_is_of_one_type_wherever_it_stands() -> None:
    kinds: dict[str, set[Any]] = {}
    for _, option in everywhere():
        kind, _ = bare(option.kind)
        # One that may be repeated takes the same words.
        item = get_args(kind)[0] if get_origin(kind) in (list, tuple) else kind
        kinds.setdefault(option.label, set()).add(str if choices(item) else item)
    differing = {label for label, types in kinds.items() if len(types) > 1}
    assert differing == set(OTHERWISE)


@pytest.mark.parametrize(
    ("label", "default"), [("--limit", 500), ("--rule", "all"), ("--prompt", "r1"), ("--k", 32)]
)
def test_a_default_is_the_same_everywhere_or_means_all(label: str, default: Any) -> None:
    assert {o.default for _, o in everywhere() if o.label == label} <= {default, None}


def test_names_that_meant_two_things_mean_one() -> None:
    labels = {name: {o.label for o in options_of(group).values()}
              for name, group in CLASSES.items()}  # fmt: skip
    assert [n for n, known in labels.items() if "--controls" in known] == ["sweep"]
    assert "--threshold" not in labels["match-features"]
    assert not [n for n, known in labels.items() if known & {"--yes", "--system-prompt"}]
    columns = [n for n, known in labels.items() if "--data" in known]
    assert all({"--question-column", "--answer-column"} <= labels[n] for n in columns)


# Help


def test_the_help_fits_80_columns_and_no_summary_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = invoke("--help").stdout
    assert max(map(len, text.splitlines())) <= 80
    listed = re.findall(r"^  ([a-z-]+) {2,}(.+)$", text, flags=re.MULTILINE)
    summaries = {name: summary for name, summary in listed if name in CLASSES}
    assert set(summaries) == set(CLASSES) == {n for names in GROUPS.values() for n in names}
    assert all(summary.endswith(".") for summary in summaries.values())
    assert all(title + ":" in text for title in GROUPS)


def test_options_stand_in_panels() -> None:
    text = invoke("tune", "--help").stdout
    for panel in ("Tuning", "Objective", "SAEs", "Data", "Questions", "Machine", "Output"):
        assert f"\n{panel}:\n" in text


# From a file


def config(tmp_path: Path, text: str) -> str:
    (tmp_path / "options.yaml").write_text(text)
    return str(tmp_path / "options.yaml")


TABLE = str(Path(__file__).resolve().parents[2] / "data/paper/table6_hookpoints.csv")


def test_options_come_from_a_file_and_the_command_line_goes_before(tmp_path: Path) -> None:
    file = config(tmp_path, "column: feature_count\ndraws: 20\nrecipe: paper\nrestarts: 0\n")
    made = json.loads(invoke("fit-mixture", TABLE, "--config", file, "--json").stdout)
    assert made["recipe"] == "paper"
    words = ("--recipe", "robust", "--json")
    made = json.loads(invoke("fit-mixture", TABLE, "--config", file, *words).stdout)
    assert made["recipe"] == "robust"
    file = config(tmp_path, f"table: {TABLE}\ncolumn: feature_count\ndraws: 20\njson: true\n")
    assert json.loads(invoke("fit-mixture", "--config", file).stdout)["recipe"] == "robust"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("colunm: x", "'column'"), ("column: [a, b]", "one value"), ("draws: {a: 1}", "draws"),
        ("draws: 5", "--draws 5"), ("draws: 20.5", "--draws"), ("draws: .nan", "--draws"),
        ("recipe: secret", "secret"), ("- 1", "holds no options"), ("a: [", "no YAML"),
        ("json: 1", "true or false"), ("", "holds no options"),
    ],
)  # fmt: skip
def test_what_a_file_may_not_say(tmp_path: Path, text: str, names: str) -> None:
    words = ("fit-mixture", TABLE, "--column", "feature_count")
    done = invoke(*words, "--config", config(tmp_path, text))
    assert done.exit_code == 2
    assert names in done.stderr


# Recorded


def test_the_command_that_made_an_artifact_makes_it_again(
    demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(demo.workspace, "moved")
    # A prompt with quotes, a flag, a list and a number that is no default; the SAEs are there.
    prompt = 'It\'s "so": <think> a </think> then <answer> b </answer>.'
    words = ["count-features", "--latents", "512", "--tokens", "16384", "--ignore-first",
             "--threshold", "0.25", "--prompt", prompt, "--workspace", "moved"]  # fmt: skip
    made = invoke(*words, "--json")
    assert made.exit_code == 0, made.stderr
    folder = Path(json.loads(made.stdout)["folder"])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["options"]["threshold"] == 0.25
    assert manifest["options"]["prompt"] == prompt
    for name in (manifest["identity"][:8], folder.name, str(folder)):
        again = invoke("runs", name, "--command", "--workspace", "moved").stdout
        assert shlex.split(again)[:2] == ["resa-lens", "count-features"]
    done = invoke(*shlex.split(again)[1:])
    assert done.exit_code == 0
    assert f"done before, in {folder.relative_to(tmp_path)}" in done.stderr
    shown = invoke("runs", "--workspace", "moved").stdout
    assert manifest["identity"][:8] in shown
    assert invoke("runs", "nothing", "--workspace", "moved").exit_code == 2
    made_by_demo = json.loads(invoke("runs", "--workspace", "moved", "--json").stdout)["runs"][-1]
    again = invoke("runs", made_by_demo["id"], "--command", "--workspace", "moved").stdout
    assert again == "resa-lens demo --workspace moved --budget test\n"


@pytest.mark.parametrize("name", sorted(set(CLASSES) - {"app", "runs"}))
def test_words_and_options_say_the_same(name: str) -> None:
    """What a manifest names is parsed to the values that were given."""
    from resa_lens.cli.options import _recorded

    values: dict[str, Any] = {}
    for key, option in options_of(CLASSES[name]).items():
        kind, _ = bare(option.kind)
        known = choices(option.kind, option.about)
        listed = get_origin(kind) in (list, tuple)
        if option.about.get("argument"):
            values[key] = ["-a", "b"] if listed else "-a"
        elif kind is bool:
            values[key] = not option.default
        elif kind in (int, float):
            values[key] = kind(option.about.get("min", 1) + 1)
        elif listed:
            values[key] = ["1", "-2"]
        else:
            values[key] = known[-1] if known else "-a b"
    words, given = _recorded(name, values)
    import typer.main

    command: Any = typer.main.get_command(app)
    sub = command.commands[name]
    parsed = sub.make_context(name, words[2:]).params
    for key, value in values.items():
        if key not in NOT_RECORDED:
            assert parsed[key] == value, key
    assert set(given) <= {o.label.lstrip("-") for o in options_of(CLASSES[name]).values()}


def test_what_is_given_reaches_the_configurations() -> None:
    args = build(CLASSES["tune"], {"rank": 4, "schedule": "constant", "reference_gradient": False,
                                   "seed": 7, "targets": ["q_proj,v_proj"]})  # fmt: skip
    assert (args.lora.rank, args.lora.seed, args.sae.seed, args.corpus.seed) == (4, 7, 7, 7)
    assert args.objective == {"schedule": "constant", "reference_gradient": False,
                              "targets": ("q_proj", "v_proj")}  # fmt: skip


def test_the_list_of_runs_fits_80_columns_and_breaks_no_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from rich.console import Console

    from resa_lens.figures.terminal import fitted
    from resa_lens.stages.reports.start import runs

    row = {
        "id": "0123abcd", "kind": "recommendation", "layer": 27, "control": "random-weights",
        "score": "100.0 %", "created": "2026-11-28T22:41:43", "megabytes": 1234.5,
        "path": "adapters/x", "verifiable": True,
    }  # fmt: skip
    grid, *_ = runs([row], False)
    (whole,) = fitted(grid, 80)
    Console(width=80).print(whole)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "0123abcd" in line]
    cells = ("recommendation", "27", "random-weights", "100.0 %", "2026-11-28")
    assert all(cell in line for cell in cells)


def hidden(group: type) -> list[str]:
    """Fields that a mixin has from its own base in the place of a nearer base's declaration."""
    nearest = {
        name: base
        for base in reversed(group.__mro__)
        for name in inspect.get_annotations(base)
    }  # fmt: skip
    return [
        item.name
        for item in fields(group)
        if item is not nearest[item.name].__dataclass_fields__[item.name]
    ]


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_no_mixin_hides_the_options_of_a_nearer_base(name: str) -> None:
    assert hidden(CLASSES[name]) == []


def test_a_hidden_declaration_is_seen() -> None:
    """A mixin that inherits a part brings the base's form of it, whatever stands behind it."""

    @options("A")
    class Plain:
        value: int = setting(1, "One.")

    @options("A")
    class Special(Plain):
        value: int = setting(2, "Two.")

    @options("B")
    class Mixin(Plain):
        other: int = setting(3, "Three.")

    @options("C")
    class Both(Mixin, Special):
        pass

    assert hidden(Both) == ["value"]
    assert hidden(Special) == []
