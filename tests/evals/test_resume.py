from __future__ import annotations

import json

import pytest

from resa_lens.errors import BadInputError, RunFailedError
from resa_lens.evals.engines import Generation, GenerationConfig
from resa_lens.evals.resume import AnswerLog, answer_all
from resa_lens.evals.run import EvalConfig, ask
from resa_lens.evals.tasks import EvalItem

ITEMS = [EvalItem(f"q{i}", f"{i}?", str(i)) for i in range(6)]
ASKED = ask(ITEMS, EvalConfig(samples=2, generation=GenerationConfig(temperature=1.0)))


class Engine:
    """Answers from the last prompt to the first; breaks before an answer where it is told to."""

    def __init__(self, breaks=None, error=None) -> None:
        self.breaks, self.error = breaks, error or RuntimeError("out of memory")
        self.asked = []

    def generate(self, prompts, config, progress=None, *, streams=None, answered=None):
        self.asked = list(streams)
        found = {}
        for i in reversed(range(len(prompts))):
            if len(found) == self.breaks:
                raise self.error
            found[i] = Generation(f"{prompts[i]}{streams[i][1]} \udcff é", (1, i), 2, True)
            answered(i, found[i])
        return [found[i] for i in range(len(prompts))]


def run(path, engine, advance=None):
    log = AnswerLog(path, {"threads": 3})
    with log:
        return answer_all(engine, ASKED, GenerationConfig(), log, advance), log


def test_a_crash_keeps_what_was_finished(tmp_path):
    whole, _ = run(tmp_path / "whole.jsonl", Engine())
    path = tmp_path / "w" / "a.jsonl"
    with pytest.raises(RunFailedError, match=r"after 5 of 12 answers \(RuntimeError: out of") as e:
        run(path, Engine(breaks=5))
    assert len(str(e.value).splitlines()) <= 3
    engine, seen = Engine(), []
    answers, log = run(path, engine, seen.append)
    assert [a.text for a in answers] == [a.text for a in whole]
    assert engine.asked == [one.stream for one in ASKED[:7]]
    assert seen == [5] + 7 * [1]
    assert log.settings == {"threads": 3}
    third = Engine()
    assert run(path, third)[0] == answers
    assert third.asked == []  # nothing was left to ask


def test_the_seconds_of_all_runs_are_summed(tmp_path):
    path = tmp_path / "a.jsonl"
    _, first = run(path, Engine())
    lines = path.read_text().splitlines()
    last = {**json.loads(lines[-1]), "seconds": 100.0}
    path.write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    assert 0 < first.seconds < 100
    assert 100 < run(path, Engine())[1].seconds < 110


@pytest.mark.parametrize("cut", [1, 40])
def test_a_line_that_a_kill_cut_is_dropped(tmp_path, cut):
    path = tmp_path / "a.jsonl"
    answers, _ = run(path, Engine())
    path.write_bytes(path.read_bytes()[:-cut])
    engine = Engine()
    assert [a.text for a in run(path, engine)[0]] == [a.text for a in answers]
    assert len(engine.asked) == 1
    assert len(AnswerLog(path).answers) == 12


def test_refusals_and_interrupts_are_passed_on(tmp_path):
    with pytest.raises(BadInputError, match=r"^no$"):
        run(tmp_path / "a.jsonl", Engine(1, BadInputError("no")))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b.jsonl", Engine(2, KeyboardInterrupt()))
    assert len(AnswerLog(tmp_path / "b.jsonl").answers) == 2


@pytest.mark.parametrize("content", ["nonsense\n", '{"settings": {}}\n{"id": "q0"}\n', "[1]\n"])
def test_a_damaged_file_is_refused(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(BadInputError, match="is damaged"):
        AnswerLog(path)
