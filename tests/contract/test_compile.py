"""torch.compile, torch.export, operators' checks, tracing: section 8 of the contract."""

import io
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._inductor
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from twins import CELLS, LAYERS, close, flat, loss, pack, state

import rnnkern
import rnnkern.ops.autograd
from rnnkern.call_spec import CallSpec
from rnnkern.ops import library

# Inductor's own frames and exported programs warn about deprecated parts of Python and torch.
pytestmark = [
    pytest.mark.compiler,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


def gradients(call: Any, module: nn.Module, *args: Any) -> list[Tensor]:
    out = call(*args)
    return [*flat(out), *torch.autograd.grad(loss(out), list(module.parameters()))]


@pytest.mark.parametrize(
    ("name", "input_grad", "options"),
    [
        ("LSTM", True, {}),
        ("GRU", False, {}),
        ("RNN", True, {}),
        ("LSTM", True, {"proj_size": 2}),
    ],
)
def test_compile(name: str, input_grad: bool, options: dict[str, Any]) -> None:
    """One graph, forward and backward; one recompilation when T and B first change, then none."""
    module = getattr(rnnkern, name)(3, 4, 2, bidirectional=True, batch_first=True, **options)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for batch, steps in ((2, 5), (3, 7), (4, 9), (5, 11), (6, 6)):
        x = torch.randn(batch, steps, 3, requires_grad=input_grad)
        close(gradients(compiled, module, x), gradients(module, module, x))
    assert counter.frame_count <= 2
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1)
        close(flat(compiled(x)), flat(module(x)))
    assert not torch._dynamo.config.allow_rnn


def test_compile_leaves_torchs_layers_alone() -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(nn.LSTM(3, 4), backend="eager", fullgraph=True)(torch.ones(5, 2, 3))


def test_compile_dropout() -> None:
    module = rnnkern.LSTM(3, 4, 2, dropout=0.5)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.ones(5, 2, 3)
    assert not torch.equal(compiled(x)[0], compiled(x)[0])
    module.eval()
    close(flat(compiled(x)), flat(module(x)))


@pytest.mark.parametrize(
    ("name", "given", "ordered"),
    [("LSTM", False, True), ("GRU", False, False), ("LSTM", True, False)],
)
def test_compile_packed(name: str, given: bool, ordered: bool) -> None:
    module = getattr(rnnkern, name)(3, 4, 2, bidirectional=True)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    hx = state(name, 4, 3, 4) if given else None
    for lengths in ([5, 7, 2], [6, 1, 6], [3, 3, 3]):
        x = torch.randn(max(lengths), 3, 3)
        packed = pack(x, sorted(lengths, reverse=True) if ordered else lengths)
        close(gradients(compiled, module, packed, hx), gradients(module, module, packed, hx))


@pytest.mark.parametrize("name", CELLS)
def test_compile_cells(name: str) -> None:
    module = getattr(rnnkern, name)(3, 4)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for hx in (None, state(name, 2, 4)):
        x = torch.randn(2, 3)
        close(gradients(compiled, module, x, hx), gradients(module, module, x, hx))


def test_compile_by_inductor() -> None:
    model = nn.Sequential(rnnkern.GRU(3, 4), _First(), nn.Linear(4, 2))
    x = torch.randn(5, 2, 3)
    compiled = torch.compile(model, fullgraph=True)
    close(gradients(compiled, model, x), gradients(model, model, x))
    with torch.no_grad():
        close([compiled(x)], [model(x)])


class _First(nn.Module):
    def forward(self, pair: tuple[Tensor, Any]) -> Tensor:
        return pair[0]


