"""Resets inside a sequence by the CUDA kernels, on the simulated chip.

Against torch.nn in float64, as kernels/test_resets.py has it. Halves are compared between the
engines, whose roundings differ, and with float64 by norms.
"""

import hypothesis.strategies as st
import pytest
import torch
from cases import CELLS, Case
from hypothesis import given
from profiles import examples
from reset_calls import FORMS, assert_close, assert_near, mask, reset_states, results
from simulated import random_cases
from test_resets import expected, test_refusals_of_the_operator  # noqa: F401
from torch import Tensor

import rnnkern
import rnnkern.nn.resets
from rnnkern.call_spec import CallSpec
from rnnkern.ops import library

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.sources("csrc"),
    pytest.mark.timeout(600),  # compiling takes minutes where the machine is busy
]
F64, BF16, FP16 = torch.float64, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def _by_mask(simulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every mask goes to the kernels, whatever is in it, as on a GPU."""
    monkeypatch.setattr(rnnkern.nn.resets, "choose_way", lambda *_: ("mask", ""))


def launches() -> tuple[int, int]:
    """Of the stepwise and of the persistent engine."""
    ops = torch.ops.rnnkern_cuda_on_host
    return ops.launches(), ops.persistent_launches()


def check(case: Case, form: str, resets: Tensor) -> None:
    exact = expected(case, resets, form, ends=False)
    assert_near(case, results(case, resets, form, rnnkern), exact, f"{case}, {form}")


CASES = [
    case
    for cell in CELLS
    for case in (
        Case(cell, T=9, B=4, hx=True),
        Case(cell, T=12, B=5, hx=True, L=2, batch_first=True),
        Case(cell, T=9, B=4, dtype=F64, bias=False),
        Case(cell, T=3, B=67, H=33, hx=True),
        Case(cell, T=1, B=4, hx=True),
    )
] + [
    Case("LSTM", T=9, B=4, H=8, proj=3, hx=True, L=2, batch_first=True),
    Case("LSTM", T=9, B=4, H=8, proj=3, dtype=F64),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_stepwise(case: Case, form: str) -> None:
    check(case, form, mask(case))


ON_CHIP = [
    case
    for cell in CELLS
    for case in (
        Case(cell, T=9, B=5, H=20, hx=True),
        Case(cell, T=8, B=9, H=150, batch_first=True),
        Case(cell, T=6, B=3, H=300, hx=True),
    )
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ON_CHIP, ids=str)
def test_persistent(persistent: str, case: Case, form: str) -> None:
    before = launches()
    check(case, form, mask(case))
    assert launches()[1] == before[1] + 2


def special_masks(case: Case) -> dict[str, Tensor]:
    """By name, time-major."""
    nowhere = torch.zeros(case.T, case.B, dtype=torch.bool)
    found = {name: nowhere.clone() for name in ("nowhere", "first step", "last step", "one row")}
    found["first step"][0, 1:3] = True
    found["last step"][-1, ::2] = True
    found["one row"][:, 1] = True
    return found | {"everywhere": ~nowhere}


@pytest.mark.parametrize("which", ["nowhere", "first step", "last step", "one row", "everywhere"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_special_masks(cell: str, form: str, which: str) -> None:
    ops = torch.ops.rnnkern_cuda_on_host
    cases = [Case(cell, T=8, B=5, H=20, hx=hx) for hx in (True, False)]
    cases += [Case(cell, T=8, B=5, H=20, proj=3)] if cell == "LSTM" else []
    for case in cases:
        for kernels in ("steps", "block", "clusters", "grid"):
            ops.set_persistent(kernels, 0)
            check(case, form, special_masks(case)[which])
    ops.set_persistent("steps", 0)


@pytest.mark.parametrize("steps", [1, 4, 7])
@pytest.mark.parametrize("cell", CELLS)
def test_launches_that_follow_each_other(persistent: str, cell: str, steps: int) -> None:
    """Resets at the steps where a chunk, and with it a launch, begins."""
    case = Case(cell, T=16, B=5, H=20, hx=True)
    gates = len(library.BY_MODE[cell].gates) + (cell == "GRU")
    torch.ops.rnnkern_cuda_on_host.set_chunk(steps * case.B * gates * case.H)
    for form in FORMS:
        for resets in (mask(case), mask(case, 1.0)):
            check(case, form, resets)


@examples(100)
@given(
    case=random_cases(batch_first=st.booleans()),
    form=st.sampled_from(FORMS),
    density=st.floats(0, 1),
    group=st.sampled_from(("block", "clusters", "grid")),
    seed=st.integers(0, 1000),
)
def test_at_random(case: Case, form: str, density: float, group: str, seed: int) -> None:
    """Both engines agree to rounding, for random sizes and masks; in float32 the smooth cells with
    float64 too: of a few products in half precision, which may cancel, too little is left."""
    ops = torch.ops.rnnkern_cuda_on_host
    ops.set_chunk(1 << 26)
    resets, found = mask(case, density, seed), []
    for kernels in (group, "steps"):
        ops.set_persistent(kernels, seed)
        found.append(results(case, resets, form, rnnkern))
    ops.set_persistent("steps", 0)
    assert_close(case, *found, f"{case}, {form}")
    if case.dtype == torch.float32 and case.cell != "RNN_RELU":  # whose units rounding turns off
        exact = expected(case, resets, form, ends=False)
        assert_close(case, found[0], exact, f"{case}, {form}, float64")


@pytest.mark.parametrize("persistent", ["clusters", "grid"], indirect=True)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16], ids=str)
def test_in_any_order(persistent: str, cell: str, dtype: torch.dtype) -> None:
    """The bits do not depend on the order of threads and on the latency of messages."""
    case = Case(cell, T=11, B=10, H=150, hx=True, dtype=dtype)
    found = []
    for seed in range(4):
        torch.ops.rnnkern_cuda_on_host.set_persistent(persistent, seed)
        found.append(results(case, mask(case), "row", rnnkern))
    for other in found[1:]:
        assert all(torch.equal(other[name], value) for name, value in found[0].items())


@pytest.mark.parametrize("proj", [0, 2])
def test_gradients_one_by_one(proj: int) -> None:
    """Each kind of gradient alone, against all of them at once."""
    case = Case("LSTM", T=7, B=3, proj=proj, hx=True)
    layer, (x, state) = case.layer(rnnkern), case.inputs()
    weights = [p.detach() for p in layer.parameters()]
    spec = CallSpec(0, projection=proj > 0)
    resets = (mask(case), *reset_states(case, "position"))
    output, _, _, saved, c_states = library.forward(x, None, *state, weights, *spec, True, *resets)
    dy = case.normal(50, *output.shape)

    def gradients(needs: int) -> list[Tensor]:
        dx, dh, dc, of_weights, flow_h, flow_c, *of_reset = library.backward(
            dy, None, None, x, None, *state, weights, output, saved, c_states, *spec, needs, False,
            *resets,
        )  # fmt: skip
        assert not flow_h.numel()
        assert not flow_c.numel()
        return [dx, dh, dc, *of_weights, *of_reset]

    wanted = gradients(15)
    assert all(g.abs().sum() > 0 for g in wanted)
    kinds = [1, 2, 2, *[4] * len(weights), 8, 8]
    for needs in (1, 2, 4, 8):
        found = gradients(needs)
        found[3:3] = [x.new_empty(0)] * (len(wanted) - len(found))
        for kind, alone, of_all in zip(kinds, found, wanted, strict=True):
            assert torch.equal(alone, of_all) if kind == needs else not alone.numel()


@pytest.mark.parametrize("cell", CELLS)
def test_both_engines_leave_the_same(persistent: str, cell: str) -> None:
    """Saved values, cell states and flows; the latter end at a reset."""
    case = Case(cell, T=6, B=5, I=3, H=70)
    layer, x = case.layer(rnnkern), case.inputs()[0]
    weights, dy = [p.detach() for p in layer.parameters()], torch.randn(6, 5, 70)
    spec, resets = CallSpec(CELLS.index(cell)), mask(case)
    resets[-1] = True
    found = []
    for kernels in (persistent, "steps"):
        torch.ops.rnnkern_cuda_on_host.set_persistent(kernels, 1)
        output, _, _, saved, c_states = library.forward(
            x, None, None, None, weights, *spec, True, resets
        )
        *_, flow_h, flow_c, _, _ = library.backward(
            dy, None, None, x, None, None, None, weights, output, saved, c_states, *spec, 7, True,
            resets,
        )  # fmt: skip
        found.append([saved, c_states, flow_h, flow_c])
        assert torch.equal(flow_h[0, -10:-5], dy[-2])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_any_strides() -> None:
    """A mask and states after resets whose rows are not neighbours in memory."""
    case = Case("LSTM", T=7, B=4, hx=True)
    layer, (x, state) = case.layer(rnnkern), case.inputs()
    resets, fresh = mask(case), reset_states(case, "position")
    wanted, _ = layer(x, tuple(state), resets, tuple(fresh))
    resets = torch.stack([resets.T, ~resets.T], -1)[..., 0].T
    fresh = [torch.stack([f, -f], -1)[..., 0].transpose(1, 2).contiguous() for f in fresh]
    found, _ = layer(x, tuple(state), resets, tuple(f.transpose(1, 2) for f in fresh))
    assert torch.equal(found, wanted)


def test_stepwise_launches() -> None:
    """One kernel per step and pass, as without resets, and one for each tensor at the first."""
    case = Case("LSTM", T=7, B=3, hx=True)
    torch.ops.rnnkern_cuda_on_host.set_chunk(1 << 26)
    before = launches()
    results(case, mask(case), "row", rnnkern)
    # launch_reset for h and c, launch_end_gradients, launch_add for dh_0
    assert launches()[0] - before[0] == 2 * 7 + 2 + 1 + 1
