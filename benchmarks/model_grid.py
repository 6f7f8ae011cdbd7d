"""Which models work: tiny random ones of many architectures through every step of the suite.

    python -m benchmarks.model_grid          # runs all and writes README's table

tests/models/test_grid.py holds a part of it in every test run.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from resa_lens.evals.engines.base import GenerationConfig
from resa_lens.evals.engines.hf import HFEngine
from resa_lens.features.exclusive import count_features
from resa_lens.machine.hardware import MB
from resa_lens.models.activations import stream_activations
from resa_lens.models.bridge import plain_name
from resa_lens.models.hookpoints import POST, Hookpoint, inside
from resa_lens.models.host import Model, load_model
from resa_lens.resources import data_path
from resa_lens.saes.coder import SparseCoder, new_coder
from resa_lens.saes.formats import find_coders, save_coder
from resa_lens.saes.train import SaeConfig, train_saes
from resa_lens.stages.adapters import adapter_mb
from resa_lens.stages.tune_job import TuneJob
from resa_lens.tuning.config import ATTENTION
from resa_lens.tuning.objective import Objective, preset
from resa_lens.tuning.train import (
    TuneConfig,
    adaptable,
    lora_targets,
    modules_in,
    save_adapter,
    tune,
)

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY, WIDTH, LAYERS = 576, 32, 2
"""The bundled tokenizer's, so that the think tags are tokens."""
NARROW: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "max_position_embeddings": 256,
}  # fmt: skip
GROUPED = {**NARROW, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
OLD = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 256}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": HEADS,
    "qwen2_moe": {**GROUPED, **EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**HEADS, **EXPERTS},
    "gemma": HEADS,
    "gemma2": {**HEADS, "query_pre_attn_scalar": 8, "sliding_window": 16},
    "gemma3_text": {**HEADS, "query_pre_attn_scalar": 8, "sliding_window": 16},
    "olmo": GROUPED,
    "olmo2": GROUPED,
    "olmo3": {**GROUPED, "sliding_window": 16},
    "granite": {**GROUPED, "residual_multiplier": 0.22, "embedding_multiplier": 12.0,
                "logits_scaling": 8.0, "attention_multiplier": 0.1},
    "mistral": GROUPED,
    "mixtral": {**GROUPED, **LOCAL_EXPERTS},
    "phi": {**NARROW, "partial_rotary_factor": 0.5},
    "phi3": {**GROUPED, "pad_token_id": 0, "original_max_position_embeddings": 256},
    "gpt2": OLD,
    "gptj": {**OLD, "rotary_dim": 4},
    "gpt_neox": NARROW,
    "gpt_oss": {**HEADS, **LOCAL_EXPERTS, "sliding_window": 16},
    "deepseek_v3": {**NARROW, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
                    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
                    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
                    "topk_group": 2, "n_shared_experts": 1, "moe_intermediate_size": 32,
                    "first_k_dense_replace": 1},
    "falcon": {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
               "multi_query": True, "parallel_attn": True, "bias": False, "alibi": False},
    "stablelm": GROUPED,
    "starcoder2": GROUPED,
    "cohere": GROUPED,
    "glm4": {**HEADS, "pad_token_id": 0},
    "smollm3": {**GROUPED, "pad_token_id": 0},
}  # fmt: skip
"""By transformers' model_type: what makes the configuration small."""
ROUTED = {"mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"}
"""Mixtures whose MLPs get no adapters: of preset reference they take the attention alone."""
BEFORE = {post: out for out, post in POST.items()}
"""The module's own place, by that behind its norm or factor."""
REFUSALS: dict[tuple[str, str], str] = {}
"""(variant, column): the message of TransformerLens or transformers where it fails itself."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Return the bundled model's tokenizer."""
    return PreTrainedTokenizerFast.from_pretrained(data_path("tiny-reasoner"))


def save_variant(name: str, folder: Path, seed: int = 0) -> Path:
    """Write a random model of an architecture, its norms and biases away from 0 and 1."""
    config = AutoConfig.for_model(name, vocab_size=VOCABULARY, **VARIANTS[name])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for parameter_name, parameter in model.named_parameters():
            norm = "norm" in parameter_name or "ln_" in parameter_name
            mean = float(parameter.ndim == 1 and norm)
            torch.nn.init.normal_(parameter, mean=mean, std=0.15)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@dataclass
