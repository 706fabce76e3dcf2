"""The arrays of a layer's state_dict, layer by layer and direction by direction.

Names and shapes are torch.nn's: weight_ih_l0 (G·H, I), weight_hh_l0 (G·H, R), bias_ih_l0 and
bias_hh_l0 (G·H), weight_hr_l0 (P, H), for an added cell's learned values per unit
params_l0 (their number, H), with the suffix _reverse for the second direction. An added cell may
have weight_hh_l0 in heads (heads, G·H/heads, H/heads), or neither it nor bias_hh_l0; one whose
input sums are given has neither weight_ih_l0 nor bias_ih_l0. Letters:
I inputs, H hidden units, G gates, R width of h (H, or P with a projection). Needs no torch.
"""

import re
from collections.abc import Callable, Mapping
from itertools import compress
from typing import Any, NamedTuple

import numpy as np

_NAME = re.compile(r"(weight_ih|weight_hh|weight_hr|bias_ih|bias_hh|params)_l(\d+)(_reverse)?$")


class Weights(NamedTuple):
    """The weights of one direction of one layer, in torch's order."""

    w_ih: Any = None  # an array, but for a cell without it
    w_hh: Any = None  # likewise
    b_ih: np.ndarray | None = None
    b_hh: np.ndarray | None = None
    w_hr: np.ndarray | None = None
    params: np.ndarray | None = None

    @property
    def arrays(self) -> list[np.ndarray]:
        """Those that are there, as the kernels take them."""
        return [w for w in self if w is not None]

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> "Weights":
        """The function's results for those that are there."""
        return Weights(*(None if w is None else function(w) for w in self))


def layers(
    state_dict: Mapping[str, Any],
    prefix: str = "",
    products: tuple[bool, bool] = (True, True),
    biases: tuple[bool, bool] = (True, True),
) -> list[list[Weights]]:
    """The weights of every layer and direction, as NumPy arrays: `layers(sd)[layer][direction]`.

    `prefix` picks a layer out of a larger model's: "encoder." for "encoder.weight_ih_l0". Whether
    the cell has a weight_ih and a weight_hh is in `products`, a bias_ih and a bias_hh in `biases`.
    Raises ValueError for a key that no recurrent layer has (without prefix), for a missing one and
    for a value that is no array, TypeError for something else than a mapping.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"expected a mapping of names to arrays, got {type(state_dict).__name__}; "
            "of a layer give its state_dict()"
        )
    found: dict[tuple[int, int], dict[str, np.ndarray]] = {}
    for key, value in state_dict.items():
        name = str(key)
        match = _NAME.match(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if match:
            role, layer, reverse = match.groups()
            name = role.replace("weight", "w").replace("bias", "b")
            found.setdefault((int(layer), int(bool(reverse))), {})[name] = _array(key, value)
        elif not prefix:
            raise ValueError(
                f"{key!r} is not a weight of a recurrent layer; "
                "give the layer's name as prefix if the state_dict is a whole model's"
            )
    if not found:
        dot = "" if not prefix or prefix.endswith(".") else f"; with its dot it is {prefix + '.'!r}"
        raise ValueError(f"no recurrent layer's weights under the prefix {prefix!r}{dot}")
    depth = 1 + max(layer for layer, _ in found)
    directions = 1 + max(direction for _, direction in found)
    stack = [[found.get((k, d), {}) for d in range(directions)] for k in range(depth)]
    sides = ("ih", "hh")
    wanted = set(found[min(found)]) | {f"w_{side}" for side in compress(sides, products)}
    if wanted & {"b_ih", "b_hh"}:
        wanted |= {f"b_{side}" for side in compress(sides, biases)}
    for k, layer in enumerate(stack):
        for d, weights in enumerate(layer):
            if missing := wanted - set(weights):
                suffix = f"_l{k}" + "_reverse" * d
                names = sorted(_torch_name(name) + suffix for name in missing)
                raise ValueError(f"the state_dict lacks {', '.join(names)}")
    return [[Weights(**weights) for weights in layer] for layer in stack]


def _array(key: str, value: Any) -> np.ndarray:
    try:
        return np.asarray(value)
    except Exception as error:  # torch has one for bfloat16, GPU, meta and trained tensors each
        raise ValueError(f"{key} cannot be read as a NumPy array: {error}") from error


def _torch_name(name: str) -> str:
    return name.replace("w_", "weight_").replace("b_", "bias_")
