"""The Python front door: objects in and out, the command line's own artifacts, quick to import."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import pytest

import resa_lens as rl
from resa_lens.errors import BadInputError
from resa_lens.evals.engines import GenerationConfig
from resa_lens.evals.run import EvalConfig
from resa_lens.features.activity import ActivityConfig
from resa_lens.features.exclusive import CountConfig
from resa_lens.features.falsify import FalsifyConfig
from resa_lens.resources import data_path
from resa_lens.saes.train import SaeConfig
from resa_lens.session.options import filled
from resa_lens.stages.demo import BUDGETS, LEARNING_RATE
from resa_lens.texts.corpora import CorpusConfig
from resa_lens.tuning.loop import TuneConfig
from resa_lens.tuning.objective import Objective

SMALL: dict[str, Any] = {"layers": "4-6", "latents": 256, "tokens": 4096}
SCREEN = 40
"""Lines of a terminal that a result may fill."""


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict[str, Any]:
    """A lab and one result of each method, at a tiny budget."""
    lab = rl.open(tmp_path_factory.mktemp("front") / "runs", quiet=True)
    model = lab.model("tiny-reasoner")
    saes = lab.train_saes(model, **SMALL)
    counts = lab.count_features(model, saes)
    rec = lab.recommend(counts)
    short: dict[str, Any] = {"steps": 2, "limit": 8, "learning_rate": 1e-4}
    tuned = lab.tune(model, saes, layer=rec, **short)
    noise = lab.tune(model, saes, layer=rec, control="noise", **short)
    return {
        "lab": lab, "model": model, "saes": saes, "counts": counts, "recommendation": rec,
        "tuned": tuned, "noise": noise, "scores": lab.eval(model, limit=8),
        "comparison": lab.compare(tuned, noise),
        "falsification": lab.falsify(
            model, saes, counts, texts=4, shuffles=2, other_seed=False, random_weights=False
        ),
        "activity": lab.activity(model, saes, text_tokens=2000),
        "mixture": counts.mixture("either"),
        "audit": rl.audit(data_path("paper/tables36_61_layer_checkpoints.csv"), draws=20),
    }  # fmt: skip


STORED = ("saes", "counts", "recommendation", "tuned", "scores", "falsification", "activity")
COMPUTED = ("comparison", "mixture", "audit")


# Import


def in_a_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys, time; began = time.process_time(); import resa_lens as rl\n"
        "spent = time.process_time() - began\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pandas', 'plotly'} & set(sys.modules)\n"
        "assert {'open', 'fit_mixture', 'load_sae', 'audit', 'is_correct'} <= set(dir(rl))\n"
        "print(spent < 0.3, heavy)"
    )
    assert in_a_process(code) == "True set()"


def test_tables_need_no_torch():
    code = (
        "import sys, resa_lens as rl\n"
        "from resa_lens.resources import data_path\n"
        "table = data_path('paper/table6_hookpoints.csv')\n"
        "fit = rl.fit_mixture(table, 'feature_count', draws=20)\n"
        "rl.audit(table, draws=20)\n"
        "print(len(repr(fit)) > 0, 'torch' in sys.modules)"
    )
    assert in_a_process(code) == "True False"


def test_an_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = rl.nonsense  # type: ignore[attr-defined]


# The same artifacts as the command line's


def files(workspace: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in workspace.rglob("*") if p.is_file()}


@pytest.mark.usefixtures("whole_starting_point")
def test_the_front_door_finds_what_the_command_line_made(demo):
    """Identities are equal from SAEs to scores, so nothing is made and no byte is written."""
    before, budget = files(demo.workspace), BUDGETS["test"]
    lab = rl.open(demo.workspace, quiet=True)
    model = lab.model("tiny-reasoner")
    saes = lab.train_saes(model, latents=budget.latents, tokens=budget.sae_tokens)
    counts = lab.count_features(model, saes)
    rec = lab.recommend(counts)
    tuned = lab.tune(
        model, saes, layer=rec, steps=budget.steps, limit=budget.questions,
        learning_rate=LEARNING_RATE,
    )  # fmt: skip
    scores = lab.eval(model, limit=budget.questions)
    assert {k: v for k, v in files(demo.workspace).items() if not k.endswith("README.md")} == {
        k: v for k, v in before.items() if not k.endswith("README.md")
    }
    expected = demo.result
    assert list(rec.layers) == expected["recommendation"]["recommended"]
    assert (rec.verdict, rec.reason) == tuple(
        expected["recommendation"][key] for key in ("verdict", "reason")
    )
    assert str(tuned.path) == expected["tune"]["adapter"]
    assert [tuned.difference, list(tuned.ci), tuned.p_value] == [
        expected["tune"]["paired"][key] for key in ("difference", "ci", "p_value")
    ]
    assert scores.path == tuned.base.path
    assert [scores.accuracy, scores.n, list(scores.ci)] == [
        expected["tune"]["base"][key] for key in ("accuracy", "n", "ci")
    ]
    assert lab.saes(model).path == saes.path
    verdicts = {rule: counts.mixture(rule).verdict for rule in ("all", "any", "either")}
    assert verdicts == expected["verdicts"]


# Results


@pytest.mark.parametrize("name", [*STORED, *COMPUTED])
def test_a_result_is_one_screen_a_table_and_a_place(small, name):
    result = small[name]
    assert 1 < len(repr(result).splitlines()) <= SCREEN
    page = result._repr_html_()
    assert page.startswith("<div>")
    assert page.endswith("</div>")
    assert isinstance(result.table(), pd.DataFrame)
    if name in COMPUTED:
        assert (result.path, result.manifest) == (None, None)
        return
    assert (result.path / "manifest.json").is_file()
    assert result.manifest.identity.startswith(result.path.name.rsplit("-", 1)[1])
    assert result.path.name in repr(result)


def test_the_tables_are_the_stages_figures(small):
    counts, saes = small["counts"], small["saes"]
    rows = counts.manifest.results["layers"]
    for row in rows:
        for rule in ("all", "any", "either"):
            assert counts.table().loc[row["layer"], rule] == row[rule]
            assert len(counts.features(row["layer"], rule)) == row[rule]
    stored = {row["layer"]: row["fvu"] for row in saes.manifest.results["layers"]}
    assert saes.table()["fvu"].to_dict() == stored
    assert len(small["falsification"].table()) == counts.table()["either"].sum() > 0
    tuned = small["tuned"].table()["accuracy"]
    assert tuned["difference"] == pytest.approx(tuned["tuned"] - tuned["base"])
    assert set(small["scores"].answers()["family"]) <= set(small["scores"].table().index)


@pytest.mark.parametrize(
    "name", [n for n in (*STORED, *COMPUTED) if n not in ("audit", "activity")]
)
def test_plots_are_figures(small, name):
    assert isinstance(small[name].plot(), go.Figure)


def test_one_feature_of_an_activity(small):
    activity = small["activity"]
    layer = 5
    table = activity.features(layer)
    assert len(table) == activity.table().loc[layer, "alive"]
    feature = int(table.index[0])
    page = activity.feature(layer, feature)
    assert page["tokens_fired"] == table.loc[feature, "tokens_fired"] > 0
    assert isinstance(activity.plot(layer, feature), go.Figure)


def test_text_from_a_model_stays_text_in_a_notebook(small):
    scores = replace(small["scores"], name="<script>alert(1)</script>")
    assert "<script>" not in scores._repr_html_()


def test_a_model_prints_in_two_lines(small):
    assert "12 layers x 128" in repr(small["model"])
    assert len(repr(small["model"]).splitlines()) == 2


def test_the_saes_of_a_recommendation_are_tuned_through(small):
    tuned, saes, rec = small["tuned"], small["saes"], small["recommendation"]
    parents = tuned.manifest.ingredients["parents"]
    assert parents["recommendation"] == rec.manifest.identity
    assert parents["sae"] == saes.run.parent([rec.layer]).identity
    assert tuned.layer == rec.layer
    assert small["noise"].manifest.config["control"] == "noise"


def test_a_layer_by_its_number_and_a_control_without_a_layer(small):
    lab, model, saes = small["lab"], small["model"], small["saes"]
    short: dict[str, Any] = {"steps": 1, "limit": 4}
    by_number = lab.tune(model, saes, layer="6th", start_check=False, **short)
    assert by_number.layer == 5
    assert "recommendation" not in by_number.manifest.ingredients["parents"]
    imitated = lab.tune(model, control="cot-free", **short)
    assert (imitated.layer, imitated.name) == (None, "cot-free")
    assert "cot-free" in repr(imitated)


def test_a_tuned_model_is_loaded_and_scored(small):
    tuned = small["tuned"]
    model = small["lab"].model(tuned)
    assert model.peft is not None
    assert small["lab"].eval(tuned, limit=8).path == tuned.scores.path


def test_a_file_of_questions_with_columns_of_its_own(small, tmp_path):
    file = tmp_path / "sums.csv"
    file.write_text("task_text,gold\nCompute 2+3.,5\nCompute 7-4.,3\n")
    columns = {"question_column": "task_text", "answer_column": "gold"}
    scores = small["lab"].eval(small["model"], str(file), max_new_tokens=32, **columns)
    assert scores.answers()["question"].tolist() == ["Compute 2+3.", "Compute 7-4."]
    with pytest.raises(BadInputError, match="task_text"):
        small["lab"].eval(small["model"], str(file))


def test_comparisons_name_what_was_compared(small, tmp_path):
    pair = small["comparison"]
    assert (pair.run.base, pair.run.other) == ("SAE, layer 5", "noise, layer 5")
    three = small["lab"].compare(small["scores"], small["tuned"], small["noise"])
    assert list(three.table().index) == ["SAE, layer 5", "noise, layer 5"]
    assert pair.save(tmp_path / "pair.html").read_text().startswith("<!doctype html>")
    with pytest.raises(BadInputError, match="two runs or more"):
        small["lab"].compare(small["tuned"])
    with pytest.raises(BadInputError, match="same run"):
        small["lab"].compare(small["tuned"], small["tuned"])
    with pytest.raises(BadInputError, match=r"margin 1\.5"):
        small["lab"].compare(small["tuned"], small["noise"], margin=1.5)


# Options


CONFIGS = {
    "train_saes": (SaeConfig(), CorpusConfig()),
    "count_features": (CountConfig(),),
    "falsify": (FalsifyConfig(),),
    "activity": (ActivityConfig(), CorpusConfig()),
    "tune": (TuneConfig(), Objective(), CorpusConfig()),
    "eval": (GenerationConfig(), EvalConfig()),
}


@pytest.mark.parametrize("call", CONFIGS)
def test_every_field_is_an_option(call):
    configs = CONFIGS[call]
    for config in configs:
        for item in fields(config):
            if item.name == "generation":  # its own fields are the options
                continue
            value = getattr(config, item.name)
            made = filled(call, {item.name: value}, *configs)
            assert made == list(configs)


def test_a_field_of_several_configurations_goes_to_each():
    made = filled("train_saes", {"seed": 3, "latents": 64}, *CONFIGS["train_saes"])
    assert [config.seed for config in made] == [3, 3]
    _, evaluation = filled("eval", {"temperature": 0.6, "samples": 4}, *CONFIGS["eval"])
    assert (evaluation.generation.temperature, evaluation.samples) == (0.6, 4)


@pytest.mark.parametrize(
    ("call", "option", "nearest"),
    [
        ("train_saes", "latent", "latents"),
        ("count_features", "treshold", "threshold"),
        ("falsify", "shuffle", "shuffles"),
        ("eval", "temprature", "temperature"),
    ],
)
def test_an_unknown_option_names_the_nearest(small, call, option, nearest):
    lab, model, saes, counts = (small[key] for key in ("lab", "model", "saes", "counts"))
    places = {"count_features": (model, saes), "falsify": (model, saes, counts)}
    with pytest.raises(TypeError, match=rf"{call}\(\) has no option '{option}'.*'{nearest}'"):
        getattr(lab, call)(*places.get(call, (model,)), **{option: 1})


def test_seed_and_force_are_options_of_every_call(small):
    lab, model, saes = small["lab"], small["model"], small["saes"]
    other = lab.train_saes(model, **SMALL, seed=1)
    assert other.path != saes.path
    assert other.manifest.config["corpus"]["seed"] == 1
    before = small["counts"].manifest.created
    again = lab.count_features(model, saes, force=True)
    assert again.manifest.created > before
    assert again.path == small["counts"].path
    with pytest.raises(BadInputError, match="holds other SAEs"):
        lab.tune(model, other, layer=small["recommendation"], steps=1, limit=4)


def test_selectors_that_measure_the_target(small, monkeypatch):
    monkeypatch.setattr("resa_lens.stages.layer_probes.BATCHES", 2)
    lab, counts = small["lab"], small["counts"]
    changed = lab.recommend(
        counts, selector="activation-change", target=lab.model("tiny-reasoner-rl")
    )
    probed = lab.recommend(counts, selector="gradient-probe")
    assert (changed.selector, probed.selector) == ("activation-change", "gradient-probe")
    assert {changed.layer, probed.layer} <= {4, 5, 6}


def test_bad_calls_are_refused_before_anything_is_tuned(small):
    lab, model, saes, rec = (small[k] for k in ("lab", "model", "saes", "recommendation"))
    for match, call in (
        ("needs a layer", lambda: lab.tune(model, saes)),
        ("not that of the SAEs", lambda: lab.tune(model, saes, layer=rec, site="resid_post")),
        ("control 'nois' is unknown", lambda: lab.tune(model, saes, layer=rec, control="nois")),
        ("preset 'papre' is unknown", lambda: lab.tune(model, saes, layer=rec, preset="papre")),
        ("rule 'al' is unknown", lambda: lab.recommend(small["counts"], rule="al")),
        ("selector 'best' is unknown", lambda: lab.recommend(small["counts"], selector="best")),
        (
            "give target = the other one",
            lambda: lab.recommend(small["counts"], selector="activation-change"),
        ),
        ("setting 'warm' is unknown", lambda: lab.eval(model, setting="warm")),
        ("layer '12' is out of range", lambda: lab.train_saes(model, layers=12)),
    ):
        with pytest.raises(BadInputError, match=match):
            call()


# Without a workspace


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda lab, m, s, t: lab.train_saes(m, layers="1-12"), "layer '12' is out of range"),
        (lambda lab, m, s, t: lab.count_features(m, s, layers=[12]), "layer '12' is out of range"),
        (lambda lab, m, s, t: lab.insert(m, s, layers="13th"), "layer '13th' is out of range"),
        (lambda lab, m, s, t: lab.tune(m, s, layer=12), "layer '12' is out of range"),
        (lambda lab, m, s, t: lab.eval(m, setting="paper"), "32768 of --setting paper"),
        (lambda lab, m, s, t: lab.eval(m, max_new_tokens=1024), "reads 1024 tokens in all"),
        (lambda lab, m, s, t: lab.eval(t, max_new_tokens=1024), "reads 1024 tokens in all"),
        (lambda lab, m, s, t: lab.activity(m, s, generations=2, max_new_tokens=1024), "1024 tok"),
    ],
    ids=["train", "count", "insert", "tune", "paper", "eval", "eval tuned", "activity"],
)  # fmt: skip
def test_what_a_model_cannot_do_is_refused_before_any_work(small, monkeypatch, call, said):
    """Nothing is loaded, trained or written: the tuned model's files say what it reads."""

    def load(*args: Any, **options: Any) -> None:
        raise AssertionError("weights were about to be loaded")

    monkeypatch.setattr("resa_lens.models.host.AutoModelForCausalLM.from_pretrained", load)
    before = files(small["lab"].workspace.root)
    with pytest.raises(BadInputError, match=said):
        call(small["lab"], small["model"], small["saes"], small["tuned"])
    assert files(small["lab"].workspace.root) == before