class Subject:
    """One architecture under test: our model, and plain transformers' of the same folder."""

    folder: Path
    plain: Any
    model: Model
    ids: Tensor
    coders: dict[Hookpoint, SparseCoder]

    def fresh(self) -> Model:
        """Load the model again, plain."""
        return load_model(str(self.folder))


def subject(folder: Path) -> Subject:
    """Load a variant's folder both ways."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(8, VOCABULARY, (4, 40), generator=generator)
    return Subject(folder, plain, load_model(str(folder)), ids, {})


def load(s: Subject) -> None:
    """The shape is read, and nothing is wrapped before it is needed."""
    assert (s.model.n_layers, s.model.d_model) == (LAYERS, WIDTH)
    assert "bridge" not in vars(s.model)


@torch.no_grad()
def logits(s: Subject) -> None:
    """The bridge gives plain transformers' logits."""
    expected = s.plain(s.ids).logits
    assert expected.std() > 0.01
    assert (s.model.bridge(s.ids) - expected).abs().max() < 1e-4 * expected.abs().max()


@contextmanager
def recording(model: Any, modules: list[str]) -> Iterator[dict[str, Tensor]]:
    """Keep the outputs of modules, by torch's own hooks."""
    held: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            # Some layers add to it in place.
            held[name] = (output[0] if isinstance(output, tuple) else output).clone()

        return hook

    handles = [model.get_submodule(n).register_forward_hook(keep(n)) for n in modules]
    try:
        yield held
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def sites(s: Subject) -> None:
    """Every site is the output of the module that it is named by, and SAEs go by these names."""
    names = s.model.names
    points = [Hookpoint(n, site) for n in range(LAYERS) for site in names.sites]
    modules = {p: names.huggingface(p) for p in points}
    with recording(s.plain, [m for m in modules.values() if m is not None]) as held:
        s.plain(s.ids)
    for point, name in product(points, adaptable(s.plain)):
        part = modules[Hookpoint(point.layer, BEFORE.get(point.site, point.site))]
        assert inside(name, point) == name.startswith(f"{part}."), (name, point)
    acts = next(iter(stream_activations(s.model, [s.ids], points))).acts
    factor = getattr(s.plain.config, "residual_multiplier", 1.0)
    for point, module in modules.items():
        if module is not None:
            expected = held[module]
            s.plain.base_model.get_submodule(names.sparsify(point))
        else:
            before = Hookpoint(point.layer, BEFORE[point.site])
            expected = held[str(modules[before])] * factor
        torch.testing.assert_close(acts[point], expected, atol=1e-5, rtol=1e-4)
        for name in (names.sparsify(point), names.saelens(point), point.transformer_lens):
            assert names.parse(name) == point, name
    with tempfile.TemporaryDirectory() as place:
        coder = new_coder(WIDTH, 64, 4, seed=0)
        for point in points:
            save_coder(coder, Path(place) / names.sparsify(point), "sparsify", point)
        assert set(find_coders(Path(place), names).values()) == set(points)


def saes(s: Subject) -> None:
    """Two steps of SAE training at every layer and at both of the paper's sites."""
    for site in ("mlp_out", "resid_post"):
        config = SaeConfig(site=site, latents=64, k=4).for_width(WIDTH)
        trained = train_saes(s.model, range(LAYERS), [s.ids[:2], s.ids[2:]], [s.ids], config)
        assert trained.tokens > 0
        assert all(0 < q.fvu < 100 for q in trained.quality)
        s.coders |= trained.coders


def count(s: Subject) -> None:
    """Exclusive features are counted at every layer."""
    coders = {p: c for p, c in s.coders.items() if p.site == "mlp_out"}
    counts = count_features(s.model, coders)
    assert [c.layer for c in counts.layers] == list(range(LAYERS))
    assert all(c.active for c in counts.layers)


def tuning(s: Subject) -> None:
    """Two steps of SAE-Tuning change the adapters and nothing else; PEFT reads what is written."""
    for name in ("paper", "reference"):
        objective = preset(name)
        if name == "reference" and s.plain.config.model_type in ROUTED:
            objective = preset(name, targets=ATTENTION)
        tune_briefly(s, objective)


