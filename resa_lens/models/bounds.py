"""What a model can read: token ids within its embedding, and no more tokens than positions.

Importing it loads no torch: `resa-lens doctor` reads a folder by it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resa_lens.errors import BadInputError
from resa_lens.texts.prompts import THINK_CLOSE, THINK_OPEN, resolve_system_prompt

if TYPE_CHECKING:
    from torch import Tensor, nn

TAGS = (THINK_OPEN, THINK_CLOSE)


def check_tags(where: str, ids: Mapping[str, int], rows: int) -> None:
    """Raise BadInputError where a think tag is a token that the embedding has no row for."""
    for tag in TAGS:
        if (number := ids.get(tag, -1)) >= rows:
            raise BadInputError(
                f"{where}: the tokenizer's {tag} is token {number}, the model has {rows} "
                f"embeddings (0 to {rows - 1}); resize them (resize_token_embeddings) and save the "
                "model again"
            )


def tag_ids(folder: Path) -> dict[str, int]:
    """Return the ids of the think tags that a folder's tokenizer has as one token."""
    try:
        saved = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = saved["model"]["vocab"]
        single = {token["content"]: int(token["id"]) for token in saved.get("added_tokens", ())}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    if isinstance(vocabulary, dict):
        single = {**{tag: vocabulary[tag] for tag in TAGS if tag in vocabulary}, **single}
    return {tag: single[tag] for tag in TAGS if tag in single}


def prompt_tokens(folder: Path) -> int | None:
    """Return the tokens of the prompt r1 by a folder's tokenizer; None where it is of another kind.

    Nothing of the model is loaded for it.
    """
    from tokenizers import Tokenizer

    if not (folder / "tokenizer.json").exists():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # The package raises nothing narrower.
    except Exception:  # noqa: BLE001 - loading the model says what is wrong
        return None
    return len(tokenizer.encode(str(resolve_system_prompt("r1"))).ids)


def check_length(model: Any, tokens: int) -> None:
    """Raise BadInputError where a text has more tokens than a model has learned positions.

    Of an `UnloadedModel` it is not known whether it learned them.
    """
    loaded = getattr(model, "model", None)
    if loaded is not None and (positions := positions_of(loaded)) and tokens > positions[1]:
        raise BadInputError(
            f"{model.name} has {positions[1]} learned positions, the text has {tokens} tokens; use "
            "a shorter one (--prompt short), or a model with more"
        )


def check_shapes(source: Any, target: Any) -> None:
    """Raise BadInputError where SAEs of one model cannot be inserted into another one.

    Args:
        source: a `Model` or an `UnloadedModel`.
        target: the same.
    """
    if (source.d_model, source.n_layers) != (target.d_model, target.n_layers):
        raise BadInputError(
            f"source {source.name} has {source.n_layers} layers x {source.d_model}, target "
            f"{target.name} {target.n_layers} x {target.d_model}; they must be of one shape"
        )


def positions_of(model: Any) -> tuple[nn.Module, int] | None:
    """Return the embedding of learned positions and how many there are; None without such."""
    from torch import nn

    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        # The bridge puts an infix behind the names.
        learned = isinstance(module, nn.Embedding) and ("pos" in name or "wpe" in name.split("."))
        if learned and longest is not None and module.num_embeddings >= longest:
            return module, int(longest)
    return None


def guard(model: Any, tokenizer: Any, name: str) -> None:
    """Let the model refuse, in one line, what lies beyond its embedding or its positions.

    Only a model whose tokenizer has more tokens than it has rows, or whose positions are learned,
    gets a check at its forward pass.

    Raises:
        BadInputError: a think tag is a token beyond the embedding.
    """
    embedding = model.get_input_embeddings()
    rows = int(embedding.weight.shape[0])
    known = tokenizer.get_vocab()
    check_tags(name, {tag: known[tag] for tag in TAGS if tag in known}, rows)
    if max(known.values(), default=0) >= rows:
        embedding.register_forward_pre_hook(partial(_check_ids, name, tokenizer, rows))
    if positions := positions_of(model):
        module, longest = positions
        offset = int(module.num_embeddings) - longest  # pyright: ignore
        module.register_forward_pre_hook(
            partial(_check_positions, name, longest, offset), with_kwargs=True
        )


def _check_ids(name: str, tokenizer: Any, rows: int, module: Any, args: tuple[Tensor, ...]) -> None:
    if args and args[0].numel() and (largest := int(args[0].max())) >= rows:
        raise BadInputError(
            f"{name}: token {tokenizer.convert_ids_to_tokens(largest)!r} is {largest}, the model "
            f"has {rows} embeddings (0 to {rows - 1}); resize them and save the model again"
        )


def _check_positions(
    name: str,
    longest: int,
    offset: int,
    module: Any,
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    positions = options.get("position_ids")
    if positions is None and not offset and args:
        positions = args[0]
    if positions is not None:
        tokens = int(positions.max()) + 1 if positions.numel() else 0
    else:
        # OPT's counts the tokens of its mask.
        tokens = args[0].shape[-1] if args else 0
    if tokens > longest:
        raise BadInputError(
            f"{name} has {longest} learned positions, and a text of {tokens} tokens or more was to "
            "be read; use shorter texts (--prompt, --max-new-tokens), or a model with more"
        )
