"""Adapters after their tuning: merged into a whole model folder, and described by a card."""

from __future__ import annotations

import html
import math
import os
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from safetensors import safe_open
from transformers import GenerationConfig

from resa_lens.cost import watt_hours
from resa_lens.errors import BadInputError, RunFailedError
from resa_lens.hookpoints import describe_layer
from resa_lens.model_files import find_folder, hash_files, resolve_base, weight_files
from resa_lens.models import DTYPES, Model, load_model, quiet
from resa_lens.tuning.objective import PRESETS
from resa_lens.workspace import Manifest, Workspace, write_errors

_TOKENIZER_PATTERNS = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "additional_chat_templates", "*.model", "*.tiktoken",
    "generation_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
"""What a merged folder takes from its base as it is."""
_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Rounding:
    """What storing the merged weights in their dtype does to the adapters' change."""

    lost: float
    """Size of the rounding error over the size of the change, both as Frobenius norms."""
    unchanged: float
    """Share of the weights under an adapter that come out as the base's own, changed or not."""
    weights: int
    """Weights under an adapter."""


@dataclass(frozen=True)
class Merged:
    """A whole model that was written."""

    folder: Path
    dtype: str
    rounding: Rounding
    manifest: Manifest
    notes: tuple[str, ...]
    """What the user is to be told."""


def merge_model(
    name: str,
    adapters: Sequence[str],
    out: Path,
    *,
    scale: float | Sequence[float] = 1.0,
    dtype: str = "base",
    base: str | None = None,
    force: bool = False,
    note: Callable[[str], None] = lambda line: None,
) -> Merged:
    """Write a model with its adapters' changes added to the weights, whole or not at all.

    The sum is formed in float32 and rounded once, to the dtype that is stored.

    Args:
        name: any model's name, see `load_model`; an adapter folder is the first adapter.
        adapters: further adapter folders.
        out: the folder to make.
        scale: as of `load_model`.
        dtype: of the stored weights: "base" for the base's own (float32 of a .gguf file),
            "float32", "bfloat16" or "float16".
        base: of an adapter folder given as `name`, its base model.
        force: replace a folder that an earlier merge made.
        note: is told what is going on.

    Raises:
        BadInputError: no adapter, one that does not fit, or a place that is taken.
        RunFailedError: the merged weights are not finite, or the disk is full.
    """
    if dtype != "base" and dtype not in DTYPES:
        raise BadInputError(f"dtype {dtype!r} is unknown; use base, {', '.join(DTYPES)}")
    source = _base_of(name, base)
    _check_out(out, source, [Path(a) for a in (name, *adapters)], force)
    stored = _stored_dtype(source) if dtype == "base" else dtype
    model = load_model(
        name, device="cpu", dtype="float32", base=base, adapters=adapters, scale=scale
    )
    if model.peft is None:
        raise BadInputError(f"{name} has no adapter to merge; name one with --adapter")
    for line in model.notes:
        note(line)
    parameters = sum(p.numel() for n, p in model.model.named_parameters() if "lora_" not in n)
    size = parameters * DTYPES[stored].itemsize
    note(
        f"merging {len(model.adapters)} adapter{'s' if len(model.adapters) > 1 else ''} into "
        f"{model.base_hash[:8] if model.base_hash else name}: about "
        f"{max(1, round(6 * parameters / 2**20))} MB of memory, {max(1, round(size / 2**20))} MB "
        f"of disk as {stored}"
    )
    whole, rounding = _merge(model, DTYPES[stored])
    warnings = _warnings(stored, rounding)
    for line in warnings:
        note(line)
    notes = (*model.notes, *warnings)
    manifest = Manifest(
        kind="model",
        config={
            "model": name,
            "base": source.name,
            "base_hash": model.base_hash,
            "adapters": [{**asdict(a), "folder": str(a.folder)} for a in model.adapters],
            "dtype": stored,
        },
        results={"rounding": asdict(rounding), "notes": list(notes)},
        parents=[str(a.folder) for a in model.adapters],
        hashes={"attached": model.weights_hash},
        dtype=stored,
    )
    place = Workspace(out.absolute().parent, recover=False)
    with place.artifact(out.absolute(), manifest) as temporary:
        if (source / "generation_config.json").exists():
            # The base's file is copied as it is; saving its values would refuse some of them.
            whole.generation_config = GenerationConfig()
        with quiet():
            whole.save_pretrained(temporary)
        if source.is_file():
            model.tokenizer.save_pretrained(temporary)
        else:
            _copy_files(source, temporary)
        manifest.hashes["weights"] = hash_files(weight_files(temporary))
    return Merged(out, stored, rounding, manifest, notes)


