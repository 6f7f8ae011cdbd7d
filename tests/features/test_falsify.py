"""Verdicts on planted features: what they depend on, each answer with its interval."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import fisher_exact

from resa_lens import stats
from resa_lens.errors import BadInputError
from resa_lens.features.counterparts import Counterpart, counterparts
from resa_lens.features.exclusive import CountConfig, count_features
from resa_lens.features.falsify import FalsifyConfig, judge, summarise, union_of_rules
from resa_lens.features.responses import Responses, respond
from resa_lens.features.stimuli import KINDS, PLAIN_TEXTS, Trial, trials
from resa_lens.features.words import (
    ARTEFACT,
    CONCEPT,
    DELIMITER,
    DETECTOR,
    NO,
    SEED,
    SURVIVES,
    UNDETERMINED,
    VERDICTS,
    VOCABULARY,
    WORDS,
    YES,
)
from resa_lens.figures.plots import VERDICT_COLOURS
from resa_lens.models.activations import stream_activations
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.saes.coder import assemble

POINT = Hookpoint(9, "resid_post")
PLANTED = {
    "detector": {"original", "paraphrase", "injected", "shuffled", "words", "document"},
    "wording": {"original"},
    "delimiter": {"original", "paraphrase", "neutral", "format", "document"},
}
"""Kinds of trials in which each planted feature fires at the opening tag, and nowhere else."""


@pytest.fixture(scope="module")
def made(tiny):
    return trials(tiny, CountConfig(), texts=20, shuffles=20)


@pytest.fixture(scope="module")
def planted(tiny, made):
    """An SAE of four latents, each separating its kinds of trials from all the rest."""
    x, wanted = [], []
    for trial, batch in zip(
        made,
        stream_activations(tiny, (torch.tensor([t.ids]) for t in made), [POINT]),
        strict=True,
    ):
        acts = batch.acts[POINT][0]
        opened = list(trial.places[0])
        others = list(trial.places[1])
        if trial.kind == "original":
            others = [p for p in range(len(acts)) if p not in opened]
        x.append(acts[opened + others])
        for kinds in PLANTED.values():
            on = torch.full((len(opened),), 1.0 if trial.kind in kinds else -1.0)
            wanted.append(torch.cat([on, -torch.ones(len(others))]))
    rows = torch.cat(x).double()
    targets = torch.stack(
        [torch.cat(wanted[i :: len(PLANTED)]) for i in range(len(PLANTED))], 1
    ).double()
    ones = torch.cat([rows, torch.ones(len(rows), 1).double()], 1)
    # Few places fire and many do not: each side has half of the weight.
    weights = []
    for column in targets.mT:
        w = torch.where(column > 0, (column < 0).sum() / (column > 0).sum(), 1.0)
        gram = ones.mT @ (w[:, None] * ones) + 1e-4 * torch.eye(ones.shape[1]).double()
        weights.append(torch.linalg.solve(gram, ones.mT @ (w * column)))
    solved = torch.stack(weights).float()
    return assemble(
        {
            "encoder.weight": solved[:, :-1].contiguous(),
            "encoder.bias": solved[:, -1].contiguous(),
            "W_dec": torch.nn.functional.normalize(solved[:, :-1]).contiguous(),
            "b_dec": torch.zeros(tiny.d_model),
        },
        k=len(PLANTED),
    )


def test_planted_features_get_their_verdicts(tiny, made, planted):
    rules = {POINT: dict.fromkeys(range(len(PLANTED)), ("either",))}
    responses = respond(tiny, {POINT: planted}, {POINT: range(len(PLANTED))}, made)
    verdicts = dict(zip(PLANTED, judge(responses, rules), strict=True))
    words = {name: verdict.verdict for name, verdict in verdicts.items()}
    assert words == {"detector": DETECTOR, "wording": ARTEFACT, "delimiter": DELIMITER}
    assert verdicts["detector"].failed[:2] == ("injection", "shuffle")
    assert verdicts["detector"].shares["injected"].fired >= 18
    assert verdicts["detector"].places == ("open",)
    assert verdicts["detector"].depends_on["phase"]["open"]["share"] > 0.8
    assert verdicts["detector"].depends_on["phase"]["close"]["share"] == 0.0
    assert verdicts["wording"].failed == ("paraphrase",)
    assert verdicts["delimiter"].failed == ("neutral", "format")


def test_the_counter_names_the_planted_detector(tiny, planted):
    counts = count_features(tiny, {POINT: planted})
    assert 0 in union_of_rules(counts.layers[0])
    assert union_of_rules(counts.layers[0])[0][-1] == "either"


# Trials ------------------------------------------------------------------------------------------


def test_trials_hold_the_tags_where_they_say(tiny, made):
    kinds = [t.kind for t in made]
    assert kinds[0] == "original"
    counted = {k: kinds.count(k) for k in set(kinds)}
    assert counted == {"original": 1, **dict.fromkeys(KINDS, 20)}
    for trial in made[1:]:
        opened, closed = (
            tiny.tokenizer.decode([trial.ids[p] for p in place]) for place in trial.places
        )
        if trial.kind in ("plain", "untagged", "thought"):
            assert "think" not in opened + closed
            # As many tokens as the tags have.
            assert [len(place) for place in trial.places] == [1, 1]
        elif trial.kind in ("neutral", "format"):
            assert "think>" not in opened + closed
            assert opened.strip()[0] in "<[{"
            assert any(mark in closed for mark in ("</", "[/", "}}", "]]"))
        else:
            assert (opened, closed) == ("<think>", "</think>")


def test_every_trial_but_the_prompt_has_one_place_for_each_tag(tiny, made):
    """More occurrences of a tag would be more chances to fire."""
    assert [len(place) for place in made[0].places] == [2, 2]
    sizes = {(t.kind, *map(len, t.places)) for t in made[1:] if t.kind not in ("neutral", "format")}
    assert {size[1:] for size in sizes} == {(1, 1)}
    drawn = {t.places[0] for t in made if t.kind == "words"}
    assert len(drawn) > 1, "the occurrence is not drawn"


def test_kinds_of_trial_speak_of_reasoning_or_do_not(made):
    def speak(kind):
        return [
            any(word in t.text.replace("think>", "").lower() for word in ("reason", "think",
            "thought", "steps", "private work", "considerations"))
            for t in made if t.kind == kind
        ]  # fmt: skip

    assert not any(speak("plain") + speak("injected") + speak("format") + speak("words"))
    assert all(speak("shuffled") + speak("document"))
    assert np.mean(speak("paraphrase") + speak("neutral")) > 0.9
    words = [t for t in made if t.kind == "words"]
    assert all(t.text.count("<think>") == made[0].text.count("<think>") for t in words)


def test_a_long_prompt_goes_without_documents(tiny, monkeypatch):
    """Where there is no room for a problem behind it, the phase is left out."""

    def refuse(model, tokens):
        raise BadInputError(f"{tokens} tokens")

    monkeypatch.setattr("resa_lens.features.stimuli.check_length", refuse)
    some = trials(tiny, CountConfig(), texts=2, shuffles=2)
    assert {t.kind for t in some} == {"original", *KINDS} - {"document", "thought"}
    values = torch.zeros(len(some), 2, 1)
    values[0] = 1.0
    (found,) = judge(Responses(some, {POINT: values}, {POINT: (7,)}), RULES_OF_ONE)
    assert "phase" not in found.depends_on
    assert found.depends_on["order"]["n"] == 2


def test_an_injected_text_differs_from_its_pair_by_the_tags_alone(made):
    pairs = [(a, b) for a, b in pairwise(made) if a.kind == "injected"]
    assert len(pairs) == 20
    for injected, plain in pairs:
        assert plain.kind == "plain"
        left = injected.text.replace("<think> ", "").replace("</think> ", "")
        assert left == plain.text


def test_the_base_rate_is_taken_over_as_many_tokens(tiny):
    """A tag of several tokens has more chances to fire than a short word."""
    config = CountConfig("Put it in <reasoning> a </reasoning> b.", open_tag="<reasoning>",
                         close_tag="</reasoning>")  # fmt: skip
    pairs = [(a, b) for a, b in pairwise(trials(tiny, config, texts=20)) if a.kind == "injected"]
    sizes = [[len(place) for place in trial.places] for pair in pairs for trial in pair]
    assert min(sizes[0]) > 2
    # Only the end of the text can cut a place short.
    last = [place[-1] == len(b.ids) - 1 for _, b in pairs for place in b.places]
    equal = [len(x) == len(y) for a, b in pairs for x, y in zip(a.places, b.places, strict=True)]
    assert all(same or cut for same, cut in zip(equal, last, strict=True))
    assert sum(equal) >= 36


def test_a_shuffled_prompt_has_the_same_words(tiny, made):
    words = sorted(made[0].text.split())
    shuffled = [t for t in made if t.kind == "shuffled"]
    assert all(sorted(t.text.split()) == words for t in shuffled)
    assert len({t.text for t in shuffled}) == len(shuffled)


def test_trials_follow_the_seed(tiny, made):
    assert trials(tiny, CountConfig(), texts=20, shuffles=20) == made
    assert trials(tiny, CountConfig(), texts=20, shuffles=20, seed=1) != made


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"texts": 0}, "0 texts"),
        ({"shuffles": 0}, "0 shuffles"),
        ({"plain_texts": ["one text alone"]}, "two or more"),
        ({"plain_texts": ["a text of words", "ab"]}, "three words"),
        ({"plain_texts": ["a <think> in it", "a plain text"]}, "has a tag"),
    ],
)
def test_trials_that_cannot_be_made(tiny, change, message):
    with pytest.raises(BadInputError, match=message):
        trials(tiny, CountConfig(), **change)


# Judging -----------------------------------------------------------------------------------------


def synthetic(fired: dict[str, float], n: int = 40) -> Responses:
    """Responses of one feature that fires in the given share of each kind's trials."""
    kinds = ["original", *("injected", "plain") * n]
    kinds += [k for k in KINDS if k not in ("injected", "plain") for _ in range(n)]
    held = [Trial(kind, "", (0,), ((0,), (0,))) for kind in kinds]
    values = torch.zeros(len(held), 2, 1)
    values[0, 0] = 1.0
    for kind, share in fired.items():
        rows = [i for i, k in enumerate(kinds) if k == kind]
        values[rows[: round(share * n)], 0] = 1.0
    return Responses(held, {POINT: values}, {POINT: (7,)})


