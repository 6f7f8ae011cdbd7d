"""The prompt-only, think-tag exclusive feature counter (paper, section 5; spec, section 4).

The system prompt that contains the tags goes through the model once.  A reasoning feature of a
layer is an SAE feature that is active at `<think>` and at `</think>` and at no other token of the
prompt.  What the paper leaves open is an option here; the strict rule is never loosened to get a
count: the other rules stand beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from resa_lens import prompts
from resa_lens.activations import stream_activations
from resa_lens.errors import BadInputError
from resa_lens.features.checks import check_features
from resa_lens.hookpoints import Hookpoint
from resa_lens.models import Model
from resa_lens.phases import tag_spans
from resa_lens.saes.coder import SparseActs, SparseCoder, encode

RULES: dict[str, str] = {
    "all": "active at every occurrence of <think> and of </think>, and at no other token",
    "any": "active at one or more occurrences of each tag, and at no other token",
    "either": "active at one or more occurrences of either tag, and at no other token",
}
"""The counting rules; `all` is the paper's as the spec states it."""


@dataclass(frozen=True)
class CountConfig:
    """What the paper leaves open, with the stated defaults."""

    prompt: str = "r1"
    """A name in prompts.SYSTEM_PROMPTS, a text, or @file."""
    chat_template: bool = False
    """Whether the prompt goes through the tokenizer's chat template as the system message."""
    open_tag: str = prompts.THINK_OPEN
    close_tag: str = prompts.THINK_CLOSE
    threshold: float = 0.0
    """A feature is active where its value after the top-k is above this."""
    ignore_first: bool = False
    """Leave the first position (beginning of sequence, an attention sink) out of "other"."""


@dataclass(frozen=True)
class TaggedPrompt:
    """The prompt's tokens, and which of them belong to each occurrence of the tags."""

    text: str
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    open_spans: tuple[tuple[int, ...], ...]
    """Token positions of each occurrence of the opening tag."""
    close_spans: tuple[tuple[int, ...], ...]

    @property
    def others(self) -> list[int]:
        """Positions that belong to no occurrence of a tag."""
        inside = {p for span in (*self.open_spans, *self.close_spans) for p in span}
        return [p for p in range(len(self.ids)) if p not in inside]


@dataclass(frozen=True)
class LayerCount:
    """The features of one layer that each rule names."""

    layer: int
    features: Mapping[str, tuple[int, ...]]
    active: int
    """Features active at one token of the prompt or more: the base of the counts."""

    def to_dict(self) -> dict[str, Any]:
        """Return layer and the count of each rule."""
        return {"layer": self.layer, **{rule: len(self.features[rule]) for rule in RULES}}


@dataclass(frozen=True)
class FeatureCounts:
    """Counts at every layer, with the prompt they were taken on."""

    prompt: TaggedPrompt
    layers: tuple[LayerCount, ...]
    config: CountConfig = field(default_factory=CountConfig)

    def table(self, rule: str = "all") -> dict[int, int]:
        """Return {0-based layer: count} of one rule.

        Raises:
            BadInputError: no such rule.
        """
        if rule not in RULES:
            raise BadInputError(f"rule {rule!r} is unknown; use {', '.join(RULES)}")
        return {item.layer: len(item.features[rule]) for item in self.layers}


def tag_prompt(model: Model, config: CountConfig) -> TaggedPrompt:
    """Tokenise the prompt and find the tags' tokens by character spans.

    A token belongs to an occurrence when it shares a character with it, so tags of several tokens
    work, and so does a token that reaches over the tag's edge.

    Raises:
        BadInputError: no tag in the prompt, no chat template, or a tokenizer without offsets.
    """
    return tag_text(model, prompts.resolve_system_prompt(config.prompt), config)


