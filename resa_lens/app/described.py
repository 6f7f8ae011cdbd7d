"""What an artifact is in a sentence, and its manifest as rows of a table."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from resa_lens.app.listing import Artifact
from resa_lens.hookpoints import describe_layer

Row = dict[str, str]


def sentence(artifact: Artifact) -> str:
    """Say what an artifact is, by its kind and what its manifest says of it."""
    manifest = artifact.manifest
    try:
        return _sentence(manifest.kind, manifest.config, manifest.results)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        # Of another version, or changed by hand: the manifest below stands as it is.
        return f"An artifact of the kind {manifest.kind}; its manifest is not as this version's."


def _sentence(kind: str, config: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    def place(layer: Any) -> str:
        return describe_layer(int(layer), int(results["n_layers"]))

    model = results.get("model", "a model")
    match kind:
        case "saes":
            layers = results["layers"]
            fvu = [float(row["fvu"]) for row in layers]
            return (
                f"Sparse autoencoders of {len(layers)} layer(s) of {model} at {results['site']}, "
                f"{int(config['sae']['latents']):,} latents each, seed "
                f"{config['sae']['seed']}; share of the variance that they leave unexplained on "
                f"held-out text (FVU): {min(fvu):.4f} to {max(fvu):.4f}."
            )
        case "counts":
            sums = {
                rule: sum(int(row[rule]) for row in results["layers"])
                for rule in ("all", "any", "either")
            }
            said = ", ".join(f"{count} by rule {rule}" for rule, count in sums.items())
            return (
                f"Features of {model} that are active at the think tags of the prompt and nowhere "
                f"else in it, over {len(results['layers'])} layers: {said}."
            )
        case "recommendation":
            layers = "; ".join(place(layer) for layer in results["recommended"])
            return f"Layers of {model} to tune: {layers}. Verdict: {results['verdict']}."
        case "falsification":
            return f"Counted features of {model} put to the test: {results['summary']['reason']}."
        case "activity":
            tokens = sum(int(n) for n in results["tokens"].values())
            return (
                f"How often and how strongly each feature of {model} fires, in which phase, with "
                f"examples: {tokens:,} tokens of {results['documents']:,} documents."
            )
        case "scores":
            names = ", ".join(results["significant"])
            return f"Features of {model} scored between reasoning and other text: {names}."
        case "quality":
            return f"Quality of SAEs of {model} at {results['site']}, measured anew."
        case "stability":
            return f"Recommendations for {model} with other prompts, counting rules and SAE seeds."
        case "effects":
            return f"What each layer's counted features do to the loss of {model}."
        case "matches":
            return f"One run's features of {model} looked for in another's."
        case "ablation":
            return (
                f"Features at {results['site']}, layer {int(results['layer'])} (0-based), changed "
                f"while the model answers: accuracy {100 * float(results['effect']):+.1f} points, "
                f"random features {100 * float(results['control']):+.1f} on average "
                f"(p = {float(results['p_value']):.2g})."
            )
        case "attribution":
            found = results["agreement"]
            return (
                f"Features at {results['site']}, layer {int(results['layer'])} (0-based), weighed "
                f"by gradient x activation and by patching; the two agree with a rank correlation "
                f"of {float(found['spearman']):.2f} (n = {found['n']})."
            )
        case "adapter":
            if results["layer"] is None:
                return f"A LoRA adapter for {model}, fine-tuned on texts: {config.get('control')}."
            through = config.get("control") or "the SAE"
            return (
                f"A LoRA adapter for {model}, tuned with {through} at {place(results['layer'])}, "
                f"site {results['site']}, {config['steps']} steps."
            )
        case "eval":
            low, high = (100 * float(value) for value in results["ci"])
            return (
                f"{model} answered {int(results['n']):,} questions: "
                f"{100 * results['accuracy']:.1f} % right (95 % {low:.1f} to {high:.1f} %)."
            )
        case "sweep":
            jobs = config["jobs"]
            layers = {job["layer"] for job in jobs} - {None}
            return (
                f"{len(jobs)} tunings of {model} at {len(layers)} layers with SAEs of "
                f"{results['source']}, preset {results['preset']}, each scored."
            )
        case _:
            return f"An artifact of the kind {kind}."


def warnings(artifact: Artifact) -> list[str]:
    """Return what a run warned of."""
    found = artifact.manifest.results.get("warnings")
    return [str(text) for text in found] if isinstance(found, list) else []


def command(artifact: Artifact) -> str:
    """Return the command that made an artifact."""
    return shlex.join(str(word) for word in artifact.manifest.command)


def rows(artifact: Artifact, megabytes: float) -> list[Row]:
    """Return an artifact's manifest, without its command, configuration and results."""
    manifest, cost = artifact.manifest, artifact.manifest.cost
    made = [
        ("folder", str(artifact.path)),
        ("made", f"{manifest.created.replace('T', ' ')[:19]} UTC"),
        ("took", f"{manifest.seconds:,.1f} s"),
        ("size", f"{megabytes:,.2f} MB"),
        ("peak memory", f"{manifest.peak_memory_mb:,.0f} MB"),
        *_cost(cost),
        ("seed", str(manifest.seed)),
        ("device", f"{manifest.device}, {manifest.dtype}, {manifest.threads} thread(s)"),
        ("kernels", manifest.kernel_path),
        ("machine", str(cost.get("hardware") or manifest.platform)),
        ("versions", ", ".join(f"{name} {text}" for name, text in manifest.versions.items())),
        ("commit", manifest.commit or "not known"),
        *[(f"hash of {name}", text) for name, text in manifest.hashes.items()],
    ]
    return [{"what": what, "value": value} for what, value in made]


def _cost(cost: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Measured cost; where energy is not readable, why."""
    found = []
    if isinstance(seconds := cost.get("cpu_seconds"), int | float):
        found.append(("CPU time", f"{seconds:,.1f} s"))
    if isinstance(peak := cost.get("peak_cuda_mb"), int | float):
        found.append(("peak GPU memory", f"{peak:,.0f} MB"))
    tokens = cost.get("tokens")
    if isinstance(tokens, dict):
        tokens = sum(n for n in tokens.values() if isinstance(n, int))
    if isinstance(tokens, int):
        found.append(("tokens", f"{tokens:,}"))
    joules = cost.get("joules")
    if isinstance(joules, dict) and joules:
        found.append(("energy", f"{sum(map(float, joules.values())) / 3600:.2f} Wh"))
    elif reasons := cost.get("energy_not_readable"):
        found.append(("energy", f"not readable: {'; '.join(map(str, reasons))}"))
    return found


def settings(artifact: Artifact) -> list[Row]:
    """Return an artifact's configuration, nested names with dots."""
    return [{"setting": name, "value": value} for name, value in _flat(artifact.manifest.config)]


def _flat(values: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    found = []
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found += _flat(value, f"{before}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            found.append((f"{before}{name}", text))
    return found
