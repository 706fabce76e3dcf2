"""What tests ask of the package they run against: the source tree's own, or an installed wheel."""

from pathlib import Path

import pytest
import torch

import rnnkern
import rnnkern.ops.autograd

IN_SOURCE_TREE = Path(rnnkern.__file__).parents[1] == Path(__file__).resolve().parents[1]


def require_native() -> None:
    """A build has the C++ autograd; a wheel has it for some Pythons and torches."""
    if rnnkern.ops.autograd.NATIVE is None:
        assert not IN_SOURCE_TREE, "the C++ autograd is not built"
        pytest.skip(f"the wheel has no C++ autograd for torch {torch.__version__} on this Python")
