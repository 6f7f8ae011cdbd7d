"""Experts measured, ranked and steered as stages, by command, front door and page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mixtures
import pytest
import torch
from app_driver import run_page, texts
from typer.testing import CliRunner

import resa_lens as rl
from resa_lens.artifacts.kinds.ranking import Ranking
from resa_lens.artifacts.kinds.routing import Routing
from resa_lens.artifacts.kinds.steering import Steering
from resa_lens.cli import app
from resa_lens.errors import BadInputError
from resa_lens.resources import data_path

MODEL = "tiny-moe-reasoner"
FEW = ["--text-tokens", "5000", "--threads", "1"]


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, ["experts", *words])


def result(*words: str) -> dict[str, Any]:
    done = invoke(*words, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a map and a ranking."""
    root = tmp_path_factory.mktemp("experts") / "workspace"
    common = ["--model", MODEL, *FEW, "--workspace", str(root)]
    result("measure", *common)
    result("rank", *common, "--draws", "199")
    return root


STEER = (
    "steer", "--model", MODEL, *FEW, "--limit", "4", "--max-new-tokens", "24", "--answer-sets",
    "1", "--top", "2", "--draws", "199",
)  # fmt: skip


@pytest.fixture(scope="module")
def steered(place: Path) -> Path:
    """The workspace with a steering too: half a minute of a core."""
    result(*STEER, "--workspace", str(place))
    return place


def read(place: Path, kind: str) -> dict[str, Any]:
    """Return the one result of a kind."""
    (file,) = place.glob(f"{kind}s/*/*/{kind}.json")
    return json.loads(file.read_text())


def test_a_map_counts_every_slot(place: Path) -> None:
    values = read(place, "routing")
    assert len(values["experts"]) == 128
    assert [row["layer"] for row in values["routers"]] == list(range(8))
    assert all(row["rule"] and row["error"] < 1e-5 for row in values["routers"])
    for layer in range(8):
        rows = [row["scores"] for row in values["experts"] if row["layer"] == layer]
        for where in ("all", "prompt", "think", "answer", "<think>", "</answer>"):
            assert sum(row["use"][where] for row in rows) == pytest.approx(2)
            assert sum(row["mass"][where] for row in rows) == pytest.approx(1)
    assert values["documents"]["<think>"] == values["documents"]["all"] >= 20
    assert (
        sum(values["tokens"][p] for p in ("prompt", "think", "answer")) == (values["tokens"]["all"])
    )


def test_a_ranking_says_what_its_nulls_say(place: Path) -> None:
    values = read(place, "ranking")
    assert (values["target"], values["by"]) == ("<think>", "npmi")
    assert len(values["experts"]) == 128
    scores = [row["scores"]["npmi"] for row in values["experts"]]
    assert scores == sorted(scores, reverse=True)
    types = values["null"]["token_types"]
    assert len(types["types"]) == len(types["best"]) >= 20
    assert types["reached_by"] == sum(best >= scores[0] - 1e-12 for best in types["best"])
    first = values["experts"][0]
    assert first["type_p"] == pytest.approx((1 + types["reached_by"]) / (1 + len(types["best"])))
    assert -1 <= values["null"]["split_half"]["spearman"] <= 1


@pytest.mark.slow
def test_a_steering_names_sets_uses_and_other_tokens(steered: Path) -> None:
    place, values = steered, read(steered, "steering")
    assert [row["rank"] for row in values["experts"]] == [1, 2]
    assert [dose["experts"] for dose in values["doses"]] == [1, 2]
    random = values["null"]["random"]
    assert len(random) == 19
    assert all(abs(one["use"] - values["use"]) <= 0.2 * values["use"] for one in random)
    think = values["doses"][-1]["loss"]["think"]
    assert values["effect"] == think["change"] != 0
    assert len(think["random"]["each"]) == 19
    assert values["p_value"] == think["random"]["rank_p"] >= 1 / 20
    assert len(values["null"]["types"]) >= 20
    assert values["accuracy"]["n"] == 4
    assert values["accuracy"]["control"]["sets"] == 1
    (folder,) = (place / "steerings").glob("*/*")
    names = {file.stem for file in folder.glob("*.parquet")}
    assert names == {"base", "dose-1", "dose-2", "random-0"}


