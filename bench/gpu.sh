#!/usr/bin/env bash
# Builds, tests and times rnnkern on a machine with an NVIDIA GPU: no network, under ten minutes.
# Needs nvcc, a C++ compiler and a Python whose torch (2.10 or later) has CUDA. PYTHON=python3.12
# chooses one, LIMIT=570 the seconds for all of it, BUILD=0 takes what is built already, COMMIT=... is
# written into the results where git does not know it. Arguments go to bench/gpu.py; --quick is the
# choice for a first look. A step that fails or runs out of time does not keep the next from running.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
limit=${LIMIT:-570}
failed=()
export PYTHONPATH=$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
say() { echo "gpu: [$SECONDS s] $*"; }
# Seconds that are left, or as many as asked for: at least one, since to timeout 0 means no limit.
left() {
  local seconds=$((limit - SECONDS)) most=${1:-$limit}
  ((seconds > most)) && seconds=$most
  echo $((seconds > 1 ? seconds : 1))
}

"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  say "needs an NVIDIA GPU and a torch with CUDA in $python (or in PYTHON=...)" >&2
  exit 1
}
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem --format=csv
"$python" bench/gpu.py --packages
# nvcc may be a wrapper far from its toolkit, where torch's build would look for the libraries.
if [ -z "${CUDA_HOME:-}" ]; then
  here=$(nvcc --dryrun -x cu -c /dev/null -o /dev/null 2>&1 | sed -n 's/^#\$ _HERE_=//p')
  export CUDA_HOME=${here%/bin}
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
nvcc -std=c++17 -o "$work/facts" bench/gpu_facts.cu && "$work/facts" | tee "$work/facts.txt"

# In place, so that neither pip nor the environment is touched.
if [ "${BUILD:-1}" != 0 ]; then
  say "building"
  if ! timeout "$(left)" "$python" setup.py build_ext --inplace >"$work/build.log" 2>&1; then
    tail -n 60 "$work/build.log" >&2
    say "the build failed" >&2
    exit 1
  fi
  say "built"
fi

# Without the suite's configuration, which asks for plugins that may be missing here.
pytest=("$python" -m pytest -q --tb=short --maxfail=10 -c /dev/null --rootdir . --noconftest -p no:cacheprovider)
if "$python" -c 'import pytest' 2>/dev/null; then
  say "testing"
  workers=()
  "$python" -c 'import xdist' 2>/dev/null && workers=(-n 8)
  OMP_NUM_THREADS=2 timeout "$(left 240)" "${pytest[@]}" "${workers[@]}" tests/cuda/test_gpu.py ||
    failed+=(tests)
else
  say "pytest is not installed: the tests are left out" >&2
  failed+=(tests)
fi

say "timing"
timeout "$(left)" "$python" bench/gpu.py --limit "$(left)" --facts "$work/facts.txt" "$@" ||
  failed+=(benchmark)

# A few calls under the sanitizer, without torch's caching of memory, which hides overruns. racecheck
# does not know that values sent between blocks order what was read before them, so it gets no case of
# several blocks: there it reports the sums of one step, overwritten in the next.
cases="T7-B5-I4-H6-bi-hx or proj18-packed"
for tool in memcheck racecheck; do
  if ! command -v compute-sanitizer >/dev/null; then
    say "compute-sanitizer is not installed: $tool is left out"
  elif [[ " ${failed[*]-} " == *" tests "* || $(left) -lt 30 ]]; then
    say "$tool is left out: the tests failed, or there is no time"
  else
    say "$tool"
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "$(left)" \
      compute-sanitizer --tool $tool --error-exitcode 99 --print-limit 20 \
      "${pytest[@]}" tests/cuda/test_gpu.py \
      -k "test_table and ($cases$([ $tool = memcheck ] && echo " or T12-B9-I4-H200) or test_resets and (T9 and row"))"
    status=$?
    if [ $status -eq 124 ]; then
      say "$tool ran out of time"
    elif [ $status -ne 0 ]; then
      failed+=("$tool")
    fi
  fi
done
say "failed: ${failed[*]:-nothing}"
[ ${#failed[@]} -eq 0 ]
