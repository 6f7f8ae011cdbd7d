"""The loss of a model on documents, by phase, with experts changed or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from resa_lens.experts.edits import Edit, editing
from resa_lens.experts.routers import Router
from resa_lens.experts.routing import Array, Texts, padded_batches
from resa_lens.features.interventions import Tracker
from resa_lens.models.host import Model
from resa_lens.stats import difference_from_sets, permutation_p_value, t_test
from resa_lens.texts.prompts import PHASES


@torch.no_grad()
def phase_losses(
    model: Model, texts: Texts, edits: Sequence[Edit] = (),
    routers: Mapping[int, Router] | None = None,
) -> Float[Array, "document phase"]:  # fmt: skip
    """Return each document's mean loss by phase, nats a token; NaN where it has no such token.

    A token's loss belongs to the phase of the token that is predicted.

    Args:
        model: the host.
        texts: the documents.
        edits: changes of experts.
        routers: of `find_routers`; needed with edits.
    """
    plain: Any = model.model
    total = np.zeros((texts.count, len(PHASES)))
    number = np.zeros_like(total)
    phases, documents = torch.from_numpy(texts.phases), torch.from_numpy(texts.documents)
    tracker = Tracker()
    with editing(model, edits, tracker, routers=routers if edits else {}):
        for ids, places in padded_batches(texts):
            real = places >= 0
            tracker.phases = torch.where(real, phases[places.clamp_min(0)], -1)
            logits = plain(input_ids=ids.to(model.device), use_cache=False).logits[:, :-1]
            following = ids[:, 1:].to(logits.device)
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), following.flatten(), reduction="none"
            )
            kept = real[:, 1:].flatten()
            at = places[:, 1:].flatten()[kept]
            key = (documents[at] * len(PHASES) + phases[at]).numpy()
            values = loss.cpu()[kept].double().numpy()
            total += np.bincount(key, values, total.size).reshape(total.shape)
            number += np.bincount(key, minlength=total.size).reshape(total.shape)
    with np.errstate(invalid="ignore"):
        return np.where(number > 0, total / number, np.nan)


def loss_change(
    before: Float[Array, "document phase"],
    after: Float[Array, "document phase"],
    drawn: Sequence[Float[Array, "document phase"]] = (),
) -> dict[str, Any]:
    """Compare losses document by document, and with those under random sets.

    Args:
        before: of the model as it is.
        after: with the chosen experts changed.
        drawn: with each random set changed.

    Returns:
        By phase: the mean change in nats a token, its 95 % interval and p over documents; with
        random sets their changes, and `rank_p`, (1 + sets whose change is at least as large in
        size) / (1 + sets), beside the change beyond their mean with its p over documents and sets.
    """
    rows: dict[str, Any] = {}
    for at, phase in enumerate(PHASES):
        kept = np.isfinite(before[:, at]) & np.isfinite(after[:, at])
        if kept.sum() < 2:
            continue
        change = (after - before)[kept, at]
        mean, ci, p_value = t_test(change) if change.any() else (0.0, (0.0, 0.0), 1.0)
        row: dict[str, Any] = {
            "change": mean, "ci": list(ci), "p_value": p_value, "documents": int(kept.sum()),
            "loss": float(before[kept, at].mean()),
        }  # fmt: skip
        if drawn:
            others = np.stack([(one - before)[kept, at] for one in drawn])
            each = others.mean(1)
            row["random"] = {
                "mean": float(each.mean()), "least": float(each.min()), "most": float(each.max()),
                "each": each.tolist(), "rank_p": permutation_p_value(abs(mean), np.abs(each)),
            }  # fmt: skip
            if len(drawn) > 1:
                beyond = difference_from_sets(change, others)
                row["random"] |= {"beyond": beyond.value, "beyond_p": beyond.p_value}
        rows[phase] = row
    return rows