RULES_OF_ONE = {POINT: {7: ("either",)}}
ANYWHERE = {"injected": 1, "words": 1, "shuffled": 1, "paraphrase": 1, "document": 1}
EXACT = {"paraphrase": 1, "document": 1}


@pytest.mark.parametrize(
    ("fired", "verdict", "failed"),
    [
        (ANYWHERE, DETECTOR, ("injection", "shuffle", "words")),
        (EXACT, SURVIVES, ()),
        ({**EXACT, "shuffled": 1}, VOCABULARY, ("shuffle",)),
        ({**EXACT, "neutral": 1}, CONCEPT, ("neutral",)),
        # The tag in any text, and other delimiters where reasoning is spoken of.
        ({**ANYWHERE, "neutral": 1}, CONCEPT, ("injection", "shuffle", "words", "neutral")),
        ({**EXACT, "neutral": 1, "format": 1}, DELIMITER, ("neutral", "format")),
        ({}, ARTEFACT, ("paraphrase",)),
        ({"shuffled": 1}, ARTEFACT, ("shuffle", "paraphrase")),
        ({**EXACT, "plain": 1}, ARTEFACT, ("plain",)),
        ({**EXACT, "untagged": 1}, ARTEFACT, ("untagged",)),
        ({**EXACT, "words": 1}, ARTEFACT, ("words",)),
        # Every answer that the word rests on must be sure: 11 of 40 is neither.
        ({**EXACT, "injected": 11 / 40}, UNDETERMINED, ()),
        ({**EXACT, "shuffled": 0.4}, UNDETERMINED, ()),
        ({**EXACT, "neutral": 0.5}, UNDETERMINED, ()),
        ({"paraphrase": 0.6}, UNDETERMINED, ()),
        (dict.fromkeys(ANYWHERE, 0.25), UNDETERMINED, ()),
        # It fires at these places with the tags and without: the tag does not suffice, it is idle.
        ({**ANYWHERE, "plain": 1}, ARTEFACT, ("shuffle", "plain", "words")),
        # Above the half with the tag, and hardly less without: whether the tag suffices is open.
        ({**ANYWHERE, "injected": 0.7, "plain": 0.5}, UNDETERMINED, ("shuffle", "words")),
    ],
)
def test_verdict_of_each_pattern(fired, verdict, failed):
    (found,) = judge(synthetic(fired), RULES_OF_ONE)
    assert (found.verdict, found.failed) == (verdict, failed)
    for kind, share in fired.items():
        assert found.shares[kind].share == pytest.approx(share)
        assert found.shares[kind].n == 40
        assert found.shares[kind].ci[0] <= share <= found.shares[kind].ci[1]


