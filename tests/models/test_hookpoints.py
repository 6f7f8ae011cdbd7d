from __future__ import annotations

import pytest

from resa_lens.errors import BadInputError
from resa_lens.models.hookpoints import (
    SITES,
    Hookpoint,
    Names,
    adapted_layers,
    describe_layer,
    ordinal,
    parse_hookpoint,
    parse_layer,
    parse_layers,
    site_named,
    trainable_layers,
)

NAMES = {
    Hookpoint(12, "mlp_out"): {
        "transformer_lens": "blocks.12.mlp.hook_out",
        "saelens": "blocks.12.hook_mlp_out",
        "huggingface": "model.layers.12.mlp",
        "sparsify": "layers.12.mlp",
    },
    Hookpoint(0, "resid_post"): {
        "transformer_lens": "blocks.0.hook_out",
        "saelens": "blocks.0.hook_resid_post",
        "huggingface": "model.layers.0",
        "sparsify": "layers.0",
    },
    Hookpoint(7, "attn_out"): {
        "transformer_lens": "blocks.7.attn.hook_out",
        "saelens": "blocks.7.hook_attn_out",
        "huggingface": "model.layers.7.self_attn",
        "sparsify": "layers.7.self_attn",
    },
}


@pytest.mark.parametrize(
    ("point", "project", "name"),
    [(point, project, name) for point, names in NAMES.items() for project, name in names.items()],
)
def test_a_hookpoint_has_each_projects_name_and_is_read_back_from_it(point, project, name):
    assert getattr(point, project) == name
    assert parse_hookpoint(name) == point


@pytest.mark.parametrize(
    ("name", "point"),
    [
        ("blocks.7.mlp.hook_out", Hookpoint(7, "mlp_out")),
        ("blocks.7.hook_out", Hookpoint(7, "resid_post")),
        ("gpt_neox.layers.3.mlp", Hookpoint(3, "mlp_out")),
        ("gpt_neox.layers.3", Hookpoint(3, "resid_post")),
        ("transformer.h.10.mlp", Hookpoint(10, "mlp_out")),
        ("transformer.h.10", Hookpoint(10, "resid_post")),
        ("h.1.mlp", Hookpoint(1, "mlp_out")),
        ("h.1", Hookpoint(1, "resid_post")),
        ("layers.2.attention", Hookpoint(2, "attn_out")),
        ("layers.2.post_feedforward_layernorm", Hookpoint(2, "mlp_post")),
        ("blocks.7.hook_mlp_out", Hookpoint(7, "mlp_out")),
        ("blocks.7.hook_resid_post", Hookpoint(7, "resid_post")),
    ],
)
def test_canonical_and_other_architectures_names_are_read(name, point):
    assert parse_hookpoint(name) == point


@pytest.mark.parametrize(
    "name",
    ["", "layers", "layers.x.mlp", "layers.3.mlp.extra", "blocks.3", "layers.-1", "xlayers.3",
     "blocks.3.hook_resid_pre", "layersx3xmlp"],
)  # fmt: skip
def test_an_unknown_name_is_refused_with_the_name(name):
    with pytest.raises(BadInputError) as caught:
        parse_hookpoint(name)
    assert repr(name) in str(caught.value)
    assert "layers.12.mlp" in str(caught.value)


@pytest.mark.parametrize("site", list(SITES))
def test_every_site_translates_to_distinct_names_and_back(site):
    for layer in (0, 9, 10, 27, 100):
        point = Hookpoint(layer, site)
        for name in (point.huggingface, point.sparsify):
            assert parse_hookpoint(name) == point
        both = Names(sites=tuple(SITES))
        for name in (point.transformer_lens, point.sparsify, both.saelens(point)):
            assert both.parse(name) == point
    others = [s for s in SITES if s != site]
    assert all(Hookpoint(3, o).sparsify != Hookpoint(3, site).sparsify for o in others)


def test_default_site_order_and_bad_values():
    assert Hookpoint(3).site == "mlp_out"
    assert sorted([Hookpoint(10), Hookpoint(2)]) == [Hookpoint(2), Hookpoint(10)]
    with pytest.raises(BadInputError, match="-1"):
        Hookpoint(-1)
    with pytest.raises(BadInputError, match=r"attn.*mlp_out, resid_post"):
        Hookpoint(1, "attn")
    with pytest.raises(BadInputError, match="nowhere"):
        site_named("nowhere")


