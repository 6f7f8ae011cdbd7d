"""Feature activity against a dense reference, and what may not happen on the way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from resa_lens.errors import BadInputError
from resa_lens.features.activity import (
    BINS,
    Activity,
    ActivityConfig,
    Tally,
    bin_edges,
    contexts_of,
    density,
    measure_activity,
    needed_bytes,
)
from resa_lens.models.activations import stream_activations
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.saes.baselines import random_coder
from resa_lens.saes.checkpoint import Checkpoints
from resa_lens.saes.coder import SparseActs, encode, new_coder
from resa_lens.texts.phases import PhasedBatch, phased_batches
from resa_lens.texts.prompts import document

SMALL = ActivityConfig(examples=3, before=2, after=1)
POINT = Hookpoint(0)


def sparse(dense: torch.Tensor) -> SparseActs:
    rows, latents = dense.nonzero(as_tuple=True)
    return SparseActs(rows, latents, dense[rows, latents], *dense.shape)


def drawn(seed: int, documents: int, length: int, d_sae: int = 11, first: int = 0):
    """A dense batch with few active latents, its phases and the numbers of its documents."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(documents * length, d_sae, generator=generator) * 4
    dense[torch.rand(dense.shape, generator=generator) < 0.7] = 0.0
    dense[:, 3] = 0.0  # never fires
    phases = torch.randint(3, (documents * length,), generator=generator)
    numbers = torch.arange(first, first + documents).repeat_interleave(length)
    return dense, phases, numbers


def unique(numbers: torch.Tensor, length: int) -> torch.Tensor:
    """A context of its own for every token."""
    return numbers * 1000 + torch.arange(len(numbers)) % length


BATCHES = [(0, 4, 5, 0), (1, 3, 8, 4), (2, 6, 2, 7)]
"""Seed, documents, length and first number of three batches."""


def add(tally: Tally, dense: torch.Tensor, phases, numbers, length: int, contexts=None) -> None:
    """Add a dense batch in which token i is the i-th of the vocabulary, modulo 7."""
    tokens = torch.arange(len(phases)) % 7
    contexts = unique(numbers, length) if contexts is None else contexts
    tally.add(sparse(dense), tokens, phases, numbers, contexts, length)


def filled(config: ActivityConfig = SMALL) -> tuple[Tally, list]:
    tally, held = Tally(11, config), []
    for seed, documents, length, first in BATCHES:
        batch = drawn(seed, documents, length, first=first)
        add(tally, *batch, length)
        held.append((*batch, length))
    return tally, held


def stays(held: list, feature: int, phase: int) -> list[list[tuple[float, int, int, list]]]:
    """Each stay of a feature in a phase of a document: its places as value, document, position and
    window."""
    found = []
    for dense, phases, numbers, length in held:
        columns = dense[:, feature].view(-1, length), phases.view(-1, length)
        for row, kinds, number in zip(*columns, numbers[::length].tolist(), strict=True):
            before = None
            for at in (row > 0).nonzero()[:, 0].tolist():
                if int(kinds[at]) != before:
                    found.append([])
                before = int(kinds[at])
                around = range(at - 2, at + 2)
                window = [float(row[i].half()) if 0 <= i < length else 0.0 for i in around]
                found[-1].append((float(row[at]), number, at, window, before))
    return [[place[:4] for place in stay] for stay in found if stay[0][4] == phase]


def test_figures_are_those_of_a_dense_pass():
    tally, held = filled()
    dense = torch.cat([b[0] for b in held])
    phases, numbers = (torch.cat([b[i] for b in held]) for i in (1, 2))
    for phase in range(3):
        part = dense[phases == phase]
        assert torch.equal(tally.fired[phase], (part > 0).sum(0))
        torch.testing.assert_close(tally.sums[phase], part.double().sum(0))
        torch.testing.assert_close(tally.maxima[phase], part.amax(0))
    fired = torch.stack([(dense[numbers == n] > 0).sum(0) for n in range(13)]).double()
    lengths = torch.bincount(numbers).double()
    assert torch.equal(tally.documents, (fired > 0).sum(0))
    torch.testing.assert_close(tally.squares, fired.square().sum(0))
    torch.testing.assert_close(tally.products, (fired * lengths[:, None]).sum(0))
    counts = np.stack([
        np.histogram(column[column > 0], bins=bin_edges().numpy())[0] for column in dense.mT.numpy()
    ])  # fmt: skip
    assert np.array_equal(tally.histogram.numpy(), counts)


