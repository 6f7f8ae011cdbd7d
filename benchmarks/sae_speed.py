"""SAE training against its peers and its floor, side by side in one run, interleaved.

    python benchmarks/sae_speed.py step                 one SAE on given activations
    python benchmarks/sae_speed.py sweep                the same at eight shapes, and the worst
    python benchmarks/sae_speed.py end-to-end           the model's forward pass and all SAEs
    python benchmarks/sae_speed.py end-to-end --peer-python P          SAELens in environment P too
    python benchmarks/sae_speed.py end-to-end --full --device cuda     the paper's shape

The floor is what no trainer can avoid: the model's forward up to the last hooked layer and one
encoder product a layer; it is given with the product in float32 and in bfloat16.  Medians; whole
ratios are of medians of the same run.  On a CPU with one thread `step` and `sweep` count seconds of
the processor, which other work on the machine changes little.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
import typer
from side_by_side import Threads, heading, interleaved, llama, timed, verdict

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)


@dataclass
class Contest:
    """One SAE of each trainer at a shape, and the jobs that are timed."""

    width: int
    latents: int
    k: int
    tokens: int
    device: str

    def __post_init__(self) -> None:
        from resa_lens.saes.select import half_room
        from resa_lens.saes.train import SaeConfig

        self.generator = torch.Generator().manual_seed(0)
        atoms = torch.randn(2 * self.width, self.width, generator=self.generator)
        self.atoms = F.normalize(atoms, dim=1)
        self.config = SaeConfig(latents=self.latents, k=self.k, include_special=True).for_width(
            self.width
        )
        self.half = half_room(self.latents, self.width, self.device)

    def activations(self) -> torch.Tensor:
        """Sparse sums of fixed directions with some noise, so that there is something to learn."""
        kinds = 2 * self.width
        chosen = torch.rand(self.tokens, kinds, generator=self.generator).topk(24).indices
        sizes = torch.rand(self.tokens, 24, generator=self.generator)
        x = torch.zeros(self.tokens, kinds).scatter_(1, chosen, sizes) @ self.atoms
        noise = torch.randn(self.tokens, self.width, generator=self.generator)
        return (x + 0.02 * noise).to(self.device)

    def ours(self) -> Any:
        """Return a trainer of one SAE."""
        from resa_lens.models.hookpoints import Hookpoint
        from resa_lens.saes.train import new_trainers

        trainers = new_trainers([Hookpoint(0)], self.width, self.config, 1000, device=self.device)
        return next(iter(trainers.values()))

    def sparsify(self) -> tuple[Any, Any]:
        """Return sparsify's coder with its optimizer, from the same weights."""
        from schedulefree import ScheduleFreeWrapper
        from sparsify.sign_sgd import SignSGD

        from resa_lens.saes.coder import SparseCoder, SparseCoderConfig

        coder = SparseCoder(self.width, SparseCoderConfig(num_latents=self.latents, k=self.k))
        coder.load_state_dict(self.ours().coder.state_dict())
        coder = coder.to(self.device)
        rate = self.config.learning_rate or 0.0
        wrapper = ScheduleFreeWrapper(SignSGD(coder.parameters(), lr=rate), momentum=0.95)
        wrapper.train()
        return coder, wrapper

    def their_step(self, pair: tuple[Any, Any], x: torch.Tensor, autocast: bool) -> None:
        """Take a step as sparsify's trainer does."""
        coder, wrapper = pair
        coder.set_decoder_norm_to_unit_norm()
        with torch.autocast(self.device.split(":")[0], dtype=torch.bfloat16, enabled=autocast):
            fvu = coder(x).fvu
        fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        wrapper.step()
        wrapper.zero_grad()

    def seconds(self, rounds: int, trainer: Any) -> dict[str, float]:
        """Return the median seconds of a step of each, and of one encoder product."""
        x, device = self.activations(), self.device
        plain, auto = self.sparsify(), self.sparsify()
        weights = trainer.params["encoder.weight"], trainer.params["encoder.bias"]
        bf16 = tuple(w.bfloat16() for w in weights)
        xb = x.bfloat16()
        return interleaved(
            {
                "ours": lambda: timed(lambda: trainer.step(x, self.half), device),
                "sparsify": lambda: timed(lambda: self.their_step(plain, x, False), device),
                "autocast": lambda: timed(lambda: self.their_step(auto, x, True), device),
                "fp32": lambda: timed(lambda: F.linear(x, *weights), device),
                "bf16": lambda: timed(lambda: F.linear(xb, *bf16), device),
            },
            rounds,
            warm=2,
        )


def step_targets() -> tuple[float, float]:
    """Return what sparsify's step, and its step under autocast, must take of ours at least."""
    from resa_lens.saes.kernels import native_bf16

    return (2.0 if native_bf16() else 1.3), 1.5


