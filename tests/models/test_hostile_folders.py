"""Folders that bring programs: chat templates, patterns, kernels, quantisation, own code."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from resa_lens.cli import app
from resa_lens.errors import BadInputError
from resa_lens.machine.needs import read_shape
from resa_lens.models.files import HUB_KERNELS
from resa_lens.models.host import Model, load_model
from resa_lens.resources import data_path
from resa_lens.texts import chat

MESSAGES = [{"role": "system", "content": "a <think> b </think>"}]
ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ 9 ** (9 ** (9 ** 9)) }}",
    "recursion of powers": "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}" * 3,
    "growing text": "{% set ns = namespace(t='x') %}{% for i in range(99) %}"
    "{% set ns.t = ns.t * 9 %}{% endfor %}{{ ns.t }}",
    "long": "{{ 'x' * 9000000 }}",
    "large": "{{ 'x' * 9000000000 }}",
}
RAISING = {
    "system role": ("{{ raise_exception('System role not supported') }}", "System role not"),
    "syntax": ("{% for m in messages %}", "TemplateSyntaxError"),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
    "division": ("{{ 1 // 0 }}", "ZeroDivisionError"),
    "undefined": ("{{ messages[0].absent.absent }}", "UndefinedError"),
    "type": ("{{ 'a' + 1 }}", "TypeError"),
    "range": ("{{ range(10 ** 9) }}", "OverflowError"),
    "unsafe": ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    "brackets": ("{{ " + "(" * 500 + "1" + ")" * 500 + " }}", "Error"),
}


def quick(cases: dict[str, Any], number: int) -> list[Any]:
    """Return the cases, all but the first of them for the slow tier: each starts a process."""
    return [
        pytest.param(*([case] if isinstance(case, str) else case),
                     marks=[pytest.mark.slow] if index >= number else [])
        for index, case in enumerate(cases.values())
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the bundled model to make hostile."""
    return Path(shutil.copytree(data_path("tiny-reasoner"), tmp_path / "hostile"))


@pytest.fixture
def model(folder: Path) -> Model:
    return load_model(str(folder))


def configure(folder: Path, name: str = "config.json", **values: Any) -> None:
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def one_line(*args: str, code: int = 2) -> str:
    result = CliRunner().invoke(app, list(args))
    assert result.exit_code == code, (result.output, result.exception)
    error = result.stderr[result.stderr.index("error: ") :].strip()
    assert len(error.splitlines()) == 1
    return error


# Chat templates


@pytest.mark.parametrize("template", quick(ENDLESS, 2), ids=ENDLESS)
def test_a_template_without_end_is_ended(
    model: Model, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "CPU_S", 2)
    model.tokenizer.chat_template = template
    began = time.process_time()
    with pytest.raises(BadInputError, match="chat template fails") as raised:
        chat.render_chats(model.tokenizer, [MESSAGES], generation=True)
    assert time.process_time() - began < 5  # of this process: the other one has its own limit
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(("template", "says"), quick(RAISING, 3), ids=RAISING)
def test_a_template_that_raises_is_one_line(model: Model, template: str, says: str) -> None:
    model.tokenizer.chat_template = template
    with pytest.raises(BadInputError, match=says) as raised:
        chat.render_chats(model.tokenizer, [MESSAGES], generation=True)
    assert len(str(raised.value)) < 400


def test_several_templates_without_a_default(model: Model) -> None:
    model.tokenizer.chat_template = {"a": "x", "b": "y"}  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(BadInputError, match="chat template fails"):
        chat.render_chats(model.tokenizer, [MESSAGES], generation=True)


@pytest.mark.parametrize("generation", [True, False])
def test_a_template_is_rendered_as_by_transformers(model: Model, generation: bool) -> None:
    tokenizer: Any = model.tokenizer
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] | upper }}]{{ m['content'] | tojson }}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[me]{% endif %}"
    )
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    chats = [[{"role": "user", "content": text}] for text in ("a", "ü\u2028\n", '"<b>"', "")]
    expected = tokenizer.apply_chat_template(
        chats, tokenize=False, add_generation_prompt=generation
    )
    assert chat.render_chats(tokenizer, chats, generation=generation) == expected


