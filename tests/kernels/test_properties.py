"""Properties of the fused kernels themselves, over sizes, strides, threads and instruction sets."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import CELLS, Case, call, results
from judging import check
from processes import python
from torch import Tensor

import rnnkern
from rnnkern.call_spec import CallSpec
from rnnkern.ops.autograd import layer_call
from rnnkern.ops.library import BY_MODE

SIZES = [*range(1, 11), *(2**n + d for n in (4, 5, 6, 7) for d in (-1, 0, 1))]
SPLITS = [  # few rows and many units, many rows and few units, and tails in both
    Case("LSTM", T=9, B=1, I=40, H=200, hx=True),
    Case("LSTM", T=9, B=67, I=5, H=19, bidirectional=True),
    Case("GRU", T=9, B=2, I=40, H=150, bidirectional=True),
    Case("GRU", T=9, B=67, I=5, H=19, packed=True),
    Case("RNN_TANH", T=9, B=5, I=40, H=130, packed=True, bidirectional=True),
    Case("RNN_RELU", T=9, B=40, I=33, H=17),
    Case("LSTM", T=9, B=1, I=40, H=200, proj=130, hx=True),
    Case("LSTM", T=9, B=67, I=5, H=29, proj=19, packed=True, bidirectional=True),
    Case("LSTM", T=9, B=2, I=40, H=200, proj=150, bidirectional=True),
]
BLOCKS = [  # a large batch of a small layer goes backward in blocks of rows
    Case("LSTM", T=9, B=150, I=5, H=19, packed=True, bidirectional=True, hx=True),
    Case("GRU", T=5, B=300, I=33, H=17, batch_first=True),
    Case("RNN_TANH", T=9, B=145, I=70, H=40, packed=True, hx=True),
    Case("RNN_RELU", T=2, B=433, I=1, H=16, bidirectional=True),
    Case("LSTM", T=4, B=300, I=6, H=29, proj=19, packed=True, hx=True),
    # many units, whose gate gradients stand in blocks of columns
    Case("LSTM", T=9, B=5, I=70, H=128, packed=True, bidirectional=True, hx=True),
    Case("LSTM", T=9, B=5, I=7, H=128, proj=70),
    Case("GRU", T=9, B=3, I=5, H=192, hx=True),
    Case("RNN_TANH", T=7, B=33, I=140, H=256),
]
PAIRS = [  # even sizes, so that bfloat16 is multiplied as it is where the processor can
    Case("LSTM", T=9, B=151, I=6, H=18, packed=True, bidirectional=True, hx=True),
    Case("GRU", T=5, B=301, I=34, H=18, batch_first=True),
    Case("RNN_RELU", T=2, B=433, I=2, H=16, bidirectional=True),
    Case("LSTM", T=9, B=5, I=70, H=256, packed=True, bidirectional=True),
    Case("GRU", T=9, B=3, I=6, H=384, hx=True),
    Case("RNN_TANH", T=7, B=33, I=140, H=256),
    Case("LSTM", T=6, B=37, I=70, H=100, hx=True),  # matrix registers, and some depth left over
    Case("GRU", T=5, B=20, I=96, H=150, bidirectional=True),
    Case("LSTM", T=1, B=7, I=70, H=160, hx=True),
]
LARGE = [
    Case("LSTM", T=5, B=33, I=70, H=256, hx=True),
    Case("GRU", T=5, B=70, I=290, H=275, packed=True, bidirectional=True),
    Case("RNN_TANH", T=20, B=64, I=3, H=320, batch_first=True),
    Case("RNN_RELU", T=3, B=150, I=256, H=264),
    # single steps, whose weights are read as they lie
    Case("LSTM", T=1, B=16, I=170, H=325, hx=True),
    Case("GRU", T=1, B=45, I=300, H=304, hx=True, bidirectional=True),
]
HALF = torch.bfloat16


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.every_level
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("letter", "TBIH")
@pytest.mark.parametrize("cell", CELLS)
def test_sizes(cell: str, letter: str, size: int) -> None:
    check(Case(cell, **({"T": 3, "B": 3, "I": 3, "H": 3} | {letter: size})))


@pytest.mark.slow  # all of them together
@pytest.mark.every_level
@pytest.mark.bfloat16
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("letter", "TBIH")
@pytest.mark.parametrize("cell", CELLS)
def test_sizes_of_pairs(cell: str, letter: str, size: int) -> None:
    size *= 2 if letter in "IH" else 1
    check(Case(cell, dtype=HALF, **({"T": 3, "B": 3, "I": 4, "H": 4} | {letter: size})))


@pytest.mark.every_level
@pytest.mark.parametrize("size", SIZES)
def test_sizes_of_a_projection(size: int) -> None:
    check(Case("LSTM", T=3, B=3, I=3, H=size + 3, proj=size))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize(("cell", "R"), [*((cell, 3) for cell in CELLS), ("LSTM", 2)])
def test_gradcheck(cell: str, R: int, directions: int, packed: bool) -> None:
    """The analytical gradient of one layer call against finite differences, in float64."""
    kind = BY_MODE[cell]
    G, T, B, I, H = len(kind.gates), 4, 3, 2, 3
    batch_sizes = torch.tensor([3, 2, 2, 1]) if packed else None
    x = torch.randn(8, I) if packed else torch.randn(T, B, I)
    state = [
        torch.randn(directions, B, width) for _, width in zip(kind.states, (R, H), strict=False)
    ]
    weights = [torch.randn(G * H, I), torch.randn(G * H, R), torch.randn(G * H), torch.randn(G * H)]
    weights += [torch.randn(R, H)] if R < H else []
    leaves = [t.double().requires_grad_() for t in (x, *state, *weights * directions)]
    n = 1 + len(state)
    spec = CallSpec(kind.id, directions, projection=R < H)

    def layer(*leaves: Tensor) -> tuple[Tensor, ...]:
        outputs = layer_call(leaves[0], batch_sizes, leaves[1:n], leaves[n:], spec)
        return outputs[:n]

    assert torch.autograd.gradcheck(layer, leaves, fast_mode=False)


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("cell", "P"), [*((cell, 0) for cell in CELLS), ("LSTM", 5)])
def test_strides(cell: str, P: int, batch_first: bool, dtype: torch.dtype) -> None:
    """Inputs, states and gradients that are slices, transposes or expansions of other tensors."""
    even = dtype is HALF
    case = Case(
        cell, B=6, I=7 + even, H=9 + even, proj=P, batch_first=batch_first, hx=True, dtype=dtype
    )
    layer = case.layer(rnnkern)
    x, states = case.inputs()
    wide = torch.full((*x.shape[:2], 2 * case.I + 1), torch.nan, dtype=dtype)
    every_second, rows = wide[..., : 2 * case.I : 2].copy_(x), wide[..., : case.I]
    across = x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    strided = [s.transpose(1, 2).contiguous().transpose(1, 2) for s in states]

    def outcome(x: Tensor, states: list[Tensor], expanded: bool) -> dict[str, Tensor]:
        x = x.detach().requires_grad_()
        layer.zero_grad()
        output, final = call(case, layer, x, states)
        grad = output.new_ones(()).expand_as(output)
        output.backward(grad if expanded else grad.contiguous())
        named = {k: p.grad for k, p in layer.named_parameters()}
        return named | {"output": output, "h_n": final[0], "grad": x.grad}

    plain = outcome(x, states, False)
    assert_same_bits(plain, outcome(every_second, strided, True))
    assert_same_bits(plain, outcome(across, strided, False))
    assert_same_bits(plain, outcome(rows.copy_(x), states, True))


@pytest.mark.every_level
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize(("cell", "P"), [*((cell, 0) for cell in CELLS), ("LSTM", 17)])
def test_not_finite(cell: str, P: int, value: float, dtype: torch.dtype) -> None:
    """A NaN or infinity stays in its row, from its time step on, and does there what torch does."""
    even = dtype is HALF
    case = Case(cell, T=6, B=5, I=3 + even, H=19 + even, proj=P, dtype=dtype)
    x, _ = case.inputs()
    clean, _ = case.layer(rnnkern)(x)
    x[2, 3, 1] = value
    ours, _ = case.layer(rnnkern)(x)
    theirs, _ = case.layer(torch.nn)(x)
    near = 0.03 if even else 1e-5
    torch.testing.assert_close(ours, theirs, rtol=near, atol=near, equal_nan=True)
    rows = [0, 1, 2, 4]
    assert torch.equal(ours[:, rows], clean[:, rows])
    assert torch.equal(ours[:2], clean[:2])
    if value != value:
        assert ours[2, 3].isnan().any()


@pytest.mark.every_level
@pytest.mark.parametrize("name", ["output", "input", "weight_hh_l0"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3.4e38, 1e-39], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_of_the_outermost(cell: str, value: float, name: str) -> None:
    """NaN, infinity, the largest and the smallest numbers, in a gradient or in a factor of it."""
    case = Case(cell, T=2, B=24, I=5, H=256)
    found = []
    for package in (rnnkern, torch.nn):
        layer = case.layer(package)
        x, _ = case.inputs()
        dy = torch.full((case.T, case.B, case.H), 0.01)
        place = {"output": dy, "input": x, "weight_hh_l0": layer.weight_hh_l0.data}[name]
        place.view(-1)[3] = value
        output, _ = layer(x.requires_grad_())
        leaves = [x, *layer.parameters()]
        found.append(torch.autograd.grad(output, leaves, dy))
        if cell == "GRU":  # which infinities meet in it is a matter of how its equations are put
            found[-1] = [torch.where(g.isinf(), torch.nan, g) for g in found[-1]]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.bfloat16
def test_rounding_to_bfloat16() -> None:
    """To the nearest, of two as near to the even one: 1 to 2 in steps of 1/256 of the spacing."""
    exact = 1 + torch.arange(2**15) / 2**15
    upper = exact.to(HALF)
    x = torch.stack([upper, (exact - upper.float()).to(HALF)], -1)
    layer = rnnkern.RNN(2, 2, nonlinearity="relu", bias=False, dtype=HALF)
    torch.nn.init.ones_(layer.weight_ih_l0)
    with torch.no_grad():
        assert torch.equal(layer(x[None])[0][0], upper[:, None].expand(-1, 2))


@pytest.mark.bfloat16
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_states_of_bfloat16(name: str) -> None:
    """They are carried on in float32: each step adds less than bfloat16 can tell."""
    layer = getattr(rnnkern, name)(2, 2, dtype=HALF)
    with torch.no_grad():
        for p in layer.parameters():
            torch.nn.init.zeros_(p)
        first, keep, new = layer.bias_ih_l0.view(-1, 2)[:3]
        first.fill_(-7 if name == "LSTM" else 0)  # the input gate, or the reset gate
        keep.fill_(7)
        new.fill_(1)
        x = torch.zeros(1000, 3, 2)
        wide = copy.deepcopy(layer).double()
        torch.testing.assert_close(
            layer(x.to(HALF))[0].double(), wide(x.double())[0], rtol=torch.finfo(HALF).eps, atol=0
        )


@pytest.mark.every_level
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("hidden", [6, 65, 200])
@pytest.mark.parametrize(
    ("cell", "projected"), [*((cell, False) for cell in CELLS), ("LSTM", True)]
)
def test_batch_invariance(cell: str, projected: bool, hidden: int, dtype: torch.dtype) -> None:
    """A row's results are the same bits alone, in any batch, and among rows of other lengths."""
    I, P = 74 if hidden == 200 else 12, projected * hidden // 2
    case = Case(cell, T=7, B=37, I=I, H=hidden, proj=P, bidirectional=True, dtype=dtype)
    layer = case.layer(rnnkern).requires_grad_(False)
    x, _ = case.inputs()
    whole, state = layer(x)
    final = state[0] if case.has_c else state
    for begin, end in [(0, 1), (17, 18), (36, 37), (0, 2), (5, 12), (0, 36)]:
        part, _ = layer(x[:, begin:end])
        assert torch.equal(part, whole[:, begin:end]), (begin, end)
    lengths = [1 + row % case.T for row in range(case.B)]
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    ragged, state = layer(packed)
    padded, _ = torch.nn.utils.rnn.pad_packed_sequence(ragged, total_length=case.T)
    for row, length in enumerate(lengths):
        alone, alone_state = layer(x[:length, row : row + 1])
        assert torch.equal(padded[:length, row], alone[:, 0]), row
        alone_final = alone_state[0] if case.has_c else alone_state
        assert torch.equal((state[0] if case.has_c else state)[:, row], alone_final[:, 0]), row
    assert final.shape == (2, case.B, case.R)