def test_fit_mixture_takes_a_mapping_a_series_or_a_file(tmp_path):
    table = {layer: (layer % 3) * 4 for layer in range(1, 11)}
    expected = rl.fit_mixture(table, draws=20).run
    assert rl.fit_mixture(pd.Series(table), draws=20).run == expected
    file = tmp_path / "counts.csv"
    pd.Series(table, name="n").rename_axis("layer").to_csv(file)
    assert rl.fit_mixture(file, "n", draws=20).run == expected
    with pytest.raises(BadInputError, match="name the column"):
        rl.fit_mixture(file)
    with pytest.raises(BadInputError, match="'first'"):
        rl.fit_mixture({"first": 1})  # type: ignore[dict-item]


def test_audit_takes_a_file_or_a_frame():
    file = data_path("paper/tables36_61_layer_checkpoints.csv")
    by_file = rl.audit(file, draws=20).run.to_dict()
    by_frame = rl.audit(pd.read_csv(file, dtype=str), draws=20).run.to_dict()
    assert by_frame | {"source": ""} == by_file | {"source": ""}
    assert by_file["checkpoints"] == 104


def test_figures_and_statistics_are_at_the_front_door():
    assert {"stats", "figures", "recommend", "data_path"} <= set(dir(rl))
    from resa_lens.figures.scores import forest_figure

    assert rl.figures.forest_figure is forest_figure
    assert rl.stats.holm([0.01, 0.04]) == pytest.approx((0.02, 0.04))
    assert rl.figures.BLUE.startswith("#")
    with pytest.raises(AttributeError, match="no attribute 'pie_figure'"):
        _ = rl.figures.pie_figure