def test_examples_are_the_strongest_places_of_each_phase_with_their_surroundings():
    tally, held = filled()
    kept = tally.examples
    for feature in range(11):
        for phase in range(3):
            found = sorted((max(stay) for stay in stays(held, feature, phase)), key=lambda p: -p[0])
            found, owner = found[:3], phase * 11 + feature
            assert kept.values[owner, : len(found)].tolist() == [f[0] for f in found]
            assert kept.documents[owner].tolist()[: len(found)] == [f[1] for f in found]
            assert kept.positions[owner].tolist()[: len(found)] == [f[2] for f in found]
            assert kept.windows[owner, : len(found)].tolist() == [f[3] for f in found]
            assert (kept.documents[owner, len(found) :] == -1).all()


def test_drawn_examples_are_places_at_which_the_feature_fires():
    tally, held = filled()
    kept = tally.examples
    for feature in range(11):
        for phase in range(3):
            # The drawn ones stand behind all of the strongest.
            there, owner = stays(held, feature, phase), (3 + phase) * 11 + feature
            n = int((kept.documents[owner] >= 0).sum())
            assert n == min(3, sum(map(len, there)))
            places = {place[1:3]: place for stay in there for place in stay}
            for slot in range(n):
                at = int(kept.documents[owner, slot]), int(kept.positions[owner, slot])
                value, *_, window = places.pop(at)  # no place twice
                assert kept.values[owner, slot] == value
                assert kept.windows[owner, slot].tolist() == window


def test_the_draw_does_not_look_at_the_activation():
    """One feature that fires in 4,000 documents, more strongly in later ones: chance is 2,000."""
    tally = Tally(1, replace(SMALL, examples=400))
    for first in range(0, 4000, 500):
        numbers = torch.arange(first, first + 500)
        zeros = torch.zeros(500).long()
        add(tally, 1.0 + numbers[:, None].float(), zeros, numbers, 1, numbers)
    assert len(tally.examples.documents[3].unique()) == 400
    mean = tally.examples.documents[3].double().mean()
    # Of 400 drawn without replacement: a standard error of 55.
    assert abs(float(mean) - 1999.5) < 3 * 55
    assert tally.examples.documents[0, :3].tolist() == [3999, 3998, 3997]


def test_tokens_at_which_a_feature_fires_are_counted():
    tally, held = filled()
    latents, tokens, counts, sums = tally.firing_tokens.table()
    dense = torch.cat([b[0] for b in held])
    vocabulary = torch.cat([torch.arange(len(b[1])) % 7 for b in held])
    for feature in range(11):
        mine = latents == feature
        assert counts[mine].tolist() == sorted(counts[mine].tolist(), reverse=True)
        found = {t: (c, v) for t, c, v in zip(
            *(part[mine].tolist() for part in (tokens, counts, sums)), strict=True)}  # fmt: skip
        for token in range(7):
            fired = dense[(vocabulary == token) & (dense[:, feature] > 0), feature]
            if len(fired):
                count, total = found.pop(token)
                assert count == len(fired)
                assert total == pytest.approx(float(fired.double().sum()))
        assert not found


def test_a_full_table_of_tokens_keeps_the_most_frequent():
    tally = Tally(1, replace(SMALL, firing_tokens=3))
    for batch in range(20):
        # Token 1 at every batch, token 2 at every second one, and two that never come again.
        tokens = torch.tensor([1, 2 if batch % 2 else 1, 100 + batch, 200 + batch])
        numbers = torch.full((4,), batch)
        tally.add(sparse(torch.ones(4, 1)), tokens, torch.zeros(4).long(), numbers,
                  unique(numbers, 4), 4)  # fmt: skip
    _, tokens, counts, _ = tally.firing_tokens.table()
    assert tokens.tolist()[:2] == [1, 2]
    assert counts.tolist()[:2] == [30, 10]
    assert len(tokens) == 3


