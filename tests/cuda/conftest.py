"""The CUDA operators on the simulated chip, in the place of the CPU engine's."""

from collections.abc import Iterator

import pytest
import torch
from simulated import COMPILER, in_place, loaded, operators


@pytest.fixture(scope="module")
def library() -> Iterator[None]:
    """The operators, compiled once for all of pytest-xdist's workers."""
    if not COMPILER:
        pytest.skip("needs a C++ compiler")
    with loaded(operators()):
        yield


@pytest.fixture
def simulated(library: None) -> Iterator[None]:
    """The operators in place, with small chunks of time."""
    with in_place():
        chunk = torch.ops.rnnkern_cuda_on_host.set_chunk(200)
        yield
        torch.ops.rnnkern_cuda_on_host.set_chunk(chunk)


@pytest.fixture(params=["clusters"])
def persistent(simulated: None, request: pytest.FixtureRequest) -> Iterator[str]:
    """The persistent kernels of a group on the simulated chip, with chunks of the usual size."""
    torch.ops.rnnkern_cuda_on_host.set_chunk(1 << 26)
    torch.ops.rnnkern_cuda_on_host.set_persistent(request.param, 0)
    yield request.param
    torch.ops.rnnkern_cuda_on_host.set_persistent("steps", 0)
