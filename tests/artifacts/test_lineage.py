"""What came from what: the graph, its figure, the checklist and the commands, without a page."""

from __future__ import annotations

import shlex
from pathlib import Path

import kind_examples
import pytest
from typer.main import get_command

from resa_lens.artifacts import commands, lineage
from resa_lens.artifacts.artifact import COLUMNS, Artifact, Parent
from resa_lens.artifacts.checklist import checklist
from resa_lens.artifacts.kinds.eval import adapter_of, by_adapter, is_as_tuned
from resa_lens.artifacts.listing import Listing, Unfinished, is_parent
from resa_lens.cli import app
from resa_lens.figures import lineage as lineage_plots
from resa_lens.resources import data_path

ROOT = Path("/w o/space")
MODEL = "tiny-reasoner-459a3904"
WEIGHTS = "459a3904" + 56 * "0"
SAES = f"saes/{MODEL}/scratch-mlp_out-1024x32-d6776ad89844"
COUNTS = f"counts/{MODEL}/mlp_out-9a4bb908aea5"


def artifact(relative: str, kind: str, parents: tuple[str, ...] = (), **fields) -> Artifact:
    fields.setdefault("created", "2026-11-24T10:00:00+00:00")
    weights = fields.pop("weights", WEIGHTS)
    return kind_examples.artifact(
        ROOT, relative, kind, parents=list(parents), hashes={"weights": weights}, **fields
    )


def listing(*artifacts: Artifact, under_way: tuple[Unfinished, ...] = ()) -> Listing:
    return Listing(ROOT, artifacts, (), True, under_way)


def scored(adapter: str, **fields) -> Artifact:
    name = f"/elsewhere/adapters/{adapter}"
    return artifact(f"evals/e-{adapter}", "eval", results={"model": name}, **fields)


def five() -> Listing:
    return listing(
        artifact(SAES, "saes"),
        artifact(COUNTS, "counts", (SAES,)),
        artifact("adapters/a", "adapter", (SAES,)),
        scored("a", weights="beef" * 16),
        artifact("evals/base", "eval"),
    )


def test_edges_come_from_the_manifests_and_the_model_by_its_weights():
    graph = lineage.build(five())
    model = f"model {MODEL}"
    assert [node.key for node in graph.nodes] == [
        model, SAES, COUNTS, "adapters/a", "evals/base", "evals/e-a"
    ]  # fmt: skip
    assert set(graph.edges) == {
        (model, SAES),
        (SAES, COUNTS),
        (SAES, "adapters/a"),
        ("adapters/a", "evals/e-a"),
        (model, "evals/base"),
    }
    saes = graph.node(SAES)
    assert [n.key for n in graph.parents(saes)] == [model]
    assert {n.key for n in graph.children(saes)} == {COUNTS, "adapters/a"}


def test_a_parent_that_is_missing_stands_hollow_with_its_command():
    graph = lineage.build(listing(artifact(COUNTS, "counts", (SAES,))))
    node = graph.node(SAES)
    assert node.missing
    assert node.command == (
        "resa-lens train-saes --model tiny-reasoner --site mlp_out --latents 1024 --k 32 "
        "--workspace '/w o/space'"
    )
    assert (f"model {MODEL}", SAES) in graph.edges
    # Of an evaluation whose adapter was removed, the command that made both.
    lone = scored("gone", weights="beef" * 16, command=["resa-lens", "tune", "--layer", "5"])
    graph = lineage.build(listing(lone))
    assert graph.node("adapters/gone").command == "resa-lens tune --layer 5"
    # Of a missing evaluation, the questions are the child's.
    command = ["resa-lens", "sweep", "--limit", "50", "--seeds=2"]
    sweep = artifact("sweeps/s", "sweep", ("evals/tiny-reasoner-459a3904-1",), command=command)
    node = lineage.build(listing(sweep)).node("evals/tiny-reasoner-459a3904-1")
    assert node.command.startswith("resa-lens eval --model tiny-reasoner --limit 50 --workspace")
    # Of what has no command of its own, the child's makes it too.
    lone = artifact("recommendations/m/r", "recommendation", ("effects/m/e",), command=command)
    assert lineage.build(listing(lone)).node("effects/m/e").command.startswith("resa-lens sweep")
    # What lies outside the workspace cannot be made here.
    outside = artifact(COUNTS, "counts", ("/far/saes",))
    assert lineage.build(listing(outside)).node("/far/saes").command is None


