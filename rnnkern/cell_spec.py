"""The table of cells, as csrc/cells has it. The library exports its own, and a test compares."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """One kind of recurrent cell.

    mode    torch.nn's name of it (`RNNBase.mode`)
    id      the number that crosses the bindings (enum class CellId)
    gates   gates in the order of torch's weight rows; the weights have `len(gates) * hidden_size`
    saved   what the kernels save per unit and step for the backward pass, in their order
    states  the states a step hands to the next one
    projects  whether h may be projected before it is handed on (proj_size)
    """

    mode: str
    id: int
    gates: tuple[str, ...]
    saved: tuple[str, ...]
    states: tuple[str, ...]
    projects: bool = False


_LSTM_GATES = ("input", "forget", "cell", "output")
LSTM = Cell("LSTM", 0, _LSTM_GATES, _LSTM_GATES, ("h", "c"), True)
GRU = Cell("GRU", 1, ("reset", "update", "new"), ("new", "reset", "update", "q"), ("h",))
RNN_TANH = Cell("RNN_TANH", 2, ("hidden",), (), ("h",))
RNN_RELU = Cell("RNN_RELU", 3, ("hidden",), (), ("h",))

CELLS: tuple[Cell, ...] = (LSTM, GRU, RNN_TANH, RNN_RELU)  # by id
BY_MODE: dict[str, Cell] = {cell.mode: cell for cell in CELLS}
