"""SAEs that the user points to: any readable format, hub ids, and no more than is asked for."""

from __future__ import annotations

import gc
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from resa_lens.artifacts.kinds.saes import Saes
from resa_lens.artifacts.stage import Context, Draft
from resa_lens.artifacts.workspace import Workspace
from resa_lens.errors import BadInputError
from resa_lens.features.config import CountConfig
from resa_lens.models.hookpoints import Hookpoint
from resa_lens.progress import SILENT
from resa_lens.saes.coder import new_coder
from resa_lens.saes.formats import save_coder
from resa_lens.saes.train import SaeConfig
from resa_lens.stages import falsification
from resa_lens.stages import saes as module
from resa_lens.stages.counts import count_run
from resa_lens.stages.recommendation import sae_quality
from resa_lens.stages.sae_training import train_run
from resa_lens.stages.saes import SaeRun, find_saes, open_saes
from resa_lens.texts import corpora
from resa_lens.texts.corpora import CorpusConfig

LAYERS = (3, 5)


def coder(layer: int):
    return new_coder(128, 256, 8, seed=layer).requires_grad_(False)


def opened(place: Path | str, tiny: Any, tmp_path: Path, **options: Any) -> SaeRun:
    """Untrained SAEs fit nowhere, hence `allow_mismatch`."""
    ctx = Context(Workspace(str(tmp_path / "workspace")), SILENT, 0, "cpu", "auto", False, None)
    return open_saes(ctx, tiny, Path(place), "mlp_out", allow_mismatch=True, **options)


def folder(place: Path, form: str) -> Path:
    for layer in LAYERS:
        # Only sparsify's rule names a folder by its hookpoint.
        name = f"layers.{layer}.mlp" if form == "sparsify" else f"sae-{layer}"
        save_coder(coder(layer), place / name, form, Hookpoint(layer))
    return place


@pytest.mark.parametrize("form", ["sparsify", "saelens"])
def test_folders_of_two_projects_open_alike(form: str, tiny, tmp_path: Path) -> None:
    run = opened(folder(tmp_path / "s", form), tiny, tmp_path)
    assert run.points == (Hookpoint(3), Hookpoint(5))
    assert set(run.quality) == {3, 5}
    held = run.coders(tiny, [5], decoder=False)[Hookpoint(5)]
    assert held.W_dec is None
    assert torch.equal(held.encoder.weight, coder(5).encoder.weight)


def test_a_pickle_is_refused_with_the_way_to_convert_it(tiny, tmp_path: Path) -> None:
    """No command but convert has the option to read one."""
    place = folder(tmp_path / "s", "dictionary_learning")
    with pytest.raises(BadInputError, match=r"(?s)pickle.*resa-lens convert .* --allow-pickle"):
        opened(place, tiny, tmp_path)


