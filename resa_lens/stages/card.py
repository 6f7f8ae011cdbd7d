"""The model card of an adapter: lineage, scores and cost, for people and for a hub."""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from resa_lens.files import write_errors, write_text
from resa_lens.machine.meters import watt_hours
from resa_lens.models.hookpoints import describe_layer
from resa_lens.tuning.objective import PRESETS


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
    base = base_name(str(results.get("model", config.get("base", ""))))
    tags = ["lora", "resa-lens", *(["control"] if control else ["sae-tuning"])]
    front = ModelCardData(
        base_model=base, library_name="peft", pipeline_tag="text-generation", tags=tags
    )
    if control:
        compared = "A control, for comparison with SAE-Tuning:"
        made = (
            f"{compared} {code_span(control)} in the place of the SAE."
            if config.get("sae")
            else f"{compared} fine-tuned on {code_span(control)} data."
        )
    else:
        made = (
            "Tuned by SAE-Tuning: the KL divergence between the model with a frozen sparse "
            "autoencoder's reconstruction inserted and the model without it is minimised over the "
            "LoRA weights; the autoencoder is not part of the result."
        )
    parts = [
        f"---\n{front.to_yaml().strip()}\n---",
        f"# LoRA adapter for {escaped(base)}",
        made,
        "## Scores",
        *_score_parts(scores),
        "## Lineage",
        table_of(("what", "value"), _lineage(config, results, manifest, sae)),
        "## Cost of this adapter's tuning",
        table_of(("what", "value"), _cost_rows(manifest)),
        "## Made with",
        _fenced(shlex.join(str(word) for word in manifest.get("command", []))),
        table_of(
            ("package", "version"),
            [(escaped(name), escaped(v)) for name, v in manifest.get("versions", {}).items()],
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
    with write_errors(path):
        if path.exists() and path.read_text(encoding="utf-8") == text:
            return path
        write_text(path, text)
    return path


def base_name(name: str) -> str:
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
    how = f" ({escaped(paired['note'])})" if paired.get("note") else ""
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
        table_of(("", "accuracy", "95 % interval", "questions"), rows),
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
        ("base model", f"{code_span(base_name(str(results.get('model', ''))))}, weights "
         f"{code_span(config.get('base_hash'))}"),
    ]  # fmt: skip
    layer = config.get("layer")
    if config.get("sae"):
        rows.append(("source model of the SAE", code_span(config.get("source"))))
        rows.append(("SAE run", code_span(config["sae"])))
        if layer is not None and n_layers:
            where = describe_layer(int(layer), int(n_layers))
            rows.append(("place", f"{where}, site {code_span(results.get('site'))}"))
        rows += _sae_rows(sae, layer)
    if config.get("control"):
        rows.append(("control", code_span(config["control"])))
    rows.append(("objective", _objective_text(config.get("objective", {}))))
    data = config.get("elicitation", {}).get("source")
    hashed = manifest.get("hashes", {}).get("data", config.get("data"))
    rows.append(
        ("elicitation data", f"{code_span(base_name(str(data)))}, hash {code_span(hashed)}")
    )
    rows.append(
        ("length", f"{config.get('steps')} steps, {results.get('tokens', 'unknown')} tokens")
    )
    lora = ", ".join(f"{escaped(k)} {code_span(v)}" for k, v in config.get("lora", {}).items())
    rows.append(("LoRA and optimizer", lora))
    rows.append(("trainable parameters", escaped(results.get("trainable", "unknown"))))
    if losses := results.get("losses"):
        rows.append(("loss", f"{losses[0]:.4g} at the first step, {losses[-1]:.4g} at the last"))
    rows += [("warning", escaped(warning)) for warning in results.get("warnings") or []]
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
        f"{escaped(key)} {code_span(value)}"
        for key, value in objective.items()
        if key != "preset" and (key not in known or _plain(known[key]) != _plain(value))
    ]
    head = f"preset {code_span(name)}" if name else "no preset"
    return f"{head}; " + (", ".join(differ) if differ else "every option as in it")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _cost_rows(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    cost = manifest.get("cost") or {}
    seconds = cost.get("seconds", manifest.get("seconds", 0.0))
    memory = cost.get("peak_rss_mb", manifest.get("peak_memory_mb"))
    device = cost.get("hardware") or manifest.get("device", "unknown")
    rows = [("time", f"{seconds:.1f} s on {escaped(device)}, {escaped(manifest.get('dtype', ''))}")]
    rows.append(("peak memory", f"{memory:.0f} MB" if memory is not None else "not recorded"))
    if cost.get("peak_cuda_mb") is not None:
        rows.append(("peak GPU memory", f"{cost['peak_cuda_mb']:.0f} MB"))
    energy = watt_hours(cost)
    why = "; ".join(cost.get("energy_not_readable", [])) or "not recorded"
    rows.append(("energy", f"{energy:.3g} Wh" if energy is not None else escaped(why)))
    return rows


def _line(value: Any) -> str:
    """Return a value on one line, without characters that are not printed."""
    text = " ".join(str(value).split())
    return "".join(c for c in text if c.isprintable())


def escaped(value: Any) -> str:
    """Return a value as text that is no markup of Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]{}#|~!])", r"\\\1", html.escape(_line(value), quote=False))


def code_span(value: Any) -> str:
    """Return a value in code marks that it cannot close, also in a table's cell."""
    text = _line(value)
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    padded = f" {text} " if text.startswith("`") or text.endswith("`") else text
    return f"{fence}{padded}{fence}".replace("|", "\\|") if text else "unknown"


def _fenced(text: str) -> str:
    text = "".join(c for c in text if c.isprintable() or c == "\n")
    fence = "`" * max(3, max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    return f"{fence}\n{text}\n{fence}"


def table_of(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Return a table of cells that are Markdown already."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