def test_a_recommendation_from_a_table_alone():
    from resa_lens.layers.selectors import recommend

    table = {layer: 9 if layer in (6, 7, 8) else 0 for layer in range(1, 13)}
    chosen = rl.recommend(table, selector="most-features", draws=20)
    assert chosen == recommend(table, n_layers=14, selector="most-features", draws=20)
    assert rl.recommend(pd.Series(table), n_layers=20, draws=20).n_layers == 20
    with pytest.raises(BadInputError, match="selector"):
        rl.recommend(table, selector="best")


def test_counts_behind_a_percentage():
    assert rl.possible_counts("33.3", 30) == [10]
    assert rl.possible_counts("29.41", 198) == []
    assert rl.possible_counts("50", 4) == [2]
    with pytest.raises(BadInputError, match="'half' is no number"):
        rl.possible_counts("half", 30)


def test_planted_checkpoints_are_what_the_audit_says_of_them():
    swap = ("gpqa_diamond", "minerva")
    audit = rl.audit(rl.planted_checkpoints(6.0, swap), draws=20)
    (exchange,) = audit.run.test.exchanges
    places = {int(audit.run.table.groups[row].split()[1]) for row in exchange.rows}
    assert places == {1, 3, 5, 7, 9, 11}
    assert audit.run.variance[0].anova.p_value < 0.001
    assert audit.misfits() == []
    plain = rl.planted_checkpoints(0.0, layers=3, checkpoints=2, questions={"math500": 500})
    assert plain.shape == (6, 3)
    paper = rl.audit(rl.data_path("paper/tables3_4_5_models.csv"), draws=20)
    assert len(paper.misfits()) == paper.run.test.counts["fits neither"] == 2


