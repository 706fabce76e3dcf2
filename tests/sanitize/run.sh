#!/usr/bin/env bash
# The CPU engine under the address, undefined-behaviour and thread sanitizers. No torch, no Python.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=build/sanitize
mkdir -p "$out"
CXX=${CXX:-g++}
cases=${1:-100}
common="-std=c++20 -O1 -g -w"
here=$(uname -m | sed 's/x86_64/x86/; s/arm64/aarch64/')
declare -A levels=()
while read -r where level flags; do
  if [[ $where == any || $where == "$here" ]]; then levels[$level]=$flags; fi
done < <(grep -v '^#' csrc/cpu/levels.txt)
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
