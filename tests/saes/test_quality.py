"""The quality report: figures with known answers, and a dense computation beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from resa_lens.errors import BadInputError
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model
from resa_lens.saes import quality
from resa_lens.saes.baselines import Noise
from resa_lens.saes.coder import SparseCoder, new_coder
from resa_lens.saes.quality import PhaseQuality, loss_change, measure_fvu, measure_quality
from resa_lens.texts import corpora
from resa_lens.texts.corpora import CorpusConfig, load_records
from resa_lens.texts.phases import PHASES, PhasedBatch, phased_batches, phased_texts

POINT = Hookpoint(3, "resid_post")
FIGURES = (*PHASES, "all")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def documents(tiny: Model) -> list[PhasedBatch]:
    texts = phased_texts(load_records("tiny")[:100], CorpusConfig())
    return phased_batches(tiny.tokenizer, texts, tokens=600)


@pytest.fixture(scope="module")
def acts(tiny: Model, documents: list[PhasedBatch]) -> list[torch.Tensor]:
    """Activations at POINT, batch by batch, read by a hook of the test's own."""
    found: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor, hook: object = None) -> None:
        found.append(tensor.flatten(0, 1))

    with torch.no_grad(), tiny.bridge.hooks(fwd_hooks=[(POINT.transformer_lens, keep)]):
        for batch in documents:
            tiny.bridge(batch.ids)
    return found


def signs_coder(width: int) -> SparseCoder:
    """x = relu(x) - relu(-x): reconstructs everything exactly."""
    made = new_coder(width, 2 * width, 2 * width, seed=0)
    eye = torch.cat([torch.eye(width), -torch.eye(width)])
    with torch.no_grad():
        made.encoder.weight.copy_(eye)
        assert made.W_dec is not None
        made.W_dec.copy_(eye)
    return made.requires_grad_(False)


def constant_coder(value: torch.Tensor) -> SparseCoder:
    """Answers every activation with the same vector."""
    made = new_coder(value.numel(), 16, 4, seed=0)
    with torch.no_grad():
        made.encoder.weight.zero_()
        made.encoder.bias.fill_(-1)
        made.b_dec.copy_(value)
    return made.requires_grad_(False)


def report(tiny: Model, coder: SparseCoder, documents: list[PhasedBatch]) -> dict:
    return dict(measure_quality(tiny, {POINT: coder}, documents)[POINT].phases)


def test_predicting_the_mean_explains_nothing(
    tiny: Model, documents: list[PhasedBatch], acts: list[torch.Tensor]
) -> None:
    """Over all tokens by their mean, and in each phase by the phase's own."""
    x = torch.cat(acts)
    phases = torch.cat([batch.phases.flatten() for batch in documents])
    for name, mask in [("all", phases >= 0), *((n, phases == i) for i, n in enumerate(PHASES))]:
        found = report(tiny, constant_coder(x[mask].mean(0)), documents)
        assert found[name].explained_variance == pytest.approx(0, abs=1e-6)
        assert found[name].fvu == pytest.approx(1)
        # The mean of other tokens does worse.
        assert all(found[n].fvu >= 1 - 1e-6 for n in (PHASES if name == "all" else [name]))
        assert (found[name].l0, found[name].dead_share, found[name].dense_share) == (0, 1, 0)


def test_a_perfect_reconstruction(tiny: Model, documents: list[PhasedBatch]) -> None:
    found = report(tiny, signs_coder(tiny.d_model), documents)
    assert list(found) == list(FIGURES)
    for figures in found.values():
        assert figures.fvu == pytest.approx(0, abs=1e-10)
        assert figures.explained_variance == pytest.approx(1)
        assert figures.loss_change == pytest.approx(0, abs=1e-6)
        assert figures.loss_change_se == pytest.approx(0, abs=1e-6)
        assert figures.kl == pytest.approx(0, abs=1e-6)
        assert figures.loss_recovered == pytest.approx(1, abs=1e-6)
        # One of each pair of signs is active at every token.
        assert figures.l0 == tiny.d_model
        assert figures.dead_share < 0.2
        assert figures.dense_share > 0.8


def test_zeros_recover_nothing(tiny: Model, documents: list[PhasedBatch]) -> None:
    for figures in report(tiny, constant_coder(torch.zeros(tiny.d_model)), documents).values():
        assert figures.loss_recovered == 0.0
        assert figures.loss_change == figures.ablation_change > 1
        assert figures.kl > 1


