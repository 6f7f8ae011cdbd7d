"""Router mechanics on nine tiny configurations whose truth is known."""

from __future__ import annotations

import copy
from typing import Any

import mixtures
import pytest
import torch
from mixtures import CONFIGS, IDS, RENORMALISING, logits, mixture, plain

from resa_lens.errors import BadInputError, RunFailedError
from resa_lens.evals.engines import GenerationConfig, HFEngine
from resa_lens.experts.config import HOWS
from resa_lens.experts.edits import Edit, changed, check_edit, editing
from resa_lens.experts.routers import Router, Rule, find_routers, find_rule, read_output, recording
from resa_lens.features.interventions import Tracker
from resa_lens.texts.prompts import PHASES

each = pytest.mark.parametrize("name", CONFIGS)
LAYER = 1


def edited(model: Any, edit: Edit, tracker: Tracker | None = None, **options: Any) -> torch.Tensor:
    with editing(model, [edit], tracker):
        return logits(model.model, **options)


def most_used(model: Any, count: int = 1) -> list[int]:
    routers = find_routers(model)
    with recording({LAYER: routers[LAYER].module}) as outputs:
        logits(model.model)
    output = outputs[LAYER]
    experts = output[read_output(output, "gate").experts]
    return torch.bincount(experts.flatten(), minlength=8).argsort(descending=True)[:count].tolist()


# What is read


@each
def test_a_router_is_read_and_its_rule_reproduces_it(name: str) -> None:
    routers = find_routers(mixture(name))
    first = 1 if name.startswith("deepseek") else 0
    assert list(routers) == list(range(first, 3))
    for router in routers.values():
        assert (router.experts, router.k) == (8, 2)
        assert router.rule is not None
        assert router.error < 1e-5
        assert router.shared == (name.startswith("deepseek") or name == "qwen2-moe")
    rule = routers[2].rule
    assert rule is not None
    assert rule.score == ("sigmoid" if name.startswith("deepseek") else "softmax")
    assert rule.renormalise == (name in RENORMALISING or name == "deepseek-v3-groups")
    assert rule.groups == (2 if name == "deepseek-v3-groups" else 1)


def test_a_router_of_deepseek_v2_is_read_too() -> None:
    from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

    for method, group in (("greedy", 1), ("group_limited_greedy", 2)):
        config = DeepseekV2Config(
            hidden_size=16, num_attention_heads=2, n_routed_experts=8, num_experts_per_tok=2,
            n_group=group, topk_group=1, topk_method=method, routed_scaling_factor=4.0,
        )  # fmt: skip
        router = DeepseekV2TopkRouter(config)
        torch.nn.init.normal_(router.weight)
        output = router(torch.randn(40, 16))
        rule, error = find_rule(router, output, read_output(output, "gate"))
        assert rule is not None
        assert error < 1e-5
        assert (rule.renormalise, rule.scaling, rule.groups) == (False, 4.0, group)


def test_an_unknown_rule_is_refused_by_name_where_it_is_needed() -> None:
    model = mixture("mixtral")
    for _, _, module, _ in mixtures.router_modules(model.model):
        module.register_forward_hook(lambda m, i, out: (out[0], out[1].flip(-1) * 0.7, out[2]))
    routers = find_routers(model)
    assert routers[0].rule is None
    for how in ("reroute", "on"):
        with pytest.raises(BadInputError, match=r"MixtralTopKRouter.*no known rule.*use zero"):
            check_edit(routers, Edit({0: [1]}, how))
    check_edit(routers, Edit({0: [1]}, "zero"))


def test_what_has_no_router_to_change_is_refused() -> None:
    from resa_lens.models.host import load_model

    with pytest.raises(BadInputError, match="model tiny-reasoner has no experts"):
        find_routers(load_model("tiny-reasoner"))
    whole = (torch.randn(5, 4), torch.randn(5, 4), torch.zeros(5, 4, dtype=torch.long))
    with pytest.raises(BadInputError, match="uses all 4 experts"):
        read_output(whole, "gate")
    for odd in (torch.randn(5, 4), (torch.randn(5, 4),), (*whole, None)):
        with pytest.raises(BadInputError, match="a form that is not known"):
            read_output(odd, "gate")


# What edits do


@each
def test_a_change_of_nothing_changes_no_bit(name: str) -> None:
    model = mixture(name)
    before = logits(model.model)
    for edit in (Edit({}), Edit({LAYER: []}), Edit({LAYER: [1]}, "scale", 1.0)):
        assert torch.equal(edited(model, edit), before)
    edited(model, Edit({LAYER: [1]}))
    assert torch.equal(logits(model.model), before), "a hook was left behind"


