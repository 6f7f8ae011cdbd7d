"""One value for a place in the model: (layer, site), with every project's name for it.

Layers are 0-based inside; at the edge both numberings are shown.  A site is a member of the open
registry `SITES`, so further sites (mixture-of-experts routers) are one entry each.

Where a norm or a factor stands between a part of the layer and the residual stream (Gemma 2 and 3,
OLMo 2, GLM-4, Granite) there are two places: the module's own output (`mlp_out`, sparsify's
`layers.N.mlp`) and what is added to the stream (`mlp_post`, which TransformerLens and SAELens call
`hook_mlp_out`).  Elsewhere these are one place, `mlp_out`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from resa_lens.errors import BadInputError


@dataclass(frozen=True)
class Site:
    """How the projects name one site of layer {n}; the modules are those of a Llama shape."""

    name: str
    transformer_lens: str
    """The hook itself, not an alias: it means the same in every architecture."""
    saelens: str
    """An alias of TransformerLens."""
    module: str
    """Of the layer; "" is the layer itself."""
    what: str


SITES: dict[str, Site] = {
    site.name: site
    for site in (
        Site(
            "mlp_out",
            "blocks.{n}.mlp.hook_out",
            "blocks.{n}.hook_mlp_out",
            "mlp",
            "output of the MLP module, before it is added to the residual stream",
        ),
        Site(
            "resid_post",
            "blocks.{n}.hook_out",
            "blocks.{n}.hook_resid_post",
            "",
            "the block's output: the residual stream after the layer",
        ),
        Site(
            "attn_out",
            "blocks.{n}.attn.hook_out",
            "blocks.{n}.hook_attn_out",
            "self_attn",
            "output of the attention module, before it is added to the residual stream",
        ),
        Site(
            "mlp_post",
            "blocks.{n}.hook_mlp_out",
            "blocks.{n}.hook_mlp_out",
            "post_feedforward_layernorm",
            "what the MLP adds to the residual stream, where a norm or a factor stands between",
        ),
        Site(
            "attn_post",
            "blocks.{n}.hook_attn_out",
            "blocks.{n}.hook_attn_out",
            "post_attention_layernorm",
            "what the attention adds to the stream, where a norm or a factor stands between",
        ),
    )
}
POST = {"mlp_out": "mlp_post", "attn_out": "attn_post"}
"""The place behind the norm or factor, by that of the module."""
DEFAULT_SITE = "mlp_out"
MOST_LAYERS = 10_000
"""No model has so many."""
BLOCKS = ("layers", "model.layers", "gpt_neox.layers", "h", "transformer.h")
"""What the layers are called, in sparsify's names without the model's prefix."""
MODULES = {"attn_out": ("attention", "self_attention", "attn")}
"""Other names of a site's module."""


def site_named(name: str) -> Site:
    """Return the site; raise BadInputError naming the known ones."""
    if name not in SITES:
        raise BadInputError(f"unknown site {name!r}; choose from {', '.join(SITES)}")
    return SITES[name]


@dataclass(frozen=True, order=True)
class Hookpoint:
    """A layer (0-based) and a site; its names are those of a Llama-shaped model (see `Names`)."""

    layer: int
    site: str = DEFAULT_SITE

    def __post_init__(self) -> None:
        site_named(self.site)
        if self.layer < 0:
            raise BadInputError(f"layer {self.layer} is negative; layers count from 0")

    @property
    def transformer_lens(self) -> str:
        """TransformerLens' hook name, for example blocks.12.mlp.hook_out."""
        return SITES[self.site].transformer_lens.format(n=self.layer)

    @property
    def saelens(self) -> str:
        """SAELens' hook name, for example blocks.12.hook_mlp_out."""
        return SITES[self.site].saelens.format(n=self.layer)

    @property
    def huggingface(self) -> str:
        """The module's name in transformers, for example model.layers.12.mlp."""
        return f"model.{self.sparsify}"

    @property
    def sparsify(self) -> str:
        """Sparsify's hookpoint and folder name, for example layers.12.mlp."""
        return _module("layers", self.layer, SITES[self.site].module)

    def describe(self, n_layers: int) -> str:
        """Return both numberings: "layer 12 (0-based; 13th of 28)"."""
        return describe_layer(self.layer, n_layers)


