"""An SAE at the wrong place is refused, one at its own is not: figures on the bundled model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from resa_lens.errors import BadInputError
from resa_lens.models.activations import ordinary, special_ids
from resa_lens.models.hookpoints import Hookpoint, parse_hookpoint
from resa_lens.models.host import Model
from resa_lens.saes import coder as coder_module
from resa_lens.saes import fit, quality
from resa_lens.saes.baselines import random_weights_model
from resa_lens.saes.coder import SparseCoder, new_coder
from resa_lens.saes.fit import PAPER, Places, Rival, check_fit, rivals, variances
from resa_lens.saes.train import SaeConfig, train_saes
from resa_lens.texts import corpora
from resa_lens.texts.corpora import CorpusConfig, load_records

Coders = dict[Hookpoint, SparseCoder]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def text(model: Model, tokens: int, seed: int, batch: int = 4) -> list[torch.Tensor]:
    """Training documents by seed 0; others for the probe."""
    records = load_records("tiny")
    part = records[200:] if seed == 0 else records[:200]
    config = CorpusConfig(seed=seed)
    return list(corpora.batches(model.tokenizer, part, config, tokens=tokens, batch=batch))


@pytest.fixture(scope="module")
def coders(tiny: Model) -> Coders:
    """SAEs at every layer and both sites, from a twentieth of the default's tokens."""
    made: Coders = {}
    for site in PAPER:
        config = SaeConfig(site=site, latents=512, k=32).for_width(tiny.d_model)
        found = train_saes(tiny, range(tiny.n_layers), text(tiny, 10_240, 0, batch=1), [], config)
        made |= found.coders
    return made


@pytest.fixture(scope="module")
def probe(tiny: Model) -> list[torch.Tensor]:
    return text(tiny, 2048, 1, batch=2)


@pytest.fixture(scope="module")
def places(tiny: Model, probe: list[torch.Tensor]) -> Places:
    return Places(tiny, probe)


def other_site(point: Hookpoint) -> Hookpoint:
    return Hookpoint(point.layer, next(site for site in PAPER if site != point.site))


def test_every_sae_is_accepted_at_its_own_place(
    tiny: Model, coders: Coders, probe: list[torch.Tensor]
) -> None:
    fvus, warnings = check_fit(tiny, coders, probe)
    assert warnings == []
    assert set(fvus) == set(coders)
    assert max(fvus.values()) < 0.3


def test_every_sae_is_refused_at_the_other_site(coders: Coders, places: Places) -> None:
    for point, coder in coders.items():
        better = places.better(other_site(point), coder)
        assert better is not None, point
        best = places.best(other_site(point), coder, better)
        assert best is not None
        assert best.point == point


