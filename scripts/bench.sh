#!/usr/bin/env bash
# Measures what results/bench holds: selection, prefill and where its time goes, grids of methods in one generate, shared prefixes.
# With a GPU: the geometries of real models in float16 (random weights, nothing is downloaded) and selection on both devices. Without:
# small geometries in float32 on one CPU thread, and the profile of a 7B model in bfloat16 on all cores (16 GB of memory, else left out).
# Installs what it needs into .venv; with BENCH_PYTHON=/path/to/python that interpreter is used as it is. What lmms-eval is needed for is
# left out where it is not installed. Takes three quarters of an hour on a CPU.
# Usage: bash scripts/bench.sh [FOLDER [PART ...]]
#        FOLDER: for the JSON files, default output/bench      PART: selection, prefill, profile, grid, answering, shared; default all
#        answering, on a GPU, writes a checkpoint of 14 GB with random weights into output/ once
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder="${1:-output/bench}"
parts=" ${*:2} "
if [ "$parts" = "  " ]; then parts=" selection prefill profile grid answering shared "; fi
for part in $parts; do
  case "$part" in
    selection|prefill|profile|grid|answering|shared) ;;
    *) echo "Got the part $part, expected selection, prefill, profile, grid, answering or shared." >&2; exit 2 ;;
  esac
done
python="${BENCH_PYTHON:-}"
if [ -z "$python" ]; then
  source scripts/_venv.bash
  ensure_venv
  python=.venv/bin/python
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
has() { "$python" -c "$1" 2>/dev/null; }
measure() {  # NAME, then the arguments of `bench`, whose first is the part
  if [[ "$parts" != *" $2 "* ]]; then return; fi
  echo "== $1" >&2
  "$python" -m vlm_pruner_eval bench "${@:2}" --out "$folder/$1.json"
}

mkdir -p "$folder"
if has 'import torch; assert torch.cuda.is_available()'; then
  device=gpu geometries=(llava-1.5-7b llava-1.5-13b llava-next-7b qwen2-vl-7b) repeats=5
else
  device=cpu geometries=(mini 100m) repeats=1
fi
measure "selection_$device" selection --repeats 4
for geometry in "${geometries[@]}"; do
  measure "prefill_${geometry}_$device" prefill --geometry "$geometry" --repeats "$([ "$geometry" = mini ] && echo 4 || echo "$repeats")" --new-tokens 16
  measure "profile_${geometry}_$device" profile --geometry "$geometry" --repeats "$repeats" --new-tokens 8
done
measure "grid_${geometries[0]}_$device" grid --geometry "${geometries[0]}"
if [ "$device" = cpu ] && has 'import psutil; assert psutil.virtual_memory().available > 16e9'; then
  measure profile_llava-1.5-7b_cpu profile --geometry llava-1.5-7b --dtype bfloat16 --threads "$(nproc)" --repeats 1 --new-tokens 4
fi
if has 'import lmms_eval'; then
  measure "answering_${geometries[0]}_$device" answering --geometry "${geometries[0]}" --limit 96
  measure "shared_prefix_$device" shared --limit 20 --rounds 3
fi
echo "The measurements are in $folder." >&2