def test_an_adapters_scores_are_known_by_its_weights():
    adapter = artifact("adapters/renamed", "adapter", files={"adapter_model.safetensors": "ab"})
    model = {"weights": WEIGHTS, "adapters": [{"weights": "ab", "scale": 9.0}]}
    fields = {"weights": "beef" * 16, "ingredients": {"model": model}}
    scores = artifact("evals/e", "eval", results={"model": "9*old-name"}, **fields)
    graph = lineage.build(listing(adapter, scores))
    assert ("adapters/renamed", "evals/e") in graph.edges
    assert [node.title for node in graph.nodes if node.base] == ["tiny-reasoner"]
    assert adapter_of(scores, by_adapter([adapter])) is adapter
    assert not is_as_tuned(scores)
    # Without the adapter the scores hang on its base.
    graph = lineage.build(listing(artifact(SAES, "saes"), scores))
    assert (f"model {MODEL}", "evals/e") in graph.edges


def test_many_alike_are_folded_and_controls_stand_apart():
    artifacts = [artifact(SAES, "saes")]
    for number in range(30):
        control = {"control": "noise"} if number % 2 else {}
        name = f"a{number:02}"
        artifacts.append(
            artifact(f"adapters/{name}", "adapter", (SAES,), config=control,
                     results={"layer": number % 5})
        )  # fmt: skip
        artifacts.append(scored(name, weights=f"{number:064x}"))
    graph = lineage.build(listing(*artifacts))
    assert len(graph.nodes) == 6  # model, SAEs, and two piles of adapters with their scores
    piles = [node for node in graph.nodes if len(node.members) == 15]
    assert [node.title for node in piles] == ["15 adapters"] * 2 + ["15 evaluations"] * 2
    assert {node.detail for node in piles[:2]} == {"5 layers", "control noise"}
    # One that is folded is found by its own path.
    assert graph.node("adapters/a03") in piles
    assert len(lineage.build(listing(*artifacts), fold=99).nodes) == 62


def test_a_merged_model_stands_left_of_the_adapter_it_was_made_from():
    graph = lineage.build(
        listing(
            artifact("models/merged", "model", ("adapters/a",)),
            artifact("adapters/a", "adapter", (SAES,)),
            artifact(SAES, "saes"),
        )
    )
    assert ("adapters/a", "models/merged") in graph.edges
    assert not any(node.missing for node in graph.nodes)
    assert lineage_plots.lineage_figure(graph.nodes, graph.edges)


def test_details_count_layers_as_the_reader_does():
    one = artifact("recommendations/m/r", "recommendation")
    kind = one.kind
    assert kind.detail(one) == "layer 5"
    assert kind.detail(one, one_based=True) == "layer 6"


def test_a_renamed_folder_is_found_again_by_its_identity():
    counts = artifact("counts/m/other-name", "counts", identity="c" * 64)
    parents = {"parents": {"counts": "c" * 64}}
    made = artifact("recommendations/m/r", "recommendation", (COUNTS,), ingredients=parents)
    assert is_parent(counts, made)
    assert counts.parent == Parent("c" * 64, "counts/m/other-name")
    graph = lineage.build(listing(counts, made))
    assert ("counts/m/other-name", "recommendations/m/r") in graph.edges
    assert graph.node(COUNTS) is None


