"""What a call of a layer says besides its tensors, as one object."""

from typing import NamedTuple


class CallSpec(NamedTuple):
    """The settings of one layer's call; `CallSpec` in csrc/core/call_spec.h has the same fields.

    The operators take the fields one by one, in this order; only there the object is unpacked.

    cell         the cell's number (`Cell.id`)
    directions   1, or 2: the second runs from the last step to the first
    bias         whether each direction's weights are (w_ih, w_hh, b_ih, b_hh), not (w_ih, w_hh)
    projection   whether w_hr follows them (LSTM's proj_size)
    batch_first  whether padded data is (B, T, ·)
    """

    cell: int
    directions: int = 1
    bias: bool = True
    projection: bool = False
    batch_first: bool = False

    @property
    def weights_per_direction(self) -> int:
        return (4 if self.bias else 2) + self.projection
