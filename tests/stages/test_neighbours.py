"""A feature's neighbours and counterparts: planted ones, what chance gives, what is damaged."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time

import pytest
import torch
from app_driver import edit, state
from planted_neighbours import (
    COUSIN,
    D_IN,
    TWIN,
    TWIN_ACTIVITY,
    add_saes,
    directions,
    floor_of_a_decoder,
    write_decoder,
)
from synthetic_workspace import ACTIVITY, SAES, Size, write_workspace

from resa_lens.artifacts.listing import scan
from resa_lens.errors import BadInputError
from resa_lens.resources import data_path
from resa_lens.stages import neighbours as module
from resa_lens.stages.neighbours import (
    ADJACENT,
    OTHERS,
    SAME,
    nearest,
    neighbours,
    places,
    recorded,
)
from resa_lens.stats.directions import chance_bound

SIZE = Size(layers=3, latents=500)
LAYER, FEATURE = 1, 62


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A workspace that no test changes, and the counterparts of its features."""
    root = write_workspace(tmp_path_factory.mktemp("neighbours") / "workspace", SIZE)
    return root, add_saes(root, SIZE.layers, SIZE.latents, torch.bfloat16)


@pytest.fixture
def workspace(planted, tmp_path):
    return shutil.copytree(planted[0], tmp_path / "workspace")


def near(root, group):
    listing = scan(root)
    some, _ = places(listing, SAES, LAYER)
    return [
        neighbours(listing, place, nearest(place, FEATURE))[0]
        for place in some
        if place.group == group
    ]


def test_the_counterpart_in_another_seed_is_the_planted_one(planted):
    root, order = planted
    before = state(root)
    ((first, second),) = near(root, OTHERS)
    assert (first.layer, first.feature) == (LAYER, order[FEATURE])
    assert first.name.startswith("seed 1")
    (cosine,) = first.similarities
    assert cosine.value > 0.99
    # And what is none stays below what chance gives.
    assert second.similarities[0].value < cosine.chance < 0.7 < cosine.value
    assert cosine.chance == chance_bound(SIZE.latents, D_IN)
    assert first.run == TWIN_ACTIVITY
    assert first.profile.tokens
    assert len(first.profile.edges) == len(first.profile.histogram) + 1
    assert state(root) == before


def test_neighbours_are_those_of_torch(planted):
    rows = directions(SIZE.latents, LAYER).bfloat16().float()
    for group, others in ((SAME, [LAYER]), (ADJACENT, [LAYER - 1, LAYER + 1])):
        for listed, layer in zip(near(planted[0], group), others, strict=True):
            there = directions(SIZE.latents, layer).bfloat16().float()
            cosines = torch.cosine_similarity(rows[FEATURE][None], there)
            if layer == LAYER:
                cosines[FEATURE] = -2
            best = cosines.topk(len(listed))
            assert [n.feature for n in listed] == best.indices.tolist()
            values = [n.similarities[0].value for n in listed]
            assert values == pytest.approx(best.values.tolist(), abs=1e-5)
            assert {(n.layer, n.run) for n in listed} == {(layer, ACTIVITY)}


def test_random_directions_stay_below_the_bound(planted):
    """The planted decoders are random: of 100 features 95 have no neighbour above the bound."""
    listing = scan(planted[0])
    same = places(listing, SAES, LAYER)[0][0]
    above = [
        ranking.cosines[0][1] > ranking.chance
        for ranking in (nearest(same, feature) for feature in range(200))
    ]
    assert sum(above) <= 22  # P < 1e-3 where one in twenty is