def test_a_second_call_reads_and_writes_nothing(place: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in place.rglob("*")}
    values = result("rank", "--model", MODEL, *FEW, "--workspace", str(place), "--draws", "199")
    assert values["target"] == "<think>"
    assert {file: file.stat().st_mtime_ns for file in place.rglob("*")} == before


def test_tables_say_the_nulls(place: Path) -> None:
    common = ["--model", MODEL, *FEW, "--workspace", str(place)]
    for words, sentence in (
        (["measure"], "least and most of the even share"),
        (["rank", "--draws", "199"], "ordinary token types in its place"),
    ):
        done = invoke(*words, *common)
        assert done.exit_code == 0, done.stderr
        assert sentence in " ".join(done.stdout.split())
        assert "done before" in done.stderr


# What is refused

BAD = [
    (["rank", "--model", "tiny-reasoner"], "model tiny-reasoner has no experts"),
    (["steer", "--experts", "3:16"], "expert 3:16 does not exist; layer 3 has experts 0 to 15"),
    (["steer", "--experts", "8:1"], "layer 8 does not exist"),
    (["steer", "--experts", "x"], "expert 'x' is none"),
    (["steer", "--experts", ",".join(f"2:{e}" for e in range(15))], "would keep 1 of 16 experts"),
    (["steer", "--experts", "2:1,2:2,2:3", "--how", "on"], "3 experts on, and a token uses 2"),
    (["steer", "--how", "scale", "--beta", "-1"], "--beta -1.0 is out of range"),
    (["steer", "--how", "scale", "--beta", "nan"], "--beta nan is out of range"),
    (["steer", "--random", "5"], "--random 5 is out of range; give 19"),
    (["steer", "--top", "128"], "leaves none to compare with"),
    (["rank", "--target", "<thonk>"], "'<thonk>' stands in none of the"),
    (["rank", "--text-tokens", "900"], "documents, and a target needs 20"),
    (["rank", "--classes", "families", "--text-tokens", "2000"], "documents and needs 20"),
    (["rank", "--classes", "shapes"], "classes 'shapes' are unknown"),
    (["rank", "--classes", "a.jsonl,b.jsonl"], "'a.jsonl' is no file"),
    (["measure", "--top", "3"], "--top 3 is of experts rank and steer"),
    (["rank", "--how", "zero"], "--how zero is of experts steer"),
    (["guess"], "'guess'"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=lambda v: "" if isinstance(v, str) else
                         " ".join(v)[:40])  # fmt: skip
def test_bad_input_is_one_line_and_code_2(words: list[str], message: str, tmp_path: Path) -> None:
    known = ["--text-tokens", "3000"] if "--text-tokens" not in words else []
    model = ["--model", MODEL] if "--model" not in words else []
    done = invoke(*words, *model, *known, "--workspace", str(tmp_path / "w"))
    assert done.exit_code == 2, done.stderr
    (line,) = [n for n in done.stderr.splitlines() if n.lower().startswith("error")]
    assert message in done.stderr, line
    assert not list((tmp_path / "w").rglob("manifest.json"))


def test_use_that_no_set_matches_is_refused(tmp_path: Path) -> None:
    """Fourteen experts of each layer off: no other fourteen are used as much."""
    chosen = ",".join(f"{layer}:{e}" for layer in range(8) for e in range(14))
    done = invoke("steer", "--model", MODEL, "--experts", chosen, "--text-tokens", "3000",
                  "--target", "think",
                  "--workspace", str(tmp_path / "w"))  # fmt: skip
    assert done.exit_code == 2, done.stderr
    assert "random sets" in done.stderr


# Classes


@pytest.mark.parametrize("classes", ["steps", "files"])
def test_classes_are_contrasted(classes: str, tmp_path: Path) -> None:
    words = ["--by", "rd-matched"]
    if classes == "files":
        rows = [json.loads(line) for line in data_path("tiny/train.jsonl").open()]
        for family in ("product", "chain_sum"):
            lines = [json.dumps(row) + "\n" for row in rows if row["family"] == family][:60]
            (tmp_path / f"{family}.jsonl").write_text("".join(lines))
        classes = f"{tmp_path / 'product.jsonl'},{tmp_path / 'chain_sum.jsonl'}"
        words = []
    values = result("rank", "--model", MODEL, *FEW, "--classes", classes, *words,
                    "--workspace", str(tmp_path / "w"))  # fmt: skip
    assert values["target"] == values["classes"][0]
    assert values["classes"] == (["steps", "at-once"] if words else ["product", "chain_sum"])
    assert values["by"] == ("rd-matched" if words else "ftri")
    assert values["null"]["token_types"] is None
    assert values["null"]["exchanged_labels"]["called"] > 10


@pytest.mark.slow
def test_right_and_wrong_answers_are_classes(tmp_path: Path) -> None:
    values = result("rank", "--model", MODEL, "--threads", "1", "--classes", "right",
                    "--generations", "400", "--draws", "199", "--workspace",
                    str(tmp_path / "w"))  # fmt: skip
    assert values["classes"] == ["right", "wrong"]
    assert values["documents"] == 400


# Front door and page


def test_the_front_door_reads_the_same(place: Path) -> None:
    lab = rl.open(place, quiet=True, threads=1)
    model = lab.model(MODEL)
    ranking = lab.experts.rank(model, tokens=5000, draws=199)
    table = ranking.table()
    assert table.index.names == ["layer", "expert"]
    assert ranking.null["token_types"]["types"]
    assert "ordinary token types" in repr(ranking)
    assert ranking.plot("rd-matched").data
    routing = lab.experts.measure(model, tokens=5000)
    assert routing.table()["use think"].groupby("layer").sum().round(6).eq(2).all()
    assert routing.plot().data
    with pytest.raises(TypeError, match="did you mean 'draws'"):
        lab.experts.rank(model, drawn=3)
    with pytest.raises(BadInputError, match="has no experts"):
        lab.experts.rank(lab.model("tiny-reasoner"))


def test_the_page_shows_maps_and_nulls(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESA_LENS_WORKSPACE", str(place))
    page = run_page("experts", difference="token-matched")
    assert "ordinary token types in its place" in texts(page)
    assert len(page.get("plotly_chart")) >= 3
    assert [radio.value for radio in page.radio if radio.label == "Difference"] == ["token-matched"]
    frames = {tuple(frame.value.columns)[:3] for frame in page.dataframe}
    assert ("layer", "layer_1_indexed", "expert") in frames


@pytest.mark.slow
def test_the_page_and_the_command_show_the_effect_beside_random_sets(
    steered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESA_LENS_WORKSPACE", str(steered))
    page = run_page("experts")
    assert "random sets" in texts(page)
    assert len(page.get("plotly_chart")) == 4
    done = invoke(*STEER, "--workspace", str(steered))
    assert done.exit_code == 0, done.stderr
    assert "rank p" in " ".join(done.stdout.split())


def test_the_page_says_what_makes_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESA_LENS_WORKSPACE", str(data_path("workspace")))
    page = run_page("experts")
    assert not page.exception
    assert any("experts rank" in code.value or "experts" in code.value for code in page.code)
    assert mixtures.K == 2


@pytest.mark.parametrize("passes", [0, 1], ids=["routers", "stage"])
@pytest.mark.parametrize("action", ["measure", "rank", "steer"])
def test_out_of_memory_names_what_takes_less(
    action: str, passes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first pass, which reads the routers, and at the next, which is the stage's."""
    embed, done = torch.nn.Embedding.forward, []

    def forward(*args: Any) -> Any:
        if len(done) >= passes:
            raise MemoryError
        done.append(1)
        return embed(*args)

    monkeypatch.setattr(torch.nn.Embedding, "forward", forward)
    words = STEER[1:] if action == "steer" else ["--model", MODEL, *FEW]
    run = invoke(action, *words, "--workspace", str(tmp_path / "w"))
    assert run.exit_code == 1
    assert isinstance(run.exception, SystemExit)
    said = run.stderr.partition("error: ")[2]
    assert "out of memory" in said
    assert len(said.splitlines()) <= 3
    kind = {"measure": Routing, "rank": Ranking, "steer": Steering}[action]
    assert (kind.lighter if passes else "--dtype bfloat16 takes less") in said
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
