"""Hold the three formats to the real SAELens and dictionary_learning, in their own environment.

    python benchmarks/check_formats.py write FOLDER   here: SAEs in every format, and our outputs
    PEER   benchmarks/check_formats.py peer FOLDER    there: their outputs, and SAEs of their own
    python benchmarks/check_formats.py read FOLDER    here: what they wrote, by our reader

PEER is the Python of an environment with sae-lens 6.54 and dictionary-learning 0.1.  Each step
prints the largest difference of reconstructions and exits with 1 above 1e-5.
"""

from __future__ import annotations

from datetime import date
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
import typer

app = typer.Typer(help=__doc__, pretty_exceptions_enable=False)
SHAPES = ((16, 64, 4), (576, 4608, 32))
LIMIT = 1e-5


def rows(width: int) -> torch.Tensor:
    """Return the activations on which all are compared."""
    return 2 * torch.randn(200, width, generator=torch.Generator().manual_seed(0))


def report(what: str, ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Print one comparison, relative to the largest value above 1."""
    scale = max(1.0, ours.abs().max().item())
    difference = (ours - theirs).abs().max().item() / scale
    # An SAE of which no latent fires agrees with every other.
    verdict = "ok" if difference <= LIMIT else "DIFFERENT"
    verdict = verdict if theirs.std(0).max() > 0 else "NOTHING FIRES"
    print(f"{what:64} {difference:.2e}  {verdict}")
    return verdict == "ok"


def finish(results: list[bool]) -> None:
    """Exit with 1 if anything differed."""
    print(f"{sum(results)} of {len(results)} agree")
    if not all(results):
        raise typer.Exit(1)


@app.command()
def write(folder: Path) -> None:
    """Write SAEs in every format and our reconstructions."""
    from resa_lens.models.hookpoints import Hookpoint
    from resa_lens.saes.coder import new_coder, reconstruct
    from resa_lens.saes.formats import save_coder

    for width, latents, k in SHAPES:
        for activation in ("topk", "batchtopk"):
            coder = new_coder(width, latents, k, seed=1, activation=activation)
            generator = torch.Generator().manual_seed(2)
            with torch.no_grad():
                coder.encoder.bias.normal_(0, 0.1, generator=generator)
                coder.b_dec.normal_(0, 0.5, generator=generator)
            coder.threshold = 1.1
            coder.requires_grad_(False)
            name = f"{activation}-{width}x{latents}"
            for form in ("saelens", "dictionary_learning"):
                save_coder(coder, folder / form / name, form, Hookpoint(3, "resid_post"))
            torch.save(reconstruct(coder, rows(width)), folder / f"{name}.pt")
    print(f"written to {folder}")


@torch.no_grad()
def unsettle(sae: Any, latents: int) -> None:
    """Give an SAE of SAELens biases, and decoder rows of unequal norm."""
    sae.b_enc.normal_(0, 0.1)
    sae.b_dec.normal_(0, 0.5)
    sae.W_dec.mul_(1 + torch.rand(latents, 1))


@app.command()
def peer(folder: Path) -> None:
    """Read ours by the real libraries, compare, and write SAEs by them."""
    sae_lens: Any = import_module("sae_lens")
    top: Any = import_module("dictionary_learning.trainers.top_k")
    batch: Any = import_module("dictionary_learning.trainers.batch_top_k")
    utils: Any = import_module("dictionary_learning.utils")
    packages = ("sae-lens", "dictionary-learning", "torch")
    print(f"{date.today()}:", ", ".join(f"{p} {metadata.version(p)}" for p in packages))
    results = []
    for width, latents, k in SHAPES:
        for activation in ("topk", "batchtopk"):
            name = f"{activation}-{width}x{latents}"
            ours = torch.load(folder / f"{name}.pt", weights_only=True)
            with torch.no_grad():
                sae = sae_lens.SAE.load_from_disk(folder / "saelens" / name)
                results.append(report(f"SAELens reads ours, {name}", ours, sae(rows(width))))
                # What it keeps of the metadata: a config it takes for an old one loses all of it.
                kept = (sae.cfg.metadata.hook_name, sae.cfg.metadata.k)
                results.append(kept == ("blocks.3.hook_resid_post", k))
                print(f"{f'SAELens keeps hook_name and k, {name}':64} {kept}")
                held, _ = utils.load_dictionary(str(folder / "dictionary_learning" / name), "cpu")
                label = f"dictionary_learning reads ours, {name}"
                results.append(report(label, ours, held(rows(width))))
        # The other way: made and saved by them.
        torch.manual_seed(3)
        shape = {"d_in": width, "d_sae": latents, "k": k}
        for label, options in (
            ("plain", {}),
            ("rescaled", {"rescale_acts_by_decoder_norm": True}),
            ("b_dec-not-applied", {"apply_b_dec_to_input": False}),
        ):
            sae = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(**shape, **options))
            unsettle(sae, latents)
            place = folder / "back" / f"saelens-topk-{label}-{width}"
            sae.save_model(place)
            with torch.no_grad():
                torch.save(sae(rows(width)), place / "out.pt")
        # Its BatchTopK is trained as such and saved as a JumpReLU.
        made = sae_lens.BatchTopKTrainingSAE(sae_lens.BatchTopKTrainingSAEConfig(**shape))
        unsettle(made, latents)
        place = folder / "back" / f"saelens-batchtopk-{width}"
        with torch.no_grad():
            # First without a threshold, to find the one that leaves k active latents a row; half
            # way between two values, for at one of them rounding decides.
            made.save_inference_model(place)
            acts = sae_lens.SAE.load_from_disk(place).encode(rows(width))
            last, following = acts.flatten().topk(k * len(acts) + 1).values[-2:].tolist()
            made.topk_threshold.fill_((last + following) / 2)
            made.save_inference_model(place)
            torch.save(sae_lens.SAE.load_from_disk(place)(rows(width)), place / "out.pt")
        for kind, made in (
            ("AutoEncoderTopK", top.AutoEncoderTopK(width, latents, k)),
            ("BatchTopKSAE", batch.BatchTopKSAE(width, latents, k)),
        ):
            place = folder / "back" / f"{kind}-{width}"
            place.mkdir(parents=True, exist_ok=True)
            with torch.no_grad():
                made.encoder.bias.normal_(0, 0.1)
                made.b_dec.normal_(0, 0.5)
                made.threshold.fill_(1.2)
                torch.save(made(rows(width)), place / "out.pt")
            torch.save(made.state_dict(), place / "ae.pt")
            text = f'{{"trainer": {{"dict_class": "{kind}", "k": {k}}}}}'
            (place / "config.json").write_text(text)
    finish(results)


@app.command()
def read(folder: Path) -> None:
    """Read what the real libraries wrote, and compare."""
    from resa_lens.saes.coder import reconstruct
    from resa_lens.saes.formats import load_coder

    results = []
    for place in sorted((folder / "back").iterdir()):
        coder = load_coder(place, allow_pickle=True)
        theirs = torch.load(place / "out.pt", weights_only=True)
        results.append(
            report(f"ours reads {place.name}", reconstruct(coder, rows(coder.d_in)), theirs)
        )
    finish(results)


if __name__ == "__main__":
    app()