def test_the_figure_places_children_to_the_right_and_leads_edges_around():
    graph = lineage.build(five())
    points, paths = lineage_plots.layout(graph.nodes, graph.edges)
    assert len(set(points.values())) == len(points)
    for parent, child, path in paths:
        assert points[parent][0] < points[child][0]
        # No edge passes through a node that it does not belong to.
        between = set(path[1:-1])
        assert not between & set(points.values())
    figure = lineage_plots.lineage_figure(graph.nodes, graph.edges, headings=COLUMNS, chosen=SAES)
    nodes = figure.data[-1]
    assert [row[0] for row in nodes.customdata] == [node.key for node in graph.nodes]
    said = [note.text for note in figure.layout.annotations]
    assert "<b>Model</b>" in said
    assert "<b>Judged</b>" not in said  # an empty column takes no room


def test_edges_that_others_say_are_not_drawn():
    edges = [("a", "b"), ("b", "c"), ("a", "c"), ("a", "d")]
    assert lineage_plots.reduced(edges) == [("a", "b"), ("b", "c"), ("a", "d")]


def test_text_from_files_is_no_markup_in_the_figure():
    hostile = artifact("evals/<b>x</b>", "eval", results={"model": "<img src=x>"})
    graph = lineage.build(listing(hostile))
    figure = lineage_plots.lineage_figure(graph.nodes, graph.edges)
    drawn = [*figure.data[-1].hovertext, *(note.text for note in figure.layout.annotations)]
    assert any("&lt;img src=x&gt;" in text for text in drawn)
    assert not any("<img" in text or "<b>x" in text for text in drawn)


def test_the_checklist_says_what_is_done_begun_and_missing():
    begun = Unfinished(f"activity/{MODEL}/.work-mlp_out-1", "step 3; no process is at work here")
    steps = {
        s.name: s
        for s in checklist(
            listing(*five().artifacts, under_way=(begun,)), commands.models(five())[0]
        )
    }
    assert {name: step.state for name, step in steps.items()} == {
        "SAEs": "done", "Counts": "done", "Recommendation": "missing", "Falsification": "missing",
        "Activity": "unfinished", "Scores": "missing", "Tuning": "done", "Controls": "missing",
        "Sweep": "missing",
    }  # fmt: skip


def test_commands_parse_and_name_the_same_saes():
    options = ["--latents", "1024", "--tokens=5000", "--seed", "3"]
    held = listing(artifact(SAES, "saes", command=["resa-lens", "train-saes", *options]))
    model = commands.models(held)[0]
    known = get_command(app).commands
    for step in checklist(held, model):
        words = shlex.split(step.command)
        assert words[0] == "resa-lens"
        context = known[words[1]].make_context(words[1], words[2:])
        assert context.params["model"] == "tiny-reasoner"
        assert context.params["workspace"] == str(ROOT)
        assert (context.params["latents"], context.params["tokens"]) == (1024, 5000)
        assert context.params["seed"] == 3


def test_commands_for_the_bundled_workspace_write_elsewhere():
    held = Listing(data_path("workspace").resolve(), five().artifacts, (), True)
    assert all("--workspace" not in s.command
               for s in checklist(held, commands.models(held)[0]))  # fmt: skip


@pytest.mark.parametrize("hostile", ["x; rm -rf y", "$(id)", "a'b"])
def test_names_are_quoted_for_the_shell(hostile: str):
    held = listing(artifact(SAES, "saes", results={"model": hostile}))
    command = checklist(held, commands.models(held)[0])[0].command
    assert shlex.split(command)[3] == hostile


def test_missing_parents_of_a_kind_stand_in_one_pile_and_keep_their_commands():
    others = [SAES.replace("d6776ad89844", f"{n:012d}") for n in (1, 2)]
    graph = lineage.build(
        listing(
            artifact(COUNTS, "counts", (others[0],)), artifact("counts/c", "counts", others[1:])
        )
    )
    pile = graph.node(others[0])
    assert pile is graph.node(others[1])
    assert pile.missing
    assert (pile.title, pile.detail) == ("2 SAEs", "missing")
    assert {node.key for node in pile.absent} == set(others)
    assert all("train-saes" in node.command for node in pile.absent)
    assert {child.key for child in graph.children(pile)} == {COUNTS, "counts/c"}
    one = lineage.build(listing(artifact(COUNTS, "counts", (SAES,)))).node(SAES)
    assert (one.key, one.absent) == (SAES, ())
