"""The operators `rnnkern::forward`, `backward` and `pack_episodes`, as torch sees them.

library        loads the compiled library; what it can do, and how it plans a call
fake           shapes without data, for compilers
decomposition  a layer from torch's own differentiable operations
native         the C++ functions of autograd, where they fit this torch
packing        how the rows of a call with resets are packed by episodes
autograd       the gradient, and the functions by which the modules call a layer

Importing the package registers all of it. Nothing here knows a module.
"""

from . import autograd, decomposition, fake, library, native, packing

__all__ = ["autograd", "decomposition", "fake", "library", "native", "packing"]
