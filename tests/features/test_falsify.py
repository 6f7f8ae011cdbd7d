"""Verdicts on planted features: a token detector, prompt artefacts, one that survives."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import fisher_exact

from resa_lens.errors import BadInputError
from resa_lens.features.exclusive import CountConfig, count_features
from resa_lens.features.falsify import (
    ARTEFACT,
    DETECTOR,
    SURVIVES,
    Counterpart,
    FalsifyConfig,
    Responses,
    counterparts,
    judge,
    respond,
    summarise,
    union_of_rules,
)
from resa_lens.features.stimuli import PLAIN_TEXTS, Trial, trials
from resa_lens.models.activations import stream_activations
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.saes.coder import assemble

POINT = Hookpoint(9, "resid_post")
PLANTED = {
    "detector": {"original", "paraphrase", "injected", "shuffled"},
    "wording": {"original"},
    "place": {"original", "paraphrase", "neutral"},
    "reasoning": {"original", "paraphrase"},
}
"""Kinds of trials in which each planted feature fires at the opening tag, and nowhere else."""


@pytest.fixture(scope="module")
def made(tiny):
    return trials(tiny, CountConfig())


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
    rules = {POINT: dict.fromkeys(range(4), ("either",))}
    responses = respond(tiny, {POINT: planted}, {POINT: range(4)}, made)
    verdicts = dict(zip(PLANTED, judge(responses, rules), strict=True))
    assert verdicts["detector"].verdict == DETECTOR
    assert verdicts["detector"].failed[0] == "injection"
    assert verdicts["detector"].shares["injected"].fired >= 36
    assert verdicts["wording"].verdict == ARTEFACT
    assert verdicts["wording"].failed == ("paraphrase",)
    assert verdicts["place"].verdict == ARTEFACT
    assert verdicts["place"].failed == ("neutral",)
    assert verdicts["reasoning"].verdict == SURVIVES
    assert verdicts["reasoning"].failed == ()
    assert verdicts["reasoning"].places == ("open",)


def test_the_counter_names_the_planted_detector(tiny, planted):
    counts = count_features(tiny, {POINT: planted})
    assert 0 in union_of_rules(counts.layers[0])
    assert union_of_rules(counts.layers[0])[0][-1] == "either"


# Trials ------------------------------------------------------------------------------------------


def test_trials_hold_the_tags_where_they_say(tiny, made):
    kinds = [t.kind for t in made]
    assert kinds[0] == "original"
    assert {k: kinds.count(k) for k in set(kinds)} == {
        "original": 1, "injected": 40, "plain": 40, "neutral": 10, "shuffled": 20, "paraphrase": 8,
    }  # fmt: skip
    for trial in made:
        opened, closed = (
            tiny.tokenizer.decode([trial.ids[p] for p in place]) for place in trial.places
        )
        if trial.kind == "plain":
            assert "think" not in trial.text
            assert opened.strip() in trial.text
        elif trial.kind == "neutral":
            assert "think>" not in opened + closed
            assert "<" in opened
            assert "</" in closed
        else:
            assert set(opened.replace("<think>", "").split()) == set()
            assert "</think>" in closed


def test_an_injected_text_differs_from_its_pair_by_the_tags_alone(made):
    pairs = [(a, b) for a, b in pairwise(made) if a.kind == "injected"]
    assert len(pairs) == 40
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
    assert trials(tiny, CountConfig()) == made
    assert trials(tiny, CountConfig(), seed=1) != made


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


def synthetic(fired: dict[str, float], n: int = 20) -> Responses:
    """Responses of one feature that fires in the given share of each kind's trials."""
    kinds = ["original", *("injected", "plain") * n]
    kinds += [k for k in ("neutral", "shuffled", "paraphrase") for _ in range(n)]
    held = [Trial(kind, "", (0,), ((0,), (0,))) for kind in kinds]
    values = torch.zeros(len(held), 2, 1)
    values[0, 0] = 1.0
    for kind, share in fired.items():
        rows = [i for i, k in enumerate(kinds) if k == kind]
        values[rows[: round(share * n)], 0] = 1.0
    return Responses(held, {POINT: values}, {POINT: (7,)})


RULES_OF_ONE = {POINT: {7: ("either",)}}