def test_the_phases_partition_the_tokens(tiny: Model, documents: list[PhasedBatch]) -> None:
    found = report(tiny, new_coder(tiny.d_model, 64, 8, seed=0), documents)
    tokens = sum(batch.ids.numel() for batch in documents)
    count = len(set(torch.cat([b.documents.flatten() for b in documents]).tolist()))
    assert sum(found[name].tokens for name in PHASES) == found["all"].tokens == tokens
    assert all(found[name].documents == count for name in FIGURES)
    assert sum(found[name].predicted for name in PHASES) == found["all"].predicted == tokens - count
    # A document's first token is prompt, and nothing predicts it.
    assert found["prompt"].predicted == found["prompt"].tokens - count
    assert found["think"].predicted == found["think"].tokens


def dense(
    tiny: Model, coder: SparseCoder, documents: list[PhasedBatch], wanted: set[int]
) -> PhaseQuality:
    """All figures from dense arrays, one document at a time."""
    xs, codes, made, rows = [], [], [], []
    for batch in documents:
        for ids, phases, _ in zip(*batch, strict=True):
            held: list[torch.Tensor] = []

            def keep(
                tensor: torch.Tensor, hook: object = None, held: list[torch.Tensor] = held
            ) -> None:
                held.append(tensor)

            def logits(hook: object, ids: torch.Tensor = ids) -> torch.Tensor:
                with tiny.bridge.hooks(fwd_hooks=[(POINT.transformer_lens, hook)]):
                    return F.log_softmax(tiny.bridge(ids[None])[0, :-1].double(), -1)

            clean = logits(keep)
            x = held[0][0]
            pre = torch.relu((x - coder.b_dec) @ coder.encoder.weight.mT + coder.encoder.bias)
            top = pre.topk(coder.cfg.k, dim=1)
            code = torch.zeros_like(pre).scatter_(1, top.indices, top.values)
            assert coder.W_dec is not None
            out = code @ coder.W_dec + coder.b_dec
            inserted = logits(lambda t, hook=None, out=out: out[None])
            ablated = logits(lambda t, hook=None: torch.zeros_like(t))
            mine = torch.tensor([int(p) in wanted for p in phases])
            xs.append(x[mine])
            codes.append(code[mine])
            made.append(out[mine])
            at, target = mine[1:], ids[1:]
            losses = [-p[torch.arange(len(target)), target][at] for p in (clean, inserted, ablated)]
            kl = (clean.exp() * (clean - inserted)).sum(-1)[at]
            rows.append([at.sum(), *(part.sum() for part in losses), kl.sum()])
    x, code, out = torch.cat(xs).double(), torch.cat(codes), torch.cat(made)
    table = torch.tensor(rows, dtype=torch.double)
    n, count = table[:, 0], len(table)
    mean = table[:, 1:].sum(0) / n.sum()
    clean, inserted, ablated, kl = mean.tolist()

    def error(sums: torch.Tensor) -> float:
        spread = (sums - sums.sum() / n.sum() * n).pow(2).sum() * count / (count - 1)
        return (spread.sqrt() / n.sum()).item()

    fvu = ((x - out).pow(2).sum() / (x - x.mean(0)).pow(2).sum()).item()
    fired = (code > 0).double()
    return PhaseQuality(
        tokens=len(x),
        documents=count,
        fvu=fvu,
        explained_variance=1 - fvu,
        l0=fired.sum(1).mean().item(),
        dead_share=(fired.sum(0) == 0).double().mean().item(),
        dense_share=(fired.mean(0) > 0.1).double().mean().item(),
        predicted=int(n.sum()),
        loss=clean,
        loss_change=inserted - clean,
        loss_change_se=error(table[:, 2] - table[:, 1]),
        ablation_change=ablated - clean,
        ablation_change_se=error(table[:, 3] - table[:, 1]),
        loss_recovered=(ablated - inserted) / (ablated - clean),
        kl=kl,
        kl_se=error(table[:, 4]),
    )


def test_figures_agree_with_a_dense_computation(tiny: Model, documents: list[PhasedBatch]) -> None:
    coder = new_coder(tiny.d_model, 96, 6, seed=1).requires_grad_(False)
    found = report(tiny, coder, documents)
    with torch.no_grad():
        for name, wanted in (("think", {1}), ("answer", {2}), ("all", {0, 1, 2})):
            expected = vars(dense(tiny, coder, documents, wanted))
            assert vars(found[name]) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_several_places_are_measured_each_alone(tiny: Model, documents: list[PhasedBatch]) -> None:
    coders = {p: new_coder(tiny.d_model, 64, 8, seed=0) for p in (POINT, Hookpoint(2))}
    together = measure_quality(tiny, coders, documents[:3])
    for point, coder in coders.items():
        alone = measure_quality(tiny, {point: coder}, documents[:3])[point]
        assert together[point] == alone


