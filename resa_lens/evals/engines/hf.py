"""Generation with transformers in process, so torch hooks on the model work.

The decoding loop is our own: a row that has ended leaves the batch, so one answer that never ends
costs little; every document has its own random stream, so that its answer does not depend on its
neighbours; and neither the model's nor the tokenizer's settings are touched.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache

from resa_lens.errors import BadInputError, RunFailedError
from resa_lens.evals.engines.base import (
    Answered,
    Generation,
    GenerationConfig,
    GenerationHooks,
    Progress,
)
from resa_lens.evals.engines.text import end_ids, finish, stopped, text_of
from resa_lens.machine.determinism import cumulative_sum
from resa_lens.models.files import context_of
from resa_lens.models.grouped import grouped_queries
from resa_lens.texts.phases import PHASES, tag_phases
from resa_lens.texts.prompts import THINK_CLOSE, THINK_OPEN

LIVE_SHARE = 0.8
"""A batch is cut down to its unfinished rows when their share is at most this."""
PROBE_DOCUMENTS, PROBE_STEPS = 8, 4
"""Of the threads' probe: few enough to take a second, where a step of a model takes 0.1 s."""


def longest_first(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Return the indices of prompts' tokens in the order in which the engine answers them.

    Too little memory shows at once, and neighbours need little padding.
    """
    return sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))


class HFEngine:
    """Generates with a transformers causal language model, plain or wrapped by PEFT, in process.

    Args:
        model: any causal language model that takes `position_ids` and `past_key_values`.
        tokenizer: its tokenizer; prompts are tokenised with the special tokens it adds by default.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._ends = end_ids(model, tokenizer)
        self._enders: dict[tuple[str, ...], Tensor] = {}

    def generate(
        self,
        prompts: Sequence[str],
        config: GenerationConfig,
        progress: Progress | None = None,
        *,
        streams: Sequence[tuple[int, ...]] | None = None,
        answered: Answered | None = None,
        hooks: GenerationHooks | None = None,
    ) -> list[Generation]:
        """Return one generation a prompt, in the prompts' order.

        Args:
            prompts: the texts to continue.
            config: lengths, sampling, stop strings.
            progress: called with the number of finished documents whenever it grows.
            streams: what names each document's random stream besides the seed; its index by
                default.  A trailing 0 changes nothing: (3,) and (3, 0) are the same stream.
            answered: called with each document's index and generation as it ends.
            hooks: told before each forward pass what it reads.

        Raises:
            BadInputError: a prompt has no tokens or as many as the model reads, the numbers of
                prompts and streams differ, or the tokenizer gives no offsets, which `hooks` need.
            RunFailedError: the model's logits are not numbers.
        """
        names = [(i,) for i in range(len(prompts))] if streams is None else list(streams)
        if len(names) != len(prompts):
            raise BadInputError(f"{len(names)} streams for {len(prompts)} prompts; give one each")
        if not prompts:
            return []
        encoded: list[list[int]] = self.tokenizer(list(prompts))["input_ids"]
        if empty := [i for i, ids in enumerate(encoded) if not ids]:
            raise BadInputError(f"prompt {empty[0]} has no tokens: {prompts[empty[0]]!r}")
        longest = context_of(self.model.config)
        if longest and (over := [i for i, ids in enumerate(encoded) if len(ids) >= longest]):
            raise BadInputError(
                f"prompt {over[0]} has {len(encoded[over[0]])} tokens and the model reads "
                f"{longest} in all: {prompts[over[0]][:60]!r}"
            )
        order = longest_first(encoded)
        results: dict[int, Generation] = {}
        with _evaluating(self.model), grouped_queries(), torch.inference_mode():
            for start in range(0, len(order), config.batch_size):
                rows = order[start : start + config.batch_size]
                batch = [encoded[i] for i in rows]
                draws = [_uniforms(config, names[i]) for i in rows]
                watch = None
                if hooks is not None:
                    watch = _Watch(hooks, self, rows, [prompts[i] for i in rows])
                for row, generation in self._decode(batch, draws, config, watch):
                    results[rows[row]] = generation
                    if answered is not None:
                        answered(rows[row], generation)
                    if progress is not None:
                        progress(len(results))
        return [results[i] for i in range(len(prompts))]

    def _decode(
        self,
        batch: list[list[int]],
        draws: list[np.ndarray],
        config: GenerationConfig,
        watch: _Watch | None,
    ) -> Iterator[tuple[int, Generation]]:
        """Yield (row, generation) as the rows of one batch end."""
        device = next(self.model.parameters()).device
        # A masked position's token does not matter: any id that exists pads.
        input_BS, mask_BS = _left_padded(batch, self._ends[0] if self._ends else 0, device)
        position_BS = (mask_BS.cumsum(1) - 1).clamp(min=0)
        enders = self._possible_enders(config.stop)
        cache = DynamicCache(config=self.model.config)
        generated: list[list[int]] = [[] for _ in batch]
        rows = list(range(len(batch)))  # the batch's rows still computed
        context = context_of(self.model.config) or config.max_new_tokens + max(map(len, batch))
        room = [min(config.max_new_tokens, context - len(ids)) for ids in batch]
        live = set(rows)
        began = time.monotonic()
        for step in range(max(room)):
            if watch is not None:
                watch.tell(rows, live, input_BS, position_BS)
            logits_BV = self.model(
                input_ids=input_BS,
                attention_mask=mask_BS,
                position_ids=position_BS,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            if step == 0 and bool(logits_BV.isnan().any()):
                raise RunFailedError("the model's logits are NaN; its weights are not usable")
            late = config.timeout is not None and time.monotonic() - began > config.timeout
            next_B = _choose(logits_BV, config, [draws[row][step] for row in rows])
            for row, token in zip(rows, next_B.tolist(), strict=True):
                if row not in live:
                    continue
                generated[row].append(token)
                ended = token in self._ends or (
                    bool(enders[token]) and stopped(self.tokenizer, generated[row], config.stop)
                )
                if ended or late or step + 1 == room[row]:
                    live.remove(row)
                    yield (
                        row,
                        finish(
                            self.tokenizer,
                            generated[row],
                            self._ends,
                            config.stop,
                            finished=ended,
                            timed_out=late and not ended,
                        ),
                    )
            if not live:
                return
            if len(live) <= LIVE_SHARE * len(rows):
                kept = [i for i, row in enumerate(rows) if row in live]
                index = torch.tensor(kept, device=device)
                cache.batch_select_indices(index)
                mask_BS, position_BS, next_B = mask_BS[index], position_BS[index], next_B[index]
                rows = [rows[i] for i in kept]
            input_BS = next_B[:, None]
            position_BS = position_BS[:, -1:] + 1
            mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(rows), 1)], dim=1)

    def _possible_enders(self, stop: tuple[str, ...]) -> Tensor:
        """Return a bool [vocabulary] of the tokens whose text can complete a stop string.

        Only after one of these is the text decoded: that keeps stop strings cheap and works for
        single tokens, several tokens, and tokens that carry more than the stop string's end.
        """
        if stop not in self._enders:
            size = max(self.model.config.get_text_config().vocab_size, len(self.tokenizer))
            last = {text[-1] for text in stop} | {"\ufffd"}  # a character's last bytes
            possible = torch.zeros(size, dtype=torch.bool)
            for token in range(len(self.tokenizer) if stop else 0):
                possible[token] = not last.isdisjoint(text_of(self.tokenizer, [token]))
            self._enders[stop] = possible
        return self._enders[stop]


