#!/usr/bin/env bash
# Makes the workspace that ships with the project, which the feature explorer opens where no other
# one is at hand: about seven minutes on two cores.  Its sweeps come from the commands of
# docs/findings.md, take hours and are left as they are.
#
#     bash data/make_workspace.sh [TARGET [WORK]]      data/workspace, made in a temporary folder
#
# WORK is where the commands run; killed, the same line with a WORK goes on there.
set -euo pipefail
cd "$(dirname "$0")/.."
target=${1:-data/workspace}
work=${2:-}
if [ -z "$work" ]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
fi
python=.venv/bin/python
export RESA_LENS_WORKSPACE=$work HF_HUB_OFFLINE=1

resa() { "$python" -m resa_lens "$@"; }
saes=(--model tiny-reasoner --latents 1024 --tokens 200000)
tuning=(--layer auto --learning-rate 1e-4 --rank 16 --limit 500)

resa recommend-layers "${saes[@]}"
resa falsify "${saes[@]}"
resa activity "${saes[@]}" --text-tokens 60000 --examples 2
resa score-features "${saes[@]}"
resa ablate "${saes[@]}" --layer auto --rule either --limit 500
resa attribute "${saes[@]}" --layer auto --rule either --features counted
resa tune "${saes[@]}" "${tuning[@]}"
resa tune "${saes[@]}" "${tuning[@]}" --control noise
resa eval --model tiny-reasoner-rl --limit 500

"$python" - "$work" "$target" <<'PYTHON'
"""Copies what is small enough, with paths that hold on any machine."""
import json
import shutil
import sys
from pathlib import Path

from resa_lens.artifacts.manifest import MANIFEST
from resa_lens.hashes import digest, file_hash

work, target = (Path(argument).resolve() for argument in sys.argv[1:])
data = Path("data").resolve()
made = [json.loads(f.read_text()) for f in work.glob("recommendations/*/*/manifest.json")]
used = {parent for manifest in made for parent in manifest["parents"]}
used |= {json.loads((work / p / "manifest.json").read_text())["config"].get("saes") for p in used}
for kind in sorted(path for path in work.iterdir() if path.is_dir()):
    shutil.rmtree(target / kind.name, ignore_errors=True)
    for file in sorted(f for f in kind.rglob("*") if f.is_file()):
        place = file.relative_to(work)
        # The SAEs of falsification's controls, and pages that carry Plotly, are too large.
        if place.parts[0] == "saes" and not any(place.is_relative_to(u) for u in used if u):
            continue
        if file.suffix == ".html" or any(part.startswith(".") for part in place.parts):
            continue
        copy = target / place
        copy.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix in (".json", ".md"):
            text = file.read_text().replace(f"{work}/", "").replace(f"{data}/", "")
            copy.write_text(text)
        else:
            shutil.copyfile(file, copy)
# A manifest says what its files are: now those with other paths, and without the pages.
for manifest in sorted(target.rglob(MANIFEST)):
    folder, value = manifest.parent, json.loads(manifest.read_text())
    if folder.relative_to(target).parts[0] == "sweeps" or not value.pop("checksum", None):
        continue
    value["files"] = {
        name: file_hash(folder / name, cached=False)
        for name in value["files"]
        if (folder / name).is_file()
    }
    manifest.write_text(json.dumps({**value, "checksum": digest(value)}, indent=1) + "\n")
PYTHON
du -sh "$target"
