"""The CUDA operators on the simulated chip, in the place of the CPU engine's."""

import os
from collections.abc import Iterator

import pytest
import torch
from filelock import FileLock
from simulated import COMPILER, compile_operators, in_place, loaded


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The operators, compiled once for all of pytest-xdist's workers."""
    if not COMPILER:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    path = folder / "cuda_on_host.so"
    with FileLock(folder / "cuda_on_host.lock"):
        if not path.exists():
            compile_operators(path)
    with loaded(path):
        yield


@pytest.fixture
def simulated(library: None) -> Iterator[None]:
    """The operators in place, with small chunks of time."""
    with in_place():
        chunk = torch.ops.rnnkern_cuda_on_host.set_chunk(200)
        yield
        torch.ops.rnnkern_cuda_on_host.set_chunk(chunk)


@pytest.fixture
def persistent(simulated: None) -> Iterator[None]:
    """The persistent engine on the simulated chip, with chunks of the usual size."""
    torch.ops.rnnkern_cuda_on_host.set_chunk(1 << 26)
    torch.ops.rnnkern_cuda_on_host.set_persistent(True, 0)
    yield
    torch.ops.rnnkern_cuda_on_host.set_persistent(False, 0)