def test_matches_are_read_from_either_side(planted):
    listing = scan(planted[0])
    listed, notes = recorded(listing, SAES, LAYER, FEATURE)
    assert notes == []
    by_name = {(n.name, n.feature): n.similarities for n in listed}
    there, back = "match in cousin", "matched from cousin"
    assert {key: [s.measure for s in alike] for key, alike in by_name.items()} == {
        (there, FEATURE + 1): ["cosine"],
        (there, FEATURE): ["correlation"],
        (back, FEATURE - 1): ["cosine"],
        (back, FEATURE): ["correlation"],
    }
    # Where the features were sought is known on the way back alone: the cousin's SAEs are not here.
    assert by_name[there, FEATURE + 1][0].chance is None
    assert by_name[back, FEATURE - 1][0].chance == chance_bound(SIZE.latents, D_IN)
    assert by_name[there, FEATURE][0].chance == 0.125
    assert all(n.profile is None for n in listed)
    # Layers that were not matched, and the cousin's own features.
    assert recorded(listing, SAES, 0, FEATURE) == ([], [])
    assert {n.name for n in recorded(listing, COUSIN, LAYER, 3)[0]} == {
        "match in synthetic, seed 0",
        "matched from synthetic, seed 0",
    }


def test_many_matches_are_cut_with_their_number(workspace, monkeypatch):
    monkeypatch.setattr(module, "MOST_RECORDED", 1)
    listed, notes = recorded(scan(workspace), SAES, LAYER, FEATURE)
    assert [n.similarities[0].value for n in listed] == [0.75]
    assert notes == ["3 more recorded matches, of smaller values, are left out."]


def test_a_damaged_sae_is_said_and_the_others_stand(workspace):
    file = workspace / TWIN / "layers.1.mlp" / "sae.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BadInputError, match="truncated"):
        near(workspace, OTHERS)
    assert len(near(workspace, ADJACENT)) == 2
    # A table's neighbours stand without the decoder, and say why they have no bound.
    shutil.rmtree(workspace / SAES / "layers.1.mlp")
    listing = scan(workspace)
    same = places(listing, SAES, LAYER)[0][0]
    ranking = nearest(same, FEATURE, [(9, 0.5)])
    assert (ranking.cosines, ranking.chance) == (((9, 0.5),), None)
    assert "has no sae.safetensors" in ranking.note
    with pytest.raises(BadInputError, match=r"has no sae\.safetensors"):
        nearest(same, FEATURE)


def test_a_record_that_cannot_be_read_is_a_line(workspace):
    (next((workspace / "matches").rglob("there")) / "matches.parquet").write_bytes(b"x")
    listed, notes = recorded(scan(workspace), SAES, LAYER, FEATURE)
    assert len(listed) == 2
    assert len(notes) == 1
    assert "matches.parquet is missing or damaged" in notes[0]


def _add_run(root, older, layer=None):
    """Copy the activity run of the SAEs, as one that is older and of other documents."""
    shutil.copytree(root / ACTIVITY, root / older)

    def change(manifest):
        manifest["created"] = "2020-01-01T00:00:00+00:00"
        if layer is not None:
            manifest["results"]["layers"] = [
                row for row in manifest["results"]["layers"] if row["layer"] == layer
            ]

    edit(root / older / "manifest.json", change)


def test_the_run_that_is_viewed_is_preferred_where_it_is_of_the_same_sae(workspace):
    older = ACTIVITY + "-older"
    _add_run(workspace, older, LAYER)
    for name in ("there", "back"):  # a match within the SAEs themselves
        file = next((workspace / "matches").rglob(name)) / "manifest.json"
        edit(file, lambda m: m["config"].update(saes=[SAES, SAES]))
    listing = scan(workspace)

    def runs(viewed):
        some, _ = places(listing, SAES, LAYER)
        near = {}
        for place in some:
            listed, _ = neighbours(listing, place, nearest(place, FEATURE), viewed=viewed)
            near[place.group, place.other.layer] = listed[0].run
        near["recorded"] = recorded(listing, SAES, LAYER, FEATURE, viewed=viewed)[0][0].run
        return near

    newest = {
        (SAME, 1): ACTIVITY,
        (ADJACENT, 0): ACTIVITY,
        (ADJACENT, 2): ACTIVITY,
        (OTHERS, 1): TWIN_ACTIVITY,
        "recorded": ACTIVITY,
    }
    assert runs("") == runs(ACTIVITY) == newest
    # It measured one layer, and nothing of the twin.
    assert runs(older) == {**newest, (SAME, 1): older, "recorded": older}


