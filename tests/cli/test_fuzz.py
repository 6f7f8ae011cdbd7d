"""Bad command lines, generated from the options: each is refused before any work, whatever it is.

A seed makes an invocation: a command with what it requires, and one value that its option cannot
take.  Loading a model fails the test: whatever can be known from the arguments is refused before.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from typer.testing import CliRunner

from resa_lens.cli import app
from resa_lens.cli.groups import OnModel
from resa_lens.cli.options import CLASSES, Option, options_of
from resa_lens.config import bare, choices
from resa_lens.features.config import check_feature
from resa_lens.models.hookpoints import check_layer, check_layers

PAPER = Path(__file__).resolve().parents[2] / "data" / "paper"
TABLE = str(PAPER / "table6_hookpoints.csv")
CHECKPOINTS = str(PAPER / "tables36_61_layer_checkpoints.csv")
NEEDED: dict[str, list[str]] = {
    "fit-mixture": [TABLE, "--column", "feature_count", "--draws", "20"],
    "regret": [TABLE, "--column", "average", "--draws", "20"],
    "audit": [CHECKPOINTS, "--draws", "20"],
    "match-features": ["seed:0", "seed:1"],
    "compare": ["run-a", "run-b"],
    "convert": ["saes", "converted", "--to", "saelens"],
    "export": ["run", "exported", "--to", "html"],
    "merge": ["merged", "--adapter", "adapter"],
    "experts": ["steer", "--model", "tiny-moe-reasoner"],
}
"""What a command cannot do without, sound where it can be."""
LONG, SURROGATE = "x" * 300, "name\udcff"
NAMES = {
    "layers": ("some", "7-3", "1-", "blocks.x", "9" * 30), "control_layers": ("some", "7-3"),
    "layer": ("middle", "-1", "0th", "9" * 30, "1.5"),
    "data": ("json", "csv", "text", "parquet", "missing.jsonl", "folder/missing.csv", "owner/", ""),
    "tasks": ("missing.jsonl", "no-such-benchmark", "tiny:levels=x", "math500=missing.jsonl"),
    "prompt": ("@missing.txt", "@bytes.txt"),
    "saes": ("missing", "./missing", "file.txt"), "adapter": ("missing", "folder", "file.txt"),
    "show": ("5", "5:", "x:3", "5:-1", "5:x"), "features": ("x", "1,,2", "-3", "1.5"),
    "device": ("tpu", "gpu", ""), "controls": ("nothing", "noise,nothing", ","),
    "column": ("no_such_column",), "group": ("no_such_column", "A", "A=,"),
    "against": ("no_such_column",), "counts_column": ("no_such_column",),
    "quality_column": ("no_such_column",), "effect_column": ("no_such_column",),
    "questions": ("mmlu", "=3", "mmlu=x"), "baseline": ("no-such-group", "x=y"),
    "table": ("missing.csv", "folder", "bytes.txt"), "checkpoints": ("missing.csv", "bytes.txt"),
    "prices": ("missing.csv", "folder", "bytes.txt"), "plain_texts": ("missing.txt", "bytes.txt"),
    "rule": ("most",), "run_a": (), "run_b": (), "workspace": ("file.txt", "file.txt/inside"),
    "target": (), "out": (), "source": ("missing", "file.txt"), "save": ("page.doc",),
}  # fmt: skip
"""By option, texts that it cannot take; a name that is too long or no text fits none."""
BEYOND: dict[Any, tuple[str, ...]] = {
    check_layers: ("12", "1-26", "13th", "3,99", "layers.12.mlp", "11-12"),
    check_layer: ("12", "13th", "99"), check_feature: ("12:5", "13th:0"),
}  # fmt: skip
"""Layers that the bundled model, of twelve, does not have: its config.json says so."""
CONTEXT = {"max_new_tokens": ("1024", "32768"), "setting": ("paper",)}
"""Answers that would fill all of the 1,024 tokens that it reads."""
NO_NAMES = {"words", "targets", "question_column", "answer_column", "effect_se_column"}
"""Options whose texts only the model or the data can refuse."""


def beyond_the_model(group: type, option: Option) -> tuple[str, ...]:
    """Values that an option takes, and the model cannot."""
    if not issubclass(group, OnModel):
        return ()
    # Of `activity` answers are read with --generations alone.
    context = () if group.__name__ == "Activity" else CONTEXT.get(option.key, ())
    return (*BEYOND.get(option.about.get("layers"), ()), *context)


def wrong_values(group: type, option: Option) -> Iterator[str]:
    """Values that an option of a command cannot take."""
    yield from beyond_the_model(group, option)
    kind, _ = bare(option.kind)
    if kind is bool:
        yield "=maybe"
        return
    item = get_args(kind)[0] if get_origin(kind) in (tuple, list) else kind
    if item in (int, float):
        yield from ("x", "nan", "inf", "-inf", "1e400", "9" * 40, "")
        about = option.about
        if "min" in about:
            yield str(about["min"] - 1)
        if "over" in about:
            yield str(about["over"])
        if about.get("max", 10**20) < 10**13:
            yield str(about["max"] * 2 + 1)
        if item is int:
            yield "1.5"
        return
    yield SURROGATE
    if choices(option.kind, option.about):
        yield from ("unknown", "ALL", LONG)
        return
    if option.key not in NO_NAMES:
        yield from NAMES.get(option.key, ())
        checked = option.about.get("check") or option.about.get("layers")
        if checked and option.key not in ("prompt", "features", "show"):
            yield LONG


def invocation(seed: int) -> list[str]:
    """A command line with one wrong value."""
    draw = random.Random(seed)
    name = draw.choice(sorted(set(CLASSES) - {"app"}))
    options = options_of(CLASSES[name])
    words = list(NEEDED.get(name, []))
    if draw.random() < 0.05:
        return [name, *words, "--config", draw.choice(("missing.yaml", "bytes.txt", "list.yaml",
                                                       "unknown.yaml", "folder"))]  # fmt: skip
    group = CLASSES[name]
    known = {k: v for k, option in options.items() if (v := [*wrong_values(group, option)])}
    key = draw.choice(sorted(known))
    option, value = options[key], draw.choice(known[key])
    if option.about.get("argument"):
        places = [k for k, o in options.items() if o.about.get("argument")]
        if words:
            words[min(places.index(key), len(words) - 1)] = value
        else:
            words.append(value)
    elif value.startswith("="):
        words.append(option.label + value)
    else:
        words += [f"{option.label}={value}"]
    return [name, *words]


class LateRefusalError(AssertionError):
    """Weights were about to be loaded."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with files to stumble over, and no model in reach."""

    def load(*args: Any, **options: Any) -> None:
        raise LateRefusalError(args)

    monkeypatch.setattr("resa_lens.artifacts.stage.load_model", load)
    monkeypatch.setattr("resa_lens.models.host.AutoModelForCausalLM.from_pretrained", load)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("RESA_LENS_WORKSPACE", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "file.txt").write_text("text\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x80 no text\n")
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    (tmp_path / "unknown.yaml").write_text("no-such-option: 1\n")
    # Files of every format that the `datasets` library would take for data.
    for suffix in ("json", "csv", "parquet"):
        (tmp_path / f"loose.{suffix}").write_text("question,answer\n1,2\n")
    return tmp_path


