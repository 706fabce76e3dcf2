"""How an added cell's CUDA kernels are compiled and found, by a stand-in for nvcc or by nvcc."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rnnkern
from rnnkern import own_cell_cuda
from rnnkern.nn import added
from rnnkern.ops import library
from rnnkern.own_cell import AddedCell

pytestmark = [pytest.mark.cuda, pytest.mark.timeout(600)]
HEADER = rnnkern.cells.FOLDER / "min_gru.h"
NVCC = own_cell_cuda._nvcc()

# Writes down what it is called with, and makes a library that has no kernels.
STAND_IN = """#!{python}
import subprocess, sys
with open("{folder}/calls", "a") as calls:
    print(*sys.argv[1:], file=calls)
source, library = sys.argv[-3], sys.argv[-1]
if "broken" in open(source).read():
    sys.exit("mine.h(7): error: identifier \\"sigmoide\\" is undefined")
text = 'extern "C" const void* rnnkern_kernels() {{ return nullptr; }}'
command = ["c++", "-shared", "-x", "c++", "-", "-o", library]
subprocess.run(command, input=text, text=True, check=True)
"""


class OnGpu(Tensor):
    """Says of itself that it is on a GPU."""

    is_cuda = True


def cell(mode: str, header: Path = HEADER, **more: str) -> AddedCell:
    """One that the engine does not know: it is given no kernels."""
    return AddedCell(str(header), "MinGRU", "MinGRU", mode=mode, **more)


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with nvcc, nvidia-smi of a machine with two kinds of GPUs, and a cache."""
    nvcc, smi = tmp_path / "bin" / "nvcc", tmp_path / "bin" / "nvidia-smi"
    nvcc.parent.mkdir()
    nvcc.write_text(STAND_IN.format(python=sys.executable, folder=tmp_path))
    smi.write_text("#!/bin/sh\nprintf '9.0\\n8.0\\n9.0\\n'\n")
    for tool in (nvcc, smi):
        tool.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(nvcc.parent), prepend=":")
    monkeypatch.setenv("RNNKERN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(own_cell_cuda, "_refusals", {})
    own_cell_cuda._capabilities.cache_clear()
    yield tmp_path
    own_cell_cuda._capabilities.cache_clear()


def test_compiled_once(tools: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """For the architectures that are here, and again only when something changes."""
    for mode in ("a", "b"):
        own_cell_cuda.add_kernels(cell(mode))
        assert own_cell_cuda.refusal(mode) == ""
    (call,) = (tools / "calls").read_text().splitlines()
    assert "-gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90,code=sm_90" in call
    assert "compiling MinGRU (min_gru.h) for sm_80_sm_90" in capfd.readouterr().err
    (made,) = (tools / "cache").glob("*.so")
    assert made.name.startswith("MinGRU-sm_80_sm_90-")


@pytest.mark.parametrize("change", ["architecture", "flags", "nvcc", "around"])
def test_compiled_anew(tools: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    own_cell_cuda.add_kernels(cell("a"))
    if change == "architecture":
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a+PTX")
    elif change == "flags":
        monkeypatch.setenv("NVCC_APPEND_FLAGS", "-lineinfo")
    elif change == "nvcc":
        with (tools / "bin" / "nvcc").open("a") as nvcc:
            nvcc.write("# another version\n")
    own_cell_cuda.add_kernels(cell("b", around="Zoneout" if change == "around" else ""))
    assert len((tools / "calls").read_text().splitlines()) == 2
    assert own_cell_cuda.refusal("b") == ""


def test_errors_name_the_header(tools: Path) -> None:
    header = tools / "broken.h"
    header.write_text("")
    for _ in range(2):  # nothing is remembered of it
        with pytest.raises(
            RuntimeError, match=r"broken.h does not compile .*\nmine.h\(7\): error"
        ) as found:
            own_cell_cuda.add_kernels(cell("a", header))
        assert "RNNKERN_CUDA=0" in str(found.value)


def test_what_is_missing(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "there was no GPU" in own_cell_cuda.refusal("never added")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "none")
    own_cell_cuda.add_kernels(cell("a"))
    assert "names no GPU" in own_cell_cuda.refusal("a")
    monkeypatch.setattr(own_cell_cuda, "_nvcc", lambda: None)
    own_cell_cuda.add_kernels(cell("b"))
    assert "there is no nvcc" in own_cell_cuda.refusal("b")
    monkeypatch.setenv("RNNKERN_CUDA", "0")
    own_cell_cuda.add_kernels(cell("c"))
    assert "RNNKERN_CUDA=0" in own_cell_cuda.refusal("c")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: rnnkern.cells.LayerNormLSTM(3, 4).layers[0].recurrence.own, "its sums are given"),
        (lambda: rnnkern.cells.variational_dropout(rnnkern.GRU).layer.own, "no mask on h"),
    ],
    ids=["given sums", "masked h"],
)
def test_cells_that_are_not_taken(tools: Path, make: Callable[[], AddedCell], why: str) -> None:
    own = make()
    missing = own_cell_cuda.not_taken(library.BY_MODE[own.mode])
    own_cell_cuda.add_kernels(own, missing)
    assert why in own_cell_cuda.refusal(own.mode)
    assert not (tools / "calls").exists()


@pytest.mark.slow
def test_at_load(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch sees a GPU, `load` adds the kernels, and its tensors go to them."""
    monkeypatch.setenv("CXXFLAGS", "-O0")
    monkeypatch.setattr(library, "DEVICES", library.DEVICES | {"cuda"})
    own = rnnkern.cells.MinGRU.own
    added.classes.cache_clear()
    layer, _ = added.classes(own)
    assert (tools / "calls").exists()
    module, x = layer(3, 4), torch.zeros(5, 2, 3).as_subclass(OnGpu)
    assert added._backend(module, None, x) is None
    own_cell_cuda._refusals[own.mode] = "no nvcc"
    assert str(added._backend(module, None, x)) == "decomposition: no nvcc"


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None or not shutil.which("c++"), reason="needs nvcc")
@pytest.mark.parametrize("function", ["sigmoid", "sigmoide"])
def test_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    """A header compiles, or nvcc's message says which line does not."""
    monkeypatch.setenv("RNNKERN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    header = tmp_path / "mine.h"
    header.write_text(HEADER.read_text().replace("sigmoid(preact[0])", f"{function}(preact[0])"))
    if function == "sigmoid":
        assert own_cell_cuda._library(cell("a", header)).stat().st_size > 1000
    else:
        with pytest.raises(RuntimeError, match=r"mine\.h\(15\): error: .*sigmoide") as found:
            own_cell_cuda._library(cell("a", header))
        assert "csrc/cuda" not in str(found.value)