@pytest.mark.parametrize(
    ("fired", "verdict", "failed"),
    [
        ({"injected": 1, "paraphrase": 1}, DETECTOR, ("injection",)),
        ({"shuffled": 0.5, "paraphrase": 1}, DETECTOR, ("shuffle",)),
        ({"neutral": 0.5, "paraphrase": 1}, ARTEFACT, ("neutral",)),
        ({"paraphrase": 0.45}, ARTEFACT, ("paraphrase",)),
        ({"paraphrase": 0.5, "injected": 0.45, "shuffled": 0.45, "neutral": 0.45}, SURVIVES, ()),
        # It fires at these places with the tags and without: no detector, and no reasoning either.
        ({"injected": 1, "plain": 1, "paraphrase": 1}, ARTEFACT, ("plain",)),
        ({"injected": 0, "plain": 0.5, "paraphrase": 1}, ARTEFACT, ("plain",)),
        ({"injected": 1, "plain": 0.55, "paraphrase": 1}, DETECTOR, ("injection", "plain")),
        # Hardly more often than before: its part in plain text refutes it all the same.
        ({"injected": 0.5, "plain": 0.45, "paraphrase": 1}, DETECTOR, ("injection",)),
        ({"injected": 1, "shuffled": 1, "neutral": 1}, DETECTOR,
         ("injection", "shuffle", "neutral", "paraphrase")),
    ],
)  # fmt: skip
def test_verdict_of_each_pattern(fired, verdict, failed):
    (found,) = judge(synthetic(fired), RULES_OF_ONE)
    assert (found.verdict, found.failed) == (verdict, failed)
    for kind, share in fired.items():
        assert found.shares[kind].share == pytest.approx(share)
        assert found.shares[kind].n == 20
        assert found.shares[kind].ci[0] <= share <= found.shares[kind].ci[1]


def test_few_texts_acquit_nobody():
    """A perfect detector in 4 of 4 texts has p = 0.125: it falls, and the reason says how sure."""
    (found,) = judge(synthetic({"injected": 1, "paraphrase": 1}, n=4), RULES_OF_ONE)
    assert found.injection_p == pytest.approx(0.125)
    assert (found.verdict, found.failed) == (DETECTOR, ("injection",))
    said = "4 of 4 plain texts (0 of 4 without them), too few to be sure of the tags' part"
    assert said in found.reason
    (sure,) = judge(synthetic({"injected": 1, "paraphrase": 1}), RULES_OF_ONE)
    assert "too few" not in sure.reason


def test_the_share_that_counts_as_firing_is_an_option():
    found = judge(
        synthetic({"injected": 0.3, "paraphrase": 1}), RULES_OF_ONE, FalsifyConfig(fires=0.25)
    )
    assert found[0].failed == ("injection",)


def test_only_the_tags_of_the_count_are_looked_at():
    held = synthetic({"paraphrase": 1})
    held.values[POINT][1:, 1] = 1.0  # active at every closing tag, where it was not counted
    (found,) = judge(held, RULES_OF_ONE)
    assert found.places == ("open",)
    assert found.verdict == SURVIVES


def test_a_threshold_of_the_count_holds_here_too():
    held = synthetic({"paraphrase": 1, "injected": 1})
    held.values[POINT][1:] *= 0.1
    (found,) = judge(held, RULES_OF_ONE, threshold=0.5)
    assert found.failed == ("paraphrase",)


def test_a_feature_that_was_not_counted_is_refused():
    held = synthetic({"paraphrase": 1})
    held.values[POINT][0] = 0.0
    with pytest.raises(BadInputError, match="active at no tag"):
        judge(held, RULES_OF_ONE)


def test_another_seed_decides_last():
    lost = {POINT: {7: Counterpart(0.3, 1, 0.2, 4)}}
    (found,) = judge(synthetic({"paraphrase": 1}), RULES_OF_ONE, other_seed=lost)
    assert (found.verdict, found.failed) == (ARTEFACT, ("other seed",))
    kept = {POINT: {7: Counterpart(0.3, 1, 0.9, 4)}}
    (found,) = judge(synthetic({"paraphrase": 1}), RULES_OF_ONE, other_seed=kept)
    assert found.verdict == SURVIVES
    # Any two features of one tag correlate: that is not said to be the same feature.
    assert found.reason.endswith(
        "another seed's SAE has one that answers to these tags alike (r = 0.90)"
    )
    assert found.to_dict()["other_seed"]["found"] is True
    same = {POINT: {7: Counterpart(0.8, 1, 0.9, 4)}}
    (found,) = judge(synthetic({"paraphrase": 1}), RULES_OF_ONE, other_seed=same)
    assert found.reason.endswith("another seed's SAE has its direction")
    assert Counterpart(0.71, 1, None, None).found
    assert not Counterpart(0.69, 1, None, None).found