@dataclass(frozen=True)
class Names:
    """How one architecture names its places (`bridge.names`)."""

    blocks: str = "model.layers"
    """The layers' module."""
    prefix: str = "model"
    """Of the modules' names, which sparsify leaves out."""
    sites: tuple[str, ...] = ("mlp_out", "resid_post", "attn_out")
    """Those that it has, each place once."""
    modules: Mapping[str, str] = field(
        default_factory=lambda: {s.name: s.module for s in SITES.values()}
    )
    """By site, the module within a layer."""

    def huggingface(self, point: Hookpoint) -> str | None:
        """Return the module whose output the place is; None where it is no module's."""
        if point.site not in self.modules:
            return None
        return _module(self.blocks, point.layer, self.modules[point.site])

    def sparsify(self, point: Hookpoint) -> str:
        """Return sparsify's name; ours where the place is no module's output."""
        name = self.huggingface(point)
        return point.sparsify if name is None else name.removeprefix(f"{self.prefix}.")

    def saelens(self, point: Hookpoint) -> str:
        """Return SAELens' name: the alias means the place behind the norm, where there are two."""
        return point.transformer_lens if POST.get(point.site) in self.sites else point.saelens

    def parse(self, name: str) -> Hookpoint:
        """Read a hookpoint from any project's name for it in this architecture.

        Raises:
            BadInputError: the name is of no known form.
        """
        for site, module in self.modules.items():
            whole = _module(self.blocks, "{n}", module)
            for form in (whole, whole.removeprefix(f"{self.prefix}.")):
                if (layer := _layer(form, name)) is not None:
                    return Hookpoint(layer, site)
        point = parse_hookpoint(name)
        post = POST.get(point.site)
        if post in self.sites and name == Hookpoint(point.layer, post).transformer_lens:
            return Hookpoint(point.layer, post)
        return point


def _layer(form: str, name: str) -> int | None:
    """Return the layer in a name of a form with {n}; None where it is of another form."""
    match = re.fullmatch(re.escape(form).replace(r"\{n\}", r"(\d+)"), name)
    return int(match[1]) if match else None


def _module(blocks: str, layer: int | str, module: str) -> str:
    return f"{blocks}.{layer}.{module}" if module else f"{blocks}.{layer}"


LLAMA = Names()
"""What is meant where no model says otherwise."""


def ordinal(number: int) -> str:
    """Return 1st, 2nd, 3rd, 4th, 11th, ..."""
    if 10 <= number % 100 <= 20:
        return f"{number}th"
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th') }"


def describe_layer(layer: int, n_layers: int) -> str:
    """Return both numberings of a 0-based layer."""
    return f"layer {layer} (0-based; {ordinal(layer + 1)} of {n_layers})"


def module_layer(name: str) -> int | None:
    """Return the 0-based layer that a module's or weight's dotted name speaks of, or None."""
    match = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(match[1]) if match else None


def inside(module: str, point: Hookpoint) -> bool:
    """Return whether a module, by its dotted name, works on what a place is the output of.

    Of an architecture that calls its attention or MLP something unusual, none is.
    """
    if module_layer(module) != point.layer:
        return False
    site = next((out for out, post in POST.items() if post == point.site), point.site)
    parts = (SITES[site].module, *MODULES.get(site, ()))
    return any(f"{_module('', point.layer, part)}." in f".{module}" for part in parts)


def list_layers(layers: Sequence[int], *, one_based: bool = False) -> str:
    """Return 0-based layers in a few words: "layer 3, 7"."""
    return f"layer {', '.join(str(layer + one_based) for layer in layers)}"


def parse_hookpoint(name: str) -> Hookpoint:
    """Read a hookpoint from any of the projects' names, as they are meant in a Llama shape.

    `Names.parse` knows what they mean in one architecture.

    Raises:
        BadInputError: the name is of no known form.
    """
    for site in SITES.values():
        modules = (site.module, *MODULES.get(site.name, ()))
        forms = [_module(blocks, "{n}", module) for blocks in BLOCKS for module in modules]
        for form in (site.transformer_lens, site.saelens, *forms):
            if (layer := _layer(form, name)) is not None:
                return Hookpoint(layer, site.name)
    raise BadInputError(
        f"unknown hookpoint {name!r}; use for example blocks.12.hook_mlp_out, layers.12.mlp "
        "or model.layers.12"
    )


