"""The layers on a GPU: the same table of cases, and what only a GPU has: streams, graphs, grids."""

import os
from collections.abc import Iterator
from itertools import product

# cuBLAS asks for it when torch is to be deterministic; read when its first handle is made.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import own_cell_calls
import pytest
import reset_calls
import torch
from cases import (
    BEYOND_CLUSTERS,
    CELLS,
    IN_A_BLOCK,
    PERSISTENT,
    TABLE,
    Case,
    Judged,
    Results,
    results,
)
from judging import judge_halves
from reset_calls import FORMS, assert_close, mask
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import rnnkern
import rnnkern.ops.library
from rnnkern import own_cell_cuda
from rnnkern.call_spec import CallSpec

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a torch built for it"
    ),
    # torch says so once, when the first product of all is one of autograd's thread.
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),
]
HALVES = (torch.bfloat16, torch.float16)
KINDS = [*({"cell": cell} for cell in CELLS), {"cell": "LSTM", "proj": 24}]
PADDED = [Case(**kind, T=9, B=5, I=6, H=40, bidirectional=True, hx=True) for kind in KINDS]
ON_CHIP = [*PERSISTENT, *IN_A_BLOCK, *BEYOND_CLUSTERS]
PACKED = [Case(**kind, T=9, B=5, I=6, H=40, bidirectional=True, packed=True) for kind in KINDS]


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """torch fills new tensors with NaN in this mode: what a kernel leaves unwritten shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def move(value: object, device: str) -> object:
    """Tensors and packed sequences, also within tuples, on another device."""
    if isinstance(value, (Tensor, PackedSequence)):
        return value.to(device)
    return tuple(move(v, device) for v in value) if isinstance(value, tuple) else value


class OnGpu:
    """rnnkern's layers as the cases use them: called with CPU tensors, computing on the GPU."""

    def __getattr__(self, name: str) -> object:
        def make(*args: object, **options: object) -> torch.nn.RNNBase:
            layer = getattr(rnnkern, name)(*args, device="cuda", **options)
            on_gpu = layer.forward
            layer.forward = lambda *args: move(on_gpu(*move(args, "cuda")), "cpu")
            return layer

        return make


def gpu_results(case: Case) -> Results:
    return {name: value.cpu() for name, value in results(case, OnGpu()).items()}


def test_built() -> None:
    assert "cuda" in rnnkern.ops.library.DEVICES
    layer = rnnkern.LSTM(3, 4, device="cuda")
    x = torch.zeros(5, 2, 3, device="cuda")
    assert rnnkern.explain(layer, x).name == "fused"
    first = os.environ.get("RNNKERN_ON_CHIP", "clusters").partition(",")[0]
    there = torch.cuda.get_device_capability() >= ((9, 0) if first == "clusters" else (8, 0))
    assert rnnkern.plan(layer, x)["schedule"] == (first if there else "steps")
    assert rnnkern.plan(layer.double(), x.double())["schedule"] == "steps"


def judge_on_gpu(case: Case) -> Judged:
    narrow = torch.float32 if case.dtype is torch.float64 else case.dtype
    ours, theirs = gpu_results(case), results(case, torch.nn, narrow)
    if case.cell == "RNN_RELU" and case.dtype.itemsize == 2:
        return judge_halves(case, ours, theirs)
    return Judged(case, ours, theirs, results(case, torch.nn, torch.float64))


@pytest.mark.parametrize("case", [*TABLE, *ON_CHIP], ids=str)
def test_table(case: Case) -> None:
    judge_on_gpu(case).assert_as_good_as_torch()


@pytest.mark.parametrize("case", [*PADDED, *PACKED, *ON_CHIP], ids=str)
def test_same_bits_twice(case: Case) -> None:
    """Two runs give the same bits: a race would show here."""
    first, second = gpu_results(case), gpu_results(case)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