def test_a_damaged_table_of_activity_takes_the_profiles_alone(workspace):
    for run in (ACTIVITY, TWIN_ACTIVITY):
        (workspace / run / "features.parquet").write_bytes(b"x")
    for name, saes in (("there", [SAES, TWIN]), ("back", [TWIN, SAES])):
        file = next((workspace / "matches").rglob(name)) / "manifest.json"
        edit(file, lambda m, saes=saes: m["config"].update(saes=saes))
    listing = scan(workspace)
    same = places(listing, SAES, LAYER)[0][0]
    ranking = nearest(same, FEATURE)
    listed, notes = neighbours(listing, same, ranking)
    assert [(n.feature, n.similarities[0].value) for n in listed] == list(ranking.cosines)
    assert {(n.run, n.profile) for n in listed} == {(ACTIVITY, None)}
    assert len(notes) == 1
    assert "features.parquet is missing or damaged" in notes[0]
    listed, notes = recorded(listing, SAES, LAYER, FEATURE)
    assert [n.profile for n in listed] == [None] * 4
    assert len(notes) == 1
    assert TWIN_ACTIVITY in notes[0]


def test_other_models_sites_and_widths_are_no_other_seeds(workspace):
    manifest = workspace / TWIN / "manifest.json"

    def others():
        listing = scan(workspace)
        some, left_out = places(listing, SAES, LAYER)
        return [p.name.partition(" (")[0] for p in some if p.group == OTHERS], left_out

    assert others() == (["seed 1"], 0)
    for number in range(5):
        shutil.copytree(workspace / TWIN, (workspace / TWIN).with_name(f"twin-{number}"))
    edit(manifest, lambda m: m["config"]["sae"].update(latents=64))
    names, left_out = others()
    assert (names, left_out) == (["seed 1"] * 4, 2)
    for number in range(4):
        shutil.rmtree((workspace / TWIN).with_name(f"twin-{number}"))
    assert others() == (["seed 1", "64 latents, seed 1"], 0)
    edit(manifest, lambda m: m["results"].update(site="resid_post"))
    assert others() == (["seed 1"], 0)
    edit(manifest, lambda m: m["results"].update(site="mlp_out"))
    edit(manifest, lambda m: m.update(hashes={"weights": "0a" * 32}))
    assert others() == (["seed 1"], 0)


def test_a_changed_byte_of_a_small_sae_is_noticed(tmp_path):
    root = tmp_path / "workspace"
    shutil.copytree(data_path("workspace") / "saes", root / "saes")
    listing = scan(root)
    (saes,) = listing.artifacts
    layer = saes.results.layers[0].layer
    same = places(listing, saes.relative, layer)[0][0]
    assert nearest(same, 3).cosines
    file = same.own.folder / "sae.safetensors"
    whole = bytearray(file.read_bytes())
    whole[-9] ^= 1
    file.write_bytes(bytes(whole))
    with pytest.raises(BadInputError, match="was changed since it was written"):
        nearest(same, 3)


@pytest.mark.slow
def test_a_decoder_of_the_size_that_the_issue_names_is_read_within_a_second(tmp_path):
    """65,536 latents x 1,536: CPU time of the best of three, once the file is in memory.

    It is held to what cannot be left out on the same machine: reading and widening the numbers,
    their products with one direction and their norms; 0.2 s of a quiet core.
    """
    root = write_workspace(tmp_path / "workspace", Size(layers=2, latents=64))
    for layer in (0, 1):
        folder = root / SAES / f"layers.{layer}.mlp"
        write_decoder(folder, torch.randn(65_536, 1536).bfloat16())
    listing = scan(root)
    other = places(listing, SAES, 0)[0][1]
    seconds, floor = [], []
    for _ in range(3):
        began = time.process_time()
        nearest(other, 62)
        seconds.append(time.process_time() - began)
        floor.append(floor_of_a_decoder())
    assert min(seconds) < 2.5 * min(floor)


def test_nothing_here_loads_torch():
    code = "import sys; from resa_lens.stages import neighbours; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