def test_two_saes_of_one_layer_are_refused(tiny, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_coder(coder(3), tmp_path / "s" / name, "saelens", Hookpoint(3))
    with pytest.raises(BadInputError, match=r"both SAEs of layers\.3\.mlp"):
        opened(tmp_path / "s", tiny, tmp_path)


def test_of_a_hub_id_only_the_layers_asked_for_are_read(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    snapshot = folder(cache / "models--owner--saes" / "snapshots" / "abc", "sparsify")
    (cache / "models--owner--saes" / "refs").mkdir()
    (cache / "models--owner--saes" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(cache))
    (snapshot / "layers.3.mlp" / "sae.safetensors").write_bytes(b"never opened")
    run = opened("owner/saes", tiny, tmp_path, only=[5])
    assert run.folder == snapshot
    assert set(run.coders(tiny, [5])) == {Hookpoint(5)}
    with pytest.raises(BadInputError, match="corrupt"):
        opened("owner/saes", tiny, tmp_path)
    with pytest.raises(BadInputError, match=r"hf download owner/saes --include 'layers\.7\.mlp"):
        opened("owner/saes", tiny, tmp_path, only=[7])


def test_large_saes_are_checked_a_few_at_a_time(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = folder(tmp_path / "s", "sparsify")
    whole = opened(place, tiny, tmp_path)
    groups: list[int] = []
    check = module.check_fit

    def spy(model: Any, coders: Any, *args: Any, **options: Any) -> Any:
        groups.append(len(coders))
        return check(model, coders, *args, **options)

    monkeypatch.setattr(module, "check_fit", spy)
    opened(place, tiny, tmp_path)
    monkeypatch.setattr(module, "FIT_BYTES", 1)
    parts = opened(place, tiny, tmp_path)
    assert groups == [2, 1, 1]
    assert parts.quality == whole.quality
    assert parts.warnings == whole.warnings


def test_saes_on_the_asked_data_come_before_newer_ones(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run on a file of one's own is newer, and the default is the bundled questions."""
    place = Workspace(str(tmp_path / "workspace"))
    ctx = Context(place, SILENT, 0, "cpu", "auto", False, None)
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("mine.jsonl", "other.jsonl")):
        Path(name).write_text(f'{{"question": "What is {number} + 1?", "answer": "{number + 1}"}}')

    def train(source: str, share: float = 0.0) -> str:
        corpus = CorpusConfig(source, thought_share=share)
        data = corpora.hash_records(corpora.read_records(corpus))
        stage = ctx.stage(
            Saes, tiny, name="run", data={"data": data},
            config={"sae": SaeConfig(latents=64), "corpus": corpus, "layers": [3]},
        )  # fmt: skip

        def work(draft: Draft) -> None:
            row = {"layer": 3, "fvu": 0.1, "l0": 32.0, "dead_share": 0.0}
            draft.results = {
                "site": "mlp_out", "layers": [row], "tokens": 1, "model": tiny.name, "n_layers": 12,
            }  # fmt: skip

        return stage.obtain(work).path.name

    def reused(source: str, share: float | None = None) -> str | None:
        corpus = CorpusConfig(source, thought_share=share)
        run = find_saes(ctx, tiny, SaeConfig(), corpus, [3])
        return run and run.folder.name

    tiny_run, mine = train("tiny"), train("mine.jsonl")
    assert reused("tiny") == tiny_run
    assert reused("mine.jsonl") == mine
    assert reused("other.jsonl") is None
    # By what stands in a file, not by its name.
    shutil.copy("mine.jsonl", "copy.jsonl")
    assert reused("copy.jsonl") == mine
    shutil.copy("other.jsonl", "mine.jsonl")
    assert reused("mine.jsonl") is None
    # A share of thoughts that is asked for is that of the SAEs; of None any is.
    assert reused("tiny", 0.0) == tiny_run
    assert reused("tiny", 0.5) is None
    half = train("tiny", 0.5)
    assert half != tiny_run
    assert reused("tiny", 0.5) == half
    assert reused("tiny", 0.0) == tiny_run


def test_layers_are_loaded_one_after_the_other(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counting, trials of features, the selectors' quality, mode pretrained."""
    layers = range(2, 5)
    for layer in layers:
        save_coder(coder(layer), tmp_path / "s" / f"layers.{layer}.mlp", "sparsify")
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    peaks: list[int] = []
    real = module.load_coder

    def load(*args: Any, **options: Any) -> Any:
        alive.add(loaded := real(*args, **options))
        peaks.append(sum(t.nbytes for part in alive for t in part.state_dict().values()))
        return loaded

    monkeypatch.setattr(module, "load_coder", load)
    monkeypatch.setattr(module, "FIT_BYTES", 1)
    # Untrained SAEs fit nowhere.
    monkeypatch.setattr(module, "check_fit", lambda *_, **__: ({}, []))
    ctx = Context(Workspace(tmp_path / "w"))
    run = opened(tmp_path / "s", tiny, tmp_path)
    one = sum(t.nbytes for t in coder(2).state_dict().values())
    counts = count_run(ctx, tiny, run, CountConfig(), None)
    for work in (
        lambda: count_run(replace(ctx, force=True), tiny, run, CountConfig(), None),
        lambda: count_run(ctx, tiny, run, CountConfig(), None, control="random"),
        lambda: falsification._try(ctx, tiny, run, counts.counts, [], "features", anew=True),
        lambda: sae_quality(tiny, run, CorpusConfig(), layers).measure(),
        lambda: train_run(
            ctx, tiny, list(layers), SaeConfig(mode="pretrained"), CorpusConfig(),
            source=str(tmp_path / "s"),
        ),
    ):  # fmt: skip
        gc.collect()
        peaks.clear()
        work()
        assert len(peaks) >= len(layers)
        # One, and the next one while it is loaded: bytes of the SAEs that are alive.
        assert max(peaks) <= 2 * one
