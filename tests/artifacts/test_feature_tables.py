"""The tables of features, read by row group."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic_workspace import ACTIVITY, PLANTED, Size, write_workspace

from resa_lens.artifacts.feature_tables import (
    EXAMPLE_SCHEMA,
    EXAMPLES,
    FEATURE_SCHEMA,
    FEATURES,
    GROUP,
    SCORE_SCHEMA,
    histogram_edges,
    open_groups,
    read_feature,
)
from resa_lens.errors import BadInputError
from resa_lens.features.activity import bin_edges


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_workspace(tmp_path_factory.mktemp("files") / "w", Size(layers=3, latents=2500))


def small(path, **columns):
    schema = pa.schema([("layer", pa.int32()), ("feature", pa.int32())])
    pq.write_table(pa.table(columns, schema=schema), path, row_group_size=4)
    return open_groups(path, schema)


def test_one_feature_is_one_group_of_each_file(root):
    for name, schema in ((FEATURES, FEATURE_SCHEMA), (EXAMPLES, EXAMPLE_SCHEMA)):
        groups = open_groups(root / ACTIVITY / name, schema)
        assert len(groups.low) == 3 * 3
        assert len(groups.of(1)) == 3
        assert groups.of(1, [GROUP + 5]) == [4]
        assert groups.of(1, [3, 2 * GROUP]) == [3, 5]
        assert groups.of(9) == []
        found = groups.find(1, PLANTED.feature)
        assert {(row["layer"], row["feature"]) for row in found} == {(1, PLANTED.feature)}
        assert groups.find(9, 0) == []


def test_every_row_is_found(tmp_path):
    # Groups of four rows: some hold two layers, whose features are then out of order.
    rng = np.random.default_rng(0)
    pairs = sorted({(int(a), int(b)) for a, b in rng.integers(0, 7, (30, 2))})
    groups = small(
        tmp_path / "f.parquet",
        layer=[layer for layer, _ in pairs],
        feature=[feature for _, feature in pairs],
    )
    for layer in range(7):
        for feature in range(7):
            wanted = [{"layer": layer, "feature": feature}] * ((layer, feature) in pairs)
            assert groups.find(layer, feature) == wanted


def test_scores_are_read_by_name(root):
    groups = open_groups(root / "scores/synthetic-5e5e5e5e/run/scores.parquet", SCORE_SCHEMA)
    held = groups.read(groups.of(2, score="auc"), ["score"])["score"].unique().to_pylist()
    assert held == ["auc"]
    assert groups.of(score="none such") == []
    assert groups.find(1, PLANTED.feature)[0]["value"] == 2.5


def test_without_statistics_every_group_is_read(tmp_path):
    file = tmp_path / "f.parquet"
    table = pa.table({"layer": [0, 1, 2], "feature": [5, 6, 7]})
    table = table.cast(pa.schema([("layer", pa.int32()), ("feature", pa.int32())]))
    pq.write_table(table, file, row_group_size=1, write_statistics=False)
    groups = open_groups(file, table.schema)
    assert groups.of(1) == [0, 1, 2]
    assert groups.find(1, 6) == [{"layer": 1, "feature": 6}]


def test_the_synthetic_tables_have_the_writers_bins(root):
    assert histogram_edges(root / ACTIVITY) == pytest.approx(bin_edges().tolist(), rel=1e-5)
    row, examples = read_feature(root / ACTIVITY, PLANTED.layer, PLANTED.feature)
    assert row["top_tokens"][0] == PLANTED.token
    assert [example["rank"] for example in examples] == [0, 1]
    assert len(row["histogram"]) == len(bin_edges()) - 1


@pytest.mark.parametrize("damage", ["half", "missing", "text", "columns", "types"])
def test_what_is_no_such_table_is_refused(root, tmp_path, damage):
    file = tmp_path / FEATURES
    whole = (root / ACTIVITY / FEATURES).read_bytes()
    if damage == "half":
        file.write_bytes(whole[: len(whole) // 2])
    elif damage == "text":
        file.write_text("layer,feature\n1,2\n")
    elif damage == "columns":
        pq.write_table(pa.table({"layer": [1], "x": [2]}), file)
    elif damage == "types":
        table = pq.read_table(root / ACTIVITY / FEATURES)
        place = table.schema.get_field_index("density")
        pq.write_table(table.set_column(place, "density", table["density"].cast("string")), file)
    with pytest.raises(BadInputError, match=r"features\.parquet"):
        open_groups(file, FEATURE_SCHEMA)


def test_a_file_without_bins_is_refused(tmp_path):
    pq.write_table(pa.table({"layer": [1]}), tmp_path / FEATURES)
    with pytest.raises(BadInputError, match="histogram"):
        histogram_edges(tmp_path)
    with pytest.raises(BadInputError, match="missing or damaged"):
        histogram_edges(tmp_path / "nowhere")


def test_damage_after_the_opening_is_told(root, tmp_path):
    file = tmp_path / FEATURES
    whole = bytearray((root / ACTIVITY / FEATURES).read_bytes())
    file.write_bytes(whole)
    groups = open_groups(file, FEATURE_SCHEMA)
    file.write_bytes(whole[:2000])
    with pytest.raises(BadInputError, match="missing or damaged"):
        groups.find(2, 2000)


def test_another_file_in_its_place_is_told_and_not_misread(root, tmp_path):
    file = tmp_path / FEATURES
    shutil.copy(root / ACTIVITY / FEATURES, file)
    groups = open_groups(file, FEATURE_SCHEMA)
    os.utime(file, ns=(1, 1))
    with pytest.raises(BadInputError, match="written anew"):
        groups.find(2, 2000)
    assert open_groups(file, FEATURE_SCHEMA).find(2, 2000)
