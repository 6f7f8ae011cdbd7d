"""The guide on a 24 GB card: its stages' bytes by formulas, and the formulas by counting.

At full shape nothing is allocated: the formulas of `machine.needs` and the stages are arithmetic.
At a small shape they are held to the tensors that live while the stage's own loop runs.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from live_bytes import MB, LiveBytes, storage_bytes
from transformers import Qwen2Config, Qwen2ForCausalLM

from resa_lens.machine.needs import Shape, activations_mb, generation_mb, needs_of
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.models.host import Model, load_model
from resa_lens.saes.coder import new_coder
from resa_lens.saes.config import SaeConfig
from resa_lens.saes.quality import measure_fvu
from resa_lens.saes.train import train_saes
from resa_lens.stages import saes as saes_stage
from resa_lens.tuning.config import TuneConfig, preset
from resa_lens.tuning.train import tune

CARD_MB = 24 * 1000**3 / MB
FREE = 0.9
"""What plans use of a card: a tenth is left."""
R1_DISTILL = Shape(
    name="R1-Distill-1.5B", layers=28, width=1536, feed_forward=8960, vocabulary=151_936,
    parameters=1_777_088_000, dtype="BF16", stored_mb=3390.0, adapted=8_716_288,
)  # fmt: skip
CONFIG: Any = SimpleNamespace(
    get_text_config=lambda: SimpleNamespace(
        num_attention_heads=12, num_key_value_heads=2, hidden_size=1536, num_hidden_layers=28,
        vocab_size=151_936,
    )
)  # fmt: skip
# All seven projections of a layer, as preset reference adapts them.
REFERENCE_ADAPTED = 28 * 32 * (
    (1536 + 1536) * 2 + (1536 + 256) * 2 + (1536 + 8960) * 3
)  # fmt: skip


def guide() -> dict[str, float]:
    """Return the MB of the card by stage of docs/how-to-r1-distill.md, in its order."""
    full = needs_of(R1_DISTILL, device="cuda", available_mb=CARD_MB, free_disk_mb=1e6)
    model, sae = full.load_mb, full.sae_mb
    step = 0.75 * sae
    group = saes_stage.FIT_BYTES / MB + sae
    acts = 2 * 256 * 1536 * 4 * 8 / MB

    def tuning(sequence: int, adapted: int) -> float:
        return model + sae + adapted * 16 / MB + activations_mb(R1_DISTILL, sequence, 2, gpu=True)

    def answers(rows: int, tokens: int) -> float:
        return model + generation_mb(CONFIG, rows, tokens, 2)

    nine = 9 * (2 * sae + 16 * 256 * 1536 * 4 / MB) + model + step
    return {
        "2 twenty answers of 2,048 tokens": answers(8, 2048 + 512),
        "3 public SAEs, checked in groups": model + group + acts,
        "3 own SAEs, nine layers a pass": nine,
        "4 counts": full.count_mb,
        "4 counts in random SAEs": model + 2.5 * sae,
        "4 trials of features, in groups": model + group,
        "4 SAEs of another seed, one layer": full.train_one_mb,
        "5 tuning, preset paper": tuning(256, R1_DISTILL.adapted),
        "5 tuning, sequences of 2,048": tuning(2048, R1_DISTILL.adapted),
        "5 tuning, preset reference": tuning(2048, REFERENCE_ADAPTED),
        "5 answers with an SAE": answers(8, 2048 + 512) + sae,
        "6 sixteen answers of 32,768 tokens": answers(16, 32_768 + 1024),
        "8 activity, one layer": model + group,
    }


def test_a_24_gb_card_does_the_guide_from_end_to_end() -> None:
    stages = guide()
    beyond = {name: round(mb) for name, mb in stages.items() if mb > FREE * CARD_MB}
    assert not beyond
    # The largest of them are near it: the formulas are not of another unit.
    assert max(stages.values()) > 0.6 * CARD_MB


LAYERS, WIDTH, FORWARD, LATENTS = 4, 128, 768, 16_384


def small(vocabulary: int) -> Model:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=WIDTH, intermediate_size=FORWARD,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512,
    )  # fmt: skip
    config.architectures = ["Qwen2ForCausalLM"]
    model: Any = Qwen2ForCausalLM(config).eval()
    host: Any = Model("small", model, load_model("tiny-reasoner").tokenizer, None, "0" * 8,  # pyright: ignore
                      "cpu", "float32", "a test")  # fmt: skip
    return host


def counted(*modules: torch.nn.Module) -> LiveBytes:
    live = LiveBytes()
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            live.follow(tensor)
    return live


@pytest.mark.parametrize("vocabulary", [600, 12_000])
@pytest.mark.parametrize("name", ["paper", "reference"])
def test_a_tuning_holds_what_its_formula_says(name: str, vocabulary: int) -> None:
    """Never more; preset reference shares its first blocks and holds less."""
    host, objective, sequence = small(vocabulary), preset(name), 256
    coder = new_coder(WIDTH, LATENTS, 16, seed=0)
    weights = storage_bytes(host.model, coder) / MB
    batches = [torch.randint(600, (1, sequence)) for _ in range(2)]
    live = counted(host.model, coder)
    with live:
        _, course = tune(
            host, coder, Hookpoint(2, objective.site), batches, 2, objective,
            TuneConfig(rank=32, dropout=0.05),
        )  # fmt: skip
    shape = Shape("small", LAYERS, WIDTH, FORWARD, vocabulary, 0, "F32", 0.0, course.trainable)
    formula = course.trainable * 16 / MB + activations_mb(shape, sequence, 4)
    held = live.peak / MB - weights
    assert (0.2 if name == "reference" else 0.6) * formula < held < 1.05 * formula


def test_sae_training_holds_what_its_formula_says() -> None:
    host, layers = small(600), [1, 2]
    config = SaeConfig(latents=LATENTS, k=16, include_special=True).for_width(WIDTH)
    batches = [torch.randint(600, (2, 32)) for _ in range(2)]
    live = counted(host.model)
    with live:
        train_saes(host, layers, batches, [], config)
    sae = 2 * LATENTS * WIDTH * 4 / MB
    held = live.peak / MB - storage_bytes(host.model) / MB
    # One gradient, as large as the encoder, and half of that for the encoder in bfloat16; then the
    # encoder's product, in pieces of at most `PRODUCT_BYTES` on a CPU.
    formula = len(layers) * 2 * sae + 0.75 * sae
    product = 2 * 32 * LATENTS * 4 / MB
    assert 0.8 * formula < held < 1.05 * formula + product


def test_one_sae_at_a_time_costs_one() -> None:
    """Figures of many SAEs by a mapping that makes them: what lives is one, and what it does."""
    host = small(600)
    points = [Hookpoint(layer) for layer in range(LAYERS)]
    batches = [torch.randint(600, (2, 64))]
    peaks = []
    for some in (points[:1], points):
        live = counted(host.model)
        with live:
            for point in some:
                measure_fvu(host, {point: new_coder(WIDTH, LATENTS, 16, seed=0)}, batches)
        peaks.append(live.peak)
    assert peaks[1] < 1.1 * peaks[0]


def test_what_lives_is_counted_once_and_no_longer() -> None:
    live = LiveBytes()
    with live:
        x = torch.zeros(2**18)
        y = x[:10].view(2, 5)
        assert live.now() == MB
        z = (x + 1).requires_grad_()
        (z * z).sum().backward()
        assert live.now() == 3 * MB
        del x, y, z
        assert live.now() == 0
    assert live.peak == pytest.approx(5 * MB, rel=0.02)
