"""The reader of published tables: other people's columns, numbers never printed, bad files."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from resa_lens.errors import BadInputError
from resa_lens.layers.checkpoints import read_checkpoints
from resa_lens.layers.granularity import AS_LABELLED, granularity_test
from resa_lens.resources import data_path


def file(folder: Path, text: str, name: str = "table.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_reader_of_the_layers() -> None:
    table = read_checkpoints(data_path("paper/tables36_61_layer_checkpoints.csv"))
    assert table.group_column == "layer_1_indexed"
    assert table.row_names[0] == "layer 1 (0-based; 2nd), step 1000"
    assert len(set(table.row_names)) == 104
    assert table.average_column == "average"
    assert table.ignored == ("step",)
    assert table.missing == 0
    assert read_checkpoints(data_path("paper/tables8_61_checkpoints.csv")).group_column == "model"


def test_reader_of_other_peoples_tables(tmp_path: Path) -> None:
    path = file(
        tmp_path,
        "Recipe,Seed,AIME-2024,Math 500,my bench,Avg.\n"
        "a,1,26.67,80.2%,25,53.4\na,2,-,n/a,50,\nb,1,30,81,,55.5\n",
    )
    table = read_checkpoints(path, group="Recipe", questions={"mybench": 4})
    assert table.benchmarks == ("AIME-2024", "Math 500", "my bench")
    assert table.questions == (30, 500, 4)
    assert table.missing == 3
    assert table.cells[1] == (None, None, Decimal(50))
    assert table.average_column == "Avg."
    assert table.row_names == ("a, Seed 1", "a, Seed 2", "b, Seed 1")
    # Without n the column is left alone; with one, the known n is replaced.
    assert read_checkpoints(path, group="Recipe").benchmarks == ("AIME-2024", "Math 500")
    other = read_checkpoints(path, group="Recipe", questions={"Math 500": 5000})
    assert other.questions == (30, 5000)


def test_reader_of_numbers_that_were_never_printed(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    rows = {"layer": [0, 1], "aime24": [800 / 30, 30.0], "gpqa": [100 * 61 / 198, 26.26]}
    pq.write_table(pa.table(rows), path)
    table = read_checkpoints(path)
    assert table.groups == ("layer 0 (0-based; 1st)", "layer 1 (0-based; 2nd)")
    assert granularity_test(table.cells, table.questions).counts[AS_LABELLED] == 2


HEAD = "model,step,aime24\n"


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        ("", {}, "no rows"),
        (HEAD, {}, "no rows"),
        ("name,aime24\na,20\nb,30\n", {}, 'no column "layer or layer_1_indexed or model"'),
        (HEAD + "a,1,20\nb,1,30\n", {"group": "seed"}, 'no column "seed"'),
        ("model,score\na,20\nb,30\n", {}, "no column of a known benchmark"),
        (HEAD + "a,1,20\nb,1,30\n", {"questions": {"mmlu": 5}}, 'no column "mmlu"'),
        (HEAD + "a,1,20\nb,1,30\n", {"questions": {"aime24": 0}}, "aime24=0"),
        (HEAD + "a,1,20\nb,1,130\n", {}, 'row 2: aime24 "130" is no percentage'),
        (HEAD + "a,1,20\nb,1,-3\n", {}, 'row 2: aime24 "-3" is no percentage'),
        (HEAD + "a,1,inf\nb,1,3\n", {}, 'row 1: aime24 "inf" is no percentage'),
        (HEAD + "a,1,many\nb,1,3\n", {}, 'aime24 "many" is no percentage'),
        (HEAD + "a,1,0.2\nb,1,0.3\n", {}, "scores are in percent"),
        (HEAD + "a,1,\nb,1,\n", {}, "the largest score is none"),
        (HEAD + "a,1,20\na,2,30\n", {}, "every row has model a"),
        (HEAD + "a,1,20\n,2,30\n", {}, "row 2"),
        (HEAD + "a,1,20\nb,1,30\na,1,20\n", {}, "row 3 repeats row 1"),
        (HEAD + "a,1,20\nb,1,30,7\n", {}, "row 2 (line 3) has 4 cells"),
        ("model,aime24,AIME 24\na,20,20\nb,30,30\n", {}, "are one benchmark"),
        ("layer_1_indexed,aime24\n0,20\n1,30\n", {}, 'layer_1_indexed "0" is no layer'),
        ("layer,aime24\n1.5,20\n1,30\n", {}, 'layer "1.5" is no layer'),
        ("layer,aime24\ntop,20\n1,30\n", {}, 'layer "top" is no layer'),
    ],
)
def test_reader_refuses(tmp_path: Path, text: str, options: dict, said: str) -> None:
    with pytest.raises(BadInputError) as caught:
        read_checkpoints(file(tmp_path, text), **options)
    assert said in str(caught.value)


def test_reader_refuses_other_files(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="does not exist"):
        read_checkpoints(tmp_path / "absent.csv")
    with pytest.raises(BadInputError, match="no known format"):
        read_checkpoints(file(tmp_path, HEAD, "table.txt"))