def refuse(words: list[str], place: Path) -> str:
    """Run a command line that must be refused, and return what it says on stderr."""
    before = sorted(str(path) for path in place.rglob("*"))
    done = CliRunner().invoke(app, words)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    # Notes may stand before an error: the workspace, for one.
    error = next((n for n, line in enumerate(lines) if line.lower().startswith("error: ")), None)
    assert isinstance(done.exception, SystemExit), (words, repr(done.exception))
    assert done.exit_code == 2, (words, done.exit_code, done.stderr)
    assert error is not None, (words, done.stderr)
    assert len(lines) - error <= 3, (words, done.stderr)
    assert done.stdout == "", (words, done.stdout)
    assert sorted(str(path) for path in place.rglob("*")) == before, words
    return done.stderr


SEEDED, ALL = 80, 900


def test_seeded_command_lines_are_refused_before_any_work(place: Path) -> None:
    for seed in range(SEEDED):
        refuse(invocation(seed), place)


@pytest.mark.recorded
def test_all_command_lines_are_refused_before_any_work(place: Path) -> None:
    for seed in range(ALL):
        refuse(invocation(seed), place)


def test_what_the_model_cannot_do_is_refused_before_its_weights_are_read(place: Path) -> None:
    lines = [
        ([name, *NEEDED.get(name, ()), f"{option.label}={values[0]}"], values[0])
        for name, group in sorted(CLASSES.items())
        for option in options_of(group).values()
        if (values := beyond_the_model(group, option))
    ]
    lines += [(["activity", "--generations=4", "--max-new-tokens=1024"], "1024")]
    convert = ["convert", "folder", "converted", "--to=saelens", "--model=tiny-reasoner"]
    lines += [([*convert, "--layers=12"], "12")]
    assert len(lines) >= 20
    for words, value in lines:
        error = refuse(words, place)
        assert value.partition(":")[0] in error, (words, error)
        assert "1024 tokens" in error or "0 to 11" in error, (words, error)


def test_the_paper_setting_names_what_would_be_right(place: Path) -> None:
    error = refuse(["eval", "--setting", "paper"], place)
    assert "--max-new-tokens 32768 of --setting paper" in error
    assert "tiny-reasoner reads 1024 tokens in all" in error
    assert "for example --max-new-tokens 512" in error
    done = CliRunner().invoke(app, ["eval", "--setting", "paper", "--max-new-tokens", "512"])
    assert isinstance(done.exception, LateRefusalError), done.stderr


def test_the_fuzz_reaches_every_command_and_most_options() -> None:
    drawn = [invocation(seed) for seed in range(ALL)]
    assert {words[0] for words in drawn} == set(CLASSES) - {"app"}
    labels = {option.label for group in CLASSES.values() for option in options_of(group).values()}
    used = {word.partition("=")[0] for words in drawn for word in words if word.startswith("--")}
    assert len(used & labels) > 0.65 * len(labels)


def test_a_place_that_takes_nothing_is_refused_before_any_work(place: Path) -> None:
    """All is permitted in /proc, and nothing can be made there."""
    refuse(["demo", "--workspace", "/proc/resa-workspace"], place)


def test_a_sound_command_line_reaches_the_model(place: Path) -> None:
    """The sentinel is where models are loaded: what is sound is not refused."""
    for words in (["count-features"], ["tune", "--layer", "4"], ["eval", "--limit", "3"],
                  ["ablate", "--features", "1,2"], ["sweep"], ["demo"]):  # fmt: skip
        done = CliRunner().invoke(app, words)
        assert isinstance(done.exception, LateRefusalError), (words, done.stderr)


def test_tune_without_anything_is_of_the_bundled_model(place: Path) -> None:
    done = CliRunner().invoke(app, ["tune"])
    assert isinstance(done.exception, LateRefusalError), done.stderr
    assert done.exception.args[0] == ("tiny-reasoner",)
    assert "tiny-reasoner, the bundled one" in done.stderr