def test_compile_autocast_and_transforms() -> None:
    gru = rnnkern.GRU(3, 4)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def low(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return gru(x.bfloat16())[0]

    out = low(torch.randn(5, 2, 3))
    assert out.dtype == torch.bfloat16
    assert torch.autograd.grad(out.float().sum(), gru.weight_hh_l0)[0].dtype == torch.float32
    x = torch.randn(4, 5, 2, 3)
    mapped = torch.compile(torch.vmap(lambda x: gru(x)[0]), backend="aot_eager", fullgraph=True)
    close([mapped(x)], [torch.vmap(lambda x: gru(x)[0])(x)])


def test_hook_is_installed_before_dynamo_is_imported() -> None:
    """The order of a user's program: rnnkern first, Dynamo when something is first compiled."""
    code = (
        "import sys, torch, rnnkern; lstm = rnnkern.LSTM(3, 4)\n"
        "assert 'torch._dynamo.variables.builder' not in sys.modules\n"
        "f = torch.compile(lstm, backend='eager', fullgraph=True)\n"
        "f(torch.ones(5, 2, 3))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


class Model(nn.Module):
    """A layer inside a model, as exporters meet it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.rnn = getattr(rnnkern, name)(
            3, 4, 2, bidirectional=True, batch_first=True, dropout=0.1
        )
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x)
        return self.out(y)


@pytest.mark.parametrize(
    ("name", "strict"), [("LSTM", False), ("LSTM", True), ("GRU", False), ("RNN", False)]
)
def test_export(name: str, strict: bool) -> None:
    """Dynamic batch and length, saved and loaded, decomposed, unflattened."""
    model = Model(name).eval()
    sizes = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("steps")}}
    program = torch.export.export(
        model, (torch.randn(2, 5, 3),), dynamic_shapes=sizes, strict=strict
    )
    assert set(program.state_dict) == set(model.state_dict())
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("rnnkern.forward.default") == 2
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    x = torch.randn(3, 9, 3)
    for made in (program, torch.export.load(buffer), program.run_decompositions()):
        close([made.module()(x)], [model(x)])
    close(
        [torch.export.unflatten(program)(torch.randn(2, 5, 3) * 0)], [model(torch.zeros(2, 5, 3))]
    )


class WithResets(nn.Module):
    """With the ends the rows are packed by episodes; without, the kernels take the mask."""

    def __init__(self, ends: bool) -> None:
        super().__init__()
        self.lstm = rnnkern.LSTM(3, 4, 2)
        self.ends = ends

    def forward(self, x: Tensor, resets: Tensor, h: Tensor, c: Tensor) -> list[Tensor]:
        if not self.ends:
            output, state = self.lstm(x, (h, c), resets, (h[:, 0], c[:, 0]))
            return [output, *state]
        output, state, ends = self.lstm(x, (h, c), resets, (h[:, 0], c), return_ends=True)
        return [output, *state, *ends.state, ends.row, ends.step]


def resets_arguments(steps: int, batch: int, density: float) -> tuple[Tensor, ...]:
    resets = torch.rand(steps, batch) < density
    return torch.randn(steps, batch, 3), resets, *torch.randn(2, 2, batch, 4)


@pytest.mark.parametrize("ends", [False, True])
def test_compile_resets(ends: bool) -> None:
    """One graph for every mask: the number of episodes is data."""
    model = WithResets(ends)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for steps, batch, density in ((5, 2, 0.5), (7, 3, 0.2), (7, 3, 0.0), (6, 5, 1.0)):
        args = resets_arguments(steps, batch, density)
        close(compiled(*args), model(*args))
        leaves = [args[k].requires_grad_() for k in (0, 2, 3)]
        wanted = torch.autograd.grad(loss(model(*args)[:3]), leaves)
        close(torch.autograd.grad(loss(compiled(*args)[:3]), leaves), wanted)
    assert counter.frame_count <= 4


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_export_resets(strict: bool, ends: bool) -> None:
    model = WithResets(ends)
    steps, batch = (torch.export.Dim(name, min=2) for name in ("steps", "batch"))
    program = torch.export.export(
        model,
        resets_arguments(5, 2, 0.5),
        dynamic_shapes=({0: steps, 1: batch}, {0: steps, 1: batch}, {1: batch}, {1: batch}),
        strict=strict,
    )
    assert ("pack_episodes" in str(program.graph)) == ends
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    for density in (0.0, 0.3):
        args = resets_arguments(9, 4, density)
        close(torch.export.load(buffer).module()(*args), model(*args))
        buffer.seek(0)


class EveryState(nn.Module):
    """A layer of each kind of state, called without one and with one."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = rnnkern.LSTM(3, 4)
        self.gru = rnnkern.GRU(3, 4)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        return self.lstm(x)[0], self.lstm(x, (h, c))[0], self.gru(x)[0], self.gru(x, h)[0]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.timeout(600)  # inductor compiles C++, which takes minutes where the machine is busy
def test_ahead_of_time_package(tmp_path: Path) -> None:
    model = EveryState().eval()
    args = (torch.randn(5, 2, 3), torch.randn(1, 2, 4), torch.randn(1, 2, 4))
    with torch.no_grad():
        program = torch.export.export(model, args)
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2")
        )
        close(torch._inductor.aoti_load_package(package)(*args), model(*args))


@pytest.mark.filterwarnings("ignore:The tensor attributes self.rnn._flat_weights")
@pytest.mark.parametrize("strict", [False, True])
def test_onnx_exporter_meets_torchs_operators(
    strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    program = torch.export.export(Model("LSTM").eval(), (torch.randn(2, 5, 3),), strict=strict)
    assert "aten.lstm.input" in [str(node.target) for node in program.graph.nodes]


@pytest.mark.parametrize("name", LAYERS)
def test_make_fx_and_symbolic_trace(name: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    model = Model(name).eval()
    x = torch.randn(2, 5, 3)
    with torch.no_grad():
        close([make_fx(model)(x)(x)], [model(x)])
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["rnn", "out"]
    x = torch.randn(3, 7, 3)
    close([traced(x)], [model(x)], 0)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_jit(name: str) -> None:
    """TorchScript gets torch's layer on the same parameters."""
    model = Model(name).eval()
    expected = model(torch.ones(3, 7, 3))
    traced = torch.jit.trace(model, torch.randn(2, 5, 3))
    close([traced(torch.ones(3, 7, 3))], [expected])
    scripted = torch.jit.script(model)
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    for made in (scripted, torch.jit.load(buffer), torch.jit.freeze(scripted)):
        close([made(torch.ones(3, 7, 3))], [expected])


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantize_dynamic_leaves_it_alone() -> None:
    model = Model("LSTM").eval()
    x = torch.randn(2, 5, 3)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert type(quantized.rnn) is rnnkern.LSTM
    close([quantized(x)], [model(x)], 0.05)


def arguments(cell: int, grad: bool, packed: bool, **options: Any) -> tuple[Any, ...]:
    """Arguments of rnnkern::forward but for `train`."""
    directions, dtype = options.get("directions", 1), options.get("dtype", torch.float32)
    gates = (4, 3, 1, 1)[cell]
    batch_first = options.get("batch_first", False)
    x = torch.randn(5, 3) if packed else torch.randn(2, 4, 3)
    sizes = torch.tensor([2, 2, 1]) if packed else None
    batch = 2 if packed or batch_first else 4
    width = options.get("proj_size", 4)
    hidden = [torch.randn(directions, batch, n) for n in ((width, 4) if cell == 0 else (4,))]
    shapes = [(4 * gates, 3), (4 * gates, width), (4 * gates,), (4 * gates,)][: options.get("n", 4)]
    shapes += [(width, 4)] if width < 4 else []
    weights = [torch.randn(s) for _ in range(directions) for s in shapes]

    def ready(t: Tensor) -> Tensor:
        return t.to(dtype).requires_grad_(grad)

    given = library.optional([ready(h) for h in hidden] if options.get("given", True) else [])
    spec = CallSpec(cell, directions, options.get("n", 4) == 4, width < 4, batch_first)
    return ready(x), sizes, *given, [ready(w) for w in weights], *spec


OPTIONS: list[dict[str, Any]] = [
    {"directions": 2},
    {"given": False, "n": 2, "batch_first": True},
    {"dtype": torch.bfloat16},
]


@pytest.mark.parametrize("by_step", [False, True])
@pytest.mark.parametrize("cell", range(3))
def test_opcheck_resets(cell: int, by_step: bool) -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    args = arguments(cell, True, False, batch_first=by_step)
    shape = (1, 2, 4, 4) if by_step else (1, 4, 4)
    fresh = [torch.randn(shape, requires_grad=True) for _ in range(2 if cell == 0 else 1)]
    resets = torch.rand(2, 4) < 0.5, *library.optional(fresh)
    for given in (resets, resets[:1]):
        extra = ("test_aot_dispatch_dynamic",) if given is resets and not by_step else ()
        opcheck(library.forward, (*args, True, *given), test_utils=checks + extra)
    args = arguments(cell, False, False, batch_first=by_step)
    output, h_n, c_n, saved, c_states = library.forward(*args, True, *resets)
    grads = (torch.randn_like(output), torch.randn_like(h_n), torch.randn_like(c_n))
    fresh = [None if s is None else s.detach() for s in resets[1:]]
    for needs in (15, 8, 1):
        rest = (*args[:5], output, saved, c_states, *args[5:], needs, False, resets[0], *fresh)
        opcheck(library.backward, (*grads, *rest), test_utils=checks)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("options", "cell"),
    [
        *((options, cell) for options in OPTIONS for cell in range(3)),
        ({"proj_size": 2, "directions": 2}, 0),
        ({"proj_size": 3, "n": 2, "given": False, "batch_first": True}, 0),
    ],
    ids=str,
)
def test_opcheck(cell: int, packed: bool, options: dict[str, Any]) -> None:
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    sampled = options is OPTIONS[cell % 2] or "proj_size" in options
    if sampled and packed == (cell == 0):  # the slow one: a sample
        checks += ("test_aot_dispatch_dynamic",)
    for grad in (False, True):
        opcheck(
            library.forward, (*arguments(cell, grad, packed, **options), True), test_utils=checks
        )
    args = arguments(cell, False, packed, **options)
    output, h_n, c_n, saved, c_states = library.forward(*args, True)
    grads = (torch.randn_like(output), torch.randn_like(h_n), torch.randn_like(c_n))
    alone = () if packed else ((1, False), (2, False), (4, False))
    for needs, flow in ((7, True), *alone):
        rest = (*args[:5], output, saved, c_states, *args[5:], needs, flow)
        opcheck(library.backward, (*grads, *rest), test_utils=checks)


def test_opcheck_pack_episodes() -> None:
    resets = torch.rand(5, 3) < 0.5
    for batch_first in (False, True):
        opcheck(torch.ops.rnnkern.pack_episodes.default, (resets, batch_first))


def test_operator_alone() -> None:
    """Called without the layers: gradients of both orders, and without train by recomputation."""
    args = arguments(1, True, False)
    leaves = [args[0], args[2], *args[4]]
    saved, recomputed = (
        torch.autograd.grad(loss(library.forward(*args, train)[:2]), leaves)
        for train in (True, False)
    )
    close(recomputed, saved)
    first = torch.autograd.grad(loss(library.forward(*args, True)[:2]), leaves, create_graph=True)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss(first), leaves))


def test_modules_pickle_after_compile() -> None:
    lstm = rnnkern.LSTM(3, 4)
    torch.compile(lstm, backend="eager", fullgraph=True)(torch.ones(5, 2, 3))
    close(
        flat(pickle.loads(pickle.dumps(lstm))(torch.ones(5, 2, 3))), flat(lstm(torch.ones(5, 2, 3)))
    )
