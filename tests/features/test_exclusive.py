"""The exclusive counter: every rule on hand-made activations, planted features, tags in pieces."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from resa_lens.errors import BadInputError
from resa_lens.features.exclusive import (
    RULES,
    CountConfig,
    TaggedPrompt,
    count_features,
    exclusive_features,
    tag_prompt,
)
from resa_lens.models.activations import stream_activations
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model, load_model
from resa_lens.saes.coder import SparseActs, SparseCoder, new_coder
from resa_lens.texts.prompts import R1_SYSTEM_PROMPT

# Positions 1 and 4 are <think>, 2 and 6 </think>, 0, 3, 5, 7 are others.
PROMPT = TaggedPrompt(
    text="",
    ids=tuple(range(8)),
    tokens=tuple("o<>o<o>o"),
    open_spans=((1,), (4,)),
    close_spans=((2,), (6,)),
)


def test_thresholds_and_tags_that_count_nothing_are_refused() -> None:
    for threshold in (float("nan"), float("inf"), -1.0):
        with pytest.raises(BadInputError, match=r"threshold .* is out of range; give 0 or more"):
            CountConfig(threshold=threshold)
        with pytest.raises(BadInputError, match=r"threshold .* is out of range; give 0 or more"):
            exclusive_features(acts({0: [1]}), PROMPT, threshold=threshold)
    with pytest.raises(BadInputError, match="threshold 'nan' is no number"):
        CountConfig(threshold="nan")  # type: ignore[arg-type]
    with pytest.raises(BadInputError, match=r"are both '<t>'.*give two tags"):
        CountConfig(open_tag="<t>", close_tag="<t>")
    with pytest.raises(BadInputError, match="one stands inside of the other"):
        CountConfig(open_tag="think>", close_tag="</think>")


def acts(features: Mapping[int, Iterable[int]], value: float = 1.0, n: int = 8) -> SparseActs:
    pairs = [(row, latent) for latent, rows in features.items() for row in rows]
    return SparseActs(
        torch.tensor([p[0] for p in pairs], dtype=torch.long),
        torch.tensor([p[1] for p in pairs], dtype=torch.long),
        torch.full((len(pairs),), value),
        n,
        40,
    )


KNOWN = {
    0: [1, 2, 4, 6],  # every occurrence
    1: [1, 2, 4, 6, 3],  # and elsewhere
    2: [1, 2],  # one occurrence of each
    3: [4, 6, 7],  # one of each and elsewhere
    4: [1, 4],  # the opening tag alone
    5: [6],  # one closing tag
    6: [3, 5],  # no tag
    7: [1, 2, 4, 6, 0],  # everywhere it should, and at the first position
    8: [1, 4, 2],  # all of one tag, one of the other
}


def test_every_rule_on_known_features() -> None:
    assert exclusive_features(acts(KNOWN), PROMPT) == {
        "all": (0,),
        "any": (0, 2, 8),
        "either": (0, 2, 4, 5, 8),
    }


def test_first_position_can_be_left_out_of_the_others() -> None:
    found = exclusive_features(acts(KNOWN), PROMPT, ignore_first=True)
    assert found["all"] == (0, 7)
    assert found["any"] == (0, 2, 7, 8)


def test_first_position_that_is_a_tag_still_counts() -> None:
    prompt = TaggedPrompt("", (0, 1, 2), ("<", ">", "o"), ((0,),), ((1,),))
    found = exclusive_features(acts({0: [0, 1], 1: [1]}, n=3), prompt, ignore_first=True)
    assert found["all"] == (0,)


def test_threshold_is_exclusive_and_works_both_ways() -> None:
    weak = acts({0: [1, 2, 4, 6]}, value=0.5)
    assert exclusive_features(weak, PROMPT, threshold=0.5)["either"] == ()
    assert exclusive_features(weak, PROMPT, threshold=0.49)["all"] == (0,)
    # Below the threshold it does not fire elsewhere either.
    mixed = acts({0: [1, 2, 4, 6, 3]})
    mixed.values[-1] = 0.1
    assert exclusive_features(mixed, PROMPT)["all"] == ()
    assert exclusive_features(mixed, PROMPT, threshold=0.2)["all"] == (0,)


def test_tags_of_several_tokens() -> None:
    """Active at one token of each span is enough, and a span's tokens are not "other"."""
    prompt = TaggedPrompt("", tuple(range(8)), tuple("o<<<o>>o"), ((1, 2, 3),), ((5, 6),))
    found = exclusive_features(acts({0: [2, 5], 1: [1, 2, 3, 5, 6], 2: [2, 4, 5], 3: [3]}), prompt)
    assert found == {"all": (0, 1), "any": (0, 1), "either": (0, 1, 3)}