@pytest.mark.parametrize(
    ("number", "text"),
    [(1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (10, "10th"), (11, "11th"), (12, "12th"),
     (13, "13th"), (20, "20th"), (21, "21st"), (22, "22nd"), (23, "23rd"), (24, "24th"),
     (101, "101st"), (111, "111th"), (112, "112th"), (113, "113th"), (122, "122nd")],
)  # fmt: skip
def test_ordinals(number, text):
    assert ordinal(number) == text


def test_both_numberings_are_shown():
    # Spec section 1: the table's "13th layer" is layer 12.
    assert describe_layer(12, 28) == "layer 12 (0-based; 13th of 28)"
    assert Hookpoint(12).describe(28) == "layer 12 (0-based; 13th of 28)"
    assert describe_layer(0, 12) == "layer 0 (0-based; 1st of 12)"


def test_a_number_is_0_based_and_an_ordinal_1_based():
    assert parse_layer("12", 28) == parse_layer("13th", 28) == parse_layer(12, 28) == 12
    assert parse_layer(" 1st ", 28) == 0
    assert [parse_layer(ordinal(n), 28) for n in range(1, 29)] == list(range(28))


@pytest.mark.parametrize("text", ["28", "29th", "0th", "999"])
def test_a_layer_outside_the_model_is_refused_with_both_ranges(text):
    with pytest.raises(BadInputError) as caught:
        parse_layer(text, 28)
    message = str(caught.value)
    assert repr(text) in message
    assert "0 to 27" in message
    assert "28th" in message
    assert message.count("\n") < 3


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5", "12 th", "auto", "1e3"])
def test_what_is_no_layer_is_refused(text):
    with pytest.raises(BadInputError, match="is not a layer"):
        parse_layer(text, 28)


@pytest.mark.parametrize(
    ("spec", "layers"),
    [
        (None, list(range(1, 27))),
        ("default", list(range(1, 27))),
        ("all", list(range(28))),
        ("1-26", list(range(1, 27))),
        ("5", [5]),
        ("13th", [12]),
        ("2nd-4th", [1, 2, 3]),
        ("3,5,8th", [3, 5, 7]),
        ("8, 2-4 ,3", [2, 3, 4, 8]),
        ("7-7", [7]),
        ("layers.*.mlp", list(range(28))),
        ("blocks.*.hook_resid_post", list(range(28))),
        ("layers.4.mlp,model.layers.2", [2, 4]),
        ([9, 3, 3], [3, 9]),
    ],
)
def test_ranges_lists_and_wildcards(spec, layers):
    assert parse_layers(spec, 28) == layers


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("1-28", "28"),
        ("9-3", "9-3"),
        ("a-b", "a"),
        ("3,,5", "''"),
        ("5-", "''"),
        ("layers.28.mlp", "28"),
        ("rooms.*.mlp", "rooms.*.mlp"),
        ("*", "'*'"),
        ("", "''"),
        ([28], "28"),
    ],
)
def test_bad_sets_of_layers_name_what_is_wrong(spec, named):
    with pytest.raises(BadInputError) as caught:
        parse_layers(spec, 28)
    assert named in str(caught.value)


def test_first_and_last_layer_are_left_out_unless_nothing_would_remain():
    assert trainable_layers(28) == list(range(1, 27))
    assert trainable_layers(3) == [1]
    assert trainable_layers(2) == [0, 1]
    assert trainable_layers(1) == [0]


@pytest.mark.parametrize(
    ("n", "block"),
    [(12, range(2, 10)), (28, range(6, 22)), (26, range(5, 21)), (1, [0]), (2, [0, 1])],
)
def test_the_middle_block_is_symmetric_and_three_fifths_deep(n, block):
    layers = adapted_layers("middle", n)
    assert layers == list(block)
    assert layers == [n - 1 - layer for layer in reversed(layers)]
    assert adapted_layers("all", n) == list(range(n))