def _base_of(name: str, base: str | None) -> Path:
    path = find_folder(name)
    is_adapter = path.is_dir() and (path / "adapter_config.json").exists()
    return resolve_base(path, base) if is_adapter else path


def _check_out(out: Path, base: Path, adapters: Sequence[Path], force: bool) -> None:
    place = out.absolute()
    for read in (base, *adapters):
        if read.exists() and read.resolve().is_relative_to(place.resolve()):
            raise BadInputError(f"{out} holds {read}, which is read; choose another folder")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise BadInputError(f"{out} is no folder; choose another place")
    if out.exists() and any(out.iterdir()):
        if not force:
            raise BadInputError(f"{out} exists; choose another folder, or replace it with --force")
        held = Workspace(place.parent, recover=False).manifest(place)
        if held is None or held.kind != "model":
            raise BadInputError(
                f"{out} was not made by merge; --force replaces merged models alone, choose "
                "another folder"
            )
    above = next(p for p in place.parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise BadInputError(f"{out}: {above} is no folder that can be written to; choose another")


def _stored_dtype(source: Path) -> str:
    """Return the dtype that most of a folder's weights are stored in; float32 of a .gguf file."""
    if source.is_file():
        return "float32"
    held: Counter[str] = Counter()
    for file in weight_files(source):
        with safe_open(file, framework="pt") as stream:
            for key in stream.keys():  # noqa: SIM118 - not a dict
                part = stream.get_slice(key)
                held[part.get_dtype()] += math.prod(part.get_shape())
    most = held.most_common(1)[0][0] if held else "F32"
    if most not in _STORED:
        raise BadInputError(f"{source} is stored as {most}; say --dtype {' or '.join(DTYPES)}")
    return _STORED[most]


@torch.no_grad()
def _merge(model: Model, dtype: torch.dtype) -> tuple[Any, Rounding]:
    """Add the adapters' changes to the weights, round, and measure what the rounding did."""
    layers: list[Any] = [m for m in model.peft.modules() if hasattr(m, "get_delta_weight")]
    # A tied weight is one parameter that two modules hold.
    uses = Counter(id(p) for m in model.peft.modules() for p in m._parameters.values())
    change = error = 0.0
    same = count = 0
    for layer in layers:
        inside = layer.get_base_layer()
        if uses[id(inside.weight)] > 1:
            raise BadInputError(
                "an adapter is on the embeddings, whose weights are tied to the output's: merged "
                "it would change both; attach it instead (eval --adapter)"
            )
        before = inside.weight.detach().clone()
        try:
            layer.merge(safe_merge=True)
        except ValueError as failure:
            raise RunFailedError(f"the merged weights are not finite: {failure}") from failure
        after = inside.weight.detach()
        rounded = after.to(dtype).float()
        if not bool(rounded.isfinite().all()):
            raise RunFailedError(f"the merged weights do not fit {dtype}; use --dtype float32")
        change += float((after - before).double().square().sum())
        error += float((rounded - after).double().square().sum())
        same += int((rounded == before.to(dtype).float()).sum())
        count += before.numel()
    whole = model.peft.unload()
    lost = math.sqrt(error / change) if change else 0.0
    return whole.to(dtype), Rounding(lost, same / max(1, count), count)


def _warnings(dtype: str, rounding: Rounding) -> tuple[str, ...]:
    if rounding.lost < 0.1:
        return ()
    return (
        f"warning: rounding to {dtype} errs by {100 * rounding.lost:.0f} % of the adapters' change "
        f"({100 * rounding.unchanged:.0f} % of the weights under them stay the base's); "
        "--dtype float32 keeps it",
    )


def _copy_files(source: Path, target: Path) -> None:
    for pattern in _TOKENIZER_PATTERNS:
        for file in source.glob(pattern):
            if file.is_dir():
                shutil.copytree(file, target / file.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(file, target / file.name)


# Card


def adapter_card(
    manifest: Mapping[str, Any],
    scores: Mapping[str, Any] | None = None,
    *,
    sae: Mapping[str, Any] | None = None,
) -> str:
    """Return the model card of an adapter: front matter for a hub, lineage, scores, cost.

    Args:
        manifest: the adapter's manifest, as JSON.
        scores: base, tuned and paired, as `tune` prints them; None where it was not scored.
        sae: the manifest of the SAEs it was tuned through, for their figures.
    """
    config, results = manifest["config"], manifest.get("results", {})
    control = config.get("control")
    base = _base_name(str(results.get("model", config.get("base", ""))))
    tags = ["lora", "resa-lens", *(["control"] if control else ["sae-tuning"])]
    front = ModelCardData(
        base_model=base, library_name="peft", pipeline_tag="text-generation", tags=tags
    )
    if control:
        made = (
            f"A control, for comparison with SAE-Tuning: {_code(control)} in the place of the SAE."
            if config.get("sae")
            else f"A control, for comparison with SAE-Tuning: fine-tuned on {_code(control)} data."
        )
    else:
        made = (
            "Tuned by SAE-Tuning: the KL divergence between the model with a frozen sparse "
            "autoencoder's reconstruction inserted and the model without it is minimised over the "
            "LoRA weights; the autoencoder is not part of the result."
        )
    parts = [
        f"---\n{front.to_yaml().strip()}\n---",
        f"# LoRA adapter for {_text(base)}",
        made,
        "## Scores",
        *_score_parts(scores),
        "## Lineage",
        _table(("what", "value"), _lineage(config, results, manifest, sae)),
        "## Cost of this adapter's tuning",
        _table(("what", "value"), _cost_rows(manifest)),
        "## Made with",
        _fenced(shlex.join(str(word) for word in manifest.get("command", []))),
        _table(
            ("package", "version"),
            [(_text(name), _text(v)) for name, v in manifest.get("versions", {}).items()],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def write_card(folder: Path, text: str) -> Path:
    """Write a card as the folder's README.md, whole or not at all; an equal one is left alone.

    Raises:
        BadInputError: no permission to write there.
        RunFailedError: the disk is full, or another write error.
    """
    path = folder / "README.md"
    temporary = folder / ".README.md.tmp"
    with write_errors(path):
        if path.exists() and path.read_text(encoding="utf-8") == text:
            return path
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return path


def _base_name(name: str) -> str:
    """Return a name that tells nothing of the machine: a path's last part, a hub id whole."""
    name = _line(name)
    local = name.startswith((".", "/", "~")) or name.count("/") != 1
    return (name.rstrip("/").rsplit("/", 1)[-1] if local else name) or "unknown"


def _score_parts(scores: Mapping[str, Any] | None) -> list[str]:
    if not scores:
        return ["Not scored."]
    rows = []
    for label, key in (("base", "base"), ("with this adapter", "tuned")):
        one = scores[key]
        low, high = one["ci"]
        rows.append(
            (label, f"{100 * one['accuracy']:.1f} %", f"{100 * low:.1f} to {100 * high:.1f} %",
             str(one["n"]))
        )  # fmt: skip
    paired = scores["paired"]
    gained, lost = paired.get("gained"), paired.get("lost")
    flips = "" if gained is None else f", {gained} gained and {lost} lost"
    how = f" ({_text(paired['note'])})" if paired.get("note") else ""
    low, high = (100 * value for value in paired["ci"])
    difference = 100 * paired["difference"]
    figures = (
        f"{difference:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}, p = "
        f"{paired['p_value']:.3g}{how}, n = {paired['n']}; "
        f"{paired['changed']} answers changed{flips}"
    )
    shown = paired["p_value"] < 0.05 and (low > 0 or high < 0)
    if not shown:
        verdict = f"No difference from the base was shown, and none is claimed: {figures}."
    else:
        verdict = f"Measured {'gain' if difference > 0 else 'loss'}: {figures}."
    return [
        _table(("", "accuracy", "95 % interval", "questions"), rows),
        f"{verdict} Same questions for both, paired. One adapter's test: it is not corrected for "
        "other adapters, layers or seeds that were tried.",
    ]


def _lineage(
    config: Mapping[str, Any],
    results: Mapping[str, Any],
    manifest: Mapping[str, Any],
    sae: Mapping[str, Any] | None,
) -> list[tuple[str, str]]:
    n_layers = results.get("n_layers")
    rows = [
        ("base model", f"{_code(_base_name(str(results.get('model', ''))))}, weights "
         f"{_code(config.get('base_hash'))}"),
    ]  # fmt: skip
    layer = config.get("layer")
    if config.get("sae"):
        rows.append(("source model of the SAE", _code(config.get("source"))))
        rows.append(("SAE run", _code(config["sae"])))
        if layer is not None and n_layers:
            where = describe_layer(int(layer), int(n_layers))
            rows.append(("place", f"{where}, site {_code(results.get('site'))}"))
        rows += _sae_rows(sae, layer)
    if config.get("control"):
        rows.append(("control", _code(config["control"])))
    rows.append(("objective", _objective_text(config.get("objective", {}))))
    data = config.get("elicitation", {}).get("source")
    hashed = manifest.get("hashes", {}).get("data", config.get("data"))
    rows.append(("elicitation data", f"{_code(_base_name(str(data)))}, hash {_code(hashed)}"))
    rows.append(
        ("length", f"{config.get('steps')} steps, {results.get('tokens', 'unknown')} tokens")
    )
    lora = ", ".join(f"{_text(k)} {_code(v)}" for k, v in config.get("lora", {}).items())
    rows.append(("LoRA and optimizer", lora))
    rows.append(("trainable parameters", _text(results.get("trainable", "unknown"))))
    if losses := results.get("losses"):
        rows.append(("loss", f"{losses[0]:.4g} at the first step, {losses[-1]:.4g} at the last"))
    rows += [("warning", _text(warning)) for warning in results.get("warnings") or []]
    return rows


def _sae_rows(sae: Mapping[str, Any] | None, layer: int | None) -> list[tuple[str, str]]:
    if not sae:
        return []
    made = sae["config"].get("sae", {})
    rows = [("SAE", f"{made.get('latents')} latents, k {made.get('k')}")]
    found = [q for q in sae.get("results", {}).get("layers", []) if q["layer"] == layer]
    if found and found[0].get("fvu") is not None:
        rows.append(("SAE's FVU at this layer", f"{found[0]['fvu']:.4f}"))
    return rows


def _objective_text(objective: Mapping[str, Any]) -> str:
    """Return the preset's name and every option that differs from it."""
    name = objective.get("preset")
    known = asdict(PRESETS[name]) if name in PRESETS else {}
    differ = [
        f"{_text(key)} {_code(value)}"
        for key, value in objective.items()
        if key != "preset" and (key not in known or _plain(known[key]) != _plain(value))
    ]
    head = f"preset {_code(name)}" if name else "no preset"
    return f"{head}; " + (", ".join(differ) if differ else "every option as in it")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _cost_rows(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    cost = manifest.get("cost") or {}
    seconds = cost.get("seconds", manifest.get("seconds", 0.0))
    memory = cost.get("peak_rss_mb", manifest.get("peak_memory_mb"))
    device = cost.get("hardware") or manifest.get("device", "unknown")
    rows = [("time", f"{seconds:.1f} s on {_text(device)}, {_text(manifest.get('dtype', ''))}")]
    rows.append(("peak memory", f"{memory:.0f} MB" if memory is not None else "not recorded"))
    if cost.get("peak_cuda_mb") is not None:
        rows.append(("peak GPU memory", f"{cost['peak_cuda_mb']:.0f} MB"))
    energy = watt_hours(cost)
    why = "; ".join(cost.get("energy_not_readable", [])) or "not recorded"
    rows.append(("energy", f"{energy:.3g} Wh" if energy is not None else _text(why)))
    return rows


def _line(value: Any) -> str:
    """Return a value on one line, without characters that are not printed."""
    text = " ".join(str(value).split())
    return "".join(c for c in text if c.isprintable())


def _text(value: Any) -> str:
    """Return a value as text that is no markup of Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]{}#|~!])", r"\\\1", html.escape(_line(value), quote=False))


def _code(value: Any) -> str:
    """Return a value in code marks that it cannot close, also in a table's cell."""
    text = _line(value)
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    padded = f" {text} " if text.startswith("`") or text.endswith("`") else text
    return f"{fence}{padded}{fence}".replace("|", "\\|") if text else "unknown"


def _fenced(text: str) -> str:
    text = "".join(c for c in text if c.isprintable() or c == "\n")
    fence = "`" * max(3, max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    return f"{fence}\n{text}\n{fence}"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