def test_nothing_active_counts_nothing() -> None:
    assert exclusive_features(acts({}), PROMPT) == dict.fromkeys(RULES, ())


def test_the_strict_rule_is_never_loosened() -> None:
    found = exclusive_features(acts({0: [1, 2], 1: [4, 6]}), PROMPT)
    assert found["all"] == ()
    assert found["any"] == (0, 1)


# On a model: planted features


@pytest.fixture(scope="module")
def planted(tiny: Model) -> tuple[SparseCoder, Hookpoint, TaggedPrompt]:
    """Encoder directions solved for on the model's own activations at the prompt's tokens."""
    point, prompt = Hookpoint(6), tag_prompt(tiny, CountConfig())
    batch = next(iter(stream_activations(tiny, [torch.tensor([prompt.ids])], [point])))
    x = batch.acts[point][0].double()
    assert x.shape[0] <= tiny.d_model + 1, "the solution would not be exact"
    tags = [p for span in (*prompt.open_spans, *prompt.close_spans) for p in span]
    first = [prompt.open_spans[0][0], prompt.close_spans[0][0]]
    other = prompt.others[len(prompt.others) // 2]
    wanted = {3: tags, 5: [*tags, other], 8: first, 9: [s[0] for s in prompt.open_spans]}
    coder = new_coder(tiny.d_model, 16, 16, seed=0)
    design = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    with torch.no_grad():
        coder.encoder.weight.zero_()
        coder.encoder.bias.fill_(-1.0)
        for latent, positions in wanted.items():
            target = torch.full((len(x),), -1.0, dtype=torch.float64)
            target[positions] = 1.0
            solved = torch.linalg.lstsq(design, target[:, None], driver="gelsd").solution[:, 0]
            coder.encoder.weight[latent] = solved[:-1].float()
            coder.encoder.bias[latent] = solved[-1].float()
    return coder.requires_grad_(False), point, prompt


def test_planted_features_are_told_apart(
    tiny: Model, planted: tuple[SparseCoder, Hookpoint, TaggedPrompt]
) -> None:
    coder, point, _ = planted
    counts = count_features(tiny, {point: coder})
    found = counts.layers[0]
    assert found.features == {"all": (3,), "any": (3, 8), "either": (3, 8, 9)}
    assert found.active == 4
    assert found.to_dict() == {"layer": 6, "all": 1, "any": 2, "either": 3}
    assert counts.table("any") == {6: 2}


def test_table_of_an_unknown_rule(
    tiny: Model, planted: tuple[SparseCoder, Hookpoint, TaggedPrompt]
) -> None:
    with pytest.raises(BadInputError, match=r"'most'.*all, any, either"):
        count_features(tiny, {planted[1]: planted[0]}).table("most")


def test_coder_of_another_width(tiny: Model) -> None:
    with pytest.raises(BadInputError, match="width 8, the model's is 128"):
        count_features(tiny, {Hookpoint(2): new_coder(8, 16, 2, seed=0)})


# The tags in the prompt


def test_tags_of_the_papers_prompt_are_single_tokens_twice_each(tiny: Model) -> None:
    prompt = tag_prompt(tiny, CountConfig())
    assert prompt.text == R1_SYSTEM_PROMPT
    for spans, tag in ((prompt.open_spans, "<think>"), (prompt.close_spans, "</think>")):
        assert len(spans) == 2
        assert [[prompt.tokens[p] for p in span] for span in spans] == [[tag], [tag]]
    assert len(prompt.others) == len(prompt.ids) - 4


def test_other_tags_can_be_asked_for(tiny: Model) -> None:
    prompt = tag_prompt(tiny, CountConfig(open_tag="<answer>", close_tag="</answer>"))
    assert {prompt.tokens[p] for span in prompt.open_spans for p in span} == {"<answer>"}


@pytest.mark.parametrize(
    ("prompt", "lacks"),
    [
        ("Think before you answer.", "<think>"),
        ("only <think> opens", "</think>"),
        ("only </think> closes", "<think>"),
        ("", "<think>"),
    ],
)
def test_prompt_without_the_tags(tiny: Model, prompt: str, lacks: str) -> None:
    with pytest.raises(BadInputError) as caught:
        tag_prompt(tiny, CountConfig(prompt=prompt))
    assert f"has no {lacks};" in str(caught.value)
    assert prompt in str(caught.value)


def test_prompt_from_a_file(tiny: Model, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("a <think> b </think>\n")
    assert tag_prompt(tiny, CountConfig(prompt=f"@{file}")).text == "a <think> b </think>"
    with pytest.raises(BadInputError, match=r"absent\.txt"):
        tag_prompt(tiny, CountConfig(prompt=f"@{tmp_path}/absent.txt"))


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A random model whose tokenizer knows no tag: bytes, and three merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, "th", "Ġ<", ">!"])}
    merges = [("t", "h"), ("Ġ", "<"), (">", "!")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("bytewise")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(vocab) + 8, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return load_model(str(folder))


def test_tags_in_pieces_are_found_by_characters(bytewise: Model) -> None:
    prompt = tag_prompt(bytewise, CountConfig(prompt="ünder <think> and </think>!."))
    opened = [prompt.tokens[p] for p in prompt.open_spans[0]]
    closed = [prompt.tokens[p] for p in prompt.close_spans[0]]
    # "Ġ<" and ">!" reach over the tag's edge and belong to it all the same.
    assert opened == ["Ġ<", "th", "i", "n", "k", ">"]
    assert closed == ["Ġ<", "/", "th", "i", "n", "k", ">!"]
    assert "".join(prompt.tokens[p] for p in prompt.others) == "Ã¼nderĠand."


@pytest.fixture(scope="module")
def merging(bytewise: Model) -> Model:
    """Bytes, and `> </` as one token, which some vocabularies have."""
    tokenizer = Tokenizer.from_str(bytewise.tokenizer.backend_tokenizer.to_str())  # pyright: ignore
    pieces = [">Ġ", "</", ">Ġ</"]
    vocabulary = tokenizer.get_vocab()
    vocabulary |= {piece: len(vocabulary) + number for number, piece in enumerate(pieces)}
    merges = [(">", "Ġ"), ("<", "/"), (">Ġ", "</")]
    tokenizer.model = models.BPE(vocab=vocabulary, merges=merges)
    return replace(bytewise, tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def test_a_token_of_two_tags_counts_for_neither(merging: Model) -> None:
    tagged = tag_prompt(merging, CountConfig(prompt="a <think> </think> b"))
    (shared,) = tagged.shared
    assert tagged.tokens[shared] == ">Ġ</"
    assert shared not in {*tagged.open_spans[0], *tagged.close_spans[0], *tagged.others}
    opened, closed = tagged.open_spans[0][-1], tagged.close_spans[0][0]
    features = {
        0: [shared],  # on it alone
        1: [shared, opened],  # and on a token of one tag
        2: [opened, closed],  # without it
        3: [shared, closed, 0],  # and elsewhere
    }
    found = exclusive_features(acts(features, n=len(tagged.ids)), tagged)
    assert found == {"all": (2,), "any": (2,), "either": (1, 2)}


def test_the_count_says_how_many_features_rest_on_shared_tokens(merging: Model) -> None:
    config = CountConfig(prompt="a <think> </think> b")
    tagged = tag_prompt(merging, config)
    point = Hookpoint(0, "resid_post")
    x = next(iter(stream_activations(merging, [torch.tensor([tagged.ids])], [point]))).acts[point]
    # Features 0 and 1 are the directions of the shared token and of the one before the tags.
    coder = new_coder(merging.d_model, 8, 1, seed=0)
    with torch.no_grad():
        centred = x[0] - x[0].mean(0)
        coder.b_dec.copy_(x[0].mean(0))
        coder.encoder.weight.zero_()
        coder.encoder.weight[:2] = torch.linalg.pinv(centred)[:, [tagged.shared[0], 0]].T
        coder.encoder.bias.fill_(-0.5)
    counts = count_features(merging, {point: coder}, config).layers[0]
    assert counts.features == {"all": (), "any": (), "either": ()}
    assert counts.shared == {"all": 1, "any": 1, "either": 1}
    assert counts.to_dict() == {"layer": 0, "all": 0, "any": 0, "either": 0,
                                "shared": {"all": 1, "any": 1, "either": 1}}  # fmt: skip
    plain = count_features(merging, {point: coder}, replace(config, prompt="a<think>b</think>"))
    assert plain.layers[0].shared == {}


def test_counting_with_tags_in_pieces(bytewise: Model) -> None:
    """A feature of the token "/" alone fires in the closing tag; one of "i" in both."""
    config = CountConfig(prompt="see <think> so </think>")
    prompt, point = tag_prompt(bytewise, config), Hookpoint(0, "resid_post")
    batch = next(iter(stream_activations(bytewise, [torch.tensor([prompt.ids])], [point])))
    x = batch.acts[point][0].double()
    design = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    coder = new_coder(32, 8, 8, seed=0)
    with torch.no_grad():
        coder.encoder.weight.zero_()
        coder.encoder.bias.fill_(-1.0)
        for latent, token in ((1, "/"), (2, "i")):
            hits = torch.tensor([1.0 if t == token else -1.0 for t in prompt.tokens]).double()
            solved = torch.linalg.lstsq(design, hits[:, None], driver="gelsd").solution[:, 0]
            coder.encoder.weight[latent] = solved[:-1].float()
            coder.encoder.bias[latent] = solved[-1].float()
    found = count_features(bytewise, {point: coder}, config).layers[0].features
    assert found == {"all": (2,), "any": (2,), "either": (1, 2)}


# Chat templates


def with_template(model: Model, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.tokenizer, "chat_template", template)


def test_chat_template_adds_its_own_occurrences(
    tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_template(tiny, "{{ messages[0]['content'] }} <think> {{ 'end' }}", monkeypatch)
    prompt = tag_prompt(tiny, CountConfig(prompt="a <think> b </think>", chat_template=True))
    assert (len(prompt.open_spans), len(prompt.close_spans)) == (2, 1)
    assert prompt.text.endswith("<think> end")


def test_bundled_chat_template_keeps_the_prompt(tiny: Model) -> None:
    prompt = tag_prompt(tiny, CountConfig(chat_template=True))
    assert R1_SYSTEM_PROMPT in prompt.text
    assert (len(prompt.open_spans), len(prompt.close_spans)) == (2, 2)


def test_chat_template_that_drops_the_system_message(
    tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_template(tiny, "{% for m in messages %}{{ m['role'] }}{% endfor %}", monkeypatch)
    with pytest.raises(BadInputError, match="tiny-reasoner drops <think>"):
        tag_prompt(tiny, CountConfig(chat_template=True))


def test_model_without_a_chat_template(bytewise: Model) -> None:
    with pytest.raises(BadInputError, match="no chat template"):
        tag_prompt(bytewise, CountConfig(chat_template=True))
