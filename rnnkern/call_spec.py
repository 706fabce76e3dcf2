"""What a call of a layer says besides its tensors, as one object."""

from typing import Any, NamedTuple


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


#: What prepacked weights may be rounded to, by the number that crosses the bindings' `format`.
#: "float32" rounds nothing, whatever the dtype is; the others are for float32 layers.
WEIGHT_FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2}


def weight_format(name: Any, dtype: str) -> int:
    """The number of a format for weights of this dtype ("float32"); ValueError if it has none."""
    if name not in WEIGHT_FORMATS:
        known = ", ".join(repr(known) for known in WEIGHT_FORMATS)
        raise ValueError(f"weights must be one of {known}, got {name!r}")
    if name != "float32" and dtype != "float32":
        raise ValueError(f"weights={name!r} is for float32 layers, got {dtype}")
    return WEIGHT_FORMATS[name]
