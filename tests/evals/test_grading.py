from __future__ import annotations

import resource
import signal
import subprocess
import sys
import threading
import time

import pytest

from resa_lens.errors import BadInputError, RunFailedError
from resa_lens.evals.extraction import extract_answer
from resa_lens.evals.grading import grade, is_chosen, is_correct
from resa_lens.evals.judge import PYTHON, PYTHON_FILE, Judge, UndecidedError, check_judge
from resa_lens.evals.letters import extract_letter


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think> 1+2=3 </think> <answer> Answer: 3 </answer>", "3"),
        ("1+2=3 </think> <answer> Answer: 3", "3"),
        ("a </think> <answer> 3 </answer> b </think> <answer> 4 </answer>", "4"),
        ("<answer> 3 </answer> </think> so \\boxed{4}", "4"),
        ("</think> \\boxed{1} and then \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\text{a}_{b_{c}}}", "\\text{a}_{b_{c}}"),
        ("\\boxed {\\{1, 2\\}}", "\\{1, 2\\}"),
        ("<answer> the result is \\boxed{7} </answer>", "7"),
        ("\\boxed{7} <answer> Answer: 8 </answer>", "8"),
        ("<answer> 1 <answer> 2 </answer>", "2"),
        ("\\boxed{5} and \\boxed{6", "5"),
        ("<think> I guess 12", None),
        ("<think> I guess \\boxed{12}", "12"),
        ("<think> so <answer> 12 </answer>", "12"),
        ("<think> 12 </think>", None),
        ("<think> 12 </think> 13", "13"),
        ("It goes\nAnswer: 13\n\n", "13"),
        ("</think> <answer> </answer>", None),
        ("", None),
        ("   \n", None),
        ("\\boxed{}", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("prediction", "gold", "expected"),
    [
        ("42", "42", True),
        ("42", "43", False),
        ("042", "42", True),
        ("-42", "42", False),
        ("-0", "0", True),
        ("1,000", "1000", True),
        ("+7", "7", True),
        ("7.", "7", True),
        ("$7$", "7", True),
        ("\\$7", "7", True),
        ("", "7", False),
        ("<answer></answer>", "7", False),
        ("<think> 7", "7", False),
        ("<think> 7 </think> <answer> Answer: 7 </answer>", "\\boxed{7}", True),
        ("9" * 6000, "9" * 5999, False),
        ("0.5", "1/2", True),
        ("\\frac{1}{2}", "1/2", True),
        ("\\boxed{\\dfrac{2}{4}}", "0.5", True),
        ("0.51", "1/2", False),
        ("x=5", "5", True),
        ("2\\sqrt{3}", "\\sqrt{12}", True),
        ("2\\sqrt{3}", "\\sqrt{13}", False),
        ("42.0", "42", True),
        ("1 2", "12", False),
        ("B", "A", False),
        ("C", "C", True),
    ],
)
def test_is_correct(prediction, gold, expected):
    assert is_correct(prediction, gold) is expected


@pytest.mark.parametrize("hostile", ["9^{9^9}"])
def test_hostile_power_towers_end_and_are_wrong(hostile):
    began = time.perf_counter()
    assert not is_correct(f"\\boxed{{{hostile}}}", "7")
    assert time.perf_counter() - began < 12


@pytest.mark.parametrize(
    "hostile",
    [
        "\\boxed{" * 200_000,
        "{" * 200_000 + "}" * 200_000,
        "<answer>" * 200_000,
        "<think>" * 200_000,
    ],
)
def test_long_hostile_texts_are_read_in_linear_time(hostile):
    began = time.perf_counter()
    extract_answer(hostile)
    assert time.perf_counter() - began < 1.0


def test_code_is_never_run(tmp_path):
    mark = tmp_path / "mark"
    assert not is_correct(f"__import__('pathlib').Path('{mark}').touch()", "7")
    assert not mark.exists()


def test_any_thread_may_grade():
    outcome = []
    thread = threading.Thread(
        target=lambda: outcome.extend([is_correct("0.5", "1/2"), is_correct("0.51", "1/2")])
    )
    thread.start()
    thread.join()
    assert outcome == [True, False]


