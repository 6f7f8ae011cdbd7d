"""Which modules get adapters: by the model alone, before an SAE is trained, and no others."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2ForCausalLM
from typer.testing import CliRunner

from benchmarks import model_grid
from benchmarks.model_grid import save_variant
from resa_lens.artifacts.stage import Context
from resa_lens.artifacts.workspace import Workspace
from resa_lens.cli import app
from resa_lens.errors import BadInputError
from resa_lens.machine.hardware import MB
from resa_lens.models import bridge as bridge_module
from resa_lens.models.hookpoints import Hookpoint, inside
from resa_lens.models.host import Model, load_model
from resa_lens.saes.world import World
from resa_lens.stages.adapters import adapter_mb, adapter_run
from resa_lens.stages.tune_job import TuneJob
from resa_lens.tuning.config import ATTENTION, PRESETS, TuneConfig, preset
from resa_lens.tuning.train import add_adapters, add_lora, lora_targets, modules_in, save_adapter

CONFIG = TuneConfig(rank=3)
SHORT = ("--steps", "2", "--rank", "2", "--tokens", "1024", "--latents", "64", "--limit", "2",
         "--max-new-tokens", "4", "--no-start-check")  # fmt: skip


@pytest.fixture(scope="module")
def variant(tmp_path_factory: pytest.TempPathFactory):
    """Return the folder of an architecture of the grid."""
    return cache(lambda name: save_variant(name, tmp_path_factory.mktemp(name) / name))


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("gpt2", PRESETS["paper"].targets),
        ("gpt2", PRESETS["reference"].targets),
        ("llama", ("self_attn.q_proj",)),
        ("phi3", PRESETS["reference"].targets),
        ("qwen2_moe", PRESETS["reference"].targets),
        ("deepseek_v3", PRESETS["paper"].targets),
    ],
)
def test_an_adapter_is_as_large_as_it_was_said_with_a_bridge_over_the_model(
    variant: Callable[[str], Path], tmp_path: Path, name: str, targets: tuple[str, ...]
) -> None:
    folder = str(variant(name))
    fresh, bridged = load_model(folder), load_model(folder)
    assert bridged.bridge is not None
    named = lora_targets(fresh.model, targets)
    assert lora_targets(bridged.model, targets) == named
    for layers in ("all", "1"):
        job = TuneJob(
            folder,
            objective=preset("paper", targets=targets),
            lora=TuneConfig(rank=3, adapter_layers=layers),
        )
        assert job.modules(bridged).keys() == job.modules(fresh).keys()
        peft = add_lora(load_model(folder).model, named, job.lora)
        save_adapter(peft, tmp_path / layers, Path(folder))
        weights = load_file(tmp_path / layers / "adapter_model.safetensors").values()
        assert adapter_mb(bridged, job) == pytest.approx(4 * sum(w.numel() for w in weights) / MB)
        assert adapter_mb(bridged, job) > 0


def test_a_bridges_own_parts_are_no_targets(variant: Callable[[str], Path]) -> None:
    """It cuts a fused projection into a `gate` and an `in`."""
    model = load_model(str(variant("phi3")))
    assert model.bridge is not None
    with pytest.raises(BadInputError, match=r"choose --targets from down_proj, gate_up_proj, o_pr"):
        lora_targets(model.model, ("gate",))


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("mixtral", "gate"),
        ("qwen2_moe", "gate"),
        ("qwen3_moe", "gate"),
        ("gpt_oss", "router"),
        # Modules of dense layers and shared experts, but PEFT takes them for the routed ones.
        *(("deepseek_v3", name) for name in ("gate", "down_proj", "mlp.gate_proj")),
    ],
)
def test_what_peft_cannot_adapt_is_refused(
    variant: Callable[[str], Path], name: str, target: str
) -> None:
    model = load_model(str(variant(name))).model
    with pytest.raises(BadInputError, match=f"'{target}' to adapt .*its experts") as refused:
        lora_targets(model, ("o_proj", target))
    text = str(refused.value)
    assert "\n" not in text
    offered = text.split("choose --targets from ")[1].split(", ")
    assert target not in offered
    # What is offered instead is adapted, by dropout too, and nothing else is.
    peft = add_lora(model, lora_targets(model, tuple(offered)), CONFIG)
    assert not peft.peft_config["default"].target_parameters


@pytest.mark.parametrize("name", ["phi3", "glm4"])
def test_an_adapter_on_a_fused_mlp_is_in_the_passes_with_hooks(
    variant: Callable[[str], Path], name: str
) -> None:
    """TransformerLens' own MLP computes with copies of the halves, around the adapter."""
    model, objective = load_model(str(variant(name))), preset("paper", targets=("gate_up_proj",))
    peft, bridge = add_adapters(model, objective, CONFIG)
    bridge(torch.arange(8, 40)[None]).std().backward()
    learning = {n: p.grad for n, p in peft.named_parameters() if "lora_B" in n}
    assert len(learning) == 2
    assert all(grad is not None and bool(grad.any()) for grad in learning.values())


