#!/usr/bin/env bash
# Builds, tests, times and profiles rnnkern on a machine with an NVIDIA GPU: no network, under twelve
# minutes. Needs nvcc, a C++ compiler and a Python whose torch (2.10 or later) has CUDA.
# PYTHON=python3.12 chooses one, LIMIT=700 the seconds for all of it, BUILD=0 takes what is built
# already, COMMIT=... is written into the results where git does not know it. Arguments go to
# bench/gpu.py; --quick is the choice for a first look. A step that fails or runs out of time does not
# keep the next from running, and every step writes its results as it goes: bench/results/gpu*.
#
# TORCH_CUDA_ARCH_LIST=8.0+PTX builds what GPUs without clusters run; a newer one runs that code too,
# once its driver has compiled it.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
limit=${LIMIT:-700}
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
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 8)
# SECONDS, the persistent kernels to take, then arguments of pytest.
tests() {
  say "testing $2"
  OMP_NUM_THREADS=2 RNNKERN_ON_CHIP=$2 timeout "$(left "$1")" "${pytest[@]}" "${workers[@]}" \
    tests/cuda/test_gpu.py "${@:3}" || failed+=("tests of $2")
}
# The same, then arguments of bench/gpu.py.
timings() {
  say "timing $2"
  RNNKERN_ON_CHIP=$2 timeout "$(left "$1")" "$python" bench/gpu.py --limit "$(left "$1")" \
    --facts "$work/facts.txt" "${@:3}" || failed+=("timing of $2")
}
on_chip="test_table or same_bits or test_resets or test_graph or nothing_waits"
if "$python" -c 'import pytest' 2>/dev/null; then
  tests 150 clusters
  tests 60 grid -k "$on_chip"
  tests 40 block,clusters -k "$on_chip"
else
  say "pytest is not installed: the tests are left out" >&2
  failed+=(tests)
fi

timings 170 clusters "$@"
timings 60 grid "$@" --seconds 0.2 --out bench/results/gpu-grid \
  --match "LSTM T(512|1024) B(16|64) .*(bf16|fp32)|H2048|GRU.*bf16"
timings 20 block,clusters "$@" --seconds 0.2 --out bench/results/gpu-block --match "H(64|128) "

say "profiling"
for groups in clusters grid block,clusters; do
  RNNKERN_ON_CHIP=$groups timeout "$(left 20)" "$python" bench/gpu_profile.py --limit 15 \
    --match "LSTM T(512 B16 I64 H64 fp32|1024 B16 .*bf16)" \
    --out "bench/results/gpu-profile-${groups%%,*}.txt" || failed+=("profile of $groups")
done
# Why the warps of a persistent kernel wait, where counters may be read.
if command -v ncu >/dev/null; then
  timeout "$(left 40)" ncu --kernel-name regex:persistent --launch-count 2 --section SpeedOfLight \
    --section WarpStateStats --section MemoryWorkloadAnalysis "$python" bench/gpu_profile.py \
    --match "LSTM T512 B16 I512 H512 bf16" --out "$work/profile.txt" >bench/results/gpu-ncu.txt 2>&1 ||
    say "ncu did not finish: $(tail -n 1 bench/results/gpu-ncu.txt)"
else
  say "ncu is not installed: the counters are left out"
fi

# A few calls under the sanitizer, without torch's caching of memory, which hides overruns. racecheck
# does not know that values sent between blocks order what was read before them, so it gets no case of
# several blocks: there it reports the sums of one step, overwritten in the next.
cases="T7-B5-I4-H6-bi-hx or proj18-packed"
sanitize() {  # the tool, the persistent kernels to take
  if ! command -v compute-sanitizer >/dev/null; then
    say "compute-sanitizer is not installed: $1 is left out"
  elif [[ " ${failed[*]-} " == *" tests of "* || $(left) -lt 30 ]]; then
    say "$1 of $2 is left out: the tests failed, or there is no time"
  else
    say "$1 of $2"
    RNNKERN_ON_CHIP=$2 PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "$(left)" \
      compute-sanitizer --tool "$1" --error-exitcode 99 --print-limit 20 \
      "${pytest[@]}" tests/cuda/test_gpu.py \
      -k "test_table and ($cases$([ "$1" = memcheck ] && echo " or T12-B9-I4-H200) or test_resets and (T9 and row"))"
    status=$?
    if [ $status -eq 124 ]; then
      say "$1 ran out of time"
    elif [ $status -ne 0 ]; then
      failed+=("$1 of $2")
    fi
  fi
}
sanitize memcheck clusters
sanitize memcheck grid
sanitize racecheck clusters
sanitize racecheck block,clusters
say "failed: ${failed[*]:-nothing}"
[ ${#failed[@]} -eq 0 ]
