#!/usr/bin/env bash
# All that a GPU has to show, in one run of less than 40 minutes on an H100 (80 GB):
#
#     benchmarks/gpu.sh [TABLE]         writes TABLE (gpu-table.md), an entry for docs/log.md
#     TINY=1 benchmarks/gpu.sh TABLE    the same parts on a CPU at a shape where no time means much
#
# A part that fails is named at the end and does not stop the others; then the exit code is 1.
set -uo pipefail
cd "$(dirname "$0")/.."
table=$(realpath -m "${1:-gpu-table.md}")
python=${PYTHON:-python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=()

if [ -n "${TINY:-}" ]; then
  device=cpu dtype=float32
  train=(--width 64 --n-layers 3 --latents 256 --k 8 --sequence 32 --batch 2 --steps 2 --rounds 1 --vocab 128)
  select=(--width 32 --latents 512 --k 4 --tokens 64 --rounds 1)
  kl=(--width 32 --vocabulary 500 --tokens 64 --rounds 1)
  tune=(--width 64 --n-layers 4 --vocab 500 --tokens 128 --rounds 1 --latents 256)
  activity=(--width 64 --n-layers 2 --latents 256 --k 8 --batches 2 --rounds 1 --vocab 128)
  kill=(--runs 1 --tokens 15360 --layers 3 --latents 256)
  shape=(--layers 4 --width 64 --vocabulary 4000 --latents 256)
  only="doctor"
else
  device=cuda dtype=bfloat16
  # 26 SAEs of 65,536 latents with their optimizer are 40 GB; sparsify's are more.
  train=(--width 1536 --n-layers 26 --latents 65536 --sequence 2048 --batch 16 --steps 30 --rounds 1 --vocab 151936)
  select=() kl=()
  tune=(--full)
  activity=(--width 1536 --n-layers 8 --latents 65536 --vocab 151936)
  kill=(--runs 2 --tokens 1000000)
  shape=()
  only="."
fi

# part NAME MINUTES COMMAND...
part() {
  local name=$1 minutes=$2 began=$SECONDS
  shift 2
  echo "== $name" >&2
  { echo; echo "### $name"; echo; echo "    $*"; echo; } >>"$table"
  if timeout "$((60 * minutes))" "$@" >"$work/out" 2>"$work/err"; then
    echo "ended after $((SECONDS - began)) s" >>"$work/out"
  else
    echo "FAILED after $((SECONDS - began)) s: $(tail -n 1 "$work/err")" >>"$work/out"
    failed+=("$name")
  fi
  # Tables as they are, other lines as a table's text.
  sed 's/^\([^|]\)/    \1/' "$work/out" >>"$table"
}

echo "## $(date +%F), $(uname -m), $device" >"$table"
[ "$device" = cuda ] && nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader >>"$table"

part "SAEs of all layers, and sparsify's" 12 "$python" benchmarks/sae_speed.py end-to-end "${train[@]}" --device "$device" --dtype "$dtype"
part "Selections" 2 "$python" benchmarks/gpu_parts.py selection "${select[@]}" --device "$device"
part "The chunked KL beside Liger's figures" 2 "$python" benchmarks/gpu_parts.py kl "${kl[@]}" --device "$device"
part "A tuning update and the authors' loop" 5 "$python" benchmarks/tuning_speed.py "${tune[@]}" --device "$device" --dtype "$dtype"
part "Activity" 4 "$python" benchmarks/activity_speed.py "${activity[@]}" --device "$device" --dtype "$dtype"
part "Killed and resumed" 5 "$python" benchmarks/kill_resume.py "${kill[@]}" --device "$device"
part "The guide's commands, answers with hf among them" 8 "$python" benchmarks/full_shape.py "${shape[@]}" --device "$device" --only "$only"
if "$python" -c "import vllm" 2>/dev/null; then
  part "Answers with vLLM" 4 "$python" -m resa_lens eval --model tiny-reasoner --engine vllm --limit 500 --device "$device" --workspace "$work/vllm"
else
  { echo; echo "### Answers with vLLM"; echo; echo "    vLLM is not installed"; } >>"$table"
fi

if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}" | tee -a "$table" >&2
  exit 1
fi