def test_mixtures_are_aligned_as_by_the_command():
    from resa_lens.layers.tables import mixtures_of_table

    table = rl.data_path("paper/table6_hookpoints.csv")
    settings: dict[str, Any] = {"recipe": "paper", "draws": 20}
    counts = rl.fit_mixture(table, "feature_count", **settings)
    scores = rl.fit_mixture(table, "average", baseline=41.18, **settings)
    _, expected = mixtures_of_table(
        table, "feature_count", against="average", against_baseline=41.18, **settings
    )
    assert counts.align(scores) == expected


def test_the_shipped_sweeps_are_results():
    shipped = rl.open(rl.data_path("workspace"), quiet=True)
    sweeps = shipped.sweeps()
    assert len(sweeps) == len(shipped.artifacts("sweep")) > 1
    sizes = [len(sweep.table()) for sweep in sweeps]
    assert sizes == sorted(sizes, reverse=True)
    main = sweeps[0]
    right, base = main.correct(), main.answers()["base"]
    assert right.shape == (len(main.table()), main.table()["seeds"].iloc[0], main.tables.n)
    accuracy = right.mean(axis=(1, 2))
    assert accuracy == pytest.approx(main.table()["accuracy"])
    assert accuracy - base.mean() == pytest.approx(main.table()["difference"])
    assert len(main.selectors()) == len(main.tables.regrets["selectors"]) + 1
    assert {len(sweep.controls()) for sweep in sweeps} == {
        len(sweep.tables.controls) for sweep in sweeps
    }
    assert isinstance(main.plot(), go.Figure)
    assert main.path.name in repr(main)
    with pytest.raises(BadInputError, match="kind 'sweeps' is unknown"):
        shipped.artifacts("sweeps")


