"""The modules: torch.nn's recurrent layers and cells on rnnkern's kernels.

layers       LSTM, GRU, RNN: checks, layouts, the stack of layers; no arithmetic
cells        LSTMCell, GRUCell, RNNCell: one step of a layer
added        layers and cells of cells that are not built in
zoneout      those with zoneout around the cell; variational_dropout with dropout on h
recurrent_dropout  those of an LSTM with recurrent dropout
resets       resets inside a sequence: a layer's rows as a packed batch of episodes
weights      which weights a call uses
_plain       which classes the C++ functions for the usual call serve
_torch_twin  torch.nn's own classes, captured once, and the way back to them
_tracing     what lets torch.compile and torch.fx trace the modules
"""

# A pickle of such a layer names `added`.
from . import recurrent_dropout, variational_dropout, zoneout  # noqa: F401
from .cells import GRUCell, LSTMCell, RNNCell
from .layers import GRU, LSTM, RNN

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]
