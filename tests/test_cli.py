"""The command line: help, start-up time, one JSON object, exit codes, interruption."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner

from resa_lens import __version__
from resa_lens.cli import app, common
from resa_lens.figures.grids import table
from resa_lens.figures.terminal import draw, fitted

PAPER = Path(__file__).parents[1] / "data" / "paper"
TABLE_6 = str(PAPER / "table6_hookpoints.csv")
COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]


def invoke(*args: str) -> Any:
    return CliRunner().invoke(app, list(args))


def fit(*args: str) -> dict[str, Any]:
    result = invoke("fit-mixture", TABLE_6, *args, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


NO_MODEL = {
    "app", "audit", "regret", "runs", "compare", "fit-mixture", "convert", "cost", "merge",
    "doctor", "export",
}  # fmt: skip


# Help


def test_the_commands_of_the_design_are_there() -> None:
    assert set(COMMANDS) >= {
        "demo", "train-saes", "count-features", "recommend-layers", "tune", "eval", "compare",
        "fit-mixture", "convert", "runs", "app", "doctor", "export",
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help_with_an_example(name: str) -> None:
    result = invoke(name, "--help")
    assert result.exit_code == 0
    assert f"Example: resa-lens {name}" in " ".join(result.stdout.split())


@pytest.mark.parametrize("name", sorted(set(COMMANDS) - NO_MODEL))
def test_commands_that_do_work_share_their_options(name: str) -> None:
    options = {o for p in COMMANDS[name].params for o in p.opts}
    common = {"--workspace", "--seed", "--device", "--dtype", "--json", "--force", "--config"}
    assert common <= options


def test_examples_use_options_that_exist() -> None:
    for name, command in COMMANDS.items():
        example = next(
            line for line in (command.help or "").splitlines() if line.strip().startswith("Example")
        )
        options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
        used = {word for word in example.split() if word.startswith("--")}
        assert used <= options, name


def test_version() -> None:
    assert invoke("--version").stdout == f"resa-lens {__version__}\n"


def test_help_takes_less_than_a_second(cli: Callable[..., Any]) -> None:
    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    times = []
    for _ in range(3):
        began = spent()
        assert cli("--help").returncode == 0
        times.append(spent() - began)
    assert min(times) < 1.0, times  # CPU seconds


def test_help_imports_nothing_heavy(cli: Callable[..., Any]) -> None:
    code = (
        "import sys\nfrom resa_lens.cli import app\nfrom typer.testing import CliRunner\n"
        "CliRunner().invoke(app, ['tune', '--help'])\n"
        "print([m for m in ('torch', 'transformers', 'sklearn', 'plotly', 'numpy', 'scipy')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# The paper's figures


def test_the_papers_counts_come_out() -> None:
    made = fit("--column", "feature_count", "--recipe", "paper", "--draws", "20")
    assert [round(c["mean"], 2) for c in made["components"]] == [14.48, 4.86, 22.70]
    assert [round(c["weight"], 3) for c in made["components"]] == [0.407, 0.371, 0.222]
    assert round(made["entropy"], 4) == 3.1938
    assert made["recommended"] == [14, 5, 23]
    assert round(made["log_likelihood"], 4) == -3.3187


def test_the_papers_scores_come_out() -> None:
    made = fit(
        "--column", "average", "--baseline", "41.18", "--recipe", "paper", "--draws", "20"
    )  # fmt: skip
    assert [round(c["mean"], 2) for c in made["components"]] == [15.15, 5.59, 23.03]
    assert [round(c["weight"], 3) for c in made["components"]] == [0.390, 0.368, 0.242]
    assert round(made["entropy"], 4) == 3.2021


@pytest.mark.parametrize(
    "options", [("--column", "feature_count"), ("--column", "average", "--baseline", "41.18")]
)
def test_asked_properly_both_are_flat(options: tuple[str, ...]) -> None:
    made = fit(*options, "--draws", "100")
    assert made["recipe"] == "robust"
    assert made["verdict"] == "not distinguishable from flat"
    assert made["reason"]
    assert set(made) >= {
        "components", "entropy", "log_likelihood", "nulls", "verdict", "reason", "recommended",
    }  # fmt: skip


def test_the_table_for_people_holds_the_verdict() -> None:
    result = invoke("fit-mixture", TABLE_6, "--column", "feature_count", "--draws", "50")
    assert result.exit_code == 0
    assert "verdict: not distinguishable from flat" in result.stdout


# Output in a process of its own


def test_stdout_is_one_object_whatever_libraries_print(
    cli: Callable[..., Any], tmp_path: Path
) -> None:
    done = cli("recommend-layers", "--layers", "3-4", "--tokens", "1024", "--latents", "64",
               "--workspace", str(tmp_path / "w"), "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    made = json.loads(done.stdout)
    assert made["model"] == "tiny-reasoner"
    assert [row["layer"] for row in made["layers"]] == [3, 4]
    assert made["recommended"][0] in (3, 4)
    assert done.stderr.startswith(f"workspace: {tmp_path / 'w'}\n")
    # The table for people, and that it is done.
    shown = invoke("recommend-layers", "--layers", "3-4", "--tokens", "1024", "--latents", "64",
                   "--workspace", str(tmp_path / "w"))  # fmt: skip
    assert shown.exit_code == 0
    assert "verdict: " in shown.stdout
    assert "(0-based; 4th of 12)" in shown.stdout
    assert "done before" in shown.stderr


def test_runs_lists_the_artifacts(demo: Any) -> None:
    result = invoke("runs", "--workspace", str(demo.workspace), "--json")
    rows = json.loads(result.stdout)["runs"]
    kinds = {"saes", "counts", "recommendation", "insertion", "adapter", "eval", "activity",
             "falsification"}  # fmt: skip
    assert {row["kind"] for row in rows} == kinds
    assert all((demo.workspace / row["path"]).is_dir() for row in rows)
    assert [row["created"] for row in rows] == sorted((r["created"] for r in rows), reverse=True)


def test_runs_of_an_absent_workspace_make_none(tmp_path: Path) -> None:
    result = invoke("runs", "--workspace", str(tmp_path / "absent"))
    assert result.exit_code == 0
    assert "resa-lens demo" in result.stdout
    assert not (tmp_path / "absent").exists()


# Exit codes


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["nonsense"], "nonsense"),
        (["tune", "--rank", "0"], "--rank"),
        (["train-saes", "--tokens", "many"], "--tokens"),
        (["eval", "--unknown"], "--unknown"),
        (["fit-mixture", TABLE_6], "--column"),
    ],
)
def test_usage_errors_are_short_and_exit_2(args: list[str], named: str) -> None:
    result = invoke(*args)
    assert result.exit_code == 2
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) <= 3
    assert named in result.stderr
    assert result.stdout == ""


def test_interrupted_is_130_and_leaves_only_what_goes_on(tmp_path: Path) -> None:
    workspace = tmp_path / "w"
    command = [
        sys.executable, "-c", "from resa_lens.cli import main; main()", "train-saes", "--layers",
        "1-8", "--tokens", "4000000", "--workspace", str(workspace), "--json",
    ]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell that starts the tests in the background has them ignore SIGINT, and children
        # inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            # The forecast comes after the second step: the training is under way.
            if line.startswith("expected:"):
                break
        process.send_signal(signal.SIGINT)
        try:
            out, rest = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, "".join(said) + rest
    assert "interrupted; run the same command again" in rest
    assert "Traceback" not in rest
    assert out == ""
    assert not list(workspace.rglob("manifest.json"))
    # Either nothing was done yet, or a whole checkpoint is there to go on from.
    for work in workspace.rglob(".work-*"):
        assert list(work.glob("group-*/checkpoint-*/state.json"))
        assert "the same command goes on" in rest


def test_an_interrupt_that_a_library_turns_into_an_error_is_130() -> None:
    """Import code may answer an interrupt with an exception of its own."""

    def job() -> Any:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise ModuleNotFoundError("could not import") from error

    # A process that a script started in the background ignores interrupts.
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(typer.Exit) as stopped:
            common.run(job, False)
        assert stopped.value.exit_code == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, found)

    def fails() -> Any:
        raise ModuleNotFoundError("could not import")

    with pytest.raises(ModuleNotFoundError):
        common.run(fails, False)


# What is printed


def test_json_has_no_nan(capfd: pytest.CaptureFixture[str]) -> None:
    value = {"a": [1.0, float("nan")], "b": {"c": (float("inf"), 2)}, "d": True, "e": None}
    common.run(lambda: (value, ()), True)
    found = json.loads(capfd.readouterr().out, parse_constant=pytest.fail)
    assert found == {"a": [1.0, None], "b": {"c": [None, 2]}, "d": True, "e": None}


def test_layers_and_intervals_keep_their_line_in_a_narrow_table(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cells = ("layer 10 (0-based; 11th of 12)", "-1.8 to +1.8")
    headers = ("layer", "95 %", *["a header of several words"] * 5)
    made = table("title", *headers, rows=[(*cells, *["123"] * 5)])
    Console(width=100).print(draw(made))
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "123" in line]
    assert all(cell in row for cell in cells)


def test_unfinished_ablations_are_listed_by_their_arms(tmp_path: Path) -> None:
    work = tmp_path / "w" / "ablations" / "model" / ".work-mlp_out-1"
    work.mkdir(parents=True)
    for name in ("plain", "target-1"):
        (work / f"{name}.parquet").write_bytes(b"x")
    (row,) = json.loads(invoke("runs", "--workspace", str(tmp_path / "w"), "--json").stdout)["runs"]
    assert row["kind"] == "ablations, unfinished (2 arms)"
    assert "unfinished (2 arms)" in invoke("runs", "--workspace", str(tmp_path / "w")).stdout


def test_unfinished_work_of_every_kind_says_how_far_it_came(tmp_path: Path) -> None:
    root = tmp_path / "w"
    answers = root / "evals" / ".work-e" / "answers.jsonl"
    state = root / "adapters" / ".work-a" / "checkpoint-30" / "state.json"
    record = root / "sweeps" / ".work-s" / "jobs" / "L01-s0.json"
    (root / "sweeps" / ".work-s" / "locks").mkdir(parents=True)
    for file, text in ((answers, "{}\n{}\n{}\n"), (state, '{"step": 30}'), (record, "{}")):
        file.parent.mkdir(parents=True)
        file.write_text(text)
    rows = json.loads(invoke("runs", "--workspace", str(root), "--json").stdout)["runs"]
    assert {row["kind"] for row in rows} == {
        "evals, unfinished (2 answers)",
        "adapters, unfinished (step 30)",
        "sweeps, unfinished (1 job)",
    }


def test_files_in_examples_are_there() -> None:
    for name, command in COMMANDS.items():
        example = " ".join((command.help or "").partition("Example:")[2].split())
        for word in example.split():
            if word.endswith((".csv", ".jsonl", ".parquet")):
                assert (PAPER.parents[1] / word).is_file(), (name, word)


def test_regret_refuses_fewer_layers_than_the_table_has() -> None:
    done = invoke("regret", TABLE_6, "--column", "average", "--n-layers", "4")
    assert done.exit_code == 2
    assert "--n-layers 4: the table has layer 26 (0-based); give at least 27" in done.stderr
    assert invoke("regret", TABLE_6, "--column", "average", "--n-layers", "27").exit_code == 0


def test_a_wide_table_comes_in_parts_and_no_number_is_cut(
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = ("layer 10 (0-based; 11th of 12)", *[f"{i}23.456" for i in range(12)])
    grid = table("title", "layer", *[f"column {i}" for i in range(12)], rows=[row])
    (whole,) = fitted(grid, 200)
    assert whole.title == draw(grid).title
    assert [column.header for column in whole.columns] == ["layer"] + [
        f"column {i}" for i in range(12)
    ]
    assert [[str(cell) for cell in column.cells] for column in whole.columns] == [
        [cell] for cell in row
    ]
    parts = fitted(grid, 80)
    assert len(parts) > 1
    for part in parts:
        Console(width=80).print(part)
    said = capsys.readouterr().out
    assert all(f"{i}23.456" in said for i in range(12))
    assert said.count("layer 10 (0-based; 11th of 12)") == len(parts)
    assert said.count("title") == 1
