"""check: an added cell's kernels against autograd of its step, in float64."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..call_spec import CallSpec
from ..cell_spec import Cell
from ..nn.added import AddedLayer
from ..ops import decomposition, library
from ..ops.autograd import layer_call
from ..ops.decomposition import Step

#: Of the largest value of a result. Sums of so few terms err a thousandth of it.
_TOLERANCE = 1e-10


@dataclass(frozen=True)
class _Call:
    """One call of a layer with random sizes and values."""

    cell: Cell
    seed: int

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)

    @property
    def heads(self) -> int:
        return 1 + self.seed % 4

    def tensors(
        self,
    ) -> tuple[CallSpec, Tensor | None, list[tuple[str, Tensor]], Tensor | None]:
        """The spec, batch_sizes of packed data, the named input, states and weights, and masks."""
        steps, batch, inputs, hidden = (int(n) for n in torch.randint(1, 24, (4,)))
        if self.seed % 3 == 0:
            batch += 80  # blocks of rows
        if self.cell.recurrent == "heads":
            hidden *= self.heads
        two, bias, packed, given = (bool(flag) for flag in torch.randint(0, 2, (4,)))
        spec = CallSpec(self.cell.id, 2 if two else 1, bias)
        lengths = torch.randint(1, steps + 1, (batch,)).sort(descending=True).values
        sizes = torch.stack([(lengths > t).sum() for t in range(int(lengths[0]))])
        rows = (int(sizes.sum()),) if packed else (steps, batch)
        if self.cell.given_sums:
            inputs = spec.directions * len(self.cell.gates) * hidden
        leaves = [("input", torch.randn(*rows, inputs))]
        if given:  # positive: a state may be what a cell divides by
            others = (len(self.cell.states) - 1) * hidden
            widths = (hidden, others) if others else (hidden,)
            names = ("h_0", "c_0")
            leaves += [
                (name, torch.rand(spec.directions, batch, width) + 0.5)
                for name, width in zip(names, widths, strict=False)
            ]
        for direction in range(spec.directions):
            leaves += self._weights(inputs, hidden, bias, "_reverse" * direction)
        kinds = len(self.cell.masks)
        masks = torch.rand(spec.directions, *rows, kinds, hidden) if kinds else None
        return spec, sizes if packed else None, leaves, masks

    def _weights(
        self, inputs: int, hidden: int, bias: bool, suffix: str
    ) -> Iterator[tuple[str, Tensor]]:
        rows = len(self.cell.gates) * hidden
        heads, recurrent = self.heads, self.cell.recurrent
        if not self.cell.given_sums:
            yield f"weight_ih{suffix}", torch.randn(rows, inputs) / inputs**0.5
        if recurrent == "dense":
            yield f"weight_hh{suffix}", torch.randn(rows, hidden) / hidden**0.5
        elif recurrent == "heads":
            units = hidden // heads
            yield f"weight_hh{suffix}", torch.randn(heads, rows // heads, units) / units**0.5
        if bias and self.cell.biases[0]:
            yield f"bias_ih{suffix}", torch.randn(rows)
        if bias and self.cell.biases[1]:
            yield f"bias_hh{suffix}", torch.randn(rows)
        if self.cell.params:
            yield f"params{suffix}", torch.randn(len(self.cell.params), hidden)


def check(
    layer: type[AddedLayer],
    step: Step | None = None,
    calls: int = 12,
    device: torch.device | str = "cpu",
) -> float:
    """Checks a layer class of `load`: its outputs, final states and every gradient, in float64.

    They are compared with autograd of the cell's step in torch's operations, on calls with random
    sizes, with and without bias, initial states, packing and a second direction.

    step    the step to compare with; if None, that which `load` was given
    calls   how many
    device  "cuda" checks the CUDA kernels

    Returns the largest error, relative to the largest value of its result. Raises AssertionError
    that names the first result that is wrong, ValueError where there is no step, RuntimeError on a
    device for which the cell has no kernels.

    >>> rnnkern.cells.check(Mine)
    3.1e-15
    """
    cell = library.BY_MODE[layer.own.mode]
    step = step or decomposition.step_of(cell.mode)
    if step is None:
        raise ValueError(f"{layer.own.name} has no step to compare with: check(layer, step)")
    with torch.random.fork_rng(devices=() if device == "cpu" else None):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            return max(_worst(_Call(cell, seed), step, device) for seed in range(calls))
        finally:
            torch.set_default_dtype(default)


def _worst(call: _Call, step: Step, device: torch.device | str) -> float:
    """The largest relative error of a call."""
    spec, batch_sizes, named, masks = call.tensors()
    names = [name for name, _ in named]
    values = [value.to(device) for _, value in named]
    masks = None if masks is None else masks.to(device)
    states = sum(name in ("h_0", "c_0") for name in names)
    results = []
    for run in (layer_call, partial(decomposition.layer, step=step)):
        leaves = [v.clone().requires_grad_() for v in values]
        arguments = leaves[0], batch_sizes, leaves[1 : 1 + states], leaves[1 + states :]
        outputs = run(*arguments, spec, masks=masks)
        torch.manual_seed(call.seed)
        torch.autograd.backward(outputs, [torch.randn_like(o) for o in outputs])
        found: dict[str, Tensor | None] = {}
        found.update(zip(("output", "h_n", "c_n"), outputs, strict=False))
        found |= {f"the gradient of {n}": v.grad for n, v in zip(names, leaves, strict=True)}
        results.append(found)
    with torch.no_grad():
        untrained = layer_call(values[0], batch_sizes, values[1 : 1 + states],
                               values[1 + states :], spec, masks=masks)  # fmt: skip
        results[0]["output in inference"], results[1]["output in inference"] = (
            untrained[0],
            results[1]["output"],
        )
    return max(_error(name, results[0][name], truth, spec) for name, truth in results[1].items())


def _error(name: str, found: Tensor | None, truth: Tensor | None, spec: CallSpec) -> float:
    if truth is None:
        truth = torch.zeros(())
    if found is None:
        found = torch.zeros_like(truth)
    size = max(1.0, truth.detach().abs().max().item())
    error = (found - truth).detach().abs().max().item() / size
    if not error <= _TOLERANCE:
        shape = tuple(found.shape)
        raise AssertionError(
            f"{name} {shape} differs from the step's by {error:.1e} of its largest value "
            f"({spec.directions} directions, bias={spec.bias}): "
            + ("backward and step disagree" if "gradient" in name else "forward and step disagree")
        )
    return error
