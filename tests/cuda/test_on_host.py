"""The CUDA engine without a GPU: its host code as it is, its kernels thread by thread on the CPU.

The layers' own tests run here once more, with these operators in the place of the CPU engine's.
What this cannot show is what only a GPU does: the launch itself, streams, and the rounding of its
matrix products. test_gpu.py is for that.
"""

import json
from itertools import product

import hypothesis.strategies as st
import pytest
import test_properties
import torch
from cases import (
    BEYOND_CLUSTERS,
    CELLS,
    IN_A_BLOCK,
    PERSISTENT,
    TABLE,
    Case,
    check,
    results,
)
from hypothesis import given
from judging import judge
from profiles import examples
from simulated import random_cases
from test_properties import (  # noqa: F401
    test_gradcheck,
    test_not_finite,
    test_partial_gradients,
    test_strides,
)
from torch.nn.functional import linear

import rnnkern
import rnnkern.ops.library
from rnnkern.call_spec import CallSpec
from rnnkern.ops import decomposition

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.sources("csrc"),
    pytest.mark.timeout(600),  # compiling takes minutes where the machine is busy
]


@pytest.fixture(autouse=True)
def _simulated(simulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # The CPU's matrix products may round by where their operands begin in memory.
    monkeypatch.setattr(test_properties, "assert_same_bits", torch.testing.assert_close)


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_table(case: Case) -> None:
    judge(case).assert_as_good_as_torch()


CHUNKED = [
    *(Case(cell, T=7, B=5, bidirectional=True, hx=True, dtype=torch.float64) for cell in CELLS),
    Case("LSTM", T=9, B=8, packed=True, bidirectional=True, dtype=torch.float64),
    Case("GRU", T=9, B=8, packed=True, batch_first=True, dtype=torch.float64),
]


@pytest.mark.parametrize("case", CHUNKED, ids=str)
def test_chunks(case: Case) -> None:
    """In however many chunks a call is taken, its results are the same."""
    found = []
    for sums in (1, 3 * case.B * 4 * case.H, 1 << 26):
        torch.ops.rnnkern_cuda_on_host.set_chunk(sums)
        found.append(results(case, rnnkern))
    for other in found[:2]:
        torch.testing.assert_close(other, found[2], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_chunks_of_halves(dtype: torch.dtype) -> None:
    """Weight gradients are added up in float32: 256 chunks err no more than one."""
    case = Case("LSTM", T=256, B=2, H=4, dtype=dtype)
    truth = results(case, torch.nn, torch.float64)
    errors = []
    for sums in (1, 1 << 26):
        torch.ops.rnnkern_cuda_on_host.set_chunk(sums)
        found = results(case, rnnkern)
        errors.append(max((found[k] - truth[k]).abs().max().item() for k in found if "weight" in k))
    assert errors[0] <= 1.1 * errors[1]


GROUPS = ("block", "clusters", "grid")
ON_CHIP = [
    *(("block", case) for case in IN_A_BLOCK),
    *(("clusters", case) for case in PERSISTENT),
    *(("grid", case) for case in (*PERSISTENT, *BEYOND_CLUSTERS)),
]


@pytest.mark.parametrize(("persistent", "case"), ON_CHIP, ids=str, indirect=["persistent"])
def test_persistent(persistent: str, case: Case) -> None:
    before = torch.ops.rnnkern_cuda_on_host.persistent_launches()
    judge(case).assert_as_good_as_torch()
    assert torch.ops.rnnkern_cuda_on_host.persistent_launches() >= before + 2


@pytest.mark.parametrize("persistent", GROUPS, indirect=True)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_persistent_in_any_order(persistent: str, cell: str, dtype: torch.dtype) -> None:
    """The bits do not depend on the order of threads and on the latency of messages, also where a
    persistent launch ends with a chunk."""
    H = 100 if persistent == "block" else 150
    case = Case(cell, T=13, B=10, H=H, bidirectional=True, packed=True, hx=True, dtype=dtype)
    found = []
    for seed in range(6):
        torch.ops.rnnkern_cuda_on_host.set_persistent(persistent, seed)
        found.append(results(case, rnnkern))
    for other in found[1:]:
        assert all(torch.equal(other[name], value) for name, value in found[0].items())


@examples(100)
@given(
    case=random_cases(bidirectional=st.booleans(), packed=st.booleans()),
    group=st.sampled_from(GROUPS),
    seed=st.integers(0, 1000),
)
def test_persistent_at_random(case: Case, group: str, seed: int) -> None:
    """The persistent and the stepwise engine agree to rounding, for random sizes."""
    found = []
    torch.ops.rnnkern_cuda_on_host.set_chunk(1 << 26)
    for kernels in (group, "steps"):
        torch.ops.rnnkern_cuda_on_host.set_persistent(kernels, seed)
        found.append(results(case, rnnkern))
    torch.ops.rnnkern_cuda_on_host.set_persistent("steps", 0)
    close = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[case.dtype]
    for name, value in found[0].items():
        distance = (value - found[1][name]).norm() / found[1][name].norm().clamp(min=1e-3)
        assert distance <= close, name


@pytest.mark.parametrize("persistent", GROUPS, indirect=True)
@pytest.mark.parametrize("cell", CELLS)
def test_persistent_leaves_the_same(persistent: str, cell: str) -> None:
    """Saved values, cell states and flows are those of the stepwise engine, too."""
    layer = Case(cell, I=3, H=60, bidirectional=True, batch_first=True).layer(rnnkern)
    weights = [p.detach() for p in layer.parameters()]
    x, dy = torch.randn(6, 5, 3), torch.randn(6, 5, 120)
    spec = CallSpec(CELLS.index(cell), 2, batch_first=True)
    found = []
    for kernels in (persistent, "steps"):
        torch.ops.rnnkern_cuda_on_host.set_persistent(kernels, 1)
        output, _, _, saved, c_states = rnnkern.ops.library.forward(
            x, None, None, None, weights, *spec, True
        )
        *_, flow_h, flow_c, _, _ = rnnkern.ops.library.backward(
            dy, None, None, x, None, None, None, weights, output, saved, c_states, *spec, 7, True
        )
        found.append([saved, c_states, flow_h, flow_c])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("persistent", GROUPS, indirect=True)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_persistent_not_finite(persistent: str, cell: str, value: float) -> None:
    """What is not finite spreads as in the stepwise engine: whatever the exchange does to it."""
    layer = Case(cell, I=3, H=60).layer(rnnkern)
    x, dy = torch.randn(9, 10, 3), torch.randn(9, 10, 60)
    dy[6, 2, 17] = value
    found = []
    for kernels in (persistent, "steps"):
        torch.ops.rnnkern_cuda_on_host.set_persistent(kernels, 1)
        leaves = [x.clone().requires_grad_(), *layer.parameters()]
        gradients = torch.autograd.grad(layer(leaves[0])[0], leaves, dy)
        found.append([g.isfinite() for g in gradients])
    assert not found[0][0][:7, 2].any()
    assert found[0][0][7:].all()
    for ours, expected in zip(*found, strict=True):
        assert torch.equal(ours, expected)


def test_plan(persistent: str) -> None:
    """Which sizes get the persistent engine, and which the stepwise one."""

    def plan(dtype: torch.dtype, hidden_size: int, *more: object, steps: int = 9) -> dict:
        arguments = (
            torch.zeros(1, dtype=dtype),
            CELLS.index("LSTM"),
            steps,
            20,
            hidden_size,
            *more,
        )
        return json.loads(torch.ops.rnnkern_cuda_on_host.cuda_plan(*arguments))

    steps = {"schedule": "steps"}
    found = plan(torch.bfloat16, 512, 0, 2, False, True)
    assert found["schedule"] == "clusters"
    assert [found[k] for k in ("blocks", "groups", "rows")] == [16, 3, 8]
    assert found["directions_at_once"]
    assert not plan(torch.bfloat16, 512, 0, 2, True, False)["directions_at_once"]
    assert plan(torch.float64, 512, 0, 1, False, False) == steps
    assert plan(torch.bfloat16, 512, 256, 1, False, False) == steps
    assert plan(torch.bfloat16, 1024, 0, 1, False, False) == steps
    assert plan(torch.bfloat16, 512, 0, 2, False, False, steps=2) == steps
    torch.ops.rnnkern_cuda_on_host.set_persistent("grid", 0)
    found = plan(torch.float16, 1024, 0, 1, False, False)
    assert [found[k] for k in ("schedule", "blocks", "groups", "rows")] == ["grid", 64, 2, 16]
    assert plan(torch.float32, 1040, 0, 1, False, False) == steps
    torch.ops.rnnkern_cuda_on_host.set_persistent("block", 0)
    found = plan(torch.float32, 64, 0, 1, False, False)
    assert [found[k] for k in ("schedule", "blocks", "groups", "rows")] == ["block", 1, 3, 8]
    assert plan(torch.float32, 65, 0, 1, False, False) == steps


def test_launches() -> None:
    """It is these kernels that run: one per step each way, two backward with a projection."""
    for P, expected in ((0, 2), (3, 3)):
        case = Case("LSTM", T=7, bidirectional=True, proj=P, batch_first=True)
        layer, x = case.layer(rnnkern), case.inputs()[0]
        torch.ops.rnnkern_cuda_on_host.set_chunk(1 << 26)
        before = torch.ops.rnnkern_cuda_on_host.launches()
        layer(x)[0].sum().backward()
        assert torch.ops.rnnkern_cuda_on_host.launches() - before == 2 * 7 * expected


SIZES = (1, 2, 31, 33, 255, 257, 65_535, 65_537, 2**24 + 1, 2**31, 2**33 + 5, 2**40)


def test_grid_limits() -> None:
    """Every grid is one that CUDA takes, and is as large as the work, or its limit, asks for."""
    for rows, units in product(SIZES, SIZES):
        blocks_x, blocks_y, threads_x, threads_y = torch.ops.rnnkern_cuda_on_host.grid(rows, units)
        assert threads_x * threads_y == 256
        assert 1 <= blocks_x <= 2**31 - 1
        assert 1 <= blocks_y <= 65_535
        assert blocks_x == 65_536 or (blocks_x - 1) * threads_x < units <= blocks_x * threads_x
        assert blocks_y == 65_535 or (blocks_y - 1) * threads_y < rows <= blocks_y * threads_y


@pytest.mark.parametrize("cell", CELLS)
def test_large_grids(cell: str) -> None:
    """More units and more rows than a block has threads for."""
    check(Case(cell, T=2, B=67, I=3, H=33, bidirectional=True))
    check(Case(cell, T=2, B=3, I=70, H=300))


def test_long_sequence() -> None:
    """More steps than a CUDA grid can have blocks in its second dimension."""
    x = torch.randn(66_000, 1, 1)
    layer = rnnkern.RNN(1, 1).requires_grad_(False)
    reference = torch.nn.RNN(1, 1)
    reference.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), reference(x))