def test_order_of_batches_changes_no_figure():
    forward, held = filled()
    backward = Tally(11, SMALL)
    for dense, phases, numbers, length in reversed(held):
        # The tokens go with the places.
        add(backward, dense, phases, numbers, length)
    for name, value in forward.tensors().items():
        if not name.startswith("firing_tokens"):
            torch.testing.assert_close(value, backward.tensors()[name], msg=name)
    for one, other in zip(
        forward.firing_tokens.table(), backward.firing_tokens.table(), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_of_equal_peaks_the_earlier_document_stays():
    tally = Tally(1, replace(SMALL, examples=2))
    for first in (0, 2):
        numbers = torch.arange(first, first + 2).repeat_interleave(2)
        add(tally, torch.ones(4, 1), torch.zeros(4).long(), numbers, 2)
    assert tally.examples.documents[0].tolist() == [0, 1]
    assert tally.examples.positions[0].tolist() == [0, 0]


def test_documents_of_one_text_are_one_example():
    """Three documents with the same beginning, one of them stronger elsewhere, in two batches."""
    tally = Tally(1, SMALL)
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    dense = torch.tensor([[0, 2.0, 0, 0], [0, 2.0, 0, 1.0]]).flatten()[:, None]
    zeros = torch.zeros(8).long()
    for first in (0, 2):
        numbers = torch.arange(first, first + 2).repeat_interleave(4)
        add(tally, dense, zeros, numbers, 4, contexts_of(ids).flatten())
        dense[-1] = 3.0
    assert tally.examples.values[0].tolist() == [3.0, 2.0, 0.0]
    assert tally.examples.documents[0].tolist() == [3, 0, -1]
    # Also of those drawn: what two documents share does not hide what one of them has alone.
    kept = tally.examples.contexts[3][tally.examples.documents[3] >= 0].tolist()
    assert len(set(kept)) == len(kept) == 2
    assert tally.documents[0] == 4


def test_contexts_are_equal_where_the_last_tokens_are():
    ids = torch.randint(50, (2, 30), generator=torch.Generator().manual_seed(0))
    ids[1, 10:18] = ids[0, 20:28]
    found = contexts_of(ids)
    assert found[1, 17] == found[0, 27]
    assert found[1, 16] != found[0, 26]
    assert len(found.unique()) == 59
    # A text that begins later is another one.
    assert contexts_of(torch.tensor([[0, 0, 3]]))[0, 2] != contexts_of(torch.tensor([[3]]))[0, 0]


def test_a_threshold_leaves_weak_activations_out():
    tally = Tally(2, replace(SMALL, threshold=0.5))
    dense = torch.tensor([[0.4, 0.6], [0.5, 0.0]])
    zeros = torch.zeros(2).long()
    add(tally, dense, zeros, zeros, 2, zeros)
    assert tally.fired.sum(0).tolist() == [0, 1]


def test_a_batch_without_activity_is_no_error():
    tally = Tally(2, SMALL)
    zeros = torch.zeros(4).long()
    add(tally, torch.zeros(4, 2), zeros, zeros, 4, zeros)
    assert tally.fired.sum() == 0


def test_values_beyond_the_histogram_are_in_its_end_bins():
    tally = Tally(1, SMALL)
    values = torch.tensor([[1e-9], [2.0**-10], [1.0], [1.49], [1.5], [2.0**13.9], [1e9]])
    zeros = torch.zeros(7).long()
    add(tally, values, zeros, zeros, 7, zeros)
    histogram = tally.histogram[0]
    assert histogram.sum() == 7
    assert histogram[0] == 2
    assert histogram[20].item() == 2  # [1, 1.5)
    assert histogram[21].item() == 1  # [1.5, 2)
    assert histogram[-1] == 2
    assert len(bin_edges()) == BINS + 1


class Largest(TorchDispatchMode):
    """The largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, tuple | list) else (out,)
        # A view of the tally's own tables is none of the batch's size.
        for t in tensors:
            if isinstance(t, torch.Tensor) and t._base is None:
                self.numel = max(self.numel, t.numel())
        return out


def test_no_tensor_of_tokens_by_latents_is_made():
    d_sae, documents, length, k = 65_536, 8, 64, 4
    generator = torch.Generator().manual_seed(0)
    tokens = documents * length
    latents = torch.randint(d_sae, (tokens, k), generator=generator)
    acts = SparseActs(
        torch.arange(tokens).repeat_interleave(k), latents.flatten(),
        torch.rand(tokens * k, generator=generator) + 0.1, tokens, d_sae,
    )  # fmt: skip
    tally = Tally(d_sae, ActivityConfig(examples=1, before=2, after=2))
    with Largest() as seen:
        numbers = torch.arange(documents).repeat_interleave(length)
        zeros = torch.zeros(tokens).long()
        tally.add(acts, zeros, zeros, numbers, unique(numbers, length), length)
    # In-place operations give the tally's own tables back.
    assert seen.numel <= max(t.numel() for t in tally.tensors().values())
    assert seen.numel < tokens * d_sae / 8


def test_density_and_its_error_over_documents():
    tally, held = filled()
    dense = torch.cat([b[0] for b in held])
    numbers = torch.cat([b[2] for b in held])
    lengths = torch.bincount(numbers).double()
    fired = torch.stack([(dense[numbers == n] > 0).sum(0) for n in range(13)]).double()
    made = density(
        Activity({POINT: tally}, (len(dense), 0, 0), 13, float(lengths.square().sum()), SMALL),
        POINT,
    )
    share = fired.sum(0) / lengths.sum()
    torch.testing.assert_close(made.value, share)
    left = (fired - share * lengths[:, None]).square().sum(0) * 13 / 12
    torch.testing.assert_close(made.se, left.sqrt() / lengths.sum())


# On a model --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batches(tiny):
    texts = [document(f"What is {n}+{n}?", f"{n}+{n}={2 * n}", str(2 * n)) for n in range(3, 40)]
    return phased_batches(tiny.tokenizer, texts, tokens=1200)


@pytest.fixture(scope="module")
def coders(tiny):
    blank = new_coder(tiny.d_model, 300, 6, seed=0)
    return {Hookpoint(n): random_coder(blank, n) for n in (2, 7)}


def test_activity_of_a_model_is_that_of_its_activations(tiny, batches, coders):
    found = measure_activity(tiny, coders, batches, SMALL)
    assert found.documents == sum(len(b.ids) for b in batches)
    assert sum(found.tokens) == sum(b.ids.numel() for b in batches)
    assert min(found.tokens) > 0
    for point, coder in coders.items():
        fired = torch.zeros(3, 300, dtype=torch.long)
        for batch, held in zip(
            batches, stream_activations(tiny, [b.ids for b in batches], [point]), strict=True
        ):
            acts = encode(coder, held.acts[point].flatten(0, 1))
            place = batch.phases.flatten()[acts.rows] * 300 + acts.latents
            fired += torch.bincount(place, minlength=900).view(3, 300)
        # Candidates come from a bfloat16 product: at equal values another latent may be the k-th.
        assert (fired - found.tallies[point].fired).abs().sum() <= 0.002 * fired.sum()
        assert fired.sum() == 6 * sum(found.tokens)


class Stopping(Checkpoints):
    """Checkpoints after every batch, and the end after some."""

    stop = 10**9

    def keep(self, step, steps, trainers):
        self.write(step, trainers)
        if step == self.stop:
            raise KeyboardInterrupt


def test_a_stopped_run_goes_on_to_the_same_figures(tiny, batches, coders, tmp_path):
    whole = measure_activity(tiny, coders, batches, SMALL)
    store = Stopping(tmp_path)
    store.stop = 4
    with pytest.raises(KeyboardInterrupt):
        measure_activity(tiny, coders, batches, SMALL, store=store)
    steps: list[int] = []
    again = measure_activity(
        tiny, coders, batches, SMALL, store=Checkpoints(tmp_path), advance=steps.append
    )
    assert steps[0] == 4
    assert sum(steps) == len(batches)
    for point in coders:
        for name, value in whole.tallies[point].tensors().items():
            assert torch.equal(value, again.tallies[point].tensors()[name]), name


def test_needed_bytes_are_those_of_the_tensors():
    tally = Tally(64, SMALL)
    figures = sum(t.nbytes for t in tally.tensors().values())
    assert needed_bytes(10, 64, SMALL) == figures + 6 * 64 * 11


@pytest.mark.parametrize("wrong", [{"examples": 0}, {"before": -1}, {"after": -2}])
def test_sizes_that_make_no_sense(wrong):
    with pytest.raises(BadInputError, match="out of range"):
        ActivityConfig(**wrong)


def test_no_document_is_refused(tiny, coders):
    with pytest.raises(BadInputError, match="no document"):
        measure_activity(tiny, coders, [])


def test_an_sae_of_another_width_is_refused(tiny, batches):
    with pytest.raises(BadInputError, match=r"layer 3 .* has width 64"):
        measure_activity(tiny, {Hookpoint(3): new_coder(64, 10, 2, seed=0)}, batches)


def test_a_layer_beyond_the_model_is_refused(tiny, batches, coders):
    with pytest.raises(BadInputError, match="out of range"):
        measure_activity(tiny, {Hookpoint(99): next(iter(coders.values()))}, batches)


def test_documents_of_one_token_are_documents():
    tally = Tally(2, SMALL)
    batch = PhasedBatch(torch.ones(3, 1).long(), torch.zeros(3, 1).long(), torch.arange(3)[:, None])
    dense = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    add(tally, dense, batch.phases.flatten(), batch.documents.flatten(), 1)
    assert tally.examples.documents.tolist()[:2] == [[1, 0, -1], [2, -1, -1]]
    assert tally.examples.windows[0, 0].tolist() == [0.0, 0.0, 2.0, 0.0]