@app.command()
def step(
    width: int = 576,
    latents: int = 4608,
    k: int = 32,
    tokens: int = 1024,
    rounds: int = 9,
    fvu_steps: int = 60,
    threads: Threads = 1,
    device: str = "cpu",
) -> None:
    """One SAE on given activations: ours, sparsify's as shipped, sparsify's under autocast."""
    torch.set_num_threads(threads)
    heading(device, threads)
    print(f"width {width}, {latents} latents, k {k}, {tokens} tokens a step, {rounds} rounds")
    contest = Contest(width, latents, k, tokens, device)
    trainer = contest.ours()
    found = contest.seconds(rounds, trainer)
    for name, label in (
        ("ours", "resa-lens step"),
        ("sparsify", "sparsify 1.3.3 step, as shipped"),
        ("autocast", "sparsify 1.3.3 step, bf16 autocast"),
        ("fp32", "floor: one encoder product, fp32"),
        ("bf16", "floor: one encoder product, bf16"),
    ):
        print(f"{label:58} {1000 * found[name]:8.3g} ms")
    targets = step_targets()
    verdict("sparsify / ours", found["sparsify"], found["ours"], targets[0])
    verdict("sparsify under autocast / ours", found["autocast"], found["ours"], targets[1])
    print(f"{'ours / floor (fp32, bf16 product)':58} {found['ours'] / found['fp32']:6.2f}x "
          f"{found['ours'] / found['bf16']:.2f}x")  # fmt: skip
    pieces(trainer, contest.activations(), contest.half)
    # FVU after the same tokens, from the same weights, in the averaged weights.
    trainer, plain, auto = contest.ours(), contest.sparsify(), contest.sparsify()
    data = [contest.activations() for _ in range(fvu_steps)]
    with torch.no_grad():
        for coder, _ in (plain, auto):
            coder.b_dec.copy_(data[0].mean(0))
    for x in data:
        trainer.step(x, contest.half)
        contest.their_step(plain, x, False)
        contest.their_step(auto, x, True)
    plain[1].eval()
    auto[1].eval()
    test = torch.cat([contest.activations() for _ in range(4)])
    with torch.no_grad():
        a, b, c = (coder(test).fvu.item() for coder in (trainer.finish(), plain[0], auto[0]))
    print(
        f"FVU on {len(test)} fresh tokens after {fvu_steps * tokens} tokens: ours {a:.5f}, "
        f"sparsify {b:.5f} (ours {100 * (a / b - 1):+.2f} %, limit +1 %), autocast {c:.5f}"
    )


SHAPES = (
    (256, 2048, 32, 1024), (576, 4608, 32, 1024), (576, 4608, 64, 512), (768, 6144, 32, 1024),
    (896, 7168, 32, 1024), (1000, 7001, 32, 1024), (1024, 8000, 32, 2048), (1024, 8192, 64, 1024),
)  # fmt: skip
"""Width, latents, k and tokens a step; of 1,000 and 7,001 no power of two is a divisor."""


