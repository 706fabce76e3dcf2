#!/usr/bin/env bash
# Builds, tests and times rnnkern on a machine with an NVIDIA GPU: no network, under ten minutes.
# Needs nvcc, a C++ compiler and a Python whose torch (2.10 or later) has CUDA. PYTHON=python3.12
# chooses one; arguments go to bench/gpu.py.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "gpu: needs an NVIDIA GPU and a torch with CUDA in $python (or in PYTHON=...)" >&2
  exit 1
}
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true

# nvcc may be a wrapper far from its toolkit, where torch's build would look for the libraries.
if [ -z "${CUDA_HOME:-}" ]; then
  here=$(nvcc --dryrun -x cu -c /dev/null -o /dev/null 2>&1 | sed -n 's/^#\$ _HERE_=//p')
  export CUDA_HOME=${here%/bin}
fi
"$python" -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .

failed=0
"$python" -m pytest -q tests/test_cuda.py || failed=1

# A few calls under the sanitizer, without torch's caching of memory, which hides overruns.
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 100 \
      compute-sanitizer --tool "$tool" --error-exitcode 99 --print-limit 20 \
      "$python" -m pytest -q -p no:cacheprovider tests/test_cuda.py --timeout 0 \
      -k "test_table and (T7-B5-I4-H6-bidirectional-hx or T9-B8-I4-H20-packed)" || {
      status=$?
      echo "gpu: compute-sanitizer $tool ended with $status (124: out of time)" >&2
      [ $status -eq 124 ] || failed=1
    }
  done
else
  echo "gpu: compute-sanitizer not found, skipped"
fi

"$python" bench/gpu.py "$@" || failed=1
exit $failed