def test_every_word_can_be_had_and_drawn():
    assert tuple(VERDICT_COLOURS) == VERDICTS
    assert {word.group for word in WORDS.values()} == {
        "stands", "described", "refuted", "undetermined",
    }  # fmt: skip


def test_the_sentence_says_what_is_needed():
    (found,) = judge(synthetic(ANYWHERE), RULES_OF_ONE)
    assert found.sentence == "needs the tag's token; any text will do; no other delimiter will do"
    assert found.reason == f"{found.sentence} (injected 40 of 40, plain 0 of 40)"
    (found,) = judge(synthetic({**EXACT, "shuffled": 0.4}), RULES_OF_ONE)
    assert found.sentence == (
        "needs the tag, a prompt around the tag and words that speak of reasoning; other prompts "
        "that ask for reasoning will do; no other delimiter will do; undetermined: their order"
    )
    (found,) = judge(synthetic({**EXACT, "plain": 1}), RULES_OF_ONE)
    assert found.sentence == "needs no tag: it fires without one, in plain text"
    (found,) = judge(synthetic({**EXACT, "neutral": 1, "thought": 1}), RULES_OF_ONE)
    assert "other delimiters will do where the prompt speaks of reasoning" in found.sentence
    assert found.sentence.endswith("it fires within thoughts too")