def tune_briefly(s: Subject, objective: Objective) -> None:
    """Tune two steps through the first layer, and compare what moved with what should."""
    point = Hookpoint(0, objective.site)
    peft, course = tune(
        s.fresh(), s.coders[point], point, [s.ids[:2], s.ids[2:]], 2, objective,
        TuneConfig(rank=2, learning_rate=1e-2),
    )  # fmt: skip
    assert all(loss > 0 for loss in course.losses)
    trained = {n for n, p in peft.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    asked = modules_in(s.model.model, lora_targets(s.model.model, objective.targets), "all")
    learns = {n for n in asked if objective.learns(n, point)}
    changed = {n for n, p in peft.named_parameters() if "lora_B" in n and bool(p.any())}
    assert {_adapted(name) for name in changed} == learns
    assert {_adapted(name) for name in trained} == asked.keys()
    with tempfile.TemporaryDirectory() as place:
        save_adapter(peft, Path(place), s.folder)
        written = load_file(Path(place) / "adapter_model.safetensors")
        read: Any = PeftModel.from_pretrained(s.fresh().model, place)
    job = TuneJob(s.plain.config.model_type, objective=objective, lora=TuneConfig(rank=2))
    assert adapter_mb(s.model, job) * MB == sum(4 * weight.numel() for weight in written.values())
    again = {n.replace(".default", ""): p for n, p in read.named_parameters() if "lora_" in n}
    assert again.keys() == written.keys()
    assert all(torch.equal(again[name], weight) for name, weight in written.items())


def _adapted(name: str) -> str:
    """Return the module that a LoRA weight is of."""
    return plain_name(name).removeprefix("base_model.model.").split(".lora_")[0]


def generate(s: Subject) -> None:
    """The engine answers as transformers' own generation does."""
    prompt = "Problem: What is 12+34? <think>"
    config = GenerationConfig(max_new_tokens=8, stop=())
    (ours,) = HFEngine(s.model.bridge.original_model, s.model.tokenizer).generate([prompt], config)
    encoded = s.model.tokenizer(prompt, return_tensors="pt")
    out = s.plain.generate(
        input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"],
        max_new_tokens=8, do_sample=False, eos_token_id=s.model.tokenizer.eos_token_id,
        pad_token_id=s.model.tokenizer.pad_token_id,
    )  # fmt: skip
    new = out[0, encoded["input_ids"].shape[1] :].tolist()
    assert ours.tokens == len(new)
    assert ours.text == s.model.tokenizer.decode(new, skip_special_tokens=False)


COLUMNS: dict[str, Callable[[Subject], None]] = {
    "load": load, "logits": logits, "sites": sites, "SAE steps": saes, "count": count,
    "tuning steps": tuning, "generate": generate,
}  # fmt: skip


def run_variant(name: str, folder: Path) -> dict[str, str]:
    """Return what each step gave: "" where it works, else its message in one line."""
    s = subject(save_variant(name, folder))
    outcome = {}
    for column, step in COLUMNS.items():
        try:
            step(s)
        # Whatever is raised is what the table says.
        except Exception as error:  # noqa: BLE001
            outcome[column] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        else:
            outcome[column] = ""
    return outcome


def row(name: str, outcome: dict[str, str]) -> str:
    """Return a row of README's table."""
    cells = ["works" if not outcome[column] else "no" for column in COLUMNS]
    return f"| `{name}` | {' | '.join(cells)} |"


def table(outcomes: dict[str, dict[str, str]]) -> str:
    """Return README's table, with the messages of what does not work below it."""
    lines = [f"| model_type | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [row(name, outcome) for name, outcome in outcomes.items()]
    said = [f"- `{name}`, {column}: {message}" for name, outcome in outcomes.items()
            for column, message in outcome.items() if message]  # fmt: skip
    return "\n".join([*lines, *(["", *said] if said else [])])


def main() -> None:
    """Run the whole grid and put its table into README.md."""
    torch.set_num_threads(1)
    outcomes = {}
    with tempfile.TemporaryDirectory() as place:
        for name in VARIANTS:
            outcomes[name] = run_variant(name, Path(place) / name)
            print(name, {c: m for c, m in outcomes[name].items() if m} or "works", flush=True)
    readme = ROOT / "README.md"
    text, made = re.subn(
        r"(<!-- grid -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{table(outcomes)}\n{found[2]}",
        readme.read_text(), flags=re.DOTALL,
    )  # fmt: skip
    assert made == 1
    readme.write_text(text)


if __name__ == "__main__":
    main()