@pytest.mark.parametrize(("cell", "P"), [*((cell, 0) for cell in CELLS), ("LSTM", 2)])
def test_flow(cell: str, P: int) -> None:
    """The derivatives by h_t and c_t, against autograd through single steps."""
    T, B, I, H = 5, 3, 2, 4
    kind = rnnkern.ops.library.BY_MODE[cell]
    G, R = len(kind.gates), P or H
    shapes = [(G * H, I), (G * H, R), (G * H,), (G * H,), *([(P, H)] if P else [])]
    weights = [torch.randn(shape).double() for shape in shapes]
    w_ih, w_hh, b_ih, b_hh, *w_hr = (w.clone().requires_grad_() for w in weights)
    x, dy = torch.randn(T, B, I).double(), torch.randn(T, B, R).double()
    state, h, c = [torch.zeros(B, R).double(), torch.zeros(B, H).double()], [], []
    for t in range(T):
        sums = linear(x[t], w_ih, b_ih), linear(state[0], w_hh, b_hh)
        state = list(decomposition._STEPS[cell](*sums, *state[: len(kind.states)]))
        state[0] = linear(state[0], *w_hr) if P else state[0]
        h.append(state[0])
        c += state[1:]
    expected = torch.autograd.grad(h + c, h + c, [*dy, *(torch.zeros_like(c_t) for c_t in c)])
    spec = CallSpec(kind.id, projection=P > 0)
    output, _, _, saved, c_states = rnnkern.ops.library.forward(
        x, None, None, None, weights, *spec, True
    )
    *gradients, flow_h, flow_c, _, _ = rnnkern.ops.library.backward(
        dy, None, None, x, None, None, None, weights, output, saved, c_states, *spec, 0, True
    )
    torch.testing.assert_close(flow_h[0], torch.cat(expected[:T]))
    if c:
        torch.testing.assert_close(flow_c[0], torch.cat(expected[T:]))
    assert flow_c.numel() == (T * B * H if c else 0)
    assert all(len(g) == 0 for g in gradients)