def test_dependences_are_shares_with_intervals():
    (found,) = judge(synthetic({**EXACT, "shuffled": 0.5}), RULES_OF_ONE)
    order = found.to_dict()["depends_on"]["order"]
    assert order == {
        "needs": UNDETERMINED, "trials": "shuffled", "share": 0.5, "n": 40,
        "ci": stats.wilson_interval(20, 40),
    }  # fmt: skip
    needs = {name: item["needs"] for name, item in found.depends_on.items()}
    assert needs == {
        "tag": YES, "tag in prompts": YES, "prompt": YES, "words": YES, "order": UNDETERMINED,
        "wording": NO, "spelling": YES, "reasoning": YES, "phase": YES,
    }  # fmt: skip
    assert found.depends_on["phase"]["open"]["share"] == 1.0
    assert found.depends_on["phase"]["close"]["share"] == 0.0


def test_few_texts_leave_the_verdict_open():
    """A perfect detector in 4 of 4 texts: the interval is sure that it fires, not that it stops."""
    (found,) = judge(synthetic(EXACT, n=4), RULES_OF_ONE)
    assert found.verdict == UNDETERMINED
    (found,) = judge(synthetic(ANYWHERE, n=4), RULES_OF_ONE)
    assert found.injection_p == pytest.approx(0.125)


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5, 0.75, 0.9])
def test_a_noisy_detector_of_the_tag_does_not_stand(rate):
    rng = np.random.default_rng(0)
    for _ in range(50):
        fired = {kind: rng.binomial(40, rate) / 40 for kind in ANYWHERE}
        (found,) = judge(synthetic(fired), RULES_OF_ONE)
        assert found.verdict in (DETECTOR, UNDETERMINED, ARTEFACT, VOCABULARY)