@pytest.mark.parametrize(
    "args",
    [
        ("eval", "--limit", "2", "--chat-template"),
        ("count-features", "--layers", "5", "--chat-template"),
        ("recommend-layers", "--layers", "5", "--chat-template"),
        ("falsify", "--chat-template"),
        ("stability", "--chat-template"),
    ],
    ids=lambda args: args[0],
)
def test_commands_that_render_a_failing_template(
    folder: Path, tmp_path: Path, args: tuple[str, ...]
) -> None:
    configure(folder, "tokenizer_config.json", chat_template=RAISING["system role"][0])
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    workspace = tmp_path / "w"
    error = one_line(*args, "--model", str(folder), "--workspace", str(workspace))
    assert "chat template fails: System role not supported" in error
    assert not workspace.exists()


# Patterns of adapters


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A LoRA adapter of two modules, with weights that change the model."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    plain: Any = load_model("tiny-reasoner").model
    targets = ["layers.3.self_attn.q_proj", "layers.5.self_attn.v_proj"]
    peft = get_peft_model(plain, LoraConfig(r=2, target_modules=targets, lora_alpha=4))
    for name, weight in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    peft.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def logits(folder: Path) -> torch.Tensor:
    loaded = load_model(str(folder), base="tiny-reasoner")
    ids = torch.tensor([loaded.tokenizer("Problem: What is 1+2? <think>")["input_ids"]])
    with torch.no_grad():
        return loaded.model(ids).logits


HOSTILE = r"((((.*)*)*)*)*!"


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": r".*\.(3\.self_attn\.q|5\.self_attn\.v)_proj"},
        {"target_modules": HOSTILE},
        {"target_modules": r"(.+)+\1(.+)+$"},
        {"exclude_modules": HOSTILE},
        {"target_modules": HOSTILE, "exclude_modules": HOSTILE},
    ],
    ids=str,
)
def test_an_adapters_tensors_say_which_modules_it_adapts(
    adapter: Path, values: dict[str, str]
) -> None:
    expected = logits(adapter)
    configure(adapter, "adapter_config.json", **values)
    assert torch.equal(logits(adapter), expected)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern", "layers_pattern",
                                   "modules_to_save"])  # fmt: skip
def test_a_pattern_that_repeats_is_refused(adapter: Path, field: str) -> None:
    value: Any = {HOSTILE: 2} if field in ("rank_pattern", "alpha_pattern") else [HOSTILE]
    configure(adapter, "adapter_config.json", **{field: value}, layers_to_transform=[3, 5])
    with pytest.raises(BadInputError, match=f"{field} has the pattern") as raised:
        load_model(str(adapter), base="tiny-reasoner")
    assert len(str(raised.value).splitlines()) == 1


def test_a_plain_pattern_is_taken(adapter: Path) -> None:
    before = logits(adapter)
    configure(adapter, "adapter_config.json",
              alpha_pattern={"^model.layers.3.self_attn.q_proj": 8})  # fmt: skip
    assert not torch.equal(logits(adapter), before)


# Patterns of tokenizers


HANGING = {
    "exponential": r"(a+)+$",
    "alternatives": r"((a|aa)+)+!",
    # Below what the engine gives up at, at every character.
    "polynomial": r"(?:[\s\S]{0,20}){5}(?!)",
    "digits": r"(7*)*7*7*7*(?!)",
    "lines": r"( *\n*)*( *\n*)*(?!)",
}


def in_tokenizer(folder: Path, place: str, pattern: str) -> None:
    """Put a pattern into a tokenizer.json, at one of the places that take one."""
    piece = {
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
                          "invert": False},
        "normalizer": {"type": "Replace", "pattern": {"Regex": pattern}, "content": "x"},
    }[place]  # fmt: skip
    configure(folder, "tokenizer.json", **{place: piece})


@pytest.mark.parametrize("place", ["pre_tokenizer", "normalizer"])
@pytest.mark.parametrize("pattern", HANGING.values(), ids=HANGING)
def test_a_tokenizers_pattern_that_does_not_end_is_refused(
    folder: Path, pattern: str, place: str
) -> None:
    in_tokenizer(folder, place, pattern)
    began = time.process_time()
    with pytest.raises(BadInputError, match="the tokenizer") as raised:
        load_model(str(folder))
    assert time.process_time() - began < 30
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    "pattern",
    [
        # Of the forms that widely used tokenizers have.
        r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lo}\p{M}]*[\p{Ll}\p{Lo}\p{M}]+(?i:'s|'ll)?|\p{N}{1,3}|\s+",
        r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))| ?\p{L}+|\s+",
    ],
    ids=["words", "lines", "cases", "digits by threes"],
)
def test_patterns_of_usual_tokenizers_are_taken(folder: Path, pattern: str) -> None:
    in_tokenizer(folder, "pre_tokenizer", pattern)
    assert load_model(str(folder)).n_layers == 12


