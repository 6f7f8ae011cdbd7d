"""What the scores of features rest on: sparse activations of labelled tokens, by document."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from resa_lens.errors import BadInputError
from resa_lens.features.exclusive import TaggedPrompt
from resa_lens.saes.coder import SparseActs
from resa_lens.texts.phases import tokens_within

REASONING_WORDS = (
    "alternatively",
    "hmm",
    "maybe",
    "wait",
    "perhaps",
    "let me",
    "therefore",
    "however",
    "but",
    "another",
)
"""The ten of arXiv 2503.18878, by its authors' list; here in any case."""
TINY_WORDS = ("=", ";")
"""For the bundled questions, whose steps hold no word: where a result is drawn, and where the next
step begins ("6*8=48; 22+48=70").  Of the questions only the equations hold a =, one each."""
WINDOW = (1, 2)
"""Tokens before and after a reasoning word that belong to it (arXiv 2503.18878)."""

Mask = NDArray[np.bool_]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class PromptActs:
    """What the exclusive rules look at: the tagged prompt's active latents."""

    acts: SparseActs
    prompt: TaggedPrompt
    threshold: float = 0.0
    ignore_first: bool = False


@dataclass(frozen=True)
class Evidence:
    """Activations of one layer on labelled text; documents lie end to end."""

    features: Ints
    """Those active at one token or more, sorted; the rows of `acts`."""
    acts: sparse.csr_array
    """[feature, token], values above zero."""
    reasoning: Mask
    """By token: reasoning text, else other text."""
    lengths: Ints
    """Tokens of each document."""
    d_sae: int
    words: tuple[str, ...] = ()
    windows: Mask = field(default_factory=lambda: np.zeros((0, 0), dtype=bool))
    """[word, token]: near an occurrence of the word."""
    prompt: PromptActs | None = None

    @cached_property
    def document(self) -> Ints:
        """The document of each token."""
        return np.repeat(np.arange(self.lengths.size), self.lengths)

    @cached_property
    def by_document(self) -> Ints:
        """Reasoning tokens of each document."""
        return np.bincount(self.document, self.reasoning, self.lengths.size).astype(np.int64)

    @property
    def design(self) -> str:
        """Which labels the null draws anew: "documents" where each holds one group alone."""
        single = (self.by_document == 0) | (self.by_document == self.lengths)
        return "documents" if single.all() else "phases"

    def sizes(self, part: Mask) -> dict[str, int]:
        """Return tokens, and documents with such tokens, of a part of the text and of the rest."""
        held = np.bincount(self.document, part, self.lengths.size)
        return {
            "reasoning_tokens": int(part.sum()),
            "other_tokens": int((~part).sum()),
            "reasoning_documents": int((held > 0).sum()),
            "other_documents": int((held < self.lengths).sum()),
        }


class Accumulator:
    """Collects `Evidence` batch by batch: 12 bytes an active latent (k 32: 400 a token)."""

    def __init__(self, d_sae: int, words: Sequence[str] = ()) -> None:
        self.d_sae, self.words = d_sae, tuple(words)
        self._acts: list[sparse.csr_array] = []
        self._labels: list[tuple[Mask, Ints, Mask]] = []

    def add(
        self,
        acts: SparseActs,
        reasoning: Bool[Tensor, " row"],
        documents: Int[Tensor, " row"],
        keep: Bool[Tensor, " row"] | None = None,
        windows: Bool[Tensor, "word row"] | None = None,
    ) -> None:
        """Take one batch in.

        Args:
            acts: active latents of the batch's tokens.
            reasoning: each token's group.
            documents: each token's document, a number of its own over all batches.
            keep: tokens to count; all by default.
            windows: the tokens near each reasoning word.
        """
        if windows is None:
            windows = torch.zeros(len(self.words), acts.n_rows, dtype=torch.bool)
        kept = (torch.ones(acts.n_rows, dtype=torch.bool) if keep is None else keep).cpu().numpy()
        self._acts.append(sparse_rows(acts)[kept])
        self._labels.append(
            (
                reasoning.cpu().numpy()[kept],
                documents.cpu().numpy()[kept],
                windows.cpu().numpy()[:, kept],
            )
        )

    def evidence(self, prompt: PromptActs | None = None) -> Evidence:
        """Return what was collected.

        Raises:
            BadInputError: no token, a group with fewer than two documents, or nothing active.
        """
        if not self._acts:
            raise BadInputError("no token was given; scores need reasoning text and other text")
        documents = np.concatenate([d for _, d, _ in self._labels])
        order = documents.argsort(kind="stable")
        acts = sparse.csr_array(sparse.csr_array(sparse.vstack(self._acts))[order].T)
        features = np.flatnonzero(np.diff(acts.indptr))
        made = Evidence(
            features=features,
            acts=acts[features],
            reasoning=np.concatenate([r for r, _, _ in self._labels])[order],
            lengths=np.unique(documents, return_counts=True)[1],
            d_sae=self.d_sae,
            words=self.words,
            windows=np.concatenate([w for _, _, w in self._labels], axis=1)[:, order],
            prompt=prompt,
        )
        sizes = made.sizes(made.reasoning)
        for group in ("reasoning", "other"):
            if (n := sizes[f"{group}_documents"]) < 2:
                raise BadInputError(
                    f"{n} document{'s hold' if n != 1 else ' holds'} {group} text: documents are "
                    "the unit of every p-value, so give two or more (more --tokens, other data)"
                )
        if not features.size:
            raise BadInputError("no feature is active on this text; there is nothing to score")
        return made


def shape_of(matrix: sparse.csr_array) -> tuple[int, int]:
    """Return rows and columns; scipy's stubs leave them open."""
    rows, columns = matrix.shape  # pyright: ignore[reportGeneralTypeIssues]
    return int(rows), int(columns)


def sparse_rows(acts: SparseActs) -> sparse.csr_array:
    """Return active latents as a sparse matrix [row, d_sae]."""
    found = acts.rows.cpu().numpy(), acts.latents.cpu().numpy()
    values = acts.values.float().cpu().numpy()
    above = values > 0
    return sparse.csr_array(
        (values[above], (found[0][above], found[1][above])), shape=(acts.n_rows, acts.d_sae)
    )


def word_windows(
    text: str,
    offsets: Sequence[tuple[int, int]],
    words: Sequence[str],
    window: tuple[int, int] = WINDOW,
) -> Bool[Tensor, "word token"]:
    """Mark the tokens near each reasoning word: its own, and some before and after.

    Words are found by characters, in any case, and not inside of other words.

    Args:
        text: of one document.
        offsets: first character and end of each token.
        words: what is looked for.
        window: tokens before and after.
    """
    marked = torch.zeros(len(words), len(offsets), dtype=torch.bool)
    for row, word in enumerate(words):
        for found in _pattern(word).finditer(text):
            if own := tokens_within(offsets, *found.span()):
                marked[row, max(0, own[0] - window[0]) : own[-1] + window[1] + 1] = True
    return marked


@cache
def _pattern(word: str) -> re.Pattern[str]:
    before = r"(?<!\w)" if re.match(r"\w", word) else ""
    after = r"(?!\w)" if re.search(r"\w$", word) else ""
    return re.compile(before + re.escape(word) + after, re.IGNORECASE)
