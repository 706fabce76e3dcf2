"""The compiled library with the operators `rnnkern::forward` and `rnnkern::backward`.

One call runs one layer with all its directions; the schemas are in csrc/bindings/schemas.h.
`rnnkern::prepack` packs a layer's weights once for `rnnkern::forward_prepacked`.
Letters: T steps, B batch rows, I inputs, H hidden units, R width of h (H, or P with a projection),
D directions, G gates, N rows of packed data.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .._missing import built, not_built
from ..call_spec import CallSpec
from ..cell_spec import Cell, exported


def _load(name: str) -> bool:
    """Loads a library into torch; False if it was not built."""
    path = built(name)
    if path is None:
        return False
    torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    return True


if not _load("_C"):
    raise ImportError(not_built("_C"))
try:
    torch.ops.rnnkern.info()
except (RuntimeError, ValueError) as error:  # RNNKERN_CPU names a level that this CPU does not have
    raise ImportError(str(error)) from None

#: Device types whose tensors the operators take. device_count() leaves CUDA uninitialised, so that
#: to import this module neither settles CUDA_VISIBLE_DEVICES nor forbids a later fork.
DEVICES = frozenset(
    {"cpu", "meta", "cuda"} if torch.cuda.device_count() and _load("_C_cuda") else {"cpu", "meta"}
)
#: Types the operators take; in half precision sums and states are float32.
DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})
#: Device types whose kernels know LSTM's projection (proj_size); elsewhere torch runs such layers.
PROJECTION = frozenset({"cpu", "cuda", "meta"})

#: The cells by id, as the library has them; `read_cells` brings those that were added since.
CELLS: list[Cell] = []
BY_MODE: dict[str, Cell] = {}
_FLAGS = (False, True)
#: Every spec there is, by its fields: to look one up costs a third of making it.
CALL_SPECS: dict[tuple[int, int, bool, bool, bool], CallSpec] = {}


def read_cells() -> None:
    """Reads the library's table of cells."""
    added = exported(torch.ops.rnnkern.cells())[len(CELLS) :]
    CELLS.extend(added)
    BY_MODE.update((cell.mode, cell) for cell in added)
    for cell in added:
        for fields in product((cell.id,), (1, 2), _FLAGS, _FLAGS, _FLAGS):
            CALL_SPECS[fields] = CallSpec(*fields)


read_cells()


def weights_per_direction(spec: CallSpec) -> int:
    """How many: (w_ih, w_hh[, b_ih, b_hh][, w_hr or params]), of a cell without W_hh
    (w_ih[, b_ih][, params]), of one whose input sums are given without w_ih and b_ih."""
    cell = CELLS[spec.cell]
    products, biases = cell.recurs + (not cell.given_sums), sum(cell.biases) * spec.bias
    return products + biases + (spec.projection or bool(cell.params))


def hidden_size(input: Tensor, weights: Sequence[Tensor], spec: CallSpec) -> int:
    """H of a layer."""
    cell = CELLS[spec.cell]
    rows = input.shape[-1] // spec.directions if cell.given_sums else weights[0].shape[0]
    return rows // len(cell.gates)


class Resets(NamedTuple):
    """Where rows of padded data in one direction get another state before a step.

    mask   bool (T, B), with batch_first (B, T)
    state  what they get: [] for zeros, else as many states as the cell has, each (D, B, ·), or one
           for each step, (D, T, B, ·), with batch_first (D, B, T, ·)
    """

    mask: Tensor
    state: Sequence[Tensor] = ()

    def to(self, dtype: torch.dtype) -> "Resets":
        """With the states in that dtype."""
        return Resets(self.mask, [s.to(dtype) for s in self.state])

    def arguments(self) -> tuple[Tensor | None, ...]:
        """(resets, reset_h, reset_c) as the operators take them."""
        return self.mask, *optional(self.state)


def step_arguments(resets: Resets | None, masks: Tensor | None) -> tuple[Tensor | None, ...]:
    """(resets, reset_h, reset_c, masks) as the operators take them, without defaults at the end."""
    own = () if resets is None else resets.arguments()
    return own if masks is None else (*(own or (None, None, None)), masks)


