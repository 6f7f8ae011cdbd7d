r"""Do we find and judge answers as lighteval and plain math-verify do?

    python benchmarks/harness_agreement.py --lighteval .venv-eval/bin/python

Answers are written here in each benchmark's own form, half of them wrong, with no look at the
grader: GSM8K's "####", MATH's boxes, AIME's integers, AMC's decimals, Minerva's sentences, GPQA's
letters.  Every answer is judged by us, with each `--extraction`, by math-verify's own extraction
and comparison, and by lighteval's metrics in an environment that
`benchmarks/install_engine.sh lighteval FOLDER` makes.  What differs is listed one by one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
EXTRACTIONS = ("resa", "lighteval", "boxed")


@dataclass(frozen=True)
class Answer:
    """A text in a benchmark's form."""

    benchmark: str
    gold: str
    text: str
    right: bool
    choice: bool = False


def other(rng: random.Random, value: int) -> int:
    """Return another integer that is near."""
    return value + rng.choice([-10, -2, -1, 1, 2, 10])


def gsm8k(rng: random.Random, right: bool) -> tuple[str, str]:
    """A worked solution that ends in "####"."""
    each, days = rng.randint(2, 90), rng.randint(2, 60)
    total = each * days
    said = total if right else other(rng, total)
    shown = f"{said:,}" if rng.random() < 0.5 else str(said)
    steps = f"She makes {each} a day for {days} days: {each}*{days} = {said}.\n"
    return str(total), steps + f"#### {shown}"


def math_box(rng: random.Random, right: bool) -> tuple[str, str]:
    """A solution whose last line boxes an expression."""
    n, d = rng.randint(2, 40), rng.randint(2, 12)
    pairs = [
        (f"\\frac{{{n}}}{{{41}}}", f"\\dfrac{{{n}}}{{41}}", f"\\frac{{{n + 1}}}{{41}}"),
        (f"{n}\\sqrt{{{d}}}", f"{n} \\sqrt{{{d}}}", f"{n}\\sqrt{{{d + 1}}}"),
        (f"({n}, -{d})", f"({n},-{d})", f"({n},{d})"),
        (f"{n}x^2+{d}", f"{n}x^2 + {d}", f"{n}x^2 - {d}"),
        (f"{n}\\pi", f"{n}\\pi", f"{d + n}\\pi"),
        (f"[{d},\\infty)", f"[{d}, \\infty)", f"({d}, \\infty)"),
        (f"{n}-{d}i", f"{n} - {d}i", f"{n} + {d}i"),
    ]
    gold, same, wrong = rng.choice(pairs)
    said = same if right else wrong
    last = f"Therefore, the final answer is: $\\boxed{{{said}}}$. I hope it is correct"
    return gold, f"First we simplify.\n\nThen we solve for $x$.\n\n{last}"


def aime(rng: random.Random, right: bool) -> tuple[str, str]:
    """An integer from 0 to 999, after thoughts."""
    gold = rng.randint(0, 999)
    said = gold if right else (other(rng, gold) % 1000)
    thoughts = f"<think>\nSo maybe {other(rng, gold)}? Let me check again.\n</think>\n\n"
    ends = [
        f"The answer is $\\boxed{{{said}}}$.",
        f"**Final Answer**\n\\boxed{{{said:03d}}}",
        f"Therefore, the final answer is: $\\boxed{{{said}}}$. I hope it is correct",
        f"Thus $m+n = \\boxed{{{said}}}$.",
    ]
    return str(gold), thoughts + rng.choice(ends)


def amc(rng: random.Random, right: bool) -> tuple[str, str]:
    """A number that may have a fraction, boxed or said."""
    gold = rng.randint(1, 400)
    said = gold if right else other(rng, gold)
    half = rng.random() < 0.3
    shown = rng.choice([f"{said}.5", f"\\frac{{{2 * said + 1}}}{{2}}"]) if half else str(said)
    ends = [
        f"\\boxed{{{shown}}}",
        f"the answer is $\\boxed{{{shown}}}$",
        f"The answer is ${shown}$.",
    ]
    return f"{gold}.5" if half else f"{gold}.0", f"Counting the cases gives {rng.choice(ends)}"


def minerva(rng: random.Random, right: bool) -> tuple[str, str]:
    """A quantity of physics, with its unit, or a formula."""
    n, e = rng.randint(11, 99), rng.randint(3, 30)
    m = n if right else n + 1
    pairs = [
        (f"{n / 10}e{e}", f"{m / 10} \\times 10^{{{e}}}"),
        (f"{n}", f"{m} \\text{{ K}}"),
        (f"{n / 100}", f"{m / 100}"),
        (f"\\frac{{{n} m v}}{{2}}", f"\\frac{{{m}mv}}{{2}}"),
        (f"{n} \\sin(\\omega t)", f"{m} \\sin(\\omega t)"),
    ]
    gold, said = rng.choice(pairs)
    return gold, f"The final answer is $\\boxed{{{said}}}$. I hope it is correct."