@app.command()
def sweep(
    shapes: Annotated[str, typer.Option(help="width,latents,k,tokens of each; by spaces.")] = "",
    rounds: int = 7,
    threads: Threads = 1,
    device: str = "cpu",
) -> None:
    """A step at many shapes, and the worst of them against the targets."""
    torch.set_num_threads(threads)
    heading(device, threads)
    chosen = [tuple(map(int, shape.split(","))) for shape in shapes.split()] or SHAPES
    print("| width | latents | k | tokens | ours, ms | sparsify / ours | autocast / ours | "
          "ours / bf16 product |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    ratios: list[tuple[float, float]] = []
    for shape in chosen:
        width, latents, k, tokens = shape
        contest = Contest(width, latents, k, tokens, device)
        found = contest.seconds(rounds, contest.ours())
        ratios.append((found["sparsify"] / found["ours"], found["autocast"] / found["ours"]))
        cells = [f"{1000 * found['ours']:.0f}", *(f"{ratio:.2f}" for ratio in ratios[-1]),
                 f"{found['ours'] / found['bf16']:.2f}"]  # fmt: skip
        print("|", " | ".join([*map(str, shape), *cells]), "|", flush=True)
    targets = step_targets()
    verdict("the worst: sparsify / ours", min(a for a, _ in ratios), 1.0, targets[0])
    verdict("the worst: sparsify under autocast / ours", min(b for _, b in ratios), 1.0, targets[1])


def pieces(trainer: Any, x: torch.Tensor, half: torch.Tensor | None) -> None:
    """Print where the time of our step goes, by operator."""
    from torch.profiler import ProfilerActivity, profile

    runs = 5
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(runs):
            trainer.step(x, half)
    names = {
        "aten::addmm": "encoder product",
        "aten::sparse_sampled_addmm": "exact values, slopes (sampled products)",
        "aten::_embedding_bag_forward_only": "decode and weight gradients (segments)",
        "aten::lerp_": "optimizer", "aten::add_": "optimizer", "aten::sign_": "optimizer",
        "aten::topk": "top-k among candidates", "aten::copy_": "casts and copies",
    }  # fmt: skip
    total: dict[str, float] = {}
    everything = 0.0
    for row in seen.key_averages():
        everything += row.self_cpu_time_total
        if row.key in names:
            total[names[row.key]] = total.get(names[row.key], 0.0) + row.self_cpu_time_total
    whole = statistics.median(timed(lambda: trainer.step(x, half)) for _ in range(5)) * 1e6 * runs
    total["other torch operators"] = everything - sum(total.values())
    total["outside torch (NumPy's partition, Python)"] = max(0.0, whole - everything)
    print("where our step goes:")
    for name, micro in sorted(total.items(), key=lambda item: -item[1]):
        print(f"    {name:54} {micro / runs / 1000:8.2f} ms")


@app.command("end-to-end")
def end_to_end(
    width: int = 576,
    n_layers: int = 12,
    latents: int = 4608,
    k: int = 32,
    batch: int = 4,
    sequence: int = 256,
    steps: int = 4,
    rounds: int = 5,
    threads: Threads = 1,
    device: str = "cpu",
    dtype: str = "float32",
    vocab: int = 2048,
    peer_python: str | None = None,
    full: bool = False,
) -> None:
    """The model's forward pass and its SAEs: all layers in one pass, and one middle layer."""
    if full:
        width, n_layers, latents, sequence, batch = 1536, 28, 65_536, 2048, 16
        steps, rounds = 5_900_000 // (batch * sequence), 1
    import datasets
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    from resa_lens.models.activations import stream_activations
    from resa_lens.models.hookpoints import Hookpoint
    from resa_lens.models.host import Model
    from resa_lens.saes.train import SaeConfig, train_saes

    torch.set_num_threads(threads)
    heading(device, threads)
    tokens = batch * sequence * steps
    print(
        f"{n_layers} layers x {width}, vocabulary {vocab}, model in {dtype}, {latents} latents, "
        f"k {k}, {steps} steps of {batch} x {sequence} tokens, {rounds} rounds"
    )
    kind = getattr(torch, dtype)
    everywhere = list(range(1, n_layers - 1)) if full else list(range(n_layers))
    middle = n_layers // 2
    ids = torch.randint(
        vocab, (steps * batch, sequence), generator=torch.Generator().manual_seed(1)
    )
    parts = list(ids.split(batch))
    host = Model("random", llama(width, n_layers, vocab, kind, device), None, None, "0" * 8,  # pyright: ignore
                 device, dtype, "benchmark")  # fmt: skip
    plain = llama(width, n_layers, vocab, kind, device)
    if dtype != "float32":
        exact = llama(width, n_layers, vocab, torch.float32, device)
        with torch.no_grad():
            error = plain(parts[0].to(device)).logits.float() - exact(parts[0].to(device)).logits
        print(f"largest logit error of {dtype}: {error.abs().max().item():.2e}")
        del exact
    config = SaeConfig(
        latents=latents, k=k, tokens=tokens, batch=batch, include_special=True
    ).for_width(width)
    fvus: dict[str, float] = {}

    def ours(layers: list[int]) -> float:
        made: list[Any] = []
        seconds = timed(
            lambda: made.append(train_saes(host, layers, parts, [], config, steps=steps)), device
        )
        curves = made[0].losses.values()
        fvus[f"ours {len(layers)}"] = statistics.mean(curve[-1] for curve in curves)
        return seconds

    def sparsify(layers: list[int]) -> float:
        rows = datasets.Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")
        setup = TrainConfig(
            SparseCoderConfig(num_latents=latents, k=k), batch_size=batch, log_to_wandb=False,
            hookpoints=[f"layers.{n}.mlp" for n in layers], save_every=10**9,
            lr=config.learning_rate,
        )  # fmt: skip
        trainer = Trainer(setup, rows, plain)  # pyright: ignore[reportArgumentType]
        # Writing its checkpoint is no part of the comparison.
        trainer.save = lambda *args, **options: None  # pyright: ignore
        return timed(trainer.fit, device)

    def floor(layers: list[int], product: torch.dtype) -> float:
        points = [Hookpoint(n) for n in layers]
        weight = torch.randn(latents, width, device=device).to(product)

        def run() -> None:
            for held in stream_activations(host, parts, points):
                for point in points:
                    F.linear(held.acts[point].flatten(0, 1).to(product), weight)

        return timed(run, device)

    jobs: dict[str, Callable[[], float]] = {}
    for name, layers in (("all", everywhere), ("one", [middle])):
        jobs[f"ours {name}"] = lambda layers=layers: ours(layers)
        jobs[f"sparsify {name}"] = lambda layers=layers: sparsify(layers)
        jobs[f"fp32 {name}"] = lambda layers=layers: floor(layers, torch.float32)
        jobs[f"bf16 {name}"] = lambda layers=layers: floor(layers, torch.bfloat16)
    if peer_python:
        command = [
            peer_python, __file__, "peer", "--width", str(width), "--n-layers", str(n_layers),
            "--latents", str(latents), "--k", str(k), "--batch", str(batch), "--sequence",
            str(sequence), "--steps", str(steps), "--threads", str(threads), "--vocab", str(vocab),
            "--device", device, "--dtype", dtype,
        ]  # fmt: skip

        def saelens() -> float:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            return float(json.loads(done.stdout.splitlines()[-1])["seconds"])

        jobs["saelens one"] = saelens
    sink = open(os.devnull, "w")  # noqa: PTH123, SIM115
    shown, sys.stdout = sys.stdout, sink
    held_err, sys.stderr = sys.stderr, sink
    try:
        found = interleaved(jobs, rounds, warm=0 if full else 1)
    finally:
        sys.stdout, sys.stderr = shown, held_err
    for name, seconds in found.items():
        print(f"{name:20} {seconds:8.2f} s  {tokens / seconds:8.0f} tokens/s")
    print("mean FVU of the last step:", {name: round(value, 4) for name, value in fvus.items()})
    verdict("all layers: sparsify / ours", found["sparsify all"], found["ours all"], 1.4)
    verdict("one middle layer: sparsify / ours", found["sparsify one"], found["ours one"], 1.6)
    if peer_python:
        verdict("one middle layer: SAELens / ours", found["saelens one"], found["ours one"], 1.4)
    for name in ("all", "one"):
        for product in ("fp32", "bf16"):
            ratio = found[f"ours {name}"] / found[f"{product} {name}"]
            mark = (
                "" if name == "one" else f"  target 1.35x  {'met' if ratio <= 1.35 else 'MISSED'}"
            )
            print(f"{f'{name}: ours / floor with a {product} product':58} {ratio:6.2f}x{mark}")


@app.command()
def peer(
    width: int = 576, n_layers: int = 12, latents: int = 4608, k: int = 32, batch: int = 4,
    sequence: int = 256, steps: int = 4, threads: int = 1, vocab: int = 2048,
    device: str = "cpu", dtype: str = "float32",
) -> None:  # fmt: skip
    """SAELens at the middle layer, for an environment that has it; prints JSON.

    Its own SAETrainer with its TopK SAE and Adam, fed by a HookedTransformer of the same shape that
    stops after the hooked layer; its shuffling activation store is left out, in its favour.
    """
    # Not in the project's environment, hence without types.
    sae_lens: Any = import_module("sae_lens")
    config: Any = import_module("sae_lens.config")
    training: Any = import_module("sae_lens.training.sae_trainer")
    lens: Any = import_module("transformer_lens")
    torch.set_num_threads(threads)
    heads = width // 64
    model = lens.HookedTransformer(
        lens.HookedTransformerConfig(
            n_layers=n_layers, d_model=width, n_ctx=4096, d_head=64, n_heads=heads,
            n_key_value_heads=max(1, width // 192), d_mlp=width * 8 // 3, d_vocab=vocab,
            act_fn="silu", gated_mlp=True, normalization_type="RMS", device=device,
            positional_embedding_type="rotary", rotary_dim=64, final_rms=True,
            dtype=getattr(torch, dtype),
        )
    )  # fmt: skip
    middle = n_layers // 2
    hook = f"blocks.{middle}.hook_mlp_out"
    ids = torch.randint(
        vocab, (steps * batch, sequence), generator=torch.Generator().manual_seed(1)
    )

    def provide() -> Any:
        while True:
            for part in ids.split(batch):
                with torch.no_grad():
                    _, held = model.run_with_cache(
                        part.to(device), names_filter=[hook], stop_at_layer=middle + 1
                    )
                yield held[hook].flatten(0, 1).float()

    sae = sae_lens.TopKTrainingSAE(
        sae_lens.TopKTrainingSAEConfig(
            d_in=width, d_sae=latents, k=k, device=device, dtype="float32"
        )
    )
    size = batch * sequence
    trainer = training.SAETrainer(
        config.SAETrainerConfig(
            total_training_samples=steps * size,
            train_batch_size_samples=size,
            lr_end=3e-5,
            device=device,
        ),
        sae,
        provide(),
    )
    next(provide())
    print(json.dumps({"seconds": timed(trainer.fit, device)}))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("HF_DATASETS_CACHE", scratch)
        app()