def test_a_control_without_latents(tiny: Model, documents: list[PhasedBatch]) -> None:
    """Noise has an FVU and a loss, and no latents to count."""
    coder = new_coder(tiny.d_model, 64, 8, seed=0)
    noise = measure_quality(tiny, {POINT: Noise(coder, 0)}, documents)[POINT].all
    own = measure_quality(tiny, {POINT: coder}, documents)[POINT].all
    assert noise.fvu == pytest.approx(own.fvu, rel=1e-4)
    assert noise.loss_change is not None
    assert (noise.l0, noise.dead_share, noise.dense_share) == (None, None, None)


def test_nothing_is_recovered_where_zeros_do_not_matter(
    tiny: Model, documents: list[PhasedBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros that leave the model as it is: no ratio of noise to noise."""
    plain = quality._replaced

    def but_for_zeros(model: Model, ids: torch.Tensor, point: Hookpoint, value: torch.Tensor):
        return plain(model, ids, point, value) if value.any() else model.bridge(ids)

    monkeypatch.setattr(quality, "_replaced", but_for_zeros)
    for figures in report(tiny, new_coder(tiny.d_model, 64, 8, seed=0), documents).values():
        assert figures.ablation_change == 0
        assert figures.loss_recovered is None


def test_what_has_no_meaning_is_none_and_absent_phases_are_left_out(tiny: Model) -> None:
    """One document of two tokens, both prompt: no error over documents, no other phase."""
    zeros = torch.zeros(1, 2, dtype=torch.long)
    batch = PhasedBatch(torch.tensor([[5, 6]]), zeros, zeros)
    found = measure_quality(tiny, {POINT: new_coder(tiny.d_model, 8, 1, seed=0)}, [batch])[POINT]
    assert list(found.phases) == ["prompt", "all"]
    assert found.all.predicted == 1
    assert found.all.kl is not None
    assert (found.all.kl_se, found.all.loss_change_se) == (None, None)
    json.dumps(found.to_dict(), allow_nan=False)
    single = PhasedBatch(torch.tensor([[5]]), zeros[:, :1], zeros[:, :1])
    found = measure_quality(tiny, {POINT: new_coder(tiny.d_model, 8, 1, seed=0)}, [single])[POINT]
    assert (found.all.fvu, found.all.loss, found.all.loss_recovered) == (None, None, None)


def test_a_layer_beyond_the_model(tiny: Model, documents: list[PhasedBatch]) -> None:
    coder = new_coder(tiny.d_model, 8, 1, seed=0)
    with pytest.raises(BadInputError, match="out of range"):
        measure_quality(tiny, {Hookpoint(12): coder}, documents)


def test_fvu_alone_agrees_with_the_report(tiny: Model, documents: list[PhasedBatch]) -> None:
    coder = new_coder(tiny.d_model, 64, 8, seed=0)
    fvu, l0 = measure_fvu(
        tiny, {POINT: coder}, [batch.ids for batch in documents], include_special=True
    )[POINT]
    figures = measure_quality(tiny, {POINT: coder}, documents)[POINT].all
    assert (fvu, l0) == (pytest.approx(figures.fvu), figures.l0)
    assert all(
        math.isnan(v) for v in measure_fvu(tiny, {POINT: coder}, [], include_special=True)[POINT]
    )


def test_the_loss_changes_by_what_the_reconstruction_loses(
    tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = load_records("tiny")[:100]
    probe = list(corpora.batches(tiny.tokenizer, records, CorpusConfig(), tokens=1024, batch=2))
    coders = {POINT: new_coder(tiny.d_model, 64, 8, seed=0)}
    monkeypatch.setattr(quality, "reconstruct", lambda coder, acts: acts)
    assert loss_change(tiny, coders, probe)[POINT] == pytest.approx(0, abs=1e-6)
    monkeypatch.setattr(quality, "reconstruct", lambda coder, acts: torch.zeros_like(acts))
    assert loss_change(tiny, coders, probe)[POINT] > 0.05