@each
def test_zero_is_a_model_whose_expert_writes_nothing(name: str) -> None:
    model = mixture(name)
    off = most_used(model, 2)
    other = logits(mixtures.without_output(plain(name), LAYER, off))
    after = edited(model, Edit({LAYER: off}, "zero"))
    assert torch.equal(after, other)
    assert torch.equal(edited(model, Edit({LAYER: off}, "scale", 0.0)), other)
    assert not torch.allclose(after, logits(model.model), atol=1e-3)


@each
def test_rerouting_is_a_model_without_the_expert(name: str) -> None:
    model = mixture(name)
    off = most_used(model, 1 if name == "deepseek-v3-groups" else 3)
    before, after = logits(model.model), edited(model, Edit({LAYER: off}))
    if name in RENORMALISING:
        other = logits(mixtures.without_experts(plain(name), LAYER, off))
        assert (after - other).abs().max() < 1e-5
    assert not torch.allclose(before, after, atol=1e-3)


@pytest.mark.parametrize("name", ["olmoe", "qwen2-moe", "qwen3-moe-plain"])
def test_without_renormalising_only_tokens_that_used_the_expert_change(name: str) -> None:
    model = mixture(name)
    off, routers = most_used(model), find_routers(model)
    with recording({LAYER: routers[LAYER].module}) as outputs:
        logits(model.model)
    output = outputs[LAYER]
    after = changed(output, routers[LAYER], off, "reroute")
    assert after is not None
    used = torch.isin(output[2], torch.tensor(off)).any(-1)
    assert 0 < int(used.sum()) < len(used)
    assert torch.equal(output[1][~used], after[1][~used])
    assert not torch.isin(after[2], torch.tensor(off)).any()
    other = mixtures.without_experts(plain(name), LAYER, off)
    with recording({LAYER: find_routers(mixtures.host(other))[LAYER].module}) as built:
        logits(other)
    assert torch.allclose(after[1][used].sort(-1).values, built[LAYER][1][used].sort(-1).values,
                          atol=1e-5)  # fmt: skip


@each
def test_zero_renorm_keeps_the_sum_and_on_is_everywhere(name: str) -> None:
    model = mixture(name)
    routers = find_routers(model)
    with recording({LAYER: routers[LAYER].module}) as outputs:
        logits(model.model)
    output, router = outputs[LAYER], routers[LAYER]
    routed = read_output(output, "gate")
    off = most_used(model)
    after = changed(output, router, off, "zero-renorm")
    assert after is not None
    assert torch.allclose(after[routed.weights].sum(-1), output[routed.weights].sum(-1), atol=1e-5)
    dropped = torch.isin(output[routed.experts], torch.tensor(off))
    assert not after[routed.weights][dropped].any()
    least = [int(torch.bincount(output[routed.experts].flatten(), minlength=8).argmin())]
    forced = changed(output, router, least, "on")
    assert forced is not None
    assert torch.isin(forced[routed.experts], torch.tensor(least)).any(-1).all()


@each
def test_extremes_stay_finite(name: str) -> None:
    model = mixture(name)
    everything = list(range(8))
    for edit in (Edit({LAYER: everything}, "zero"), Edit({LAYER: everything}, "zero-renorm"),
                 Edit({LAYER: everything[:6]}, "reroute") if "groups" not in name else
                 Edit({LAYER: [0]}), Edit({LAYER: [0, 1]}, "on")):  # fmt: skip
        assert edited(model, edit).isfinite().all()


@pytest.mark.parametrize("name", ["qwen3-moe", "granite-moe", "gpt-oss", "deepseek-v3"])
def test_a_bridge_in_between_changes_nothing(name: str) -> None:
    model, edit = mixture(name), Edit({LAYER: [0, 1]})
    plain_logits = edited(model, edit)
    assert model.bridge is not None
    assert list(find_routers(model)) == sorted(find_routers(mixture(name)))
    difference = (edited(model, edit) - plain_logits).abs().max()
    assert difference < 1e-4 * plain_logits.abs().max()


# While the model answers

PROMPTS = ["Problem: What is 3+4? <think>", "Problem: What is 12*3+4-5? Say it. <think>"]


def answers(model: Any, edit: Edit, prompts: list[str], batch: int) -> list[tuple[int, ...]]:
    engine = HFEngine(model.model, model.tokenizer)
    config = GenerationConfig(max_new_tokens=12, batch_size=batch, stop=())
    with editing(model, [edit]) as tracker:
        return [g.token_ids for g in engine.generate(prompts, config, hooks=tracker)]


