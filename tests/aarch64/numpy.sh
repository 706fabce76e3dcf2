#!/usr/bin/env bash
# rnnkern.numpy on AArch64: an arm64 Python of this Debian and NumPy's wheel, in a folder of their
# own, run the tests of the NumPy engine under qemu. run.sh calls it, and has built the objects.
set -euo pipefail
cross=$1 qemu=$2 python=$3
shift 3  # then the engine's objects
out=$PWD/build/aarch64
root=$out/debian site=$out/site package=$out/package/rnnkern
version=${AARCH64_PYTHON:-3.11}

if [[ ! -x $root/usr/bin/python$version ]]; then
  if ! command -v apt-get dpkg > /dev/null; then
    echo "rnnkern.numpy was not run: its arm64 Python comes with apt-get" >&2
    exit 0
  fi
  mkdir -p "$out"/apt/{state/lists/partial,cache/archives/partial,debs} "$root"
  touch "$out/apt/status"  # as if nothing were installed: the machine's own packages stay as they are
  apt=(apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures::=arm64
    -o APT::Sandbox::User=root -o Dir::State="$out/apt/state"
    -o Dir::State::status="$out/apt/status" -o Dir::Cache="$out/apt/cache")
  "${apt[@]}" update
  (cd "$out/apt/debs" && "${apt[@]}" download "python$version-minimal" "libpython$version-dev" \
    "libpython$version-minimal" "libpython$version-stdlib" libexpat1 zlib1g libffi8 libc6 \
    libgcc-s1 libstdc++6)
  for package_file in "$out"/apt/debs/*.deb; do dpkg -x "$package_file" "$root"; done
fi
if [[ ! -d $site/numpy ]]; then
  "$python" -m pip install -q --disable-pip-version-check --only-binary=:all: --target "$site" \
    --python-version "$version" --platform manylinux_2_28_aarch64 \
    --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 numpy pytest
fi

mkdir -p "$package"
cp -r rnnkern/. "$package"
rm -f "$package"/*.so
torch=$("$python" -c 'import importlib.util as u; print(*u.find_spec("torch").submodule_search_locations)')
build=("$cross" -std=c++20 -O1 -fPIC -fvisibility=hidden -shared -pthread)
"${build[@]}" csrc/cpu/runtime/*.cpp "$@" -Wl,-soname,_engine.abi3.so -o "$package/_engine.abi3.so"
# torch brings pybind11.
"${build[@]}" csrc/bindings/numpy_module.cpp "$package/_engine.abi3.so" \
  -isystem "$root/usr/include/python$version" -isystem "$root/usr/include" \
  -isystem "$torch/include" -Wl,-rpath,'$ORIGIN' -o "$package/_numpy.abi3.so"

# From a folder of its own, as the sources would hide the package.
cp tests/kernels/test_{math,numpy}.py "$out/package"
cd "$out/package"
run() {
  PYTHONPATH=$PWD:$site RNNKERN_POISON=1 PYTHONDONTWRITEBYTECODE=1 \
    "$qemu" -L "$root" "$root/usr/bin/python$version" "$@"
}
run -m rnnkern
# The test left out starts a Python of its own, which this machine's kernel does not run.
run -m pytest -q -c /dev/null --rootdir . -p no:cacheprovider test_math.py test_numpy.py \
  --deselect test_numpy.py::test_imports_no_torch
