"""What the examples of real time share: the forms of a step, run in turn, and their times."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from statistics import median, quantiles
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import rnnkern

Step = Callable[[Tensor], Tensor]  # a layer's (1, B, I) -> (1, B, H), a cell's (B, I) -> (B, H)
T = TypeVar("T")

#: The forms that round nothing.
EXACT = ("torch.nn", "rnnkern", "frozen", "stream")


def by_layer(layer: nn.Module) -> Step:
    """Calls a layer for every step, with the state of the step before."""
    state: Any = None

    def step(x: Tensor) -> Tensor:
        nonlocal state
        y, state = layer(x, state)
        output: Tensor = y
        return output

    return step


def by_cell(cell: nn.Module) -> Step:
    """The same with a cell."""
    state: Any = None

    def step(x: Tensor) -> Tensor:
        nonlocal state
        state = cell(x, state)
        h: Tensor = state[0] if isinstance(state, tuple) else state
        return h

    return step


def twins(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """torch.nn's layer or cell, and rnnkern's, with the weights of `module`."""
    kind, sizes = type(module).__name__, (module.input_size, module.hidden_size)
    theirs, ours = (getattr(layers, kind)(*sizes) for layers in (nn, rnnkern))
    for twin in (theirs, ours):
        twin.load_state_dict(module.state_dict())
    return theirs, ours


def forms(module: nn.Module) -> dict[str, Step]:
    """The ways to take a layer or cell from step to step."""
    by_call = by_cell if isinstance(module, nn.RNNCellBase) else by_layer
    theirs, ours = twins(module)
    frozen: Any = rnnkern.freeze(ours)
    rounded: Any = {to: rnnkern.freeze(ours, to) for to in ("bfloat16", "int8")}
    return {
        "torch.nn": by_call(theirs),
        "rnnkern": by_call(ours),
        "frozen": by_call(frozen),
        "stream": frozen.stream(),
        **{f"{to} stream": layer.stream() for to, layer in rounded.items()},
    }


def alternately(runs: Mapping[str, Iterator[T]], block: int = 100) -> dict[str, list[T]]:
    """All that the iterators yield, `block` items of each in turn, on one thread and in inference.

    What else the machine does meanwhile then hits all of them alike.
    """
    yielded: dict[str, list[T]] = {name: [] for name in runs}
    running = dict(runs)
    with one_thread(), torch.inference_mode():
        while running:
            for name, run in list(running.items()):
                items = list(islice(run, block))
                yielded[name] += items
                if len(items) < block:
                    del running[name]
    return yielded


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def spread(seconds: list[float]) -> str:
    """Median, 99th percentile and worst."""
    percentiles = quantiles(seconds, n=100)
    values = (median(seconds), percentiles[98], max(seconds))
    return "median {:.1f}, p99 {:.1f}, worst {:.0f} µs".format(*(1e6 * v for v in values))
