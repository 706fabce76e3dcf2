"""batch_sizes of packed data, as users give them."""

from itertools import pairwise
from typing import Any

import numpy as np


def whole(batch_sizes: Any) -> list[int]:
    """batch_sizes, of whatever kind of sequence, as Python's integers."""
    sizes = np.asarray(batch_sizes)
    if sizes.ndim != 1:
        raise ValueError(f"batch_sizes must have 1 dimension, got {sizes.ndim}")
    if not sizes.size:
        raise ValueError("batch_sizes must have a size for each step, got none")
    if sizes.dtype.kind not in "iu":
        raise TypeError(f"batch_sizes must be whole numbers, got {sizes.dtype}")
    whole: list[int] = sizes.tolist()
    return whole


def check_sizes(sizes: list[int], rows: int) -> None:
    """Raises ValueError where they cannot be those of packed data with so many rows."""
    if min(sizes) < 1:
        raise ValueError(f"batch_sizes must be at least 1, got {min(sizes)}")
    if any(after > before for before, after in pairwise(sizes)):
        raise ValueError(f"batch_sizes must not grow, got {_short(sizes)}")
    if sum(sizes) != rows:
        raise ValueError(
            f"batch_sizes do not add up to the rows of input: {sum(sizes)} instead of {rows}"
        )


def _short(sizes: list[int]) -> str:
    return str(sizes) if len(sizes) <= 10 else f"[{', '.join(map(str, sizes[:10]))}, ...]"
