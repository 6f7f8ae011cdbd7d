"""Experts switched off or on, or weighed otherwise, while the model runs.

| how | what it does |
|---|---|
| reroute | off before the choice: the next best expert takes the place; only tokens that used it |
| zero | its weight is 0: the same as an expert whose output weights are zero |
| zero-renorm | its weight is 0 and the others' grow to the old sum |
| on | chosen before all others, with its own weight |
| scale | its weight times beta |

A change of nothing puts no hook on the model, so no bit of it moves.  Where a router does not
renormalise its weights, a model built without an expert gives every token other weights; rerouting
changes only the tokens that used the expert, here as everywhere.

Sources: off and on after arXiv 2502.11096 and 2509.09660, scaling after arXiv 2505.14681.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from resa_lens.errors import BadInputError, RunFailedError
from resa_lens.experts.config import HOWS, How
from resa_lens.experts.routers import Router, find_routers, read_output
from resa_lens.features.interventions import Tracker
from resa_lens.models.host import Model
from resa_lens.texts.prompts import PHASES

NEED_RULE = ("reroute", "on")
"""Changes that choose anew, and so need the router's rule."""


@dataclass(frozen=True)
class Edit:
    """A change of some experts of some layers."""

    experts: Mapping[int, Sequence[int]]
    """Indices of experts by 0-based layer."""
    how: How = "reroute"
    beta: float = 1.0
    """Factor of `scale`; 1 changes nothing."""
    phases: tuple[str, ...] = PHASES
    """Names in `PHASES`: the tokens at which the experts are changed."""

    def __post_init__(self) -> None:
        """Check what can be checked without the model.

        Raises:
            BadInputError: an unknown way or phase, a repeated expert, or a beta that is negative or
                no number.
        """
        if self.how not in HOWS:
            raise BadInputError(f"how {self.how!r} is unknown; use {', '.join(HOWS)}")
        if not 0 <= self.beta < float("inf"):
            raise BadInputError(f"beta {self.beta} is out of range; give 0 (off) or more")
        if unknown := [phase for phase in self.phases if phase not in PHASES]:
            raise BadInputError(f"phase {unknown[0]!r} is unknown; use {', '.join(PHASES)}")
        for layer, chosen in self.experts.items():
            if twice := [e for e in chosen if list(chosen).count(e) > 1]:
                raise BadInputError(f"expert {layer}:{twice[0]} stands twice; name each once")

    @property
    def identity(self) -> bool:
        """Whether nothing changes."""
        nothing = not any(self.experts.values()) or not self.phases
        return nothing or (self.how == "scale" and self.beta == 1)


def check_edit(routers: Mapping[int, Router], edit: Edit) -> None:
    """Raise BadInputError where an edit does not fit a model's routers.

    A layer without experts, an index that no expert has, fewer than k experts left, more forced on
    than a token uses, or an unknown rule.
    """
    for layer, chosen in edit.experts.items():
        router = routers.get(layer)
        if router is None:
            listed = ", ".join(map(str, sorted(routers)))
            raise BadInputError(f"layer {layer} has no experts; layers with experts: {listed}")
        if wrong := [e for e in chosen if not 0 <= e < router.experts]:
            raise BadInputError(
                f"expert {layer}:{wrong[0]} does not exist; layer {layer} has experts 0 to "
                f"{router.experts - 1}"
            )
        if not chosen:
            continue
        if edit.how in NEED_RULE:
            router.refuse_without_rule(edit.how)
        if edit.how == "reroute" and router.experts - len(chosen) < router.k:
            raise BadInputError(
                f"layer {layer} would keep {router.experts - len(chosen)} of {router.experts} "
                f"experts and each token uses {router.k}; switch fewer off, or use zero"
            )
        if edit.how == "on" and len(chosen) > router.k:
            raise BadInputError(
                f"layer {layer}: {len(chosen)} experts on, and a token uses {router.k}; name fewer"
            )


