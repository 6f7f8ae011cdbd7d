"""Does one feature, clamped at the first generated token alone, bring the thinking back?

The registered experiment (docs/experiment-first-token.md): tiny-reasoner, tuned to answer at once
where it is told so; an SAE; the feature that differs most; 19 random features beside it.

    python -m benchmarks.first_token --work FOLDER

The tuned model, the SAE and every arm are kept in the folder, and a second call goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resa_lens.evals.config import GenerationConfig
from resa_lens.evals.engines.hf import HFEngine
from resa_lens.evals.grading import is_correct
from resa_lens.evals.tasks import load_tasks, select
from resa_lens.features.interventions import (
    Intervention,
    Tracker,
    encode_batches,
    intervening,
    matched_controls,
    sum_masses,
)
from resa_lens.models.activations import stream_activations
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model, load_model
from resa_lens.saes.coder import SparseCoder, encode
from resa_lens.saes.config import SaeConfig
from resa_lens.saes.train import train_saes
from resa_lens.stats import compare_paired
from resa_lens.texts import corpora
from resa_lens.texts.phases import phased_batches
from resa_lens.texts.prompts import ANSWER_OPEN, THINK_CLOSE, document, question_prompt

AT_ONCE = " Answer at once."
POINT = Hookpoint(5, "resid_post")
UPDATES, DOCUMENTS, RATE = 100, 16, 2e-4
SAE_TOKENS, SEQUENCE, ROWS = 100_000, 128, 8
SELECTION, DOSING, QUESTIONS = 200, 100, 500
DOSES = (1.0, 2.0, 4.0, 8.0)
CONTROLS = 19
MASS_TOKENS = 16_384


def worked(seed: int) -> list[Any]:
    """Return the training split's records with steps, levels 1 to 3, in a drawn order."""
    rows = [r for r in corpora.load_records("tiny") if r.steps and str(r.level) in "123"]
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]


def text_of(record: Any, at_once: bool) -> tuple[str, str]:
    """Return a prompt and what is to follow it."""
    if not at_once:
        prompt = question_prompt(record.question)
        return prompt, document(record.question, record.steps, record.answer)[len(prompt) :]
    prompt = question_prompt(record.question + AT_ONCE)
    return prompt, f" {THINK_CLOSE} {ANSWER_OPEN} Answer: {record.answer} </answer>"


def lazy_model(work: Path, rows: Sequence[Any]) -> Model:
    """Return the target: tiny-reasoner tuned on both kinds of documents."""
    model, file = load_model("tiny-reasoner"), work / "target.pt"
    if file.exists():
        model.model.load_state_dict(torch.load(file, weights_only=True))
        return model
    torch.manual_seed(0)
    tokenizer: Any = model.tokenizer
    optimiser = torch.optim.AdamW(model.model.parameters(), lr=RATE, weight_decay=0.0)
    for step in range(UPDATES):
        batch = rows[step * DOCUMENTS : (step + 1) * DOCUMENTS]
        pairs = [text_of(r, number % 2 == 1) for number, r in enumerate(batch)]
        encoded = [
            (tokenizer(a)["input_ids"], [*tokenizer(a + b)["input_ids"], tokenizer.eos_token_id])
            for a, b in pairs
        ]
        longest = max(len(ids) for _, ids in encoded)
        ids = torch.full((len(encoded), longest), tokenizer.eos_token_id)
        labels = torch.full_like(ids, -100)
        for row, (prompt, whole) in enumerate(encoded):
            ids[row, : len(whole)] = torch.tensor(whole)
            labels[row, len(prompt) : len(whole)] = torch.tensor(whole[len(prompt) :])
        for group in optimiser.param_groups:
            group["lr"] = RATE * (1 - step / UPDATES)
        logits = model.model(input_ids=ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
        )
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.model.parameters(), 1.0)
        optimiser.step()
        if step % 20 == 19:
            print(f"update {step + 1}: loss {loss.item():.3f}", flush=True)
    torch.save(model.model.state_dict(), file)
    return model


def packed(model: Model, rows: Sequence[Any], tokens: int) -> Iterator[Tensor]:
    """Yield batches [row, position] of documents of both kinds, end to end."""
    tokenizer: Any = model.tokenizer
    stream: list[int] = []
    yielded = 0
    for number, record in enumerate(rows):
        stream += tokenizer("".join(text_of(record, number % 2 == 1)))["input_ids"]
        stream.append(tokenizer.eos_token_id)
        while len(stream) >= ROWS * SEQUENCE and yielded < tokens:
            yield torch.tensor(stream[: ROWS * SEQUENCE]).view(ROWS, SEQUENCE)
            stream, yielded = stream[ROWS * SEQUENCE :], yielded + ROWS * SEQUENCE


def coder_of(work: Path, model: Model, rows: Sequence[Any]) -> SparseCoder:
    """Return the SAE of the target."""
    file = work / "sae.pt"
    if not file.exists():
        config = SaeConfig(
            latents=512, k=16, tokens=SAE_TOKENS, batch=ROWS, seed=0, site="resid_post"
        ).for_width(model.d_model)
        tail = list(packed(model, rows[:200], 8192))
        batches = list(packed(model, rows[200:], SAE_TOKENS))
        trained = train_saes(model, [POINT.layer], batches, tail, config)
        torch.save(trained.coders[POINT], file)
    return torch.load(file, weights_only=False).requires_grad_(False)


