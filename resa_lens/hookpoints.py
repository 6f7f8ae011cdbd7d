"""One value for a place in the model: (layer, site), with every project's name for it.

Layers are 0-based inside; at the edge both numberings are shown.  A site is a member of the open
registry `SITES`, so further sites (mixture-of-experts routers) are one entry each.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from resa_lens.errors import BadInputError


@dataclass(frozen=True)
class Site:
    """How the projects name one site of layer {n}."""

    name: str
    transformer_lens: str
    huggingface: str
    sparsify: str
    what: str


SITES: dict[str, Site] = {
    site.name: site
    for site in (
        Site(
            "mlp_out",
            "blocks.{n}.hook_mlp_out",
            "model.layers.{n}.mlp",
            "layers.{n}.mlp",
            "output of the MLP, before it is added to the residual stream",
        ),
        Site(
            "resid_post",
            "blocks.{n}.hook_resid_post",
            "model.layers.{n}",
            "layers.{n}",
            "the block's output: the residual stream after the layer",
        ),
    )
}
DEFAULT_SITE = "mlp_out"

_ALIASES = {
    "mlp_out": ("blocks.{n}.mlp.hook_out", "gpt_neox.layers.{n}.mlp", "transformer.h.{n}.mlp"),
    "resid_post": ("blocks.{n}.hook_out", "gpt_neox.layers.{n}", "transformer.h.{n}"),
}


def site_named(name: str) -> Site:
    """Return the site; raise BadInputError naming the known ones."""
    if name not in SITES:
        raise BadInputError(f"unknown site {name!r}; choose from {', '.join(SITES)}")
    return SITES[name]


@dataclass(frozen=True, order=True)
class Hookpoint:
    """A layer (0-based) and a site."""

    layer: int
    site: str = DEFAULT_SITE

    def __post_init__(self) -> None:
        site_named(self.site)
        if self.layer < 0:
            raise BadInputError(f"layer {self.layer} is negative; layers count from 0")

    @property
    def transformer_lens(self) -> str:
        """TransformerLens' hook name, for example blocks.12.hook_mlp_out."""
        return SITES[self.site].transformer_lens.format(n=self.layer)

    @property
    def saelens(self) -> str:
        """SAELens' hook name: TransformerLens' own."""
        return self.transformer_lens

    @property
    def huggingface(self) -> str:
        """The module's name in a Llama-shaped transformers model."""
        return SITES[self.site].huggingface.format(n=self.layer)

    @property
    def sparsify(self) -> str:
        """Sparsify's hookpoint and folder name, for example layers.12.mlp."""
        return SITES[self.site].sparsify.format(n=self.layer)

    def describe(self, n_layers: int) -> str:
        """Return both numberings: "layer 12 (0-based; 13th of 28)"."""
        return describe_layer(self.layer, n_layers)


def ordinal(number: int) -> str:
    """Return 1st, 2nd, 3rd, 4th, 11th, ..."""
    if 10 <= number % 100 <= 20:
        return f"{number}th"
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th') }"


def describe_layer(layer: int, n_layers: int) -> str:
    """Return both numberings of a 0-based layer."""
    return f"layer {layer} (0-based; {ordinal(layer + 1)} of {n_layers})"


def parse_hookpoint(name: str) -> Hookpoint:
    """Read a hookpoint from any of the projects' names.

    Raises:
        BadInputError: the name is of no known form.
    """
    for site in SITES.values():
        forms = (site.transformer_lens, site.huggingface, site.sparsify, *_ALIASES[site.name])
        for form in forms:
            pattern = re.escape(form).replace(r"\{n\}", r"(\d+)")
            if found := re.fullmatch(pattern, name):
                return Hookpoint(int(found[1]), site.name)
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
    found = re.fullmatch(r"(\d+)(st|nd|rd|th)?", text)
    if not found:
        raise BadInputError(f"layer {text!r} is not a layer; use 12 (0-based) or 13th (1-based)")
    layer = int(found[1]) - (1 if found[2] else 0)
    if not 0 <= layer < n_layers:
        raise BadInputError(
            f"layer {text!r} is out of range: the model has {n_layers} layers, "
            f"0 to {n_layers - 1} (0-based) or 1st to {ordinal(n_layers)}"
        )
    return layer


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