def decoders(a, b):
    """Both SAEs' decoders, at any place."""
    return lambda point: (a.W_dec, b.W_dec)


def test_counterparts_of_a_permuted_sae_are_found(tiny, made, planted):
    """The same SAE with its latents in another order has every feature, at its new index."""
    order = torch.tensor([2, 0, 3, 1])
    moved = assemble(
        {
            "encoder.weight": planted.encoder.weight[order],
            "encoder.bias": planted.encoder.bias[order],
            "W_dec": planted.W_dec[order],
            "b_dec": planted.b_dec,
        },
        k=4,
    )
    some = made[:30]
    mine = respond(tiny, {POINT: planted}, {POINT: (0, 1)}, some)
    theirs = respond(tiny, {POINT: moved}, {POINT: (1, 3)}, some)
    found = counterparts(mine, theirs, decoders(planted, moved))[POINT]
    assert [found[f].feature for f in (0, 1)] == [1, 3]
    assert [found[f].cosine for f in (0, 1)] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert [found[f].correlated for f in (0, 1)] == [1, 3]
    assert [found[f].correlation for f in (0, 1)] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert found[0].elsewhere is None
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
    (verdict,) = judge(
        synthetic({"paraphrase": 1}), RULES_OF_ONE, other_seed={POINT: {7: replace(alike[0],
        cosine=0.1)}},
    )  # fmt: skip
    assert verdict.reason.endswith("(r = 1.00; 1.00 at other layers)")


def test_respond_reads_what_a_dense_pass_reads(tiny, made, planted):
    some = [made[0], made[1], made[95]]
    found = respond(tiny, {POINT: planted}, {POINT: (3, 0)}, some).values[POINT]
    for row, trial in zip(found, some, strict=True):
        batch = next(stream_activations(tiny, [torch.tensor([trial.ids])], [POINT]))
        dense = torch.relu(batch.acts[POINT][0] @ planted.encoder.weight.mT + planted.encoder.bias)
        for place, positions in enumerate(trial.places):
            top = dense[list(positions)].amax(0)
            assert row[place].tolist() == pytest.approx(top[[3, 0]].tolist(), abs=1e-4)


@pytest.mark.parametrize("feature", [4, -1])
def test_a_feature_beyond_the_latents_is_refused(tiny, made, planted, feature):
    with pytest.raises(BadInputError, match=r"feature -?\d is out of range.* features 0 to 3"):
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
    verdicts = many([{"paraphrase": 1}] * 12 + [{"injected": 1}] * 8)
    null = many([{"paraphrase": 1}] * 1 + [{"injected": 1}] * 9)
    summary = summarise(verdicts, 100, (null, 100))
    either = summary.rules[-1]
    assert (either.counted, either.survivors, either.by_texts) == (20, 12, 12)
    assert either.verdicts == {DETECTOR: 8, ARTEFACT: 0, SURVIVES: 12}
    assert (either.null_counted, either.null_by_texts, either.null_active) == (10, 1, 100)
    table = [[12, 88], [1, 99]]
    assert either.p_value == pytest.approx(fisher_exact(table, alternative="greater").pvalue)
    assert summary.tests["injection"] == 8
    assert "more than the random-weights SAE" in summary.reason
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
    held = synthetic({"paraphrase": 1}, n=20)
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
    assert "too few" not in alone[0].reason
    together = judge(responses, {POINT: dict.fromkeys(range(30), ("either",))})
    assert together[0].injection_p == pytest.approx(30 * 2 * 0.5**8)
    assert "too few to be sure of the tags' part (p = 0.23)" in together[0].reason


def test_plain_texts_reason_about_nothing():
    assert len(set(PLAIN_TEXTS)) == len(PLAIN_TEXTS)
    assert not any(tag in text for text in PLAIN_TEXTS for tag in ("<", ">"))