def gpqa(rng: random.Random, right: bool) -> tuple[str, str]:
    """A letter in the form that the prompt asks for, or near it."""
    gold, wrong = rng.sample("ABCD", 2)
    said = gold if right else wrong
    ends = [
        f"Answer: {said}",
        f"**Answer: {said}**",
        f"Answer: ({said})",
        f"Answer: {said}) 5 kg",
        f"Therefore, the answer is {said}.",
        f"The correct answer is {said}.",
        f"Answer: ${said}",
        f"Answer: $\\boxed{{{said}}}$",
    ]
    thoughts = f"<think>\nIt is not {wrong if right else gold}.\n</think>\n\nHeat flows.\n\n"
    return gold, thoughts + rng.choice(ends)


FORMS: dict[str, Callable[[random.Random, bool], tuple[str, str]]] = {
    "gsm8k": gsm8k, "math500": math_box, "aime24": aime, "amc23": amc, "minerva": minerva,
    "gpqa-diamond": gpqa,
}  # fmt: skip


def written(seed: int, each: int) -> list[Answer]:
    """Return so many answers of each benchmark, every second one wrong."""
    answers = []
    for name, form in FORMS.items():
        rng = random.Random(f"{seed}/{name}")
        for number in range(each):
            right = number % 2 == 0
            gold, text = form(rng, right)
            answers.append(Answer(name, gold, text, right, name == "gpqa-diamond"))
    return answers


def judge_by_lighteval() -> None:
    """Print lighteval's verdict on each answer that stdin holds; in its environment."""
    from resa_lens.evals.lighteval import METRIC, _doc, _theirs

    judges = {choice: _theirs(choice) for choice in (False, True)}
    for line in sys.stdin:
        answer = Answer(**json.loads(line))
        doc = _doc("task", "?", answer.gold, answer.choice, {})
        text = answer.text.rpartition("</think>")[2]
        print(json.dumps({METRIC: bool(judges[answer.choice](doc, text))}), flush=True)


def lighteval_verdicts(python: str, answers: list[Answer]) -> list[bool]:
    """Return lighteval's verdicts, from the Python of its environment."""
    # Packages of this environment are none of that one's.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    lines = "".join(json.dumps(asdict(answer)) + "\n" for answer in answers)
    done = subprocess.run(
        [python, str(HERE), "--by-lighteval"],
        input=lines,
        capture_output=True,
        env=env,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{python} did not judge: {done.stderr[-600:]}")
    return [next(iter(json.loads(line).values())) for line in done.stdout.splitlines()]


def verdicts(answers: list[Answer]) -> dict[str, list[bool]]:
    """Return our verdicts by extraction, and plain math-verify's."""
    from resa_lens.evals.extraction import final_part
    from resa_lens.evals.grading import grade
    from resa_lens.evals.judge import JUDGE

    found: dict[str, list[bool]] = {}
    for name in EXTRACTIONS:
        found[name] = [
            grade(a.text, a.gold, choice=a.choice, extraction=name).correct for a in answers
        ]
    found["math-verify"] = [
        JUDGE.extract(final_part(a.text)[0], "ABCD") == a.gold if a.choice
        else JUDGE.verify_text(final_part(a.text)[0], a.gold)
        for a in answers
    ]  # fmt: skip
    return found


def report(answers: list[Answer], found: dict[str, list[bool]]) -> list[dict[str, Any]]:
    """Print agreement by benchmark, and return the answers on which anything differs."""
    print("benchmark | n | " + " | ".join(found))
    for name in (*FORMS, "all"):
        rows = [i for i, a in enumerate(answers) if name in (a.benchmark, "all")]
        shares = [
            f"{sum(values[i] == answers[i].right for i in rows)}" for values in found.values()
        ]
        print(f"{name} | {len(rows)} | " + " | ".join(shares))
    return [
        {**asdict(answer), **{name: values[i] for name, values in found.items()}}
        for i, answer in enumerate(answers)
        if len({values[i] for values in found.values()} | {answer.right}) > 1
    ]


def main() -> None:
    """Print the table and the differences."""
    parser = argparse.ArgumentParser(description="agreement with lighteval and math-verify")
    parser.add_argument("--lighteval", help="the Python of lighteval's environment")
    parser.add_argument("--by-lighteval", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--each", type=int, default=60, help="answers of each benchmark")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.by_lighteval:
        judge_by_lighteval()
        return
    answers = written(args.seed, args.each)
    found = verdicts(answers)
    if args.lighteval:
        found["lighteval itself"] = lighteval_verdicts(args.lighteval, answers)
    print("Verdicts as the text was written, of n:")
    differing = report(answers, found)
    names = [name for name in found if name != "boxed"]
    listed = [row for row in differing if len({row[n] for n in names} | {row["right"]}) > 1]
    print(f"\n{len(listed)} answers on which one of {', '.join(names)} differs:")
    for row in listed:
        says = ", ".join(f"{name} {'right' if row[name] else 'wrong'}" for name in names)
        is_right = "right" if row["right"] else "wrong"
        print(
            f"- {row['benchmark']}, gold {row['gold']}, {is_right}: {row['text'][-90:]!r}: {says}"
        )


if __name__ == "__main__":
    main()