def test_the_share_that_counts_as_firing_is_an_option():
    fired = {**EXACT, "injected": 0.4}
    (found,) = judge(synthetic(fired), RULES_OF_ONE, FalsifyConfig(fires=0.2))
    assert found.failed == ("injection",)
    assert found.verdict == DETECTOR
    (found,) = judge(synthetic(fired), RULES_OF_ONE, FalsifyConfig(fires=0.95))
    assert found.verdict == UNDETERMINED


def test_only_the_tags_of_the_count_are_looked_at():
    held = synthetic(EXACT)
    held.values[POINT][1:, 1] = 1.0  # active at every closing tag, where it was not counted
    (found,) = judge(held, RULES_OF_ONE)
    assert found.places == ("open",)
    assert found.verdict == SURVIVES


def test_a_threshold_of_the_count_holds_here_too():
    held = synthetic({**EXACT, "injected": 1})
    held.values[POINT][1:] *= 0.1
    (found,) = judge(held, RULES_OF_ONE, threshold=0.5)
    assert found.failed == ("paraphrase",)


def test_a_feature_that_was_not_counted_is_refused():
    held = synthetic(EXACT)
    held.values[POINT][0] = 0.0
    with pytest.raises(BadInputError, match="active at no tag"):
        judge(held, RULES_OF_ONE)


def test_another_seed_decides_last():
    def judged(fired, **twin):
        twins = {
            POINT: {
                7: Counterpart(
                    **{
                        "cosine": 0.3,
                        "feature": 1,
                        "correlated": 4,
                        "agreement": (30, 40),
                        "places": 800,
                        **twin,
                    }
                )
            }
        }
        (found,) = judge(synthetic(fired), RULES_OF_ONE, other_seed=twins)
        return found

    lost = judged(EXACT, correlation=0.2)
    assert (lost.verdict, lost.failed, lost.by_texts) == (SEED, ("other seed",), SURVIVES)
    assert lost.sentence.endswith("needs this SAE: another seed's has none like it")
    known = judged(EXACT, correlation=0.9)
    assert known.verdict == SURVIVES
    assert known.to_dict()["other_seed"]["found"] is True
    seed = known.depends_on["seed"]
    assert (seed["needs"], seed["share"], seed["n"]) == (NO, 0.75, 40)
    assert seed["ci"] == stats.wilson_interval(30, 40)
    # At the border the interval crosses it.
    near = judged(EXACT, correlation=0.71)
    assert (near.verdict, near.failed) == (UNDETERMINED, ())
    assert near.sentence.endswith("undetermined: the SAE's seed")
    assert judged(EXACT, correlation=0.2, cosine=0.8).verdict == SURVIVES
    # What is described is described in one SAE as in another.
    assert judged(ANYWHERE, correlation=0.2).verdict == DETECTOR
    assert judged({**EXACT, "neutral": 1}, correlation=0.2).verdict == SEED
    assert Counterpart(0.71, 1, None, None).found
    assert not Counterpart(0.69, 1, None, None).found


def test_the_interval_of_a_correlation_is_fishers():
    z = 1.959964 / np.sqrt(97)
    low, high = Counterpart(0.1, 1, 0.5, 2, places=100).correlation_ci
    assert (low, high) == pytest.approx(
        (np.tanh(np.arctanh(0.5) - z), np.tanh(np.arctanh(0.5) + z))
    )
    assert Counterpart(0.1, 1, None, None, places=100).correlation_ci is None
    assert Counterpart(0.1, 1, 1.0, 2, places=100).needs == NO


def decoders(a, b):
    """Both SAEs' decoders, at any place."""
    return lambda point: (a.W_dec, b.W_dec)


