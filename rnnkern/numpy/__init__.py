"""Trained recurrent layers on NumPy arrays, by the same kernels, without torch.

    >>> weights = np.load("lstm.npz")            # np.savez("lstm.npz", **{k: v.numpy() for k, v in
    >>> lstm = rnnkern.numpy.Layer(weights)      #     layer.state_dict().items()}), where torch was
    >>> output, (h_n, c_n) = lstm(x)             # x (T, B, I)

Everything but the weights' values is read from their shapes: the kind of cell, the layers, the
directions. Shapes are torch.nn's. Letters: T steps, B batch rows, I inputs, H hidden units, R
width of h (H, or P with a projection), L layers, D directions, N rows of packed data.

layer    Layer: a stack from the arrays of a state_dict
stream   Stream: its state between calls; torch's stream derives from it
library  loads the compiled module; set_threads

Nothing here may import torch.
"""

from .layer import Layer
from .library import set_threads
from .stream import Stream

__all__ = ["Layer", "Stream", "set_threads"]