def written(model: Model, targets: tuple[str, ...], config: TuneConfig = CONFIG) -> set[str]:
    """Return what stands in an adapter's configuration."""
    return set(add_lora(model.model, targets, config).peft_config["default"].target_modules)


def test_bare_names_are_written_where_they_mean_just_what_is_adapted(
    variant: Callable[[str], Path],
) -> None:
    folder = str(variant("llama"))
    assert written(load_model(folder), ATTENTION) == set(ATTENTION)
    model = load_model(folder)
    # A norm of the same name, onto which PEFT would not put LoRA.
    model.model.get_submodule("model.layers.1").add_module("q_proj", torch.nn.LayerNorm(4))
    expected = {f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)}
    assert modules_in(model.model, ["q_proj"], "all").keys() == expected
    assert written(model, ("q_proj",)) == expected
    some = TuneConfig(rank=3, adapter_layers="1")
    assert written(load_model(folder), ("q_proj",), some) == {"model.layers.1.self_attn.q_proj"}


def test_what_a_site_is_the_output_of() -> None:
    attention, mlp = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.shared_expert.up_proj"
    within = {"attn_out": [attention], "attn_post": [attention], "mlp_out": [mlp],
              "mlp_post": [mlp], "resid_post": [attention, mlp]}  # fmt: skip
    others = ["model.layers.11.mlp.up_proj", "model.layers.0.self_attn.q_proj", "lm_head"]
    for site, expected in within.items():
        point = Hookpoint(1, site)
        assert [name for name in (attention, mlp, *others) if inside(name, point)] == expected


# By the commands: in a line, and before an SAE is trained


def refused(place: Path, *words: str) -> str:
    """Return the line in which a command is refused that has made nothing."""
    done = CliRunner().invoke(app, [*words, *SHORT, "--workspace", str(place / "w")])
    assert done.exit_code == 2, (done.stderr, done.exception)
    assert not list(place.rglob("adapter*"))
    assert not list(place.rglob("*.safetensors"))
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("plan", [(), ("--plan",)])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model tiny-moe-reasoner --targets gate", "'gate' to adapt"),
        ("--model tiny-reasoner --preset reference --site attn_out --adapter-layers 3 "
         "--targets q_proj", "no adapter is behind or beside it"),
        ("--model tiny-reasoner --preset reference --site mlp_out --adapter-layers 3 "
         "--targets gate_proj,up_proj", "no adapter is behind or beside it"),
        ("--model tiny-reasoner --adapter-layers 3 --targets lm_head", "none of lm_head is in"),
        ("--model tiny-reasoner --adapter-layers 3 --targets q_proj,lm_head",
         "lm_head is in no layer"),
    ],
)  # fmt: skip
def test_a_tuning_is_refused_before_an_sae_is_trained(
    tmp_path: Path, plan: tuple[str, ...], options: str, message: str
) -> None:
    assert message in refused(tmp_path, "tune", "--layer", "3", *options.split(), *plan)


@pytest.mark.parametrize(
    "command", ["tune --layer 0", "sweep --layers 0", "sweep --layers 0 --plan"]
)
def test_a_preset_that_peft_cannot_adapt_is_refused_too(
    variant: Callable[[str], Path], tmp_path: Path, command: str
) -> None:
    words = (*command.split(), "--preset", "reference", "--model", str(variant("deepseek_v3")))
    assert "'gate_proj' to adapt" in refused(tmp_path, *words)


@pytest.mark.parametrize("plan", [(), ("--plan", "--json")])
def test_targets_with_dots_are_tuned(tmp_path: Path, plan: tuple[str, ...]) -> None:
    words = ["tune", "--model", "tiny-reasoner", "--layer", "3", "--targets", "self_attn.q_proj",
             "--workspace", str(tmp_path), *SHORT, *plan]  # fmt: skip
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, (done.stderr, done.exception)
    for file in [] if plan else [next(tmp_path.rglob("adapter_config.json"))]:
        assert json.loads(file.read_text())["target_modules"] == ["self_attn.q_proj"]