def probe_threads(
    engine: HFEngine, prompts: Sequence[str], most: int
) -> tuple[int, dict[int, float]]:
    """Time a few steps with one thread and with `most`, and return the better number.

    Where other processes keep the cores busy, threads that wait for each other can be ten times
    slower than one, which no rule about the model's width can know.

    Args:
        engine: whose model runs; torch's number of threads is as before afterwards.
        prompts: a few of them are begun.
        most: threads that may be used.

    Returns:
        The number of threads, and the seconds measured by number of threads; a number that was
        stopped for being too slow has the seconds it had until then.
    """
    before = torch.get_num_threads()
    seconds: dict[int, float] = {}
    few = list(prompts[:PROBE_DOCUMENTS])
    config = GenerationConfig(max_new_tokens=PROBE_STEPS, stop=())
    try:
        for threads in sorted({1, most}):
            torch.set_num_threads(threads)
            began = time.perf_counter()
            limit = 2 * seconds[1] if seconds else None
            engine.generate(few, replace(config, timeout=limit))
            seconds[threads] = time.perf_counter() - began
    finally:
        torch.set_num_threads(before)
    # More threads must be worth it: a tie is noise, and one thread leaves cores to others.
    return (most if seconds[most] < 0.9 * seconds[1] else 1), seconds


