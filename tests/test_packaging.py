"""The sdist and the wheel: built from the tracked files, used outside the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from resa_lens.errors import BadInputError
from resa_lens.resources import app_script, data_path

ROOT = Path(__file__).resolve().parents[1]


def test_bundled_data_resolves_in_the_checkout():
    assert data_path("tiny/test.jsonl").is_file()
    assert data_path("tiny-reasoner").is_dir()
    assert app_script().is_file()
    with pytest.raises(BadInputError, match=r"nothing\.csv"):
        data_path("nothing.csv")


def run(*command: str, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, and the wheel built from it, of a copy of the tracked files."""
    source = tmp_path_factory.mktemp("source")
    listed = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    for name in filter(None, listed):
        if not (ROOT / name).is_file():  # removed, not yet committed
            continue
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
    shutil.copytree(ROOT / "data", source / "data", dirs_exist_ok=True)
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source), cwd=out)
    return out


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (wheel,) = dist.glob("*.whl")
    target = tmp_path_factory.mktemp("installed")
    run(
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
        "--disable-pip-version-check", "--target", str(target), str(wheel), cwd=dist,
    )  # fmt: skip
    return target


def python(installed: Path, cwd: Path, code: str, *args: str) -> str:
    """Run code that imports the installed package, outside the checkout."""
    env = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    return run(sys.executable, "-c", code, *args, cwd=cwd, env=env)


def test_the_shipped_workspace_is_small():
    files = [file for file in data_path("workspace").rglob("*") if file.is_file()]
    assert 0 < sum(file.stat().st_size for file in files) < 20 * 10**6