@pytest.mark.parametrize(
    ("hostile", "within"),
    [
        ("{" * 450 + "1" + "}" * 450, 8.0),
        ("9" * 100_000 + ".5", 1.0),
        ("1\x002", 1.0),
        ("\udcff 1/2", 1.0),  # half a character
        ("\\sqrt{" * 150 + "2" + "}" * 150, 8.0),
        ("1," * 50_000, 1.0),
        (" " * 100_000 + "5", 1.0),
        ("1" + " " * 100_000 + "5", 1.0),
        ("final" + " " * 100_000, 1.0),
        ("$" * 100_000, 1.0),
        ("answer is " * 10_000, 4.0),
    ],
)
def test_hostile_answers_end_and_are_wrong(hostile, within):
    assert is_correct("1/2", "0.5")  # the process is up
    began = time.perf_counter()
    assert not is_correct(f"\\boxed{{{hostile}}}", "7.5")
    extract_letter(hostile)
    assert time.perf_counter() - began < within
    assert is_correct("1/2", "0.5")


def test_memory_stays_in_the_other_process():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # It expands to 2 GB where nothing limits it.
    assert not is_correct("(1+x)^{10^6}", "7.5")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def test_a_process_ended_between_answers_costs_none_and_one_that_hangs_one(monkeypatch):
    judge = Judge()
    assert judge.equal("1/2", "0.5")
    judge._process.kill()
    judge._process.wait()
    assert judge.equal("1/2", "0.5")  # a new one
    judge._process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr("resa_lens.evals.judge.PATIENCE_S", 0.2)
    with pytest.raises(UndecidedError, match=r"0\.2 s"):
        judge.equal("1/2", "0.5")
    judge.close()


def test_a_process_that_does_not_start_is_no_wrong_answer(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RunFailedError, match="did not start"):
        Judge().equal("1/2", "0.5")


def test_another_python_judges_where_one_is_named(monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\ntouch {tmp_path}/asked\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    for where in ("variable", "file"):
        if where == "variable":
            monkeypatch.setenv(PYTHON, str(python))
        else:
            monkeypatch.delenv(PYTHON)
            (tmp_path / PYTHON_FILE).write_text(f"{python}\n")
            monkeypatch.setattr(sys, "prefix", str(tmp_path))
        judge = Judge()
        assert judge.equal("1/2", "0.5")
        judge.close()
        (tmp_path / "asked").unlink()


def test_a_python_with_another_math_verify_is_refused(monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho \'{"value": "math-verify 0.5.2"}\'\n')
    python.chmod(0o755)
    monkeypatch.setenv(PYTHON, str(python))
    with pytest.raises(RunFailedError, match=r"math-verify 0\.5\.2"):
        Judge().equal("1/2", "0.5")
    monkeypatch.setenv(PYTHON, str(tmp_path / "nowhere"))
    with pytest.raises(RunFailedError, match="nowhere"):
        Judge().equal("1/2", "0.5")
    with pytest.raises(BadInputError, match="nowhere"):
        check_judge()


def test_answers_are_compared_entirely_or_refused():
    tail = " + 1" * 1_000
    assert grade(f"\\boxed{{2{tail}}}", f"2{tail}").correct
    assert not grade(f"\\boxed{{3{tail}}}", f"2{tail}").correct  # the last 1,000 are the same
    refused = grade("\\boxed{" + "7" * 10_001 + "}", "7" * 10_001)
    assert not refused.correct
    assert "10,001" in (refused.refused or "")
    assert "s" in (grade("\\boxed{9^{9^9} + x}", "x + 7").refused or "")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("</think> The final line.\nAnswer: C", "C"),
        ("(b)", "B"),
        ("\\boxed{\\text{D}}", "D"),
        ("\\boxed{(A)}", "A"),
        ("**B**", "B"),
        ("C) the mass", "C"),
        ("The answer is D.", "D"),
        ("<think> A or B </think> <answer> Answer: B </answer>", "B"),
        ("A mass of 5", None),
        ("I think it is the second", None),
        ("Because of B", None),
        ("<think> A", None),
        ("", None),
    ],
)
def test_letters(text, letter):
    assert extract_letter(text) == letter
    assert is_chosen(text, "B") is (letter == "B")


def test_integers_need_no_math_verify():
    code = (
        "import sys; from resa_lens.evals.grading import is_correct; "
        "assert not is_correct('1', '2'); assert is_correct('1', '1'); "
        "assert 'sympy' not in sys.modules and 'math_verify' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