def test_counterparts_of_a_permuted_sae_are_found(tiny, made, planted):
    """The same SAE with its latents in another order has every feature, at its new index."""
    order = torch.tensor([2, 0, 1])
    moved = assemble(
        {
            "encoder.weight": planted.encoder.weight[order],
            "encoder.bias": planted.encoder.bias[order],
            "W_dec": planted.W_dec[order],
            "b_dec": planted.b_dec,
        },
        k=3,
    )
    some = made[:30]
    mine = respond(tiny, {POINT: planted}, {POINT: (0, 1)}, some)
    theirs = respond(tiny, {POINT: moved}, {POINT: (1, 2)}, some)
    found = counterparts(mine, theirs, decoders(planted, moved))[POINT]
    assert [found[f].feature for f in (0, 1)] == [1, 2]
    assert [found[f].cosine for f in (0, 1)] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert [found[f].correlated for f in (0, 1)] == [1, 2]
    assert [found[f].correlation for f in (0, 1)] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert found[0].elsewhere is None
    fired = int((mine.values[POINT][:, :, 0].amax(1) > 0).sum())
    assert found[0].agreement == (fired, fired)
    assert found[0].places == 60
    none = respond(tiny, {POINT: moved}, {POINT: ()}, some)
    alone = counterparts(mine, none, decoders(planted, moved))[POINT][0]
    assert alone.correlation is None
    assert alone.found


def test_features_of_one_tag_correlate_at_every_layer(planted):
    """Twins by their answers: the number for layers where none can be the same stands beside."""
    far, third = Hookpoint(3, "resid_post"), Hookpoint(5, "resid_post")
    trials_ = [Trial("plain", "", (0,), ((0,), (0,)))] * 40
    rng = torch.Generator().manual_seed(0)
    tag = (torch.rand(40, 2, 1, generator=rng) < 0.4).float()

    noise = torch.rand(40, 2, 3, generator=rng)
    mine = Responses(trials_, {POINT: torch.cat([tag, noise[:, :, :1]], 2)}, {POINT: (0, 1)})
    theirs = Responses(
        trials_,
        {POINT: 2 * tag, far: torch.cat([tag, 0 * tag], 2), third: noise[:, :, 1:2]},
        {POINT: (3,), far: (5, 6), third: (7,)},
    )  # fmt: skip
    found = counterparts(mine, theirs, decoders(planted, planted))[POINT]
    assert found[0].correlation == pytest.approx(1.0)
    assert found[0].correlated == 3
    by_hand = np.corrcoef(tag.flatten(), noise[:, :, 1].flatten())[0, 1]
    # Of two other layers the lower one is the median.
    assert found[0].elsewhere == pytest.approx(by_hand)
    theirs.values.pop(third)
    alike = counterparts(mine, theirs, decoders(planted, planted))[POINT]
    assert alike[0].elsewhere == pytest.approx(1.0)


def test_respond_reads_what_a_dense_pass_reads(tiny, made, planted):
    some = [made[0], made[1], made[95], *made[-2:], made[2], made[3]]
    assert some[3].ids == some[4].ids, "a document and its thought are one text"
    found = respond(tiny, {POINT: planted}, {POINT: (2, 0)}, some).values[POINT]
    for row, trial in zip(found, some, strict=True):
        batch = next(stream_activations(tiny, [torch.tensor([trial.ids])], [POINT]))
        dense = torch.relu(batch.acts[POINT][0] @ planted.encoder.weight.mT + planted.encoder.bias)
        for place, positions in enumerate(trial.places):
            top = dense[list(positions)].amax(0)
            assert row[place].tolist() == pytest.approx(top[[2, 0]].tolist(), abs=1e-4)


@pytest.mark.parametrize("feature", [3, -1])
def test_a_feature_beyond_the_latents_is_refused(tiny, made, planted, feature):
    with pytest.raises(BadInputError, match=r"feature -?\d is out of range.* features 0 to 2"):
        respond(tiny, {POINT: planted}, {POINT: (feature,)}, made[:1])