def test_no_result_is_a_view() -> None:
    """Views made inside a custom function could not be changed in place."""
    x = torch.randn(2, 5, 3, requires_grad=True)
    for result in rnnkern.GRU(3, 4, batch_first=True)(x):
        result[0] = 0
        result.detach_()
    rnnkern.GRU(3, 4, batch_first=True)(x)[0].sum().backward()
    assert not x.grad._is_view()


def test_freed_memory() -> None:
    for which in ("input", "h_0", "weight_hh", "bias_ih"):
        layer = rnnkern.GRU(3, 4)
        x, h = torch.randn(5, 2, 3), torch.randn(1, 2, 4)
        freed = {"input": x, "h_0": h}.get(which, getattr(layer, f"{which}_l0", None))
        freed.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match=f"memory of .*{which}"):
            layer(x, h)


def test_out_of_memory() -> None:
    """torch's own words come through."""
    x = torch.zeros(1, 1, 1).expand(1 << 20, 1 << 20, 1)
    with pytest.raises(RuntimeError, match="can't allocate memory: you tried to allocate"):
        rnnkern.GRU(1, 64)(x)


def test_autocast() -> None:
    """Autocast acts on a layer as a whole, not on the products inside the operators."""
    weights = [torch.randn(12, 5), torch.randn(12, 4), torch.randn(12), torch.randn(12)]
    spec = CallSpec(CELLS.index("GRU"))
    arguments = (torch.randn(6, 3, 5), None, None, None, weights, *spec, True)
    expected = rnnkern.ops.library.forward(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        found = rnnkern.ops.library.forward(*arguments)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_sums_are_float32() -> None:
    """1 + 2^-10 - 1 is 0 if a sum is rounded to bfloat16 on its way, and 2^-10 if it is not."""
    layer = rnnkern.RNN(2, 1, nonlinearity="relu", dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight_ih_l0.fill_(1)
        layer.bias_ih_l0.fill_(-1)
        layer.bias_hh_l0.zero_()
        output, _ = layer(torch.tensor([[[1, 2**-10]]], dtype=torch.bfloat16))
    assert output.item() == 2**-10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 2)}, "dimensions"),
        ({"cell": 999}, "no cell"),
        ({"x": torch.zeros(3, 2, 5)}, "weight_ih must have the sizes 8 5, got 8 4"),
        ({"x": torch.zeros(3, 2, 4, dtype=torch.float64)}, "differ in dtype"),
        ({"x": torch.zeros(0, 2, 4)}, "larger than 0"),
        ({"state": [torch.zeros(1, 2, 2)]}, "expected 2 states"),
        ({"batch_sizes": torch.tensor([1, 2]), "x": torch.zeros(3, 4)}, "must not grow"),
        ({"batch_sizes": torch.tensor([2, 2]), "x": torch.zeros(3, 4)}, "add up to 4"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    given = {"x": torch.zeros(3, 2, 4), "batch_sizes": None, "state": [], "cell": 0} | change
    weights = [torch.zeros(8, 4), torch.zeros(8, 2)]
    state = rnnkern.ops.library.optional(given["state"])
    spec = CallSpec(given["cell"], bias=False)
    arguments = (given["x"], given["batch_sizes"], *state, weights, *spec)
    with pytest.raises(RuntimeError, match=message):
        rnnkern.ops.library.forward(*arguments, False)