@pytest.mark.every_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, HALF], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_batch_invariance_of_single_steps(cell: str, dtype: torch.dtype) -> None:
    """The same bits whether weights that fill no cache are read for a row or for many."""
    case = Case(cell, T=1, B=37, I=210, H=700, hx=True, dtype=dtype)
    layer = case.layer(rnnkern).requires_grad_(False)
    x, _ = case.inputs()
    whole, _ = layer(x)
    for begin, end in [(0, 1), (3, 8), (20, 29), (0, 36)]:
        part, _ = layer(x[:, begin:end])
        assert torch.equal(part, whole[:, begin:end]), (begin, end)


@pytest.mark.every_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, HALF], ids=str)
@pytest.mark.parametrize("case", [*BLOCKS, *PAIRS, *LARGE], ids=str)
def test_blocks(case: Case, dtype: torch.dtype) -> None:
    check(replace(case, dtype=dtype))


@pytest.mark.every_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, HALF], ids=str)
@pytest.mark.parametrize("case", [*SPLITS, *BLOCKS, *PAIRS, *LARGE], ids=str)
def test_thread_invariance(case: Case, dtype: torch.dtype) -> None:
    """Results and gradients are the same bits on any number of threads, and on every run."""
    case = replace(case, dtype=dtype)
    torch.set_num_threads(1)
    single = results(case, rnnkern)
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        assert_same_bits(single, results(case, rnnkern))


