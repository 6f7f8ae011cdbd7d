from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from benchmarks.bundled_models import sets
from benchmarks.bundled_models.questions import (
    FAMILIES,
    TEST_SHARE,
    TRAIN_LEVELS,
    Question,
    check_steps,
    draw,
    draw_unique,
    split_of,
)

DATA = Path(__file__).parents[2] / "data" / "tiny"
LEVELS = (1, 2, 3, 4)


def drawn(count: int = 4000) -> list[Question]:
    return list(itertools.islice(draw(11, "train", LEVELS), count))


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return drawn()


@pytest.fixture(scope="module")
def bundled() -> dict[str, list[Question]]:
    return {
        split: [Question(**json.loads(line)) for line in (DATA / f"{split}.jsonl").open()]
        for split in ("train", "test")
    }


def arithmetic(text: str) -> Fraction:
    """The value of an expression of numbers, brackets, + - *."""
    assert re.fullmatch(r"[0-9+*()-]+", text), text
    return Fraction(eval(text))


def solution(text: str) -> Fraction:
    """The answer from the question's text alone, without the generator's own arithmetic."""
    if found := re.fullmatch(r"What is ([0-9+-]+)\?", text):
        return arithmetic(found[1])
    if found := re.fullmatch(r"Multiply (\d+) by (\d+)\.", text):
        return Fraction(int(found[1]) * int(found[2]))
    if found := re.fullmatch(r"Evaluate (\S+)\.", text):
        return arithmetic(found[1])
    if found := re.fullmatch(r"Solve (\S+)=(\S+) for x\.", text):
        # Linear in x: two values of left minus right give its root.
        def gap(x: int) -> Fraction:
            left, right = (arithmetic(side.replace("x", f"({x})")) for side in found.groups())
            return left - right

        return -gap(0) / (gap(1) - gap(0))
    if found := re.fullmatch(r"What is the remainder of (\S+) divided by (\d+)\?", text):
        return arithmetic(found[1]) % int(found[2])
    if found := re.fullmatch(r"How many of (.+) are greater than (\d+)\?", text):
        return Fraction(sum(int(n) > int(found[2]) for n in found[1].split(", ")))
    return told(text)


def told(text: str) -> Fraction:
    """The answer of a word problem, sentence by sentence."""
    *story, asked = re.split(r"(?<=\.) ", text)
    name, start, thing = re.fullmatch(r"(\w+) has (\d+) (\w+)\.", story[0]).groups()  # pyright: ignore
    assert asked == f"How many {thing} are left?"
    total = int(start)
    for sentence in story[1:]:
        if found := re.fullmatch(rf"{name} buys (\d+) bags of (\d+) {thing}\.", sentence):
            total += int(found[1]) * int(found[2])
        elif found := re.fullmatch(rf"{name} finds (\d+) {thing}\.", sentence):
            total += int(found[1])
        elif found := re.fullmatch(rf"{name} (?:gives away|loses) (\d+) {thing}\.", sentence):
            total -= int(found[1])
        else:
            raise AssertionError(sentence)
        assert total >= 0
    return Fraction(total)


def test_every_family_and_level_is_drawn_equally(questions):
    counts = Counter((q.family, q.level) for q in questions)
    assert set(counts) == set(itertools.product(FAMILIES, LEVELS))
    assert len(FAMILIES) >= 6
    expected = len(questions) / len(counts)
    # The hash keeps 7 of 8 questions of every kind; 5 standard deviations of a Poisson count.
    assert all(abs(n - expected) < 5 * expected**0.5 for n in counts.values())


def test_the_steps_of_every_question_hold_and_end_in_its_answer(questions):
    wrong = [q for q in questions if not check_steps(q)]
    assert wrong == []
    assert all(q.steps for q in questions)


def test_every_answer_follows_from_the_text_alone(questions):
    wrong = [q for q in questions if solution(q.question) != Fraction(q.answer)]
    assert wrong == []
    assert all(re.fullmatch(r"\d+", q.answer) for q in questions)


def test_the_steps_grow_with_the_level(questions):
    for family in FAMILIES:
        lengths = [
            sum(len(q.steps) for q in of) / len(of)
            for level in LEVELS
            if (of := [q for q in questions if (q.family, q.level) == (family, level)])
        ]
        assert lengths == sorted(lengths), family