def test_the_loss_at_the_start_is_the_first_of_the_tuning(small):
    lab, model, saes, tuned = (small[key] for key in ("lab", "model", "saes", "tuned"))
    start = lab.starting_loss(model, saes, tuned.layer, controls=("none", "identity"))
    assert start.loc[["none", "identity"]].to_numpy().tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert start.loc["SAE", "FVU"] > 0
    assert start.loc["SAE", "KL"] > 0
    assert "lora" not in " ".join(name for name, _ in model.model.named_parameters())
    weights = tuned.weights()
    assert {name.rsplit(".", 2)[1] for name in weights} == {"lora_A", "lora_B"}


def test_a_closer_look_at_one_feature(small):
    lab, model, saes, counts = (small[key] for key in ("lab", "model", "saes", "counts"))
    record = small["falsification"].run.features[0]
    layer, feature = record["layer"], record["feature"]
    # Counted: active at tags alone.
    active = saes.activations(layer, counts.prompt.ids)
    places = set(active.loc[active["feature"] == feature, "position"])
    assert places
    assert places <= set(counts.tag_positions)
    # The trials of one feature are those of all.
    trials = lab.trials(model, counts, layer, feature, texts=4, shuffles=2)
    for kind, share in record["shares"].items():
        assert trials.table().loc[kind, ["fired", "n"]].tolist() == [share["fired"], share["n"]]
    assert isinstance(trials.plot(), go.Figure)
    weighed = lab.attribute(model, saes, layer, [feature], text_tokens=256)
    assert weighed.table().index.tolist() == [feature]
    assert weighed.results["layer"] == layer
    changed = lab.ablate(model, saes, layer, [feature], limit=4, doses=(1.0,), controls=1, seed=3)
    assert changed.manifest.config["ablation"]["seed"] == 3
    assert changed.results["n"] == 4
    assert changed.table().index.tolist() == [row["strength"] for row in changed.results["doses"]]
    assert isinstance(changed.plot(), go.Figure)
    for result in (trials, weighed, changed):
        assert 1 < len(repr(result).splitlines()) <= SCREEN
    with pytest.raises(BadInputError, match="layer '12' is out of range"):
        lab.ablate(model, saes, 12, [feature])


