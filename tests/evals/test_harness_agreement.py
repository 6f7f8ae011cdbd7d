"""A few of the answers that benchmarks/harness_agreement.py judges with several harnesses."""

from __future__ import annotations

from benchmarks.harness_agreement import FORMS, report, verdicts, written


def test_we_judge_as_the_answers_were_written_and_as_math_verify_does(capsys):
    answers = written(seed=1, each=8)
    assert {answer.benchmark for answer in answers} == set(FORMS)
    assert sum(answer.right for answer in answers) == len(answers) // 2
    found = verdicts(answers)
    right = [answer.right for answer in answers]
    assert found["resa"] == right
    # It reads neither 5.4e4 in a gold answer nor "Answer: (B)".
    differing = [
        answer
        for answer, verdict in zip(answers, found["math-verify"], strict=True)
        if verdict != answer.right
    ]
    assert {answer.benchmark for answer in differing} <= {"minerva", "gpqa-diamond"}
    assert len(differing) <= 8
    assert found["lighteval"] == right
    assert len(report(answers, found)) >= len(differing)
    assert "all | 48" in capsys.readouterr().out