@pytest.mark.parametrize(
    ("steps", "answer", "family", "right"),
    [
        ("3+4=7; 7*2=14", "14", "expression", True),
        ("3+4=8; 8*2=16", "16", "expression", False),
        ("3+4=7; 7*2=14", "15", "expression", False),
        ("10-4-3=3", "3", "chain_sum", True),
        ("2*x=10-4=6; x=6/2=3", "3", "equation", True),
        ("2*x=10-4=7; x=7/2=3", "3", "equation", False),
        ("50>40 1; 30<=40 1; 41>40 2", "2", "count", True),
        ("50>40 1; 30<=40 2", "2", "count", False),
        ("50>40 1; 30>40 2", "2", "count", False),
        ("50<=40 0", "0", "count", False),
    ],
)
def test_wrong_steps_are_seen(steps, answer, family, right):
    assert check_steps(Question("?", steps, answer, family, 1)) is right


def test_draws_are_deterministic_by_seed(questions):
    assert questions[:500] == drawn(500)
    other = list(itertools.islice(draw(12, "train", LEVELS), 500))
    assert questions[:500] != other


def test_the_split_is_a_hash_of_the_text(questions):
    text = "What is 1+2+3?"
    number = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16)
    assert split_of(text) == ("test" if number % TEST_SHARE == 0 else "train")
    assert {split_of(q.question) for q in questions} == {"train"}
    share = sum(split_of(f"question {n}") == "test" for n in range(4000)) / 4000
    assert share == pytest.approx(1 / TEST_SHARE, abs=0.025)


def test_no_seed_brings_a_question_into_both_splits():
    train = {q.question for q in itertools.islice(draw(1, "train", LEVELS), 3000)}
    test = {q.question for q in itertools.islice(draw(2, "test", LEVELS), 3000)}
    assert train
    assert test
    assert not train & test


def test_unique_draws_are_distinct_with_the_asked_levels_and_even_families():
    chosen = draw_unique(5, "test", {2: 70, 4: 35})
    assert len({q.question for q in chosen}) == 105
    assert Counter(q.level for q in chosen) == {2: 70, 4: 35}
    assert set(Counter(q.family for q in chosen).values()) == {15}


def test_an_exhausted_family_leaves_its_share_to_the_others():
    # Level-1 products: 38 x 7 questions exist, an eighth of them for testing.
    chosen = draw_unique(5, "test", {1: 700})
    counts = Counter(q.family for q in chosen)
    assert len({q.question for q in chosen}) == 700
    assert counts["product"] < 60
    assert max(counts.values()) > 100


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"split": "dev"}, "dev"),
        ({"split": "train", "levels": (5,)}, "5"),
        ({"split": "train", "levels": ()}, "levels"),
        ({"split": "train", "families": ("poetry",)}, "poetry"),
    ],
)
def test_unknown_splits_levels_and_families_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        next(draw(0, **options))


# The bundled sets


def test_the_bundled_test_set_has_2000_questions_of_every_family_and_level(bundled):
    test = bundled["test"]
    assert len(test) == 2000
    assert Counter(q.level for q in test) == dict.fromkeys(LEVELS, 500)
    assert len({q.family for q in test}) >= 6
    assert {(q.family, q.level) for q in test} == set(itertools.product(FAMILIES, LEVELS))


def test_the_bundled_train_sample_holds_the_training_levels_only(bundled):
    assert {q.level for q in bundled["train"]} == set(TRAIN_LEVELS)
    assert len(bundled["train"]) == sets.TRAIN_QUESTIONS


def test_bundled_train_and_test_do_not_overlap(bundled):
    texts = {split: [q.question for q in questions] for split, questions in bundled.items()}
    for split, questions in texts.items():
        assert len(set(questions)) == len(questions)
        assert {split_of(text) for text in questions} == {split}
    assert not set(texts["train"]) & set(texts["test"])


def test_bundled_steps_and_answers_are_right(bundled):
    for question in itertools.chain(*bundled.values()):
        assert check_steps(question), question
        assert solution(question.question) == Fraction(question.answer), question


def test_the_bundled_files_are_what_the_script_writes(tmp_path):
    sets.main(tmp_path)
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()