@pytest.mark.parametrize("cell", CELLS)
def test_one_long_sequence(cell: str) -> None:
    """One sequence has more steps than all others together, of a batch that goes in blocks."""
    layer, plain = (Case(cell, I=6, H=18).layer(package) for package in (rnnkern, torch.nn))
    sequences = [torch.randn(1, 6) for _ in range(149)] + [torch.randn(160, 6)]
    packed = torch.nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False)
    expected = plain(packed)[0].data
    expected.sin().sum().backward()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        layer.zero_grad()
        output = layer(packed)[0].data
        output.sin().sum().backward()
        torch.testing.assert_close(output, expected)
        for own, other in zip(layer.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_busy_machine() -> None:
    """The bits stay the same while other processes keep every core busy and teams shrink."""
    torch.set_num_threads(2)
    quiet = [results(case, rnnkern) for case in SPLITS]
    spin = [sys.executable, "-c", "while True: pass"]
    burners = [subprocess.Popen(spin) for _ in range(os.cpu_count() or 1)]
    try:
        for _ in range(5):
            for case, expected in zip(SPLITS, quiet, strict=True):
                assert_same_bits(expected, results(case, rnnkern))
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("case", [*SPLITS, *PAIRS], ids=str)
def test_inference_is_training(case: Case, dtype: torch.dtype) -> None:
    """What a call returns does not depend on whether a gradient will be asked for."""
    case = replace(case, dtype=dtype)
    layer = case.layer(rnnkern)
    x, states = case.inputs()
    trained, _ = call(case, layer, x, states)
    with torch.inference_mode():
        inferred, _ = call(case, layer, x, states)
    assert torch.equal(trained, inferred)


@pytest.mark.parametrize("case", [*SPLITS, *BLOCKS], ids=str)
def test_partial_gradients(case: Case) -> None:
    """Each gradient is the same bits when it is the only one asked for."""
    layer = case.layer(rnnkern)
    x, states = case.inputs()
    leaves = [x.requires_grad_(), *(s.requires_grad_() for s in states), *layer.parameters()]
    output, _ = call(case, layer, leaves[0], leaves[1 : 1 + len(states)])
    weight = torch.randn_like(output)
    together = torch.autograd.grad(output, leaves, weight, retain_graph=True)
    for leaf, expected in zip(leaves, together, strict=True):
        (alone,) = torch.autograd.grad(output, [leaf], weight, retain_graph=True)
        assert torch.equal(alone, expected)


LEVELS = json.loads(torch.ops.rnnkern.info())["available"]


@pytest.mark.levels
@pytest.mark.timeout(600)  # 50 s of processor time, on a machine that may be busy
@pytest.mark.skipif("RNNKERN_CPU" in os.environ, reason="a level is already forced")
@pytest.mark.parametrize("level", LEVELS[:-1])
def test_lower_levels(level: str) -> None:
    """The table, the sizes, the invariances, resets and prepacked weights once more at each lower
    instruction set, a third of the parameters at each level, other ones at the next; where it is
    another one's with native bfloat16, of what runs in bfloat16. The level is chosen when the
    library loads: in a process of its own."""
    chosen = "bfloat16" if level.endswith(("_bf16", "_amx")) else "every_level"
    part = f"{LEVELS.index(level) % 3}/3"
    command = [sys.executable, "-m", "pytest", "-q", "-m", chosen, "--part", part]
    done = subprocess.run(
        [*command, "test_layers.py", "test_properties.py", "test_resets.py", "../realtime"],
        cwd=Path(__file__).parent,
        env=os.environ | {"RNNKERN_CPU": level},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.every_level
@pytest.mark.bfloat16
def test_forced_level() -> None:
    """RNNKERN_CPU forces the level down; without it the highest one runs."""
    assert json.loads(torch.ops.rnnkern.info())["isa"] == os.environ.get("RNNKERN_CPU", LEVELS[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("home", "level"),
    [("rnnkern.ops", "AVX2"), ("rnnkern.numpy", "avx1024"), ("rnnkern.numpy", "")],
)
def test_unknown_level(home: str, level: str) -> None:
    """A level that this CPU does not have is an error at once, which names those that it has."""
    done = python("-c", f"import {home}", env=os.environ | {"RNNKERN_CPU": level})
    assert (done.returncode == 0) == (level == "")
    if level:
        assert f"ImportError: RNNKERN_CPU={level} is no level of this CPU" in done.stderr
        assert ", ".join(LEVELS) in done.stderr


def test_plan() -> None:
    """Many rows are split by rows over all threads; a single step reads unpacked weights."""
    layer = rnnkern.LSTM(64, 256, batch_first=True)
    many = rnnkern.plan(layer, torch.zeros(600, 50, 64), training=True)
    assert (many["threads"] > 1) == (torch.get_num_threads() > 1)
    assert many["split"] == "rows"
    one = rnnkern.plan(rnnkern.LSTM(8, 16), torch.zeros(1, 1, 8))
    assert one["unpacked_weights"]
    assert one["threads"] == 1
    assert one["rule"]["input"] == "few steps"
    assert one["rule"].keys() == {"threads", "split", "input", "weights", "wgrad"}


def test_plan_counts_the_projection() -> None:
    """Its weights are read at every step, and narrow those of the recurrence."""
    x = torch.zeros(50, 40, 64)
    split = {P: rnnkern.plan(rnnkern.LSTM(64, 512, proj_size=P), x)["split"] for P in (0, 16, 500)}
    shared = "units" if torch.get_num_threads() > 1 else "rows"
    assert split == {0: shared, 16: "rows", 500: shared}