def test_an_sae_of_another_width_is_refused(tiny, made):
    wrong = assemble(
        {
            "encoder.weight": torch.zeros(4, 64),
            "encoder.bias": torch.zeros(4),
            "W_dec": torch.zeros(4, 64),
            "b_dec": torch.zeros(64),
        },
        k=2,
    )
    with pytest.raises(BadInputError, match="width 64"):
        respond(tiny, {POINT: wrong}, {POINT: (0,)}, made[:1])


@pytest.mark.parametrize("fires", [0.0, 1.5, -1.0, float("nan")])
def test_a_share_that_is_none_is_refused(fires):
    with pytest.raises(BadInputError, match="fires"):
        FalsifyConfig(fires=fires)


# The summary -------------------------------------------------------------------------------------


def many(patterns: list[dict[str, float]]):
    return [
        replace(judge(synthetic(fired), RULES_OF_ONE)[0], feature=i)
        for i, fired in enumerate(patterns)
    ]


def test_summary_sets_survivors_against_the_random_weights():
    concept = {**EXACT, "neutral": 1}
    verdicts = many(
        [EXACT] * 10 + [concept] * 2 + [ANYWHERE] * 5 + [{}] * 2 + [{"paraphrase": 0.6}]
    )
    null = many([EXACT] * 1 + [ANYWHERE] * 9)
    summary = summarise(verdicts, 100, (null, 100))
    either = summary.rules[-1]
    assert (either.counted, either.survivors, either.by_texts) == (20, 12, 12)
    assert {name: n for name, n in either.verdicts.items() if n} == {
        SURVIVES: 10, CONCEPT: 2, DETECTOR: 5, ARTEFACT: 2, UNDETERMINED: 1,
    }  # fmt: skip
    assert (either.null_counted, either.null_by_texts, either.null_active) == (10, 1, 100)
    assert (either.null_verdicts[DETECTOR], either.null_verdicts[SURVIVES]) == (9, 1)
    table = [[12, 88], [1, 99]]
    assert either.p_value == pytest.approx(fisher_exact(table, alternative="greater").pvalue)
    assert summary.tests["injection"] == 5
    assert summary.reason.startswith(
        "10 of 20 counted features survive, 2 more answer to delimiters of reasoning however "
        "spelled (5 described by what they answer to, 2 refuted, 1 undetermined); more than the "
        "random-weights SAE gives"
    )
    assert "counted as independent" in summary.reason
    flat = summarise(verdicts, 100, (verdicts, 100))
    assert "not more than the random-weights SAE" in flat.reason
    assert flat.rules[-1].p_value > 0.5
    assert summary.rules[0].counted == 0
    assert summary.rules[0].ci == (0.0, 1.0)


def test_summary_of_nothing_says_so():
    summary = summarise([], 50)
    assert summary.reason.startswith("no rule counts a feature")
    assert summary.rules[-1].p_value is None


def test_injection_is_corrected_for_all_features():
    """One feature alone has p = 0.008; among thirty such tests that is nothing."""
    held = synthetic(EXACT, n=20)
    kinds = [t.kind for t in held.trials]
    injected = [i for i, k in enumerate(kinds) if k == "injected"]
    plain = [i for i, k in enumerate(kinds) if k == "plain"]
    values = held.values[POINT].repeat(1, 1, 30)
    values[injected[:12], 0] = 1.0
    values[plain[:4], 0] = 1.0  # in the same texts
    responses = Responses(held.trials, {POINT: values}, {POINT: tuple(range(30))})
    alone = judge(
        Responses(held.trials, {POINT: values[:, :, :1]}, {POINT: (0,)}),
        {POINT: {0: ("either",)}},
    )
    assert alone[0].injection_p == pytest.approx(2 * 0.5**8)
    together = judge(responses, {POINT: dict.fromkeys(range(30), ("either",))})
    assert together[0].injection_p == pytest.approx(30 * 2 * 0.5**8)


def test_plain_texts_reason_about_nothing():
    assert len(set(PLAIN_TEXTS)) == len(PLAIN_TEXTS)
    assert not any(tag in text for text in PLAIN_TEXTS for tag in ("<", ">"))
