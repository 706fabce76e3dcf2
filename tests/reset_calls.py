"""Calls of a layer with resets inside the sequence: masks, states after resets, results by name."""

from collections.abc import Sequence
from typing import Any

import torch
from cases import Case
from torch import Tensor, nn

FORMS = ("none", "layer", "row", "position")  # of reset_state
Named = dict[str, Tensor]


def mask(case: Case, density: float = 0.3, seed: int = 11) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    resets = torch.rand(case.T, case.B, generator=generator) < density
    return resets.T.contiguous() if case.batch_first else resets


def reset_states(case: Case, form: str) -> list[Tensor]:
    rows = {
        "layer": (),
        "row": (case.B,),
        "position": (case.B, case.T) if case.batch_first else (case.T, case.B),
    }
    if form == "none":
        return []
    widths = (case.R, case.H) if case.has_c else (case.R,)
    count = case.num_states
    return [case.normal(20 + i, count, *rows[form], w) for i, w in enumerate(widths)]


def as_hx(states: Sequence[Tensor]) -> Any:
    return None if not states else tuple(states) if len(states) > 1 else states[0]


def as_list(hx: Any) -> list[Tensor]:
    return list(hx) if isinstance(hx, tuple) else [hx]


def leaves_of(case: Case, form: str, dtype: torch.dtype) -> Named:
    x, states = case.inputs()
    named = {"x": x}
    named |= {f"hx {k}": s for k, s in enumerate(states)}
    named |= {f"fresh {k}": s for k, s in enumerate(reset_states(case, form))}
    return {name: t.to(dtype).requires_grad_() for name, t in named.items()}


def call(
    case: Case, layer: nn.RNNBase, resets: Tensor, form: str, *return_ends: bool
) -> tuple[list[Tensor], Named, list[Any]]:
    """Output and final states, the leaves of the call, and the ends, if they are asked for."""
    leaves = leaves_of(case, form, next(layer.parameters()).dtype)
    state, fresh = (
        as_hx([t for name, t in leaves.items() if name.startswith(kind)])
        for kind in ("hx", "fresh")
    )
    output, final, *ends = layer(leaves["x"], state, resets, fresh, *return_ends)
    return [output, *as_list(final)], leaves, ends


def named(case: Case, layer: nn.RNNBase, outputs: list[Tensor], leaves: Named) -> Named:
    """Every result and gradient by name, in float64."""
    loss = [case.normal(50 + i, *t.shape).to(t.dtype) for i, t in enumerate(outputs)]
    torch.autograd.backward(outputs, loss)
    found = {f"result {k}": t for k, t in enumerate(outputs)}
    for name, leaf in (*leaves.items(), *layer.named_parameters()):
        found[f"{name}.grad"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return {k: v.detach().double() for k, v in found.items()}


def results(
    case: Case, resets: Tensor, form: str, package: object, dtype: torch.dtype | None = None
) -> Named:
    """Every result and gradient of a layer out of `package`; `dtype` as in cases.results."""
    layer = case.layer(package, dtype)
    outputs, leaves, _ = call(case, layer, resets, form)
    return named(case, layer, outputs, leaves)


def assert_near(case: Case, ours: Named, exact: Named, what: str) -> None:
    """Errors of at most 200 roundings of the case's dtype, in units of the largest value."""
    assert ours.keys() == exact.keys()
    eps = torch.finfo(case.dtype).eps
    for name, value in exact.items():
        bound = 200 * eps * max(1.0, value.abs().max().item())
        worst = (ours[name] - value).abs().max().item()
        assert worst <= bound, f"{what}, {name}: error {worst:.2e}, bound {bound:.2e}"


#: How far results in a dtype are from others, by norms: between engines that round differently, and
#: from float64.
CLOSE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def assert_close(case: Case, ours: Named, other: Named, what: str) -> None:
    """Distances as in CLOSE."""
    assert ours.keys() == other.keys()
    for name, value in other.items():
        distance = (ours[name] - value).norm() / value.norm().clamp(min=1e-3)
        assert distance <= CLOSE[case.dtype], f"{what}, {name}: {distance:.1e}"