def parse_layer(text: str | int, n_layers: int) -> int:
    """Read one layer: "12" is 0-based, "13th" is 1-based.

    Raises:
        BadInputError: not a layer, or outside the model.
    """
    text = str(text).strip()
    match = re.fullmatch(r"(\d{1,4})(st|nd|rd|th)?", text)
    if not match:
        raise BadInputError(f"layer {text!r} is not a layer; use 12 (0-based) or 13th (1-based)")
    layer = int(match[1]) - (1 if match[2] else 0)
    if not 0 <= layer < n_layers:
        raise BadInputError(
            f"layer {text!r} is out of range: the model has {n_layers} layers, "
            f"0 to {n_layers - 1} (0-based) or 1st to {ordinal(n_layers)}"
        )
    return layer


def check_layers(spec: str, n_layers: int = MOST_LAYERS) -> None:
    """Raise BadInputError where a text cannot name layers, of so many or whatever the model."""
    parse_layers(spec, n_layers)


def check_layer(text: str, n_layers: int = MOST_LAYERS) -> None:
    """Raise BadInputError where a text is neither auto nor a layer, of so many or of any model."""
    if text != "auto":
        parse_layer(text, n_layers)


def adapted_layers(spec: str, n_layers: int) -> list[int]:
    """Read which layers get adapters: "all", "middle", or a set as `parse_layers` reads it.

    "middle" is the block between 20 and 80 % of the depth (arXiv 2604.11838); a layer l of n is in
    it where its middle, (l + 1/2) / n, is, which is our reading of the borders.

    Returns:
        Sorted distinct 0-based layers.

    Raises:
        BadInputError: not a range, or a layer outside the model.
    """
    if spec == "middle":
        return [i for i in range(n_layers) if 2 * n_layers <= 10 * i + 5 <= 8 * n_layers]
    return parse_layers(spec, n_layers)


def check_adapted_layers(spec: str, n_layers: int = MOST_LAYERS) -> None:
    """Raise BadInputError where a text names no layers for adapters, of so many or of any model."""
    adapted_layers(spec, n_layers)


def _check_wildcard(spec: str) -> None:
    try:
        parse_hookpoint(spec.replace("*", "0"))
    except BadInputError as error:
        raise BadInputError(
            f"layers {spec!r} are no hookpoint with a wildcard; use all or layers.*.mlp"
        ) from error


def trainable_layers(n_layers: int) -> list[int]:
    """Return the default candidates: all layers but the first and the last (paper, section 5)."""
    return list(range(1, n_layers - 1)) if n_layers > 2 else list(range(n_layers))


def parse_feature(text: str, n_layers: int) -> tuple[int, int]:
    """Read LAYER:FEATURE; the layer is 0-based, or 1-based as in 13th:62.

    Raises:
        BadInputError: it has no such form, or the layer is outside the model.
    """
    layer, _, feature = text.partition(":")
    if not re.fullmatch(r"\s*\d{1,9}\s*", feature, re.ASCII):
        raise BadInputError(
            f"feature {text!r} is none; write LAYER:FEATURE, for example 5:62 or 6th:62"
        )
    return parse_layer(layer, n_layers), int(feature)


def parse_layers(spec: str | Sequence[int] | None, n_layers: int) -> list[int]:
    """Read a set of layers: None or "default", "all", "1-26", "3,5,8th", "layers.*.mlp".

    Returns:
        Sorted distinct 0-based layers.

    Raises:
        BadInputError: not a range, or a layer outside the model.
    """
    if spec is None or spec == "default":
        return trainable_layers(n_layers)
    if not isinstance(spec, str):
        return sorted({parse_layer(layer, n_layers) for layer in spec})
    if spec == "all" or "*" in spec:
        if "*" in spec:
            _check_wildcard(spec)
        return list(range(n_layers))
    chosen: set[int] = set()
    for part in spec.split(","):
        first, dash, last = part.strip().partition("-")
        if not dash:
            chosen.add(
                parse_hookpoint(first).layer if "." in first else parse_layer(first, n_layers)
            )
            continue
        low, high = parse_layer(first, n_layers), parse_layer(last, n_layers)
        if low > high:
            raise BadInputError(f"layers {part!r} run backwards; write {last}-{first}")
        chosen.update(range(low, high + 1))
    if outside := [layer for layer in chosen if layer >= n_layers]:
        parse_layer(outside[0], n_layers)
    return sorted(chosen)