# Configurations that ask for code


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_attn_implementation", "kernels-community/flash-attn2"),
        ("attn_implementation", "owner/kernel"),
        ("_attn_implementation", "owner/kernel@v1:layer"),
        ("_attn_implementation", "paged|owner/kernel"),
        ("_attn_implementation_internal", "owner/kernel"),
        ("_experts_implementation", "owner/kernel"),
        ("attn_implementation", {"": "sdpa", "text_config": "owner/kernel"}),
        ("text_config", {"_attn_implementation": "owner/kernel"}),
        ("_attn_implementation", "flash_attention_2"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_kernel_of_the_hub_is_refused(folder: Path, key: str, value: Any) -> None:
    configure(folder, **{key: value})
    for read in (load_model, read_shape):
        with pytest.raises(BadInputError, match=f"{HUB_KERNELS}=1") as raised:
            read(str(folder))
        assert len(str(raised.value).splitlines()) == 1


def test_a_kernel_of_the_hub_may_be_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here there is neither a network nor the package that fetches it: that is said instead."""
    configure(folder, _attn_implementation="owner/kernel")
    monkeypatch.setenv(HUB_KERNELS, "1")
    with pytest.raises(BadInputError, match="cannot be loaded") as raised:
        load_model(str(folder))
    assert HUB_KERNELS not in str(raised.value)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_attention_of_torch_is_taken(folder: Path, name: str) -> None:
    configure(folder, _attn_implementation=name)
    assert load_model(str(folder)).n_layers == 12


QUANTISED: list[dict[str, Any]] = [
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"load_in_8bit": True},
    {"quant_method": "gptq", "bits": 4},
    {"quant_method": "awq", "bits": 4},
    {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    {"quant_method": "hqq"},
    {"quant_method": "torchao", "quant_type": "int4_weight_only"},
]


@pytest.mark.parametrize("settings", QUANTISED, ids=str)
def test_a_quantised_folder_whose_library_is_missing(
    folder: Path, settings: dict[str, Any]
) -> None:
    configure(folder, quantization_config=settings)
    for read in (load_model, read_shape):
        with pytest.raises(BadInputError, match=r"is quantised by .* is not installed"):
            read(str(folder))


@pytest.mark.parametrize("settings", [{"quant_method": "of-the-future"}, [3], "gptq", 3], ids=str)
def test_a_quantisation_that_is_none(folder: Path, settings: Any) -> None:
    configure(folder, quantization_config=settings)
    with contextlib.suppress(BadInputError):  # loaded as it is, or refused
        load_model(str(folder))


@pytest.mark.parametrize("args", [("eval", "--limit", "2"), ("doctor",)], ids=["eval", "doctor"])
def test_commands_on_a_quantised_folder(folder: Path, tmp_path: Path, args: Any) -> None:
    configure(folder, quantization_config=QUANTISED[0])
    error = one_line(*args, "--model", str(folder), "--workspace", str(tmp_path / "w"))
    assert "bitsandbytes is not installed" in error


def test_a_folder_with_code_of_its_own(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\n")
    configure(folder, model_type="own", auto_map={"AutoConfig": "own.C",
                                                  "AutoModelForCausalLM": "own.M"})  # fmt: skip
    with pytest.raises(BadInputError, match="code of its own, which is not run") as raised:
        load_model(str(folder))
    assert len(str(raised.value).splitlines()) == 1
    assert not mark.exists()


def test_a_tokenizer_with_code_of_its_own(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (folder / "own.py").write_text(f"open({str(mark)!r}, 'w')\n")
    configure(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.T", None]},
              tokenizer_class="Own")  # fmt: skip
    shutil.move(folder / "tokenizer.json", folder / "tokenizer.other")
    with pytest.raises(BadInputError):
        load_model(str(folder))
    assert not mark.exists()


def test_a_file_of_the_folder_that_is_no_text(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    for read in (load_model, read_shape):
        with pytest.raises(BadInputError):
            read(str(folder))
