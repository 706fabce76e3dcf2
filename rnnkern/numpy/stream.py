"""Stream: a stack of layers that takes input step by step."""

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from .library import _numpy, whole_number


class Stream:
    """A stack of layers that takes its input step by step, and keeps the state between calls.

    `Layer.stream` makes it. The weights are those of the layer, shared and read only. One thread at
    a time may use a stream; any number of streams of one layer may run at once.

    >>> stream = lstm.stream(batch_size=2)
    >>> y = stream(x)  # x (B, I) gives (B, R); x (T, B, I) gives (T, B, R)
    """

    def __init__(self, packed: Sequence[Any], batch_size: int, threads: int) -> None:
        """packed: of each layer, what `_numpy.prepack` returned."""
        batch, threads = whole_number("batch_size", batch_size), whole_number("threads", threads)
        self._engine = engine = _numpy.Stream([np.asarray(p) for p in packed], batch, threads)
        self.batch_size = batch
        self.input_size, self.hidden_size = engine.input_size, engine.hidden_size
        self._states = [
            self._memory(engine.h_address, engine.dtype, (engine.layers, batch, engine.width))
        ]
        if engine.c_width:
            wide = "float64" if engine.dtype == "float64" else "float32"
            sizes = (engine.layers, batch, engine.c_width // self.hidden_size, self.hidden_size)
            others = self._memory(engine.c_address, wide, sizes)
            self._states += [others[:, :, k] for k in range(sizes[2])]

    def __repr__(self) -> str:
        engine = self._engine
        return (
            f"Stream({engine.input_size}, {engine.width}, num_layers={engine.layers}, "
            f"batch_size={engine.batch}, {engine.dtype})"
        )

    def __reduce__(self) -> Any:
        raise TypeError(
            "a stream cannot be copied or pickled: make another one and give it this one's state"
        )

    def __call__(self, x: Any) -> Any:
        """The outputs of one step, (B, I) -> (B, R), or of several, (T, B, I) -> (T, B, R).

        Raises ValueError for another shape or dtype.
        """
        return self._engine(x)

    @property
    def state(self) -> Any:
        """A copy of the state: h (L, B, R), of an LSTM the pair of it and c (L, B, H), of an added
        cell with several states the tuple of them.

        Assigned, it goes on from there; None is zeros.

        Raises ValueError for wrong shapes or dtypes.
        """
        states = [self._copy(s) for s in self._states]
        return tuple(states) if len(states) > 1 else states[0]

    @state.setter
    def state(self, value: Any) -> None:
        if value is None:
            self.reset()
            return
        given = value if isinstance(value, (tuple, list)) else (value,)
        if len(given) != len(self._states):
            count = len(self._states)
            wanted = {1: "one array, h", 2: "a pair (h, c)"}.get(count, f"{count} arrays")
            raise ValueError(f"the state must be {wanted}, got {len(given)}")
        checked = [self._check_state(*pair) for pair in zip(given, self._states, strict=True)]
        for memory, s in zip(self._states, checked, strict=True):
            memory[...] = s

    def reset(self, rows: Any = None) -> None:
        """Sets the state of these batch rows to zero: a row's number, several, or a mask (B,).

        None is all rows. Raises IndexError for a row that is not there, TypeError for other values.
        """
        if rows is None:
            self._engine.reset_all()
            return
        for row in self._rows(rows):
            self._engine.reset(row)

    def _rows(self, rows: Any) -> list[int]:
        batch = self.batch_size
        numbers = np.asarray(rows)
        if numbers.dtype == bool and numbers.shape == (batch,):
            numbers = np.flatnonzero(numbers)
        elif numbers.dtype == bool:
            raise IndexError(f"a mask of rows must have the shape ({batch},), got {numbers.shape}")
        if numbers.size and numbers.dtype.kind not in "iu":
            raise TypeError(f"rows must be whole numbers or a mask, got {rows!r}")
        found: list[int] = numbers.astype(np.int64).ravel().tolist()
        for row in found:
            if not -batch <= row < batch:
                raise IndexError(f"row {row} is out of range for a batch of {batch}")
        return [row % batch for row in found]

    def _check_state(self, value: Any, memory: Any) -> Any:
        value = np.asarray(value)
        if value.shape != memory.shape or value.dtype != memory.dtype:
            raise ValueError(
                f"the state must be {memory.shape} {memory.dtype}, got {value.shape} {value.dtype}"
            )
        return value

    # Of the arrays' kind; torch's stream overrides these.

    def _memory(self, address: int, dtype: str, shape: tuple[int, ...]) -> Any:
        """The engine's memory as an array."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory: Any = (ctypes.c_char * size).from_address(address)
        return np.frombuffer(memory, dtype).reshape(shape)

    def _copy(self, memory: Any) -> Any:
        return memory.copy()
