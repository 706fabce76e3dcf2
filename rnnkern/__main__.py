"""`python -m rnnkern`: what this installation can do, for bug reports."""

import importlib.util
import platform
from collections.abc import Iterator

import numpy
import torch

from . import __version__, autograd, ops


def _cuda() -> str:
    if "cuda" in ops.DEVICES:
        return f"kernels loaded, {torch.cuda.get_device_name()}"
    built = importlib.util.find_spec("rnnkern._C_cuda") is not None
    if torch.cuda.is_available():
        return "kernels not built; torch's own path is taken on the GPU"
    return f"no GPU; kernels {'built' if built else 'not built'}"


def _autograd() -> str:
    if autograd.NATIVE is not None:
        return "C++"
    return f"Python, slower for small calls: not built for torch {torch.__version__}"


def _lines() -> Iterator[tuple[str, str]]:
    library = ops.info()
    yield "rnnkern", __version__
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "torch", torch.__version__
    yield "numpy", numpy.__version__
    yield "processor", platform.machine()
    yield "instruction set", f"{library['isa']} of {', '.join(library['available'])}"
    yield "", "(RNNKERN_CPU forces a lower one; baseline_bf16 is an emulation for tests)"
    yield "threads", str(torch.get_num_threads())
    yield "autograd", _autograd()
    yield "CUDA", _cuda()


for _name, _value in _lines():
    print(f"{_name:>16}  {_value}")
