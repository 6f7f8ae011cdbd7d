"""A hub's cache that holds, under their real names and in their real layouts, very small ones of
what docs/how-to-r1-distill.md uses: model, SAEs, data set, benchmarks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
MODEL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
SAES = "EleutherAI/sae-DeepSeek-R1-Distill-Qwen-1.5B-65k"
DATA = "RUC-AIBOX/STILL-3-Preview-RL-Data"
LAYERS, WIDTH = 28, 32


def fill_hub(home: Path) -> None:
    """Fill a folder as HF_HOME has it."""
    model = snapshot(home, MODEL)
    _write_model(model)
    _write_saes(model, snapshot(home, SAES))
    questions = [{"question": f"What is {i}+{i % 7}?", "answer": i + i % 7} for i in range(300)]
    _write_data(home, questions)
    from resa_lens.evals.benchmarks import BENCHMARKS

    for benchmark in BENCHMARKS.values():
        place = snapshot(home, benchmark.repo, "datasets") / benchmark.subset
        place.mkdir(parents=True)
        rows = [
            {benchmark.question[0]: f"What is {i}+1?", benchmark.answer[0]: str(i + 1)}
            | {column: f"{column} {i}" for column in benchmark.wrong}
            for i in range(3)
        ]
        _write_rows(place / f"{benchmark.split}.jsonl", rows)


def snapshot(home: Path, repo: str, kind: str = "models") -> Path:
    """Make a repository's folder in the hub's cache; return that of its only revision."""
    place = home / "hub" / f"{kind}--{repo.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("a" * 40)
    folder = place / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    return folder


def _write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_model(folder: Path) -> None:
    """A random Qwen2 with the tags as single tokens, which soon ends what it says."""
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(ROOT / "data" / "tiny-reasoner" / name, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert all(len(tokenizer(tag)["input_ids"]) == 1 for tag in ("<think>", "</think>"))
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=48,
        num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=131_072, tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.5 if "embed" in name else 0.1)
        # One direction that every token shares, which speaks for the end: 32,768 new tokens would
        # take their time otherwise.
        model.model.embed_tokens.weight[:, 0] = 8
        model.lm_head.weight[tokenizer.eos_token_id, 0] = 1
    model.save_pretrained(folder)


def _write_saes(model_folder: Path, folder: Path) -> None:
    """An SAE a layer that gives back nine tenths of what differs from its own place's mean."""
    from resa_lens.models.activations import stream_activations
    from resa_lens.models.hookpoints import Hookpoint
    from resa_lens.models.host import load_model
    from resa_lens.saes.coder import new_coder

    model = load_model(str(model_folder), device="cpu")
    points = [Hookpoint(layer, "mlp_out") for layer in range(LAYERS)]
    text = (ROOT / "data" / "tiny" / "train.jsonl").read_text()[:20_000]
    ids = torch.tensor(model.tokenizer(text)["input_ids"][:1024]).reshape(4, 256)
    held = next(stream_activations(model, [ids], points))
    eye = torch.eye(WIDTH)
    for point in points:
        coder = new_coder(WIDTH, 2 * WIDTH, WIDTH, seed=0)
        state = {
            "encoder.weight": 0.9 * torch.cat([eye, -eye]),
            "encoder.bias": torch.zeros(2 * WIDTH),
            "W_dec": torch.cat([eye, -eye]),
            "b_dec": held.acts[point].flatten(0, 1).mean(0),
        }
        coder.load_state_dict(state)
        coder.save_to_disk(folder / point.sparsify)


def _write_data(home: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A data set as `load_dataset` leaves it behind for a machine without a network."""
    from datasets.packaged_modules.json.json import Json

    file = home / "rows.jsonl"
    _write_rows(file, rows)
    owner, name = DATA.split("/")
    builder = Json(
        cache_dir=str(home / "datasets"), dataset_name=name, hash="a" * 16,
        data_files={"train": [str(file)]},
    )  # fmt: skip
    builder.download_and_prepare()
    made = Path(builder.cache_dir)
    place = home / "datasets" / f"{owner}___{made.parts[-4]}" / "default" / "0.0.0" / made.name
    place.parent.mkdir(parents=True)
    made.rename(place)