def test_examples_of_a_feature_keep_text_as_text(small):
    from resa_lens.session.features import Examples

    excerpt = {"tokens": ["<b>", "=", "2"], "acts": [0.0, 2.0, 1.0], "value": 2.0, "position": 8,
               "start": 7, "phase": "think"}  # fmt: skip
    examples = Examples([excerpt])
    assert repr(examples) == "2.00, think: '<b>[=]2'"
    assert "<b>" not in examples._repr_html_()
    assert examples._repr_html_().count("outline") == 1
    activity = small["activity"]
    feature = int(activity.features(5).index[0])
    strongest = activity.examples(5, feature).excerpts
    every = activity.feature(5, feature)["examples"]
    assert strongest == [row for row in every if row["interval"] == "strongest"]
    assert 0 < len(strongest) < len(every)


def test_load_sae_by_folder_and_layer(small):
    saes = small["saes"]
    one = rl.load_sae(saes.path, 5)
    assert (one.W_dec == saes.sae(5).W_dec).all()
    alone = rl.load_sae(saes.path / "layers.5.mlp")
    assert (alone.W_dec == one.W_dec).all()
    with pytest.raises(BadInputError, match=r"several SAEs.*layers\.4\.mlp"):
        rl.load_sae(saes.path)
    with pytest.raises(BadInputError, match=r"no SAE layers\.9\.mlp"):
        rl.load_sae(saes.path, 9)
    with pytest.raises(BadInputError, match="not found"):
        rl.load_sae(saes.path / "nothing", 5)


# Examples


@pytest.mark.parametrize(
    "module",
    [f"session.{name}" for name in ("lab", "scoring", "probing", "workbench", "plain")],
)
def test_the_examples_in_docstrings_print_what_they_say(small, module):
    loaded = importlib.import_module(f"resa_lens.{module}")
    names = {key: small[key] for key in ("lab", "model", "saes", "counts")}
    examples = doctest.DocTestFinder(exclude_empty=True).find(loaded, extraglobs=names)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for example in examples:
        runner.run(example)
    assert runner.tries > 0
    assert runner.failures == 0