@pytest.mark.parametrize(
    ("name", "command", "module"),
    [
        ("gpt_neox", "tune --layer 0", "attention.query_key_value"),
        ("gpt_neox", "sweep --layers 0 --plan", "attention.query_key_value"),
        ("gpt_neox", "tune --layer 0 --targets attention.query_key_value,dense --plan",
         "attention.query_key_value"),
        ("gpt2", "tune --layer 0 --targets c_attn,c_fc", "attn.c_attn"),
        ("phi3", "tune --layer 0 --targets mlp.gate_up_proj", "mlp.gate_up_proj"),
    ],
)  # fmt: skip
def test_adapters_that_the_bridge_goes_around_are_refused_too(
    variant: Callable[[str], Path],
    tmp_path: Path,
    name: str,
    command: str,
    module: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By whatever name they are called."""
    build = bridge_module._build

    def stock_only(*args: Any, native: bool) -> Any:
        if native:
            raise AttributeError("no such part")
        return build(*args, native=False)

    monkeypatch.setattr(bridge_module, "_build", stock_only)
    line = refused(tmp_path, *command.split(), "--model", str(variant(name)))
    assert "no such part" in line
    assert "around an adapter on " in line
    assert f".0.{module};" in line


@pytest.mark.parametrize(
    "options",
    ["tune --layer 0", "tune --layer 0 --plan", "sweep --layers 0 --seeds 1 --controls none"],
)
def test_gpt2_is_tuned_by_every_command(
    variant: Callable[[str], Path], tmp_path: Path, options: str
) -> None:
    words = [*options.split(), "--model", str(variant("gpt2")), "--workspace", str(tmp_path)]
    done = CliRunner().invoke(app, [*words, *SHORT])
    assert done.exit_code == 0, (done.stderr, done.exception)


def test_an_adapter_on_the_unembedding_learns_behind_the_last_sae(tmp_path: Path) -> None:
    """No gradient passes this SAE, and the unembedding is behind it though in no layer."""
    words = ["tune", "--model", "tiny-reasoner", "--preset", "reference", "--layer", "11",
             "--targets", "lm_head", "--learning-rate", "1e-2",
             "--workspace", str(tmp_path)]  # fmt: skip
    done = CliRunner().invoke(app, [*words, *SHORT])
    assert done.exit_code == 0, (done.stderr, done.exception)
    weights = load_file(next(tmp_path.rglob("adapter_model.safetensors")))
    assert any(w.any() for name, w in weights.items() if "lora_B" in name)


def test_an_adapter_on_a_fused_mlp_is_not_taken_for_one_of_before_it_learned(
    variant: Callable[[str], Path], tmp_path: Path
) -> None:
    """Passes with hooks went around it once, and its files are still in workspaces."""
    config = {}
    for targets in ("gate_up_proj,down_proj", "qkv_proj"):
        words = ["tune", "--model", str(variant("phi3")), "--layer", "0", "--targets", targets,
                 "--workspace", str(tmp_path / targets)]  # fmt: skip
        done = CliRunner().invoke(app, [*words, *SHORT])
        assert done.exit_code == 0, (done.stderr, done.exception)
        (file,) = tmp_path.glob(f"{targets}/adapters/*/manifest.json")
        config[targets] = json.loads(file.read_text())["ingredients"]["config"]
    assert config["gate_up_proj,down_proj"]["fused_mlp"] == "adapted"
    assert "fused_mlp" not in config["qkv_proj"]


@pytest.mark.parametrize("control", [(), ("--control", "cot-free")])
def test_checkpointing_that_a_model_cannot_do_is_refused(
    tmp_path: Path, control: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Qwen2ForCausalLM, "supports_gradient_checkpointing", False)
    words = ["tune", "--model", "tiny-reasoner", "--layer", "3", "--gradient-checkpointing"]
    assert "Qwen2ForCausalLM cannot do it" in refused(tmp_path, *words, *control)


def test_mamba_is_tuned_where_peft_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels read the way out themselves, and PEFT refuses an adapter on it."""
    monkeypatch.setitem(model_grid.VARIANTS, "mamba", {"hidden_size": 32, "num_hidden_layers": 3})
    model_grid.save_variant("mamba", tmp_path / "mamba")
    model = load_model(str(tmp_path / "mamba")).model
    with pytest.raises(BadInputError, match=r"'out_proj' to adapt; choose .* dt_proj, in_proj, x_"):
        lora_targets(model, ("in_proj", "out_proj"))
    peft = add_lora(model, ("in_proj", "x_proj"), TuneConfig(rank=2))
    assert sum("lora_A" in name for name, _ in peft.named_parameters()) == 2 * 3


def test_a_sweep_without_steps_to_imitate_is_refused_before_an_sae_is_trained(
    tmp_path: Path,
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"question": "What is 1+1?", "answer": "2"}))
    words = ["sweep", "--model", "tiny-reasoner", "--layers", "3", "--controls", "cot", "--data"]
    assert "no steps to imitate" in refused(tmp_path / "w", *words, str(data))


def test_batches_of_an_update_divide_among_processes_before_anything_is_made(
    tmp_path: Path,
) -> None:
    """Own samples and SAEs take hours, and another accumulation is another adapter."""
    job = TuneJob("no-such-model", lora=replace(CONFIG, accumulation=3))
    with pytest.raises(BadInputError, match="does not divide among 2 processes; use 4"):
        adapter_run(Context(Workspace(tmp_path)), job, world=World(0, 2))
