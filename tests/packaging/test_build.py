"""What the built torch library may ask of the torch that loads it."""

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from installed import require_native

import rnnkern.ops.autograd
from rnnkern._missing import built

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")
def test_stable_abi() -> None:
    """Only libtorch's stable C interface: no C++ symbol of at:: or c10::, nothing of Python's."""
    library = built("_C")
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout.split()
    unstable = ("_ZN2at", "_ZNK2at", "_ZN3c10", "_ZNK3c10", "_ZTIN2at", "_ZTIN3c10", "Py", "_Py")
    assert [s for s in symbols if s.startswith(unstable)] == []
    assert any(s.startswith("aoti_torch_") for s in symbols)


def test_autograd_library_is_of_this_torch() -> None:
    """A library built against another torch's C++ headers is never loaded: its name differs."""
    require_native()
    release = "_".join(torch.__version__.split(".")[:2])
    assert f"_autograd_torch{release}." in rnnkern.ops.autograd.NATIVE.__file__


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what a build reads, as building writes beside it."""
    tree = tmp_path / "tree"
    for name in ("csrc", "rnnkern", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("*.so", "*.pyc"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    return tree


def setup(tree: Path, *args: str) -> None:
    command = [sys.executable, "setup.py", "-q", *args]
    subprocess.run(command, cwd=tree, check=True, capture_output=True)


def files(folder: Path, *patterns: str) -> set[str]:
    found = (path for pattern in patterns for path in folder.rglob(pattern))
    return {str(path.relative_to(folder)) for path in found if path.is_file()}


@pytest.mark.sources("setup.py")
@pytest.mark.slow
def test_source_archive(tree: Path, tmp_path: Path) -> None:
    """It has all of the sources: headers, and those that only a machine with CUDA compiles.

    Its name has the version, which setuptools reads from the package's source.
    """
    setup(tree, "sdist", "-d", str(tmp_path))
    with tarfile.open(tmp_path / f"rnnkern-{rnnkern.__version__}.tar.gz") as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
        metadata = archive.extractfile(f"{archive.getnames()[0]}/PKG-INFO").read().decode()
    assert {f"csrc/{name}" for name in files(ROOT / "csrc", "*")} <= found
    assert {"rnnkern/py.typed", "rnnkern/_numpy.pyi"} <= found
    assert "drop-in" in metadata
    assert not re.search(r"\]\((?!https:)", metadata), "a link that PyPI cannot follow"


@pytest.mark.sources("setup.py")
@pytest.mark.slow
def test_package_is_whole(tree: Path, tmp_path: Path) -> None:
    """What goes into a wheel: every module of every subpackage, py.typed, the stubs, headers."""
    setup(tree, "build_py", "--build-lib", str(tmp_path / "built"))
    found = files(tmp_path / "built" / "rnnkern", "*")
    folders = ("cells", "core", "cpu", "cuda")  # what a cell of one's own is compiled with
    engine = {f"csrc/{f}/{name}" for f in folders for name in files(ROOT / "csrc" / f, "*.h")}
    modules = files(ROOT / "rnnkern", "*.py", "*.pyi", "py.typed", "*.h")
    assert found == modules | engine | {"csrc/cpu/levels.txt"}
    assert "py.typed" in found