#: (output, h_n, c_n, saved, c_states)
forward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = (
    torch.ops.rnnkern.forward.default
)
#: (grad_input, grad_h_0, grad_c_0, grad_weights, flow_h, flow_c, grad_reset_h, grad_reset_c)
backward: Callable[
    ..., tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor, Tensor, Tensor, Tensor]
] = torch.ops.rnnkern.backward.default
#: A layer's weights as the engine multiplies by them: an opaque uint8 tensor, for this process.
prepack: Callable[..., Tensor] = torch.ops.rnnkern.prepack.default
#: (output, h_n, c_n), without a gradient
forward_prepacked: Callable[..., tuple[Tensor, Tensor, Tensor]] = (
    torch.ops.rnnkern.forward_prepacked.default
)


def info() -> dict[str, Any]:
    """What the library can do on this machine: instruction sets compiled, available and chosen."""
    found: dict[str, Any] = json.loads(torch.ops.rnnkern.info())
    return found


def plan(
    cell: int,
    steps: int,
    batch: int,
    input_size: int,
    hidden_size: int,
    proj_size: int,
    directions: int,
    element_size: int,
    backward: bool,
    threads: int,
    heads: int = 1,
) -> dict[str, Any]:
    """How the CPU engine runs one layer call: the members of `Plan` (csrc/cpu/runtime/plan.h)."""
    text = torch.ops.rnnkern.plan(
        cell, steps, batch, input_size, hidden_size, proj_size, directions, element_size, backward,
        threads, heads,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(text)
    return found


def plan_resets(steps: int, batch: int, hidden_size: int, episodes: int) -> tuple[str, str]:
    """How a call with resets runs, "mask" or "episodes" (of which there are so many), and why."""
    found: tuple[str, str] = torch.ops.rnnkern.plan_resets(steps, batch, hidden_size, episodes)
    return found


def cuda_plan(
    input: Tensor,
    cell: int,
    steps: int,
    batch: int,
    hidden_size: int,
    proj_size: int,
    directions: int,
    packed: bool,
    backward: bool,
) -> dict[str, Any]:
    """How the CUDA engine would take one layer call on the input's device."""
    text = torch.ops.rnnkern.cuda_plan(
        input, cell, steps, batch, hidden_size, proj_size, directions, packed, backward
    )
    found: dict[str, Any] = json.loads(text)
    return found


#: How torch's message begins when the memory of a GPU is at an end.
_OUT_OF_MEMORY = "CUDA out of memory"


def typed(error: RuntimeError) -> RuntimeError:
    """An operator's error with torch's type: the stable ABI carries torch's words alone."""
    if type(error) is RuntimeError and str(error).startswith(_OUT_OF_MEMORY):
        return torch.OutOfMemoryError(*error.args).with_traceback(error.__traceback__)
    return error


def _named(
    input: Any, hx: Any, weights: Sequence[Any], names: Sequence[str]
) -> Iterator[tuple[str, Any]]:
    packed = ("input", "batch_sizes", "sorted_indices", "unsorted_indices")
    given = input if isinstance(input, PackedSequence) else (input,)
    yield from zip(packed, given, strict=False)
    states = hx if isinstance(hx, (tuple, list)) else (hx,)
    yield from zip(("the state h_0", "the state c_0"), states, strict=False)
    yield from zip(names, weights, strict=False)


def check_memory(
    input: Any, hx: Any, weights: Sequence[Any] = (), names: Sequence[str] = ()
) -> None:
    """Raises RuntimeError where a tensor's storage is smaller than the tensor.

    The kernels check this themselves; torch's own operators, which some calls go to, may crash.
    What is no plain tensor in memory is not looked at.
    """
    for name, t in _named(input, hx, weights, names):
        if (
            type(t) not in (Tensor, nn.Parameter)
            or t.layout is not torch.strided
            or t.is_meta
            or not t.numel()
            or torch._C._functorch.is_functorch_wrapped_tensor(t)
        ):
            continue
        spans = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
        needed = (t.storage_offset() + spans + 1) * t.element_size()
        held = t.untyped_storage().nbytes()
        if needed > held:
            raise RuntimeError(
                f"rnnkern: the memory of {name} is not there: it needs {needed} bytes, but its "
                f"storage has {held}"
            )


def optional(state: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
    """(h_0, c_0) as the operators take them, of a state with both, one or none."""
    if len(state) > 2:
        raise RuntimeError(f"rnnkern: expected at most 2 states, got {len(state)}")
    return (*state, None, None)[:2]  # type: ignore[return-value]