@pytest.mark.slow
def test_the_wheel_is_small_and_holds_the_data_and_the_app(dist):
    (wheel,) = dist.glob("*.whl")
    assert wheel.stat().st_size < 45 * 10**6
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for name in (
        "resa_lens/_data/tiny-reasoner/model.safetensors",
        "resa_lens/_data/tiny-reasoner/tokenizer.json",
        "resa_lens/_data/tiny-reasoner-rl/model.safetensors",
        "resa_lens/_data/tiny-moe-reasoner/model.safetensors",
        "resa_lens/_data/tiny-reasoner-rl/checkpoints/step-109/adapter_model.safetensors",
        "resa_lens/_data/prices.csv",
        "resa_lens/_data/tiny/test.jsonl",
        "resa_lens/_data/paper/table6_hookpoints.csv",
        "resa_lens/_data/paper/tables36_61_layer_checkpoints.csv",
        "resa_lens/_data/feature_explorer.py",
    ):
        assert name in names
    for path in (ROOT / "resa_lens").rglob("*.py"):
        assert str(path.relative_to(ROOT)) in names or not is_tracked(path)
    foreign = {name for name in names if not name.startswith(("resa_lens/", "resa_lens-"))}
    assert not foreign
    assert not any("__pycache__" in name or name.startswith("tests") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def is_tracked(path: Path) -> bool:
    return bool(run("git", "ls-files", str(path), cwd=ROOT).strip())


@pytest.mark.slow
def test_the_sdist_holds_sources_tests_and_data(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    for name in (
        "pyproject.toml", "LICENSE", "README.md", "tests/conftest.py", "resa_lens/cli/__init__.py",
        "data/tiny-reasoner/model.safetensors", "apps/feature_explorer.py",
    ):  # fmt: skip
        assert name in names


@pytest.mark.slow
def test_data_and_app_resolve_into_the_installed_package(installed, tmp_path):
    code = (
        "import resa_lens; from resa_lens.resources import app_script, data_path;"
        "print(resa_lens.__file__, data_path('paper/table6_hookpoints.csv'),"
        " data_path('tiny-reasoner'), app_script(), sep='\\n')"
    )
    # A folder of the same name beside the package is not taken for its data.
    (installed / "data" / "tiny-reasoner").mkdir(parents=True)
    paths = python(installed, tmp_path, code).split()
    assert len(paths) == 4
    for path in paths:
        assert Path(path).is_relative_to(installed / "resa_lens")
        assert Path(path).exists()


@pytest.mark.slow
def test_the_installed_package_fits_the_mixture_of_its_own_table(installed, tmp_path):
    import json

    code = (
        "import sys; from resa_lens.resources import data_path; from resa_lens.cli import main;"
        "sys.argv = ['resa-lens', 'fit-mixture', str(data_path('paper/table6_hookpoints.csv')),"
        " '--column', 'feature_count', '--recipe', 'paper', '--json']; main()"
    )
    result = json.loads(python(installed, tmp_path, code))
    # Spec section 5: the paper's figures for the counts.
    found = [(round(c["mean"], 2), round(c["weight"], 3)) for c in result["components"]]
    assert found == [(14.48, 0.407), (4.86, 0.371), (22.70, 0.222)]
    assert round(result["entropy"], 4) == 3.1938
    assert result["recommended"] == [14, 5, 23]


@pytest.mark.slow
def test_the_installed_package_runs_its_bundled_model(installed, tmp_path):
    code = (
        "import torch; from resa_lens.models.host import load_model;"
        "model = load_model('tiny-reasoner');"
        "ids = torch.tensor([model.tokenizer('Problem: What is 1+2? <think>')['input_ids']]);"
        "print(model.folder, bool(torch.isfinite(model.bridge(ids)).all()))"
    )
    folder, finite = python(installed, tmp_path, code).split()
    assert Path(folder).is_relative_to(installed)
    assert finite == "True"


@pytest.mark.slow
def test_the_console_script_is_installed(installed, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(installed)}
    help_text = run(str(installed / "bin" / "resa-lens"), "--help", cwd=tmp_path, env=env)
    assert "fit-mixture" in help_text


# Requirements with hashes


def pins(name: str) -> dict[str, str]:
    """{package: version} of constraints.txt or requirements.txt."""
    lines = (line.split() for line in (ROOT / name).read_text().splitlines())
    pairs = [words[0].split("==") for words in lines if words and "==" in words[0]]
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in pairs}


def test_requirements_are_the_constraints_with_hashes():
    """Every package that resa-lens[dev] takes is pinned in both, and names no place."""
    assert pins("requirements.txt") == pins("constraints.txt")
    text = (ROOT / "requirements.txt").read_text()
    assert len(re.findall(r"--hash=sha256:[0-9a-f]{64}$", text, re.MULTILINE)) == len(
        pins("requirements.txt")
    )
    for name in ("requirements.txt", "constraints.txt"):
        assert not re.search(r"://|--(extra-)?index|find-links", (ROOT / name).read_text())


def test_every_package_that_is_needed_is_pinned():
    """From resa-lens[dev] down, by what the installed packages say that they need."""
    tested, seen = pins("constraints.txt"), set()
    waiting = [("resa-lens", extra) for extra in ("", "dev", "app", "notebooks")]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            needed = [Requirement(text) for text in metadata.requires(name) or []]
        except metadata.PackageNotFoundError:
            continue
        for one in needed:
            if one.marker is None or one.marker.evaluate({"extra": extra}):
                child = re.sub(r"[-_.]+", "-", one.name).lower()
                waiting += [(child, e) for e in ("", *one.extras)]
    names = {name for name, _ in seen} - {"resa-lens"}
    assert len(names) > 100
    assert not names - set(tested)


def test_requirements_are_written_from_pips_report():
    import importlib.util

    spec = importlib.util.spec_from_file_location("r", ROOT / "benchmarks" / "requirements.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def item(name, version, **info):
        return {"metadata": {"name": name, "version": version}, "download_info": info}

    hashed = {"url": "https://host/file", "archive_info": {"hashes": {"sha256": "a" * 64}}}
    packages = (
        item("resa-lens", "0.1.0", url="file:///x", dir_info={}),
        item("Torch_x", "2+cpu", **hashed), item("b", "1", **hashed),
    )  # fmt: skip
    text = script.requirements({"install": packages})
    assert text.endswith(
        f"b==1 \\\n    --hash=sha256:{'a' * 64}\ntorch-x==2 \\\n    --hash=sha256:{'a' * 64}\n"
    )
    assert "host" not in text
    assert "resa-lens==" not in text
    with pytest.raises(ValueError, match="c 1 has no SHA-256"):
        script.requirements({"install": [item("c", "1", url="https://host/file")]})
    with pytest.raises(ValueError, match="torch"):
        script.requirements({"install": [item("torch", "1", url="u", archive_info={})]})


def test_licences_are_listed_by_a_command():
    listed = run(sys.executable, "benchmarks/requirements.py", "--licences", cwd=ROOT).splitlines()
    rows = {line.split()[0].lower(): line.split(maxsplit=2)[2] for line in listed}
    assert rows["torch"].startswith("BSD") or "BSD" in rows["torch"]
    assert "Apache" in rows["transformers"]
    installed = {d.metadata["Name"].lower() for d in metadata.distributions()}
    assert set(rows) == installed
    assert sum(licence == "not stated" for licence in rows.values()) <= 3
