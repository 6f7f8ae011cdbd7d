"""The prompt-only, think-tag exclusive feature counter (paper, section 5; spec, section 4).

The system prompt that contains the tags goes through the model once.  A reasoning feature of a
layer is an SAE feature that is active at `<think>` and at `</think>` and at no other token of the
prompt.  What the paper leaves open is an option here; the strict rule is never loosened to get a
count: the other rules stand beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from resa_lens.errors import BadInputError
from resa_lens.features.checks import check_features
from resa_lens.features.config import RULES, CountConfig, check_active, check_tags
from resa_lens.features.config import check_rule as check_rule
from resa_lens.models.activations import stream_activations
from resa_lens.models.bounds import check_length
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model
from resa_lens.models.unloaded import UnloadedModel
from resa_lens.saes.coder import SparseActs, SparseCoder, encode
from resa_lens.texts import prompts
from resa_lens.texts.chat import render_chats
from resa_lens.texts.phases import tag_spans


@dataclass(frozen=True)
class TaggedPrompt:
    """The prompt's tokens, and which of them belong to each occurrence of the tags."""

    text: str
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    open_spans: tuple[tuple[int, ...], ...]
    """Token positions of each occurrence of the opening tag that are its alone."""
    close_spans: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...] = ()
    """What the chat template wrote otherwise than asked."""
    shared: tuple[int, ...] = ()
    """Tokens of two tags (`> </` is one in some vocabularies): they count for neither."""
    whole: tuple[tuple[tuple[int, ...], ...], ...] = ()
    """Where there are such, the spans of both tags with them."""

    @property
    def others(self) -> list[int]:
        """Positions that belong to no occurrence of a tag."""
        inside = {p for span in (*self.open_spans, *self.close_spans, self.shared) for p in span}
        return [p for p in range(len(self.ids)) if p not in inside]


@dataclass(frozen=True)
class LayerCount:
    """The features of one layer that each rule names."""

    layer: int
    features: Mapping[str, tuple[int, ...]]
    active: int
    """Features active at one token of the prompt or more: the base of the counts."""
    shared: Mapping[str, int] = field(default_factory=dict)
    """By rule, features that would be counted if a token of two tags counted for both."""

    def to_dict(self) -> dict[str, Any]:
        """Return layer and the count of each rule, and what rests on shared tokens, if any."""
        counts = {rule: len(self.features[rule]) for rule in RULES}
        return {"layer": self.layer, **counts, **({"shared": self.shared} if self.shared else {})}


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


def tag_prompt(model: Model | UnloadedModel, config: CountConfig) -> TaggedPrompt:
    """Tokenise the prompt and find the tags' tokens by character spans.

    A token belongs to an occurrence when it shares a character with it, so tags of several tokens
    work, and so does a token that reaches over the tag's edge.  One that belongs to two occurrences
    says of neither that a feature is active there.

    Raises:
        BadInputError: no tag in the prompt, a prompt longer than the model's positions, no chat
            template or one that fails, or a tokenizer without offsets.
    """
    return tag_text(model, prompts.resolve_system_prompt(config.prompt), config)


def tag_text(model: Model | UnloadedModel, text: str, config: CountConfig) -> TaggedPrompt:
    """Tag a text as `tag_prompt` tags the configuration's prompt.

    Raises:
        BadInputError: as `tag_prompt`.
    """
    tokenizer: Any = model.tokenizer
    check_tags(text, config.open_tag, config.close_tag)
    notes: list[str] = []
    if config.chat_template:
        if not tokenizer.chat_template:
            raise BadInputError(f"{model.name} has no chat template; count on the bare text")
        chat = [{"role": "system", "content": text}]
        (text,) = render_chats(tokenizer, [chat], generation=False, note=notes.append)
    if not tokenizer.is_fast:
        raise BadInputError(f"{model.name}: its tokenizer gives no offsets; a fast one is needed")
    # A chat template writes the beginning-of-sequence token itself.
    encoded = tokenizer(
        text, return_offsets_mapping=True, add_special_tokens=not config.chat_template
    )
    offsets = encoded["offset_mapping"]
    ids = tuple(int(i) for i in encoded["input_ids"])
    check_length(model, len(ids))
    opened, closed = (tag_spans(text, tag, offsets) for tag in (config.open_tag, config.close_tag))
    for tag, found in ((config.open_tag, opened), (config.close_tag, closed)):
        if not found:
            raise BadInputError(
                f"the chat template of {model.name} drops {tag} from its message; "
                "count on the bare text"
            )
    times = Counter(position for span in (*opened, *closed) for position in span)
    shared = tuple(sorted(position for position, count in times.items() if count > 1))
    own = [
        tuple(tuple(p for p in span if p not in shared) for span in spans)
        for spans in (opened, closed)
    ]
    return TaggedPrompt(
        text=text,
        ids=ids,
        tokens=tuple(tokenizer.convert_ids_to_tokens(list(ids))),
        open_spans=own[0],
        close_spans=own[1],
        notes=tuple(notes),
        shared=shared,
        whole=(opened, closed) if shared else (),
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

    Raises:
        BadInputError: a threshold that is negative or no finite number.
    """
    check_active(threshold)
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
    layers = []
    batch = next(iter(stream_activations(model, [ids], list(coders))))
    for point in sorted(coders):
        # One at a time: those of all layers of a large model are ten gigabytes.
        coder = coders[point]
        check_features(model, point, (), {point: coder})
        x: Float[Tensor, "position d_model"] = batch.acts[point][0].float()
        acts = encode(coder, x)
        options: dict[str, Any] = {
            "threshold": config.threshold,
            "ignore_first": config.ignore_first,
        }
        features = exclusive_features(acts, prompt, **options)
        seen = acts.latents[acts.values > config.threshold].unique().numel()
        shared = {}
        if prompt.shared:
            opened, closed = prompt.whole
            loose = exclusive_features(
                acts, replace(prompt, open_spans=opened, close_spans=closed), **options
            )
            shared = {rule: len(set(loose[rule]) - set(features[rule])) for rule in RULES}
        layers.append(LayerCount(point.layer, features, seen, shared))
        del coder
    return FeatureCounts(prompt, tuple(layers), config)