@pytest.mark.parametrize("name", ["qwen3-moe", "gpt-oss", "deepseek-v3"])
@pytest.mark.parametrize("phases", [PHASES, ("think",), ("prompt",)])
def test_answers_are_the_same_with_a_cache_and_in_a_padded_batch(
    name: str, phases: tuple[str, ...]
) -> None:
    model = mixture(name)
    edit = Edit({1: most_used(model, 2), 2: [1, 5]}, "reroute", phases=phases)
    alone = [answers(model, edit, [prompt], 1)[0] for prompt in PROMPTS]
    assert answers(model, edit, PROMPTS, 2) == alone
    for prompt, ids in zip(PROMPTS, alone, strict=True):
        start: list[int] = model.tokenizer(prompt)["input_ids"]
        row = torch.tensor([[*start, *ids]])
        # Random weights write no tags: all that is generated is thought.
        phase = torch.tensor([[0] * len(start) + [1] * len(ids)])
        whole = edited(model, edit, Tracker(phase), ids=row)[0, len(start) - 1 : -1].argmax(-1)
        assert whole.tolist() == list(ids)


def test_an_edit_of_thoughts_leaves_the_prompt_alone() -> None:
    model = mixture("qwen3-moe")
    phase = torch.tensor([[0] * 10 + [1] * 14] * 2)
    edit = Edit({LAYER: most_used(model, 3)}, "zero", phases=("think",))
    before, after = logits(model.model), edited(model, edit, Tracker(phase))
    # Not to the bit: tokens of one expert are multiplied together, and thoughts move to others.
    assert torch.allclose(before[:, :10], after[:, :10], atol=1e-5)
    assert not torch.allclose(before[:, 10:], after[:, 10:], atol=1e-3)
    with pytest.raises(RunFailedError, match="48 tokens and the tracker was told nothing"):
        edited(model, edit)


def test_beams_are_refused_and_the_models_own_search_comes_back() -> None:
    model = mixture("qwen3-moe")
    plain_model: Any = model.model
    with editing(model, [Edit({LAYER: [1]})]):
        with pytest.raises(BadInputError, match="2 beams"):
            plain_model.generate(IDS, num_beams=2, max_new_tokens=2)
        plain_model.generate(IDS, max_new_tokens=2, do_sample=False)
    assert "generate" not in vars(model.model)


# What is refused


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda: Edit({9: [1]}), "layer 9 has no experts; layers with experts: 1, 2"),
        (lambda: Edit({0: [1]}), "layer 0 has no experts"),
        (lambda: Edit({1: [8]}), "expert 1:8 does not exist; layer 1 has experts 0 to 7"),
        (lambda: Edit({1: [-1]}), "expert 1:-1 does not exist"),
        (lambda: Edit({1: list(range(7))}), "would keep 1 of 8 experts and each token uses 2"),
        (lambda: Edit({1: [0, 1, 2]}, "on"), "3 experts on, and a token uses 2"),
        (lambda: Edit({1: [2, 2]}), "expert 1:2 stands twice"),
        (lambda: Edit({1: [2]}, "scale", -1.0), "beta -1.0 is out of range"),
        (lambda: Edit({1: [2]}, "scale", float("nan")), "beta nan is out of range"),
        (lambda: Edit({1: [2]}, phases=("thoughts",)), "phase 'thoughts' is unknown"),
        (lambda: Edit({1: [2]}, "remove"), "how 'remove' is unknown"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_is_refused_in_one_line(edit: Any, message: str) -> None:
    routers = find_routers(mixture("deepseek-v3"))
    with pytest.raises(BadInputError, match=message) as error:
        check_edit(routers, edit())
    assert "\n" not in str(error.value)


def test_ways_have_one_list() -> None:
    assert HOWS == ("reroute", "zero", "zero-renorm", "on", "scale")
    assert str(Rule("sigmoid", True, 2.5, 2, 1)) == (
        "sigmoid of all experts, top k of the best 1 of 2 groups, renormalised, x 2.5"
    )
    assert copy.copy(Router.__dataclass_fields__["layer"]).name == "layer"


# Adapters


def test_an_adapter_says_which_parts_of_a_mixture_it_leaves_alone() -> None:
    from resa_lens.tuning.train import left_out, lora_targets

    shared, routed = mixture("qwen2-moe").model, mixture("qwen3-moe").model
    with pytest.raises(BadInputError, match=r"'up_proj' to adapt .its experts are stacked"):
        lora_targets(routed, ("q_proj", "up_proj"))
    assert lora_targets(shared, ("q_proj", "up_proj")) == ["q_proj", "up_proj"]
    (sentence,) = left_out(shared, ["q_proj", "up_proj"])
    assert "up_proj are adapted in dense layers and shared experts alone" in sentence
    assert left_out(shared, ["q_proj"]) == []