@torch.no_grad()
def last_acts(model: Model, coder: SparseCoder, prompts: Sequence[str]) -> Tensor:
    """Return the latents' mean activation at the prompts' last positions, [d_sae]."""
    total = torch.zeros(coder.num_latents)
    tokenizer: Any = model.tokenizer
    ids = [torch.tensor([tokenizer(prompt)["input_ids"]]) for prompt in prompts]
    for read in stream_activations(model, ids, [POINT]):
        acts = encode(coder, read.acts[POINT][:, -1].to(coder.dtype))
        total.index_add_(0, acts.latents, acts.values.float())
    return total / len(prompts)


def answered(
    model: Model,
    coder: SparseCoder,
    prompts: Sequence[str],
    golds: Sequence[str],
    change: Intervention | None = None,
) -> dict[str, Any]:
    """Return of each question whether the answer thinks, whether it is right, and its text."""
    engine, config = HFEngine(model.model, model.tokenizer), GenerationConfig(batch_size=128)
    with intervening(
        model, [] if change is None else [change], {POINT: coder}, Tracker()
    ) as tracker:
        texts = [g.text for g in engine.generate(prompts, config, hooks=tracker)]
    return {
        "thinks": [int("=" in text.split(THINK_CLOSE)[0]) for text in texts],
        "correct": [int(is_correct(t, gold)) for t, gold in zip(texts, golds, strict=True)],
        "texts": texts,
    }


def clamp(feature: int, value: float) -> Intervention:
    """Return the intervention at the first generated token."""
    return Intervention(POINT, (feature,), "clamp", 1.0, values=(value,), at="first")


def kept(file: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a file holds, or do the work and write it."""
    if not file.exists():
        result = work()
        file.with_suffix(".part").write_text(json.dumps(result))
        file.with_suffix(".part").replace(file)
    return json.loads(file.read_text())


def compared(base: Sequence[int], other: Sequence[int]) -> str:
    """Format a paired difference in points."""
    pair = compare_paired(np.array(base), np.array(other))
    low, high = (100 * bound for bound in pair.ci)
    return f"{100 * pair.difference:+.1f} ({low:+.1f} to {high:+.1f})"


def main() -> None:
    """Run what is missing and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    work: Path = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    rows = worked(0)
    reserved, rows = rows[: SELECTION + DOSING], rows[SELECTION + DOSING :]
    model = lazy_model(work, rows)
    coder = coder_of(work, model, rows)

    selection = reserved[:SELECTION]
    steps, once = (
        last_acts(model, coder, [text_of(r, at_once)[0] for r in selection])
        for at_once in (False, True)
    )
    feature = int((steps - once).argmax())
    mean = float(steps[feature])
    print(f"feature {feature}: {mean:.3f} with steps, {float(once[feature]):.3f} at once")

    dosing = [text_of(r, True)[0] for r in reserved[SELECTION:]]
    golds = [r.answer for r in reserved[SELECTION:]]
    shares = {}
    for dose in DOSES:
        arm = kept(
            work / f"dose-{dose:g}.json",
            lambda dose=dose: answered(model, coder, dosing, golds, clamp(feature, dose * mean)),
        )
        shares[dose] = float(np.mean(arm["thinks"]))
        print(f"dose {dose:g}: {100 * shares[dose]:.0f} % of {DOSING} training questions think")
    value = mean * max(DOSES, key=lambda dose: (shares[dose], -dose))

    items = select(load_tasks("tiny"), levels=(1, 2, 3), limit=QUESTIONS, seed=0)
    golds = [item.answer for item in items]
    prompts = [question_prompt(item.question + AT_ONCE) for item in items]
    base = kept(work / "base.json", lambda: answered(model, coder, prompts, golds))
    usual_prompts = [question_prompt(item.question) for item in items]
    usual = kept(work / "with-steps.json", lambda: answered(model, coder, usual_prompts, golds))
    target = kept(
        work / "feature.json",
        lambda: answered(model, coder, prompts, golds, clamp(feature, value)),
    )
    batches = phased_batches(
        model.tokenizer, [p + t for p, t in zip(prompts, base["texts"], strict=True)],
        tokens=MASS_TOKENS, longest=model.context,
    )  # fmt: skip
    mass = sum_masses(list(encode_batches(model, POINT, coder, batches)), coder)
    sets = matched_controls(mass, (feature,), draws=CONTROLS, seed=0)
    controls = [
        kept(
            work / f"control-{number}.json",
            lambda drawn=drawn: answered(model, coder, prompts, golds, clamp(drawn[0], value)),
        )
        for number, drawn in enumerate(sets)
    ]

    print(f"\nclamped to {value:.3f}; {len(items)} test questions; random features {sets}\n")
    print("| arm | think, % | change (95 %) | accuracy, % | change (95 %) |\n|---|---|---|---|---|")
    arms = {"with steps": usual, "at once": base, f"feature {feature}": target}
    arms |= {f"random {drawn[0]}": arm for drawn, arm in zip(sets, controls, strict=True)}
    for name, arm in arms.items():
        cells = [
            f"{100 * np.mean(arm[key]):.1f} | {compared(base[key], arm[key])}"
            for key in ("thinks", "correct")
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    for key in ("thinks", "correct"):
        seen = float(np.mean(target[key]))
        each = [float(np.mean(arm[key])) for arm in controls]
        above = sum(one >= seen for one in each)
        print(
            f"{key}: feature {100 * seen:.1f} %, random {100 * np.mean(each):.1f} % on average, "
            f"{100 * max(each):.1f} % at most; p = {(1 + above) / (1 + len(each)):.2f}"
        )


if __name__ == "__main__":
    main()
