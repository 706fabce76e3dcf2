"""The operators `rnnkern::forward` and `rnnkern::backward`, as torch sees them.

library        loads the compiled library; what it can do, and how it plans a call
fake           shapes without data, for compilers
decomposition  a layer from torch's own differentiable operations
autograd       the gradient, and the functions by which the modules call a layer

Importing the package registers all of it. Nothing here knows a module.
"""

from . import autograd, decomposition, fake, library

__all__ = ["autograd", "decomposition", "fake", "library"]