def tag_text(model: Model, text: str, config: CountConfig) -> TaggedPrompt:
    """Tag a text as `tag_prompt` tags the configuration's prompt.

    Raises:
        BadInputError: as `tag_prompt`.
    """
    tokenizer: Any = model.tokenizer
    for tag in (config.open_tag, config.close_tag):
        if not tag or tag not in text:
            shown = text if len(text) < 60 else text[:57] + "..."
            raise BadInputError(
                f"the prompt {shown!r} has no {tag or 'tag'}; use one that contains "
                f"{config.open_tag} and {config.close_tag}, for example --prompt r1"
            )
    if config.chat_template:
        if not tokenizer.chat_template:
            raise BadInputError(f"{model.name} has no chat template; count on the bare text")
        text = tokenizer.apply_chat_template(
            [{"role": "system", "content": text}], tokenize=False, add_generation_prompt=False
        )
    if not tokenizer.is_fast:
        raise BadInputError(f"{model.name}: its tokenizer gives no offsets; a fast one is needed")
    # A chat template writes the beginning-of-sequence token itself.
    encoded = tokenizer(
        text, return_offsets_mapping=True, add_special_tokens=not config.chat_template
    )
    offsets = encoded["offset_mapping"]
    ids = tuple(int(i) for i in encoded["input_ids"])

    opened, closed = (tag_spans(text, tag, offsets) for tag in (config.open_tag, config.close_tag))
    for tag, found in ((config.open_tag, opened), (config.close_tag, closed)):
        if not found:
            raise BadInputError(
                f"the chat template of {model.name} drops {tag} from the system message; "
                "count on the bare text"
            )
    return TaggedPrompt(
        text=text,
        ids=ids,
        tokens=tuple(tokenizer.convert_ids_to_tokens(list(ids))),
        open_spans=opened,
        close_spans=closed,
    )


def exclusive_features(
    acts: SparseActs, prompt: TaggedPrompt, *, threshold: float = 0.0, ignore_first: bool = False
) -> dict[str, tuple[int, ...]]:
    """Apply every rule to the active latents of one prompt.

    Args:
        acts: active latents; row i is the prompt's token i.
        prompt: the tags' positions.
        threshold: active means above this.
        ignore_first: whether the first position is left out of the other tokens.

    Returns:
        {rule: sorted feature indices}.
    """
    # Sparse in, one boolean row an occurrence out: [occurrence, d_sae], never [token, d_sae].
    above = acts.values > threshold
    rows, latents = acts.rows[above], acts.latents[above]

    def active_in(positions: list[int] | tuple[int, ...]) -> Bool[Tensor, " d_sae"]:
        hit = torch.zeros(acts.d_sae, dtype=torch.bool)
        wanted = torch.isin(rows, torch.tensor(positions, dtype=rows.dtype, device=rows.device))
        hit[latents[wanted].cpu()] = True
        return hit

    opened = torch.stack([active_in(span) for span in prompt.open_spans])
    closed = torch.stack([active_in(span) for span in prompt.close_spans])
    others = [p for p in prompt.others if p != 0 or not ignore_first]
    free = ~active_in(others)
    masks = {
        "all": opened.all(0) & closed.all(0) & free,
        "any": opened.any(0) & closed.any(0) & free,
        "either": (opened.any(0) | closed.any(0)) & free,
    }
    return {rule: tuple(mask.nonzero()[:, 0].tolist()) for rule, mask in masks.items()}


def count_features(
    model: Model, coders: Mapping[Hookpoint, SparseCoder], config: CountConfig | None = None
) -> FeatureCounts:
    """Count the reasoning features of every layer that has an SAE, by every rule.

    Raises:
        BadInputError: a prompt without the tags, or an SAE of another width.
    """
    config = config or CountConfig()
    prompt = tag_prompt(model, config)
    ids = torch.tensor([prompt.ids])
    for point in coders:
        check_features(model, point, (), coders)
    layers = []
    batch = next(iter(stream_activations(model, [ids], list(coders))))
    for point, coder in sorted(coders.items()):
        x: Float[Tensor, "position d_model"] = batch.acts[point][0].float()
        acts = encode(coder, x)
        features = exclusive_features(
            acts, prompt, threshold=config.threshold, ignore_first=config.ignore_first
        )
        seen = acts.latents[acts.values > config.threshold].unique().numel()
        layers.append(LayerCount(point.layer, features, seen))
    return FeatureCounts(prompt, tuple(layers), config)