class _Watch:
    """Follows the text of a batch's rows, to tell the hooks the phase of every input.

    As in `phases.tag_phases` the thoughts follow the last `<think>` of the prompt, or the first
    that the model writes, and `</think>` ends them.  What is written later cannot change the phase
    of a token that was read: another `<think>` among the thoughts is thought, one after them opens
    new ones.
    """

    def __init__(
        self,
        hooks: GenerationHooks,
        engine: HFEngine,
        names: Sequence[int],
        prompts: Sequence[str],
    ) -> None:
        if not engine.tokenizer.is_fast:
            raise BadInputError("the tokenizer gives no offsets; hooks by phase need a fast one")
        self.hooks, self.engine, self.names = hooks, engine, names
        # Not before the first token that can complete a tag is the text decoded.
        self.closers = engine._possible_enders((THINK_OPEN, THINK_CLOSE))
        encoded = engine.tokenizer(list(prompts), return_offsets_mapping=True)
        self.prompts = [
            tag_phases(text, offsets)
            for text, offsets in zip(prompts, encoded["offset_mapping"], strict=True)
        ]
        self.states = [
            _state(text, ids, offsets)
            for text, ids, offsets in zip(
                prompts, encoded["input_ids"], encoded["offset_mapping"], strict=True
            )
        ]
        self.started = False

    def tell(
        self,
        rows: Sequence[int],
        live: set[int],
        ids: Int[Tensor, "row position"],
        positions: Int[Tensor, "row position"],
    ) -> None:
        """Tell the hooks what comes next: the prompts at first, then a token a row."""
        phases = torch.full(ids.shape, -1)
        if self.started:
            tokens = ids[:, 0].tolist()
            places = [
                self._next(r, t) if r in live else -1 for r, t in zip(rows, tokens, strict=True)
            ]
            phases[:, 0] = torch.tensor(places)
        else:
            for row, known in enumerate(self.prompts):
                phases[row, phases.shape[1] - len(known) :] = torch.tensor(known)
        self.started = True
        self.hooks.before_forward(
            [self.names[row] for row in rows], positions, phases.to(ids.device)
        )

    def _next(self, row: int, token: int) -> int:
        phase, since = self.states[row]
        since.append(token)
        if self.closers[token]:
            thinking = PHASES[phase] == "think"
            tag = THINK_CLOSE if thinking else THINK_OPEN
            # Twice the characters: some tokens decode to nothing.
            if tag in text_of(self.engine.tokenizer, since[-2 * len(tag) :]):
                self.states[row] = (PHASES.index("answer" if thinking else "think"), [])
        return phase


def _state(
    text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]
) -> tuple[int, list[int]]:
    """Return the phase that goes on after a prompt, and the prompt's tokens that belong to it."""
    opened = text.rfind(THINK_OPEN)
    if opened < 0:
        return PHASES.index("prompt"), list(ids)
    begins = opened + len(THINK_OPEN)
    closed = text.find(THINK_CLOSE, begins)
    begins = closed + len(THINK_CLOSE) if closed >= 0 else begins
    since = [token for token, (first, _) in zip(ids, offsets, strict=True) if first >= begins]
    return PHASES.index("answer" if closed >= 0 else "think"), since


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Switch dropout off; afterwards every submodule has its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _uniforms(config: GenerationConfig, stream: tuple[int, ...]) -> np.ndarray:
    """Return the document's numbers in [0, 1), one a step: its random stream."""
    if config.temperature == 0:
        return np.zeros(config.max_new_tokens)
    return np.random.default_rng([config.seed, *stream]).random(config.max_new_tokens)


def _left_padded(batch: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask, [batch, longest]."""
    longest = max(map(len, batch))
    ids = torch.full((len(batch), longest), pad)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(batch):
        ids[row, longest - len(tokens) :] = torch.tensor(tokens)
        mask[row, longest - len(tokens) :] = 1
    return ids.to(device), mask.to(device)


def _choose(logits_BV: Tensor, config: GenerationConfig, draws: list[float]) -> Tensor:
    """Return the next token of each row: the largest logit, or the inverse of the CDF at its draw.

    With `top_p` < 1 only the smallest set of likeliest tokens that holds this mass is drawn from
    (nucleus sampling, arXiv 1904.09751, section 3.1).
    """
    if config.temperature == 0:
        return logits_BV.argmax(-1)
    # Accumulated in double precision, where the device has it.
    exact = torch.float32 if logits_BV.device.type == "mps" else torch.float64
    draw_B1 = torch.tensor(draws, dtype=exact, device=logits_BV.device)[:, None]
    probs_BV = (logits_BV.float() / config.temperature).softmax(-1)
    token_BV = None
    if config.top_p < 1:
        probs_BV, token_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
        # A token stays while the mass before it is below top_p; the likeliest always does.
        before_BV = cumulative_sum(probs_BV, dtype=exact) - probs_BV
        probs_BV = probs_BV.masked_fill(before_BV >= config.top_p, 0.0)
    cdf_BV = cumulative_sum(probs_BV, dtype=exact)
    # A draw is below 1, so the first value above draw x total belongs to a token with mass.
    index_B1 = torch.searchsorted(cdf_BV, draw_B1 * cdf_BV[:, -1:], right=True)
    index_B1 = index_B1.clamp(max=cdf_BV.shape[-1] - 1)
    return (index_B1 if token_BV is None else token_BV.gather(-1, index_B1))[:, 0]
