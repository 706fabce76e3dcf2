#!/usr/bin/env bash
# The CPU engine under the address, undefined-behaviour and thread sanitizers. No torch, no Python.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=build/sanitize
mkdir -p "$out"
CXX=${CXX:-g++}
cases=${1:-100}
common="-std=c++20 -O1 -g -w"
avx512="-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512"
declare -A levels=(
  [baseline]=""
  [baseline_bf16]="-DRNNKERN_BF16 -DRNNKERN_AMX"
  [avx2]="-mavx2 -mfma"
  [avx512]="$avx512"
  [avx512_bf16]="$avx512 -mavx512bf16 -DRNNKERN_BF16"
  [avx512_amx]="$avx512 -mavx512bf16 -mamx-tile -mamx-bf16 -DRNNKERN_BF16 -DRNNKERN_AMX"
)
for sanitizer in address,undefined thread; do
  flags="$common -fsanitize=$sanitizer -fno-sanitize-recover=all"
  objects=() jobs=()
  for level in "${!levels[@]}"; do
    # shellcheck disable=SC2086
    $CXX $flags ${levels[$level]} -DRNNKERN_ISA="$level" -c csrc/cpu/engine.cpp -o "$out/$level.o" &
    jobs+=($!) objects+=("$out/$level.o")
  done
  for job in "${jobs[@]}"; do wait "$job"; done
  # shellcheck disable=SC2086
  $CXX $flags csrc/cpu/runtime/*.cpp tests/sanitize/engine.cpp "${objects[@]}" \
    -o "$out/engine" -pthread
  echo "== $sanitizer"
  "$out/engine" "$cases"
done
