#!/usr/bin/env bash
# Makes the workspace that ships with the project, which the feature explorer opens where no other
# one is at hand: about ten minutes on two cores.  The folder's sweeps come from the commands of
# docs/findings.md and take hours; they are left as they are.
#
#     bash data/make_workspace.sh [FOLDER]      data/workspace by default
set -euo pipefail
cd "$(dirname "$0")/.."
target=${1:-data/workspace}
resa=${RESA_LENS:-.venv/bin/resa-lens}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export RESA_LENS_WORKSPACE=$work HF_HUB_OFFLINE=1
model=(--model tiny-reasoner)
saes=(--latents 1024 --tokens 200000)

"$resa" recommend-layers "${model[@]}" "${saes[@]}"
"$resa" falsify "${model[@]}" "${saes[@]}"
"$resa" activity "${model[@]}" "${saes[@]}" --text-tokens 60000 --examples 6
"$resa" score-features "${model[@]}" "${saes[@]}"
"$resa" ablate "${model[@]}" "${saes[@]}" --layer auto --rule either --limit 500
"$resa" attribute "${model[@]}" "${saes[@]}" --layer auto --rule either --features counted
"$resa" tune "${model[@]}" "${saes[@]}" --layer auto --learning-rate 1e-4 --limit 500
"$resa" tune "${model[@]}" "${saes[@]}" --layer auto --learning-rate 1e-4 --limit 500 --control noise
"$resa" eval --model tiny-reasoner-rl --limit 500

# Shipped are the model's own SAEs; those of falsification's controls are left out for their size.
keep=$(find "$work"/recommendations -name manifest.json -exec \
  .venv/bin/python -c 'import json, sys; print(*json.load(open(sys.argv[1]))["parents"])' {} \; |
  tr ' ' '\n' | grep '^saes/' || true)
echo "kept: $keep"
mkdir -p "$target"
for kind in "$work"/*/; do
  rm -rf "${target:?}/$(basename "$kind")"
  cp -r "$kind" "$target/"
done
du -sh "$target"