def test_an_encoder_is_cast_once_for_all_places(
    tiny: Model, coders: Coders, probe: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large model a cast is a quarter of a CPU second, and there are some hundred places."""
    casts: list[int] = []
    real = coder_module.half_precision
    monkeypatch.setattr(
        coder_module, "half_precision", lambda *args: (casts.append(1), real(*args))[1]
    )
    point, coder = next(iter(coders.items()))
    check_fit(tiny, {point: coder}, probe)
    assert len(casts) == 1
    check_fit(tiny, {other_site(point): coder}, probe, allow_mismatch=True)
    assert len(casts) == 2


@pytest.mark.parametrize("move", [1, -1, 5])
def test_at_another_layer(coders: Coders, places: Places, move: int) -> None:
    """At the MLP every one is caught.  A residual stream changes little from layer to layer: with
    so little training, an SAE of the layer above or below can fit as well as one of the layer."""
    caught: dict[str, list[bool]] = {site: [] for site in PAPER}
    for point, coder in coders.items():
        if not 0 <= point.layer + move < 12:
            continue
        there = Hookpoint(point.layer + move, point.site)
        better = places.better(there, coder)
        caught[point.site].append(better is not None)
        if better is not None:
            best = places.best(there, coder, better)
            assert best is not None
            assert best.point == point
    assert all(caught["mlp_out"])
    least = {-1: 0.5}.get(move, 1.0)
    assert sum(caught["resid_post"]) >= least * len(caught["resid_post"])


@pytest.mark.parametrize("weights", ["initial", "matched"])
def test_another_model_is_refused_and_no_place_named(
    tiny: Model, coders: Coders, probe: list[torch.Tensor], weights: str
) -> None:
    """The same shape with other weights: no layer and no site is right."""
    other = random_weights_model(tiny, 3, weights=weights)
    some = {point: coder for point, coder in coders.items() if point.layer % 2}
    _, warnings = check_fit(other, some, probe, allow_mismatch=True)
    assert len(warnings) == len(some)
    assert all("fits no other layer or site" in warning for warning in warnings)


def test_the_message_names_the_right_place(
    tiny: Model, coders: Coders, probe: list[torch.Tensor]
) -> None:
    for here, there, words in (
        (Hookpoint(9), Hookpoint(9, "resid_post"), "wrong site, it fits"),
        (Hookpoint(9), Hookpoint(4), "wrong layer, it fits"),
        (Hookpoint(9, "resid_post"), Hookpoint(2), "wrong layer and site, it fits"),
    ):
        with pytest.raises(BadInputError, match=words) as caught:
            check_fit(tiny, {there: coders[here]}, probe)
        lines = str(caught.value).splitlines()
        assert len(lines) == 3
        assert there.describe(12) in lines[0]
        assert f"site {there.site}" in lines[0]
        assert here.describe(12) in lines[1]
        assert f"site {here.site}" in lines[1]
        assert ("--site" in lines[2]) == (here.site != there.site)
        assert "--allow-site-mismatch" in lines[2]
        named = re.search(r"folder (\S+)\)", lines[2])
        assert named is not None
        assert parse_hookpoint(named[1]) == here


def test_allowed_it_warns_with_the_figures(
    tiny: Model, coders: Coders, probe: list[torch.Tensor]
) -> None:
    here, there = Hookpoint(9), Hookpoint(9, "resid_post")
    fvu, warnings = check_fit(tiny, {there: coders[here]}, probe, allow_mismatch=True)
    assert len(warnings) == 1
    assert f"{fvu[there]:.3g}" in warnings[0]
    assert "\n" not in warnings[0]
    assert "--allow-site-mismatch" in warnings[0]


def test_one_that_fits_costs_at_most_four_encodings(
    tiny: Model, coders: Coders, probe: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 0
    for module in (fit, quality):
        plain = module.encode

        def counted(coder: Any, x: Any, plain: Any = plain, **options: Any) -> Any:
            nonlocal rows
            rows += x.shape[0]
            return plain(coder, x, **options)

        monkeypatch.setattr(module, "encode", counted)
    check_fit(tiny, {Hookpoint(5): coders[Hookpoint(5)]}, probe)
    assert rows <= 4 * sum(ids.numel() for ids in probe)
    rows = 0
    check_fit(tiny, {Hookpoint(5): coders[Hookpoint(5)]}, probe, known=True)
    assert rows == sum(int(ordinary(ids, special_ids(tiny)).sum()) for ids in probe)


def test_what_is_known_to_belong_here_is_not_called_misplaced(
    tiny: Model, probe: list[torch.Tensor]
) -> None:
    """An SAE that has learnt nothing explains less than the mean, at its own place too."""
    point = Hookpoint(4)
    coder = new_coder(tiny.d_model, 64, 8, seed=0)
    with torch.no_grad():
        coder.b_dec += 100
    with pytest.raises(BadInputError, match="trained on another model"):
        check_fit(tiny, {point: coder}, probe)
    fvu, warnings = check_fit(tiny, {point: coder}, probe, known=True)
    assert fvu[point] > 1
    assert "--tokens" in warnings[0]


def test_known_ones_are_not_compared_with_other_places(
    tiny: Model, coders: Coders, probe: list[torch.Tensor]
) -> None:
    """What the manifest says outweighs a figure, as long as more than the mean is explained."""
    there = Hookpoint(9)
    fvu, warnings = check_fit(tiny, {there: coders[Hookpoint(8)]}, probe, known=True)
    assert fvu[there] < 1
    assert warnings == []


def test_a_layer_beyond_the_model(tiny: Model, probe: list[torch.Tensor]) -> None:
    with pytest.raises(BadInputError, match="out of range"):
        check_fit(tiny, {Hookpoint(12): new_coder(tiny.d_model, 8, 1, seed=0)}, probe)


def test_another_width_is_another_model(tiny: Model, probe: list[torch.Tensor]) -> None:
    with pytest.raises(BadInputError, match=r"width 64, tiny-reasoner has 128.*another model"):
        check_fit(tiny, {Hookpoint(3): new_coder(64, 8, 1, seed=0)}, probe, allow_mismatch=True)


def test_an_empty_probe_is_refused(tiny: Model) -> None:
    with pytest.raises(BadInputError, match="probe text is empty"):
        check_fit(tiny, {Hookpoint(3): new_coder(tiny.d_model, 8, 1, seed=0)}, [])


# The arithmetic


def test_rivals_are_the_other_site_and_the_layers_beside() -> None:
    assert rivals(Hookpoint(0), 12) == [Hookpoint(0, "resid_post"), Hookpoint(1)]
    assert rivals(Hookpoint(5), 12) == [Hookpoint(5, "resid_post"), Hookpoint(4), Hookpoint(6)]
    assert rivals(Hookpoint(11), 12) == [Hookpoint(11, "resid_post"), Hookpoint(10)]


def test_both_figures_must_be_lower_by_the_margin() -> None:
    """At a place whose activations lie along one direction any SAE has a low FVU."""
    own = Rival(Hookpoint(0), fvu=0.2, beyond=0.4)
    assert Rival(Hookpoint(1), 0.1, 0.2).beats(own, 1.5)
    assert not Rival(Hookpoint(1), 0.15, 0.2).beats(own, 1.5)
    assert not Rival(Hookpoint(1), 0.01, 0.9).beats(own, 1.5)


@pytest.mark.parametrize("shape", [(200, 3), (4, 9)])
def test_variances_beside_the_largest_component(shape: tuple[int, int]) -> None:
    """Of a diagonal covariance: the whole trace, and without its largest entry."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 7
    whole, rest = variances(x)
    values = torch.linalg.svdvals((x - x.mean(0)).double()).pow(2)
    assert whole == pytest.approx(values.sum().item())
    assert rest == pytest.approx(values[1:].sum().item())
