#!/usr/bin/env bash
# The CPU engine on AArch64: cross-built, run under qemu, and its numbers beside those of the
# library that is built here. No torch.
set -euo pipefail
cd "$(dirname "$0")/../.."
cases=${1:-30}
python=${PYTHON:-.venv/bin/python}
cross=${CROSS_CXX:-aarch64-linux-gnu-g++}
qemu=${QEMU:-$(command -v qemu-aarch64-static || command -v qemu-aarch64 || true)}
if [[ -z $qemu ]] || ! command -v "$cross" > /dev/null; then
  echo "test-aarch64 needs a cross-compiler and qemu:" \
    "apt install g++-aarch64-linux-gnu qemu-user-static" >&2
  exit 1
fi
out=build/aarch64
mkdir -p "$out"/{here,there}
flags="-std=c++20 -Wall -Wextra -Werror -fPIC -fvisibility=hidden"

objects=()
while read -r where level options; do
  if [[ $where != any && $where != aarch64 ]]; then continue; fi
  object=$out/$level.o
  objects+=("$object")
  if [[ -f $object && -z $(find csrc -newer "$object" -type f) ]]; then continue; fi
  # Those of any CPU with -O1, at which GCC fuses no multiply-add: their bits are then x86's.
  if [[ $where == any ]]; then options+=" -O1"; else options+=" -O3"; fi
  # shellcheck disable=SC2086
  "$cross" $flags $options -DRNNKERN_ISA="$level" -c csrc/cpu/engine.cpp -o "$object"
done < <(grep -v '^#' csrc/cpu/levels.txt)

link() {  # PROGRAM, then sources and objects
  # shellcheck disable=SC2086
  "$cross" $flags -O1 -static -pthread -DRNNKERN_NEON -DRNNKERN_ISA=neon "${@:2}" -o "$out/$1"
}
link plan tests/kernels/plan.cpp csrc/cpu/runtime/{plan,tuning,cpu_quota}.cpp
link int8 tests/aarch64/int8.cpp csrc/cpu/runtime/{tuning,cpu_quota}.cpp
link engine tests/sanitize/engine.cpp csrc/cpu/runtime/*.cpp "${objects[@]}"
${CXX:-g++} -std=c++20 -O1 tests/sanitize/engine.cpp rnnkern/_engine*.so \
  -Wl,-rpath,"$PWD/rnnkern" -pthread -o "$out/engine-here"

echo "== the plan, int8"
"$qemu" "$out/plan"
"$qemu" "$out/int8"
echo "== random layers"
"$qemu" "$out/engine" "$cases" "$out/there"
echo "== random layers on a CPU without SDOT and BFDOT"
"$qemu" -cpu cortex-a53 "$out/int8"
"$qemu" -cpu cortex-a53 "$out/engine" 5
echo "== numbers beside those of $(uname -m)"
"$out/engine-here" "$cases" "$out/here" > /dev/null
"$python" tests/aarch64/compare.py "$out"/here/baseline "$out"/there/{baseline,neon}
"$python" tests/aarch64/compare.py "$out"/here/baseline_bf16 "$out"/there/{baseline_bf16,neon_bf16}
echo "== rnnkern.numpy"
bash tests/aarch64/numpy.sh "$cross" "$qemu" "$python" "${objects[@]}"
