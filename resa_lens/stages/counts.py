"""Think-tag exclusive features, counted at every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from resa_lens.artifacts.artifact import Artifact
from resa_lens.artifacts.kinds.counts import Counts, Features
from resa_lens.artifacts.stage import Context, Draft
from resa_lens.config import config_dict
from resa_lens.errors import BadInputError
from resa_lens.features.exclusive import (
    RULES,
    CountConfig,
    FeatureCounts,
    LayerCount,
    count_features,
    tag_prompt,
)
from resa_lens.models.host import Model
from resa_lens.saes.baselines import random_coder
from resa_lens.stages.saes import SaeRun
from resa_lens.texts.prompts import resolve_system_prompt


@dataclass(frozen=True)
class CountRun:
    """Counted features, and the artifact that holds them."""

    artifact: Artifact
    counts: FeatureCounts


def count_run(
    ctx: Context,
    model: Model,
    saes: SaeRun,
    config: CountConfig,
    layers: Sequence[int] | None,
    *,
    control: str | None = None,
) -> CountRun:
    """Count the exclusive features at the layers, or read the finished counts.

    With control "random" every SAE gives way to random directions of its size and k: the count that
    chance and the tokens' geometry alone would give.

    Raises:
        BadInputError: an unknown control, a prompt without the tags, or a layer without SAE.
    """
    if control not in (None, "random"):
        raise BadInputError(
            f"control {control!r} is unknown; use random (shuffled decoders count the same, noise "
            "and PCA have no latents)"
        )
    prompt = tag_prompt(model, config)
    ctx.note_once(prompt.notes)
    places = sorted(layer for layer in saes.layers if layers is None or layer in layers)
    drawn: dict[str, Any] = {"control": control, "seed": ctx.seed} if control else {}
    if prompt.shared:
        # Counted for both tags by earlier versions: those are other counts.
        drawn["shared_tokens"] = "neither"
    stage = ctx.stage(
        Counts,
        model,
        name=saes.site,
        config={"count": config, "layers": places, **drawn},
        parents={"saes": saes.parent(places)},
        settings={
            # The text itself: a file named by @path may change.
            "count": {**config_dict(config), "prompt": resolve_system_prompt(config.prompt)},
            "saes": saes.relative,
            "layers": places,
            **({"control": control} if control else {}),
        },
    )

    def work(draft: Draft) -> None:
        # Encoders alone, half of the files: one, and the next one while it loads.  A random coder
        # stands beside the one whose size it has, with both of its matrices and their draws.
        largest = max(saes.size_mb(places).values())
        draft.expect((2.5 if control else 1) * largest, 0)
        coders = saes.each(model, layers, decoder=False)
        if control:
            coders = replace(coders, control=partial(random_coder, seed=ctx.seed))
        counts = count_features(model, coders, config)
        draft.results = {
            "layers": [c.to_dict() for c in counts.layers],
            "site": saes.site,
            "model": model.name,
            "n_layers": model.n_layers,
            "warnings": list(saes.warnings),
            "control": control,
        }
        draft.json(
            "features.json",
            {
                "rules": RULES,
                "prompt": counts.prompt.text,
                "tokens": counts.prompt.tokens,
                "open_spans": counts.prompt.open_spans,
                "close_spans": counts.prompt.close_spans,
                "shared": counts.prompt.shared,
                "layers": [
                    {
                        "layer": c.layer,
                        "active": c.active,
                        "features": c.features,
                        "shared": c.shared,
                    }
                    for c in counts.layers
                ],
            },
        )

    artifact = stage.obtain(work)
    stored = artifact.read("features.json", Features)
    counted = tuple(
        LayerCount(
            row.layer,
            {rule: tuple(named) for rule, named in row.features.items()},
            row.active,
            row.shared,
        )
        for row in stored.layers
    )
    return CountRun(artifact, FeatureCounts(prompt, counted, config))