def changed(
    output: tuple[Tensor, ...],
    router: Router,
    experts: Sequence[int],
    how: str,
    beta: float = 1.0,
    rows: Bool[Tensor, " token"] | None = None,
) -> tuple[Tensor, ...] | None:
    """Return a router's output with some experts changed, None where no token's is.

    Args:
        output: what the router returned; it is not written to.
        router: whose output it is.
        experts: indices.
        how: a name in `HOWS`.
        beta: factor of scale.
        rows: the tokens that may be changed; all by default.
    """
    routed = read_output(output, router.name)
    logits, weights, chosen = (output[i] for i in routed)
    index = torch.tensor(list(experts), device=chosen.device)
    uses = torch.isin(chosen, index)
    if how in NEED_RULE:
        assert router.rule is not None, "the edit was not checked"
        # Whoever used none of them keeps its very bits.
        touched = uses.any(-1) if how == "reroute" else uses.sum(-1) < len(index)
        touched = touched if rows is None else touched & rows
        if not touched.any():
            return None
        place = {"off": index} if how == "reroute" else {"on": index}
        anew, others = router.rule.choose(logits, chosen.shape[-1], router.bias, **place)
        weights_after = torch.where(touched[:, None], anew.to(weights.dtype), weights)
        experts_after = torch.where(touched[:, None], others.to(chosen.dtype), chosen)
    else:
        uses = uses if rows is None else uses & rows[:, None]
        if not uses.any():
            return None
        factor = 0.0 if how.startswith("zero") else beta
        experts_after, weights_after = chosen, torch.where(uses, weights * factor, weights)
        if how == "zero-renorm":
            before, after = weights.sum(-1, keepdim=True), weights_after.sum(-1, keepdim=True)
            # Where nothing is left there is nothing to scale.
            alive = uses.any(-1, keepdim=True) & (after.abs() > 1e-12)
            grown = weights_after * (before / torch.where(alive, after, torch.ones_like(after)))
            weights_after = torch.where(alive, grown, weights_after)
    parts = list(output)
    parts[routed.weights], parts[routed.experts] = weights_after, experts_after
    return tuple(parts)


@contextmanager
def editing(
    model: Model,
    edits: Sequence[Edit],
    tracker: Tracker | None = None,
    *,
    routers: Mapping[int, Router] | None = None,
) -> Iterator[Tracker]:
    """Let a model run with experts changed: whole documents, or generation with a cache.

    Args:
        model: the host, with or without its bridge.
        edits: what is changed; several of one layer act one after the other.
        tracker: knows the phases of the inputs of each pass; where an edit acts at some phases
            alone it must be given to the engine as hooks, or hold the phases of the documents.
        routers: of `find_routers`, where they are known.

    Raises:
        BadInputError: an edit does not fit the model; within, a search with beams is asked for.
        RunFailedError: within, a pass whose phases the tracker was not told.
    """
    known = routers if routers is not None else find_routers(model)
    tracker = tracker or Tracker()
    for edit in edits:
        check_edit(known, edit)
    handles = [
        known[layer].module.register_forward_hook(_hook(known[layer], edit, chosen, tracker))
        for edit in edits
        if not edit.identity
        for layer, chosen in edit.experts.items()
        if chosen
    ]
    try:
        with _without_beams(model.model):
            yield tracker
    finally:
        for handle in handles:
            handle.remove()


def _hook(router: Router, edit: Edit, chosen: Sequence[int], tracker: Tracker) -> Any:
    everywhere = set(edit.phases) == set(PHASES)
    phase_indices = torch.tensor([PHASES.index(phase) for phase in edit.phases])

    def hook(
        _module: nn.Module, _inputs: Any, output: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...] | None:
        rows = None
        if not everywhere:
            phases, tokens = tracker.phases, len(output[0])
            if phases is None or phases.numel() != tokens:
                known = "nothing" if phases is None else f"{phases.numel()}"
                raise RunFailedError(
                    f"the router reads {tokens} tokens and the tracker was told {known}; pass it "
                    "to the engine as hooks"
                )
            rows = torch.isin(phases.flatten().cpu(), phase_indices).to(output[0].device)
        return changed(output, router, chosen, edit.how, edit.beta, rows)

    return hook


@contextmanager
def _without_beams(model: Any) -> Iterator[None]:
    """Refuse searches that reorder the cache, of which phases per row know nothing."""
    own = model.generate

    def generate(*inputs: Any, **options: Any) -> Any:
        config = options.get("generation_config") or model.generation_config
        beams = options.get("num_beams", getattr(config, "num_beams", 1)) or 1
        if beams > 1:
            raise BadInputError(
                f"{beams} beams: experts are changed in greedy or sampled answers alone; use 1"
            )
        return own(*inputs, **options)

    model.generate = generate
    try:
        yield
    finally:
        del model.generate
