"""Reference recurrent cells in NumPy and float64, forward and backward: ground truth of the tests.

Written to be read beside a textbook, not to be fast. Every cell is a class with two functions:
`step`, its equations, and `adjoint`, their derivative. One walk over time serves them all.

    >>> tape = forward("LSTM", x, [Weights(w_ih, w_hh, b_ih, b_hh)])   # x is (T, B, I)
    >>> tape.output, tape.h_n, tape.c_n, tape.directions[0].saved["forget"]
    >>> gradients = backward(tape, grad_output=np.ones_like(tape.output))
    >>> gradients.input, gradients.weights[0].w_hh, gradients.flow_c[0]

Letters: T steps, B batch rows, I inputs, H hidden units, R width of h (H, or P with a projection),
D directions, N rows of all steps together: T·B, or the length of packed data. p = W_ih x + b_ih and
q = W_hh h + b_hh are the two products of a step, with the gates in torch.nn's order along their
last axis. d_ before a name is the derivative of the loss by it.
"""

from ..state_dict import Weights
from .cells import CELLS
from .layer import Gradients, Tape, backward, forward
from .walk import Direction

__all__ = ["CELLS", "Direction", "Gradients", "Tape", "Weights", "backward", "forward"]