# The smooth cells: ReLU units in half precision are on or off by rounding.
RESETS = [
    *(Case(**kind, T=9, B=5, I=6, H=40, hx=True) for kind in KINDS),
    Case("LSTM", T=9, B=5, H=40, L=2, batch_first=True, dtype=torch.float64),
    *(
        Case(cell, T=14, B=19, H=H, hx=True, dtype=dtype)
        for cell in CELLS[:3]
        for H, dtype in ((70, torch.float32), (300, torch.float32), *product((20, 500), HALVES))
    ),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", RESETS, ids=str)
def test_resets(case: Case, form: str) -> None:
    """Against the CPU engine in float64."""
    resets = mask(case)
    ours = {k: v.cpu() for k, v in reset_calls.results(case, resets, form, OnGpu()).items()}
    assert_close(case, ours, reset_calls.results(case, resets, form, rnnkern, torch.float64), form)


@pytest.mark.parametrize("case", RESETS, ids=str)
def test_resets_have_the_same_bits_twice(case: Case) -> None:
    first, second = (reset_calls.results(case, mask(case), "row", OnGpu()) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("case", RESETS[:6], ids=str)
def test_graph_of_resets(case: Case) -> None:
    """Nothing looks into the mask: captured once, replayed on another."""
    layer = case.layer(rnnkern).to("cuda")
    x = case.inputs()[0].to("cuda").requires_grad_()
    resets = mask(case).to("cuda")

    def run() -> list[Tensor]:
        output, _ = layer(x, None, resets)
        leaves = [x, *layer.parameters()]
        return [output, *torch.autograd.grad(output, leaves, torch.ones_like(output))]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    resets.copy_(~resets)
    graph.replay()
    assert_equal(captured, run())


class Call:
    """A forward and backward pass with everything on the GPU; `run` gives the same tensors anew."""

    def __init__(self, case: Case, device: str = "cuda") -> None:
        self.case = case
        self.layer = case.layer(rnnkern).to(device)
        x, states = case.inputs()
        self.x = x.to(device).requires_grad_()
        self.hx = tuple(s.to(device) for s in states)
        self.lengths = torch.tensor(sorted(case.lengths(), reverse=True))

    def run(self) -> list[Tensor]:
        hx = (self.hx if self.case.has_c else self.hx[0]) if self.hx else None
        x = self.x
        if self.case.packed:
            # By hand: torch's packing copies indices to the device, which is a synchronisation.
            sizes = [int((self.lengths > t).sum()) for t in range(self.case.T)]
            rows = torch.cat([self.x[t, :n] for t, n in enumerate(sizes)])
            x = PackedSequence(rows, torch.tensor(sizes))
        output, _ = self.layer(x, hx)
        output = output.data if self.case.packed else output
        leaves = [self.x, *self.layer.parameters()]
        return [output, *torch.autograd.grad(output, leaves, torch.ones_like(output))]


def assert_equal(ours: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [*PADDED, *PACKED], ids=str)
def test_nothing_waits(case: Case) -> None:
    """No call makes the host wait for the device."""
    call = Call(case)
    call.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", [*PADDED, *PACKED], ids=str)
def test_graph(case: Case) -> None:
    """Captured once, replayed on other values."""
    call = Call(case)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call.run()
    with torch.no_grad():
        call.x.mul_(-0.5)
    graph.replay()
    assert_equal(captured, call.run())


@pytest.mark.parametrize("case", PADDED, ids=str)
def test_stream(case: Case) -> None:
    """Work is put on the current stream: after what is already there, before what follows."""
    call = Call(case)
    expected = call.run()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        scrambled = call.x.detach().clone()
        call.x.data.fill_(torch.nan)
        torch.cuda._sleep(50_000_000)
        call.x.data.copy_(scrambled)
        found = call.run()
    torch.cuda.current_stream().wait_stream(side)
    assert_equal(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_other_device() -> None:
    """The tensors' device is used, not the current one."""
    assert_equal([t.cpu() for t in Call(PADDED[0], "cuda:1").run()],
                 [t.cpu() for t in Call(PADDED[0], "cuda:0").run()])  # fmt: skip
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize(("T", "B"), [(70_000, 1), (1, 300_000)])
def test_large_grids(T: int, B: int) -> None:
    """More steps, or more blocks of rows, than a grid has in its second dimension."""
    layer, reference = rnnkern.RNN(1, 4, device="cuda"), torch.nn.RNN(1, 4)
    reference.load_state_dict(layer.state_dict())
    x = torch.randn(T, B, 1)
    with torch.no_grad():
        assert_equal([layer(x.cuda())[0].cpu()], [reference(x)[0]])


@pytest.mark.parametrize("case", PADDED, ids=str)
def test_autocast(case: Case) -> None:
    """Autocast acts on the layer as a whole, not on the products inside it."""
    call = Call(case)
    x, weights = call.x.detach(), [p.detach() for p in call.layer.parameters()]
    spec = CallSpec(CELLS.index(case.cell), case.directions, case.bias, case.proj > 0)
    arguments = (x, None, None, None, weights, *spec, True)
    expected = rnnkern.ops.library.forward(*arguments)
    with torch.autocast("cuda", torch.bfloat16):
        found = rnnkern.ops.library.forward(*arguments)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", PADDED, ids=str)
def test_tf32(case: Case) -> None:
    """float32 products follow torch's setting: exact by default, tf32 where it is allowed."""
    call = Call(Case(case.cell, T=9, B=16, I=64, H=128, proj=case.proj))
    exact = call.run()
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        coarse = call.run()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert not torch.equal(exact[0], coarse[0])
    torch.testing.assert_close(exact[0], coarse[0], rtol=1e-2, atol=1e-2)


@pytest.fixture(scope="module")
def own_layers(tmp_path_factory: pytest.TempPathFactory) -> own_cell_calls.Layers:
    """Layers of cells that are not built in, each with the kernels that nvcc makes for this GPU."""
    layers = own_cell_calls.load_layers(tmp_path_factory.mktemp("headers"))
    missing = {own_cell_cuda.refusal(layer.own.mode) for layer in layers.values()} - {""}
    if missing:
        pytest.skip(missing.pop())
    return layers


@pytest.mark.parametrize("name", own_cell_calls.NAMES)
def test_own_cells(own_layers: own_cell_calls.Layers, name: str) -> None:
    """Outputs, states and every gradient, against autograd of the step on the GPU."""
    assert rnnkern.cells.check(own_layers[name], device="cuda") < 1e-11


@pytest.mark.parametrize("name", own_cell_calls.NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
def test_own_cells_leave_what_the_cpu_engine_leaves(
    own_layers: own_cell_calls.Layers, name: str, dtype: torch.dtype
) -> None:
    call = own_cell_calls.make(own_layers[name])
    truth = own_cell_calls.results(*call, torch.float64)
    found = own_cell_calls.results(*call, dtype, "cuda")
    own_cell_calls.assert_close(found, truth, dtype)
    again = own_cell_calls.results(*call, dtype, "cuda")
    for first, second in zip(found, again, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["PeepholeLSTM", "SLSTM", "SRU"])
def test_graph_of_own_cells(own_layers: own_cell_calls.Layers, name: str) -> None:
    """Nothing waits for the GPU: a call is captured and replayed on other values."""
    layer = own_layers[name](6, 40, bidirectional=True, device="cuda")
    x = torch.randn(9, 5, 6, device="cuda", requires_grad=True)

    def run() -> list[Tensor]:
        output, _ = layer(x)
        leaves = [x, *layer.parameters()]
        return [output, *torch.autograd.grad(output, leaves, torch.ones_like(output))]

    assert rnnkern.explain(layer, x).name == "fused"
    assert rnnkern.plan(layer, x)["schedule"] == "steps"
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        x.neg_()
    graph.replay()
    assert_equal(captured, run())
