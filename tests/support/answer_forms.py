r"""Right answers in the forms in which people and models write them, and near misses of them.

Everything is drawn from a seed, by kind; nothing here reads the grader.  A near miss differs from
the gold in one thing: a sign, a bound, a unit, the order, a digit or the option.
"""

from __future__ import annotations

# ruff: noqa: E501, RUF001
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

LETTERS = "ABCD"
LONG = {"cm": "centimeters", "m": "meters", "kg": "kilograms", "g": "grams", "s": "seconds",
        "h": "hours", "min": "minutes", "ft": "feet", "km": "kilometers"}  # fmt: skip
OTHER = {"cm": "m", "m": "km", "kg": "g", "g": "kg", "s": "min", "h": "min", "min": "s", "ft": "m",
         "km": "cm"}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A gold answer and a text, with what is right."""

    kind: str
    gold: str
    text: str
    right: bool
    choice: bool = False


def grouped(n: int, mark: str) -> str:
    return f"{n:,}".replace(",", mark)


def wrapped(rng: random.Random, answer: str) -> str:
    """A text that gives an answer by a box, tags or a plain sentence."""
    return rng.choice(
        [
            f"\\boxed{{{answer}}}",
            f"So we get $\\boxed{{{answer}}}$.",
            f"<think> some thoughts, maybe 17 </think> <answer> {answer} </answer>",
            f"The final answer is: $\\boxed{{{answer}}}$. I hope it is correct.",
        ]
    )


PLAIN: list[Callable[[str], str]] = [
    lambda a: f"**{a}**",
    lambda a: f"**Answer:** {a}",
    lambda a: f"**Answer: {a}**",
    lambda a: f"Final Answer: **{a}**",
    lambda a: f"### Answer\n{a}",
    lambda a: f"```\n{a}\n```",
    lambda a: f"The result:\n```text\n{a}\n```",
    lambda a: f"\\[\n{a}\n\\]",
    lambda a: f"$$\n{a}\n$$",
    lambda a: f"The answer is ${a}$.",
    lambda a: f"Therefore the answer is {a}.",
    lambda a: f"Answer: {a}\n\nHope this helps!",
    lambda a: f"{a}\n\nLet me know if you have any questions.",
    lambda a: f"**{a}**\n\nI hope that is clear!",
    lambda a: f"\\boxed{{{a}}}\n\n<answer></answer>",
    lambda a: f"<answer> {a} </answer> <answer> </answer>",
    lambda a: f"Thus the answer is {a}, because everything else was ruled out.",
    lambda a: f"<think> it may be 99 </think>\n\nThe answer is {a}.<|im_end|>",
    lambda a: f"x = {a}",
    lambda a: f"The correct answer is: {a}",
]
"""A number said plainly."""

CHOSEN: list[Callable[[str], str]] = [
    lambda c: c,
    lambda c: f"({c})",
    lambda c: f"{c}.",
    lambda c: f"**{c}**",
    lambda c: f"**({c})**",
    lambda c: f"`{c}`",
    lambda c: f"option {c}",
    lambda c: f"\\boxed{{{c}}}",
    lambda c: f"\\boxed{{\\text{{{c}}}}}",
    lambda c: f"\\boxed{{\\textbf{{({c})}}}}",
    lambda c: f"$\\boxed{{\\mathrm{{{c}}}}}$",
    lambda c: f"\\boxed{{{c}. 5\\text{{ kg}}}}",
    lambda c: f"Answer: {c}",
    lambda c: f"Answer: {c}) because heat flows downhill",
    lambda c: f"Answer: ({c}) the mass of the electron",
    lambda c: f"**Answer:** {c}\n\nHope this helps!",
    lambda c: f"The answer is {c}.",
    lambda c: f"The answer is ({c}), since the energy is kept.",
    lambda c: f"The correct option is **{c}**.",
    lambda c: f"Therefore, option {c} is correct.",
    lambda c: f"I would choose {c}.",
    lambda c: f"{c}) the second one",
    lambda c: f"<think> E or F? </think>\n\n**Final Answer**\n\n{c}",
    lambda c: f"<answer>The answer is {c}.</answer>",
    lambda c: f"My final answer is $\\boxed{{{c}}}$. I hope it is correct",
    lambda c: f"```\n{c}\n```",
    lambda c: f"Answer:\n\n{c}",
    lambda c: f"Answer: ${c}$",
]
"""An option said plainly."""


def spellings(rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """Yield (kind, gold, the same otherwise)."""
    n, k = rng.randint(2, 9_999), rng.randint(1_000, 9_999_999)
    d = rng.randint(3, 19)
    top = rng.choice([t for t in range(1, d) if d % t or t == 1])
    unit = rng.choice(sorted(LONG))
    yield "thousands", str(k), grouped(k, ",")
    yield "thousands", str(k), grouped(k, "{,}")
    yield "thousands", grouped(k, ","), grouped(k, "\\,")
    yield "thousands", str(k), grouped(k, " ")
    yield "unit", str(n), f"{n} {unit}"
    yield "unit", f"{n} {unit}", str(n)
    yield "unit", f"{n}\\text{{ {unit}}}", f"{n} \\text{{ {LONG[unit]}}}"
    yield "unit", f"{n}\\text{{ {unit}}}^2", f"{n} square {LONG[unit]}"
    yield "unit", str(n), f"{n} apples"
    yield "degrees", f"{n}^\\circ", str(n)
    yield "degrees", str(n), f"{n} degrees"
    yield "percent", f"{n}\\%", str(n)
    yield "percent", str(n), f"{n} percent"
    yield "percent", f"{n}\\%", f"{n / 100:.2f}"
    yield "money", f"\\${n}", f"{n}"
    yield "money", f"{n}.50", f"\\${grouped(n, ',')}.50"
    yield "money", f"\\${n}", f"{n} dollars"
    yield "mixed", f"{n}\\frac{{{top}}}{{{d}}}", f"\\frac{{{n * d + top}}}{{{d}}}"
    yield "mixed", f"{n}\\frac{{{top}}}{{{d}}}", f"{n} {top}/{d}"
    yield "fraction", f"\\frac{{{top}}}{{{d}}}", f"{top}/{d}"
    yield "fraction", f"\\frac{{{top}}}{{{d}}}", f"\\dfrac{{{3 * top}}}{{{3 * d}}}"
    yield "fraction", f"-\\frac{{{top}}}{{{d}}}", f"\\frac{{-{top}}}{{{d}}}"
    yield "decimal", f"{n}.5", f"\\frac{{{2 * n + 1}}}{{2}}"
    yield "decimal", f"{n}", f"{n}.00"
    yield "exponent", f"{n}e-30", f"{n} \\times 10^{{-30}}"
    yield "exponent", f"{n}{'0' * 40}", f"{n}e40"
    yield "base", f"{n:b}_2", f"{n:b}_{{2}}"
    yield "base", f"{n:b}_2", f"{n:b}_{{\\text{{two}}}}"
    yield "base", f"{n:b}_2", f"{n:b}"
    a, b, c = sorted(rng.sample(range(-50, 50), 3))
    yield "list", f"{a}, {b}, {c}", f"{c}, {a}, {b}"
    yield "list", f"{a},{b},{c}", f"{a}, {b} and {c}"
    yield "list", f"{a}, {b}", f"x = {a} \\text{{ or }} x = {b}"
    yield "set", f"\\{{{a}, {b}, {c}\\}}", f"\\left\\{{{b}, {a}, {c}\\right\\}}"
    yield "tuple", f"({a}, {b})", f"\\left({a},{b}\\right)"
    yield "signs", f"\\pm {n}", f"{n}, -{n}"
    yield "interval", f"[{a}, {b})", f"{a} \\le x < {b}"
    yield "interval", f"({a}, \\infty)", f"x > {a}"
    yield "interval", f"(-\\infty,{a})\\cup({b},\\infty)", f"(-\\infty, {a}) ∪ ({b}, ∞)"
    yield "assignment", f"{n}", f"x = {n}"
    yield "assignment", f"x = {n}", f"{n}"
    yield "assignment", f"x={a}, y={b}", f"x = {a} and y = {b}"
    yield "equation", f"y={n}x+{d}", f"{n}x + {d}"
    yield "equation", f"{n}x-y+{d}=0", f"{2 * n}x - 2y + {2 * d} = 0"
    yield "radical", f"{n}\\sqrt{{3}}", f"\\sqrt{{{3 * n * n}}}"
    yield "polynomial", f"(x+{n})(x-{d})", f"x^2 + {n - d}x - {n * d}".replace("+ -", "- ")
    yield "complex", f"{n}+{d}i", f"{d}i + {n}"
    yield "words", "\\text{Monday}", "monday"
    yield "ratio", f"{n}:{n + 1}", f"{n} : {n + 1}"
    matrix = "\\begin{{pmatrix}}{}&{}\\\\{}&{}\\end{{pmatrix}}"
    yield "matrix", matrix.format(a, b, c, n), matrix.format(f" {a} ", f" {b} ", f" {c} ", f" {n} ")


def misses(rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """Yield (kind, gold, a near miss)."""
    n, m = rng.randint(2, 9_999), rng.randint(10_000, 99_999_999)
    d = rng.randint(3, 19)
    a, b, c = sorted(rng.sample(range(1, 60), 3))
    unit = rng.choice(sorted(LONG))
    place = rng.randrange(len(str(m)))
    digit = (
        str(m)[:place] + str((int(str(m)[place]) + rng.randint(1, 9)) % 10) + str(m)[place + 1 :]
    )
    digit = digit.lstrip("0") or "0"
    x = rng.choice("abkmnpqtxyz")
    yield "sign", f"{n}", f"-{n}"
    yield "sign", f"-\\frac{{{n}}}{{{d}}}", f"\\frac{{{n}}}{{{d}}}"
    yield "sign", f"{n}-{d}i", f"{n}+{d}i"
    yield "sign", f"{n}{x}-{d}", f"{n}{x}+{d}"
    yield "sign", f"\\pm {n}", f"{n}"
    yield "sign", f"{n}", f"\\pm {n}"
    yield "sign", f"({a}, -{b})", f"({a}, {b})"
    yield "sign", f"{n}x-y+{d}=0", f"{n}x+y+{d}=0"
    yield "sign", f"{n}-\\sqrt{{{d}}}", f"{n}+\\sqrt{{{d}}}"
    yield "bound", f"[{a},{b})", f"[{a},{b}]"
    yield "bound", f"({a},{b}]", f"[{a},{b}]"
    yield "bound", f"x \\ge {n}", f"x > {n}"
    yield "bound", f"(-\\infty,{n}]", f"x < {n}"
    yield "bound", f"({a},\\infty)", f"({b},\\infty)"
    yield "bound", f"(-\\infty,{a})\\cup({b},\\infty)", f"(-\\infty,{a}]\\cup({b},\\infty)"
    yield "bound", f"[{a},{b}]\\cup[{c},\\infty)", f"[{a},{b}]\\cup({c},\\infty)"
    yield "bound", f"{a} < x \\le {b}", f"{a} < x < {b}"
    yield "unit", f"{n} {unit}", f"{n} {OTHER[unit]}"
    yield "unit", f"{n}\\text{{ {unit}}}^2", f"{n}\\text{{ {unit}}}"
    yield "unit", f"{n}\\text{{ {unit}}}^2", f"{n}\\text{{ {unit}}}^3"
    yield "unit", f"\\${n}", f"{n} cents"
    yield "unit", f"{n}\\%", f"{n / 1000:.4f}"
    yield "unit", f"{n}", f"{n / 100:.2f}"
    yield "unit", f"{n:b}_2", f"{n:b}_3"
    yield "unit", f"{n} apples", f"{n} oranges"
    yield "unit", "3:30 pm", "3:30 am"
    yield "order", f"({a},{b})", f"({b},{a})"
    yield "order", f"x={a}, y={b}", f"x={b}, y={a}"
    yield "order", f"\\frac{{{a}}}{{{b}}}", f"\\frac{{{b}}}{{{a}}}"
    yield "order", f"{a}:{b}", f"{b}:{a}"
    yield "order", f"{x}-{n}", f"{n}-{x}"
    yield "order", "\\text{east}", "\\text{seat}"
    yield (
        "order",
        f"\\begin{{pmatrix}}{a}\\\\{b}\\end{{pmatrix}}",
        (f"\\begin{{pmatrix}}{b}\\\\{a}\\end{{pmatrix}}"),
    )
    yield "order", f"{a}^{{{b + 60}}}", f"{b + 60}^{{{a}}}"  # 2^4 is 4^2
    yield "digit", f"{m}", digit
    yield "digit", grouped(m, ","), grouped(int(digit), ",")
    yield "digit", f"0.{m}", f"0.{m}1"
    yield "digit", f"{m}e-20", f"{m}e-21"
    yield "digit", f"{m}{'0' * 30}", f"{m}{'0' * 29}1"
    yield "digit", f"10^{{{a + 20}}}", f"10^{{{a + 20}}}+1"
    yield "digit", f"\\frac{{{n}}}{{{m}}}", f"\\frac{{{n}}}{{{m + 1}}}"
    yield "digit", f"{n}\\frac{{1}}{{{d}}}", f"{n}"
    yield "digit", f"{n}\\sqrt{{{d}}}", f"{n}\\sqrt{{{d + 1}}}"
    yield "digit", f"{a}, {b}, {c}", f"{a}, {b}, {c + 1}"
    yield "digit", f"{a}, {b}, {c}", f"{a}, {b}"
    yield "digit", f"\\{{{a}, {b}\\}}", f"\\{{{a}, {b}, {c}\\}}"
    yield (
        "digit",
        f"\\frac{{2^{{{n + 900}}}+1}}{{2^{{{n + 902}}}}}",
        (f"\\frac{{1}}{{2^{{{n + 902}}}}}"),
    )
    yield "digit", f"n={a}, {b}", f"n={a}, {c}"
    yield "digit", "\\frac{1}{3}", "0.333333"
    yield "digit", f"{x}^{{{a}}}", f"{x}^{{{a + 1}}}"
    yield "digit", f"{n}{x}", f"{n}"
    yield "option", "C", "D"
    yield "option", f"{x}={n}", f"{x}={n + 1}"
    yield "option", f"{n}", "\\text{none}"


def right_cases(seed: int) -> Iterator[Case]:
    """Yield right answers by form: some 90 a seed."""
    rng = random.Random(seed)
    for kind, gold, other in spellings(rng):
        yield Case(kind, gold, wrapped(rng, other), True)
    number = str(rng.choice([rng.randint(2, 999), -rng.randint(2, 999)]))
    for number_form in PLAIN:
        yield Case("plain", number, number_form(number), True)
    letter = rng.choice(LETTERS)
    for letter_form in CHOSEN:
        yield Case("option", letter, letter_form(letter), True, choice=True)


def near_misses(seed: int) -> Iterator[Case]:
    """Yield wrong answers that are nearly right: some 100 a seed."""
    rng = random.Random(seed)
    for kind, gold, other in misses(rng):
        yield Case(kind, gold, wrapped(rng, other), False)
    n = rng.randint(2, 999)
    for number_form in PLAIN:
        yield Case("plain", str(n), number_form(str(n + rng.choice([-1, 1, 10]))), False)
    right, wrong = rng.sample(LETTERS, 2)
    for letter_form in CHOSEN:
        yield Case("option", right, letter_form(wrong), False, choice=True)
    for text in (
        f"The answer is not {right}.", f"The answer cannot be {right}",
        f"Option {right} is incorrect.", f"Answer: {right} or {wrong}", f"Answer: {wrong} (not {right})",
        f"I think {right} looks right but the answer is {wrong}", f"We can rule out {right}.",
        f"\\boxed{{{right}, {wrong}}}",
    ):  # fmt: skip
        yield Case("option", right, text, False, choice=True)
    for text in (
        f"The answer is not {n}.", f"The answer is {n + 1}, not {n}.", f"It is more than {n}.",
        f"The answer is {n} or {n + 1}.", f"<think> {n} </think>", f"<think> the answer is {n}",
        f"\\boxed{{{n}}}. Wait, that is wrong: it is \\boxed{{{n + 1}}}",
    ):  # fmt: skip
        yield Case("plain", str(n), text, False)
