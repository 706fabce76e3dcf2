"""Memory that is not there, and memory that is at an end: 10.4 and 10.8 of the contract."""

import subprocess
import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from twins import CELLS, LAYERS, close, flat, pack

import rnnkern
import rnnkern.ops.autograd
from rnnkern.call_spec import CallSpec
from rnnkern.ops import library

WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def free(t: Tensor, part: int = 0) -> None:
    """Leaves a tensor with so many bytes of its storage."""
    t.untyped_storage().resize_(part)


class Use:
    """A module and the arguments of one call."""

    def __init__(self, name: str, *, packed: bool = False, grad: bool = True, **options: Any):
        self.module = getattr(rnnkern, name)(3, 4, **options).requires_grad_(grad)
        self.cell = name.endswith("Cell")
        directions = 1 + options.get("bidirectional", False)
        self.x = torch.randn(2, 3) if self.cell else torch.randn(5, 2, 3)
        width = options.get("proj_size", 4)
        rows = (2,) if self.cell else (directions, 2)
        self.states = [torch.randn(*rows, width), torch.randn(*rows, 4)]
        self.states = self.states[: 1 + name.startswith("LSTM")]
        if packed:
            self.packed = pack(self.x, [3, 5])
            self.x = self.packed.data

    def weight(self, name: str) -> Tensor:
        return getattr(self.module, name if self.cell else f"{name}_l0")

    def run(self) -> list[Tensor]:
        hx = tuple(self.states) if len(self.states) == 2 else self.states[0]
        return flat(self.module(getattr(self, "packed", self.x), hx))


@pytest.fixture(params=["native", "python"], autouse=True)
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "python":
        monkeypatch.setattr(rnnkern.ops.autograd, "NATIVE", None)


@pytest.mark.parametrize("part", [0, 4])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_freed_argument(name: str, grad: bool, part: int) -> None:
    """Each tensor of a call, with no memory and with too little; the message names it."""
    finds: dict[str, Callable[[Use], Tensor]] = {
        "input": lambda use: use.x,
        "h_0": lambda use: use.states[0],
        **{w: lambda use, w=w: use.weight(w) for w in WEIGHTS},
    }
    if name.startswith("LSTM"):
        finds["c_0"] = lambda use: use.states[1]
    for what, find in finds.items():
        use = Use(name, grad=grad)
        use.run()
        free(find(use), part)
        # A cell's input and states are given dimensions first, at which torch looks itself.
        with pytest.raises(RuntimeError, match=f"memory of .*{what}|setStorage"):
            use.run()


@pytest.mark.parametrize("part", [0, 8])
@pytest.mark.parametrize("name", LAYERS)
def test_freed_packed_argument(name: str, part: int) -> None:
    finds = {
        "input": lambda use: use.packed.data,
        "h_0": lambda use: use.states[0],
        "batch_sizes": lambda use: use.packed.batch_sizes,
        "sorted_indices": lambda use: use.packed.sorted_indices,
        "weight_hh": lambda use: use.weight("weight_hh"),
    }
    for what, find in finds.items():
        use = Use(name, packed=True)
        use.run()
        free(find(use), part)
        # batch_sizes is first read by torch.nn's own checks.
        with pytest.raises(RuntimeError, match=f"memory of .*{what}|setStorage"):
            use.run()


def test_freed_batch_sizes_without_a_state() -> None:
    use = Use("GRU", packed=True)
    free(use.packed.batch_sizes)
    sizes = use.packed.batch_sizes
    weights, spec = list(use.module.parameters()), CallSpec(library.BY_MODE["GRU"].id)
    with pytest.raises(RuntimeError, match="memory of batch_sizes"):
        library.forward(use.x, sizes, None, None, weights, *spec, False)


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_freed_before_backward(name: str) -> None:
    """What the forward pass saved, and what comes in from behind."""
    finds: dict[str, Callable[[Use, list[Tensor]], Tensor]] = {
        "input": lambda use, out: use.x,
        "h_0": lambda use, out: use.states[0],
        "weight_ih": lambda use, out: use.weight("weight_ih"),
        "weight_hh": lambda use, out: use.weight("weight_hh"),
    }
    if not name.endswith("Cell"):  # a cell's result is a state, which is not saved
        finds["output"] = lambda use, out: out[0].detach()
    for what, find in finds.items():
        use = Use(name)
        out = use.run()
        loss = sum(t.sum() for t in out)
        free(find(use, out))
        with pytest.raises(RuntimeError, match=f"memory of .*{what}|setStorage"):
            loss.backward()


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_freed_gradient(name: str) -> None:
    for k in range(len(Use(name).run())):
        out = Use(name).run()
        grads = [torch.ones_like(t) for t in out]
        free(grads[k])
        with pytest.raises(RuntimeError, match=r"memory of grad_|setStorage"):
            torch.autograd.backward(out, grads)


@pytest.mark.parametrize("name", LAYERS)
def test_freed_saved_values(name: str) -> None:
    """What only the kernels know of: gates and cell states."""
    freed = []

    def hook(t: Tensor) -> Tensor:
        if t.dim() == 1 and t.numel() >= 10 * 4 and t.dtype == torch.float32:  # T·B·H or more
            freed.append(t)
        return t

    use = Use(name)
    with torch.autograd.graph.saved_tensors_hooks(hook, lambda t: t):
        out = use.run()
    if name == "RNN":  # saves no gates
        assert not freed
        return
    for t in freed:
        free(t)
    with pytest.raises(RuntimeError, match=r"memory of (saved|c_states)"):
        out[0].sum().backward()


def test_freed_projection_and_second_direction() -> None:
    use = Use("LSTM", bidirectional=True, proj_size=2)
    use.run()
    for name in ("weight_hr_l0", "weight_hr_l0_reverse", "weight_hh_l0_reverse"):
        use = Use("LSTM", bidirectional=True, proj_size=2)
        free(getattr(use.module, name))
        with pytest.raises(RuntimeError, match=f"memory of {name[:9]}"):
            use.run()


@pytest.mark.parametrize("name", CELLS)
def test_freed_where_torchs_code_runs(name: str) -> None:
    """Calls that a cell hands over to torch.nn, as under autocast."""
    for what in ("input", *WEIGHTS):
        use = Use(name)
        free(use.x if what == "input" else use.weight(what))
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(RuntimeError, match=f"memory of {what}"),
        ):
            use.run()


def test_enough_memory() -> None:
    """Views into a larger storage, expanded tensors, and tensors without elements are all there."""
    layer = rnnkern.GRU(3, 4)
    expected = layer(torch.ones(5, 2, 3))
    buffer = torch.ones(31)
    close(flat(layer(buffer[1:].view(5, 2, 3))), flat(expected))
    close(flat(layer(torch.ones(1).expand(5, 2, 3))), flat(expected))
    free(buffer, 30 * 4)
    with pytest.raises(RuntimeError, match="setStorage"):  # torch makes no such view
        layer(buffer[:1].as_strided((5, 2, 3), (0, 0, 1), 28))
    assert layer(torch.ones(5, 0, 3))[0].shape == (5, 0, 4)


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_other_devices(name: str) -> None:
    """Meta and fake tensors among real ones."""
    with FakeTensorMode():
        fake = torch.empty(1)
    for device, k in product(("meta", "fake"), range(1 + name.startswith("LSTM"))):
        use = Use(name)
        state = use.states[k]
        use.states[k] = state.to("meta") if device == "meta" else fake.fake_mode.from_tensor(state)
        with pytest.raises(Exception, match=r"device|fake|Fake"):
            use.run()
    for what in WEIGHTS:
        use = Use(name)
        attribute = what if use.cell else f"{what}_l0"
        setattr(use.module, attribute, nn.Parameter(use.weight(what).to("meta")))
        with pytest.raises(RuntimeError, match="device"):
            use.run()


@pytest.mark.parametrize(("bias", "given"), [(True, False), (False, True)])
def test_the_wrong_weight_is_named(bias: bool, given: bool) -> None:
    """One weight of a wrong shape is the one that the message names."""
    shapes = {"weight_ih": (16, 3), "weight_hh": (16, 4)}
    shapes |= {"bias_ih": (16,), "bias_hh": (16,)} if bias else {}
    state = library.optional([torch.zeros(1, 2, 4)] * 2 if given else [])
    spec = CallSpec(library.BY_MODE["LSTM"].id, bias=bias)
    for wrong, shape in product(shapes, ((20, 5), (16, 5), (20, 4), (17, 3), (20,))):
        if len(shape) != len(shapes[wrong]):
            continue
        weights = [torch.zeros(shape if k == wrong else s) for k, s in shapes.items()]
        with pytest.raises(RuntimeError, match=f"rnnkern: {wrong} must have the sizes"):
            library.forward(torch.zeros(5, 2, 3), None, *state, weights, *spec, False)


PROGRAM = """
import itertools, resource, torch, rnnkern
layers = rnnkern.LSTM(1, 64), rnnkern.GRU(1, 64)
hungry = torch.zeros(2000, 2000, 1)
for layer in layers:
    layer(hungry[:2, :2])
in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + (64 << 20),) * 2)
for layer, grad in itertools.product(layers, (True, False)):
    with torch.set_grad_enabled(grad):
        try:
            layer(hungry)
        except RuntimeError as error:
            assert type(error) is RuntimeError, type(error)
            print(error.args[0])
for layer in layers:
    layer(hungry[:2, :2])[0].sum().backward()
print("went on")
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a limit of address space")
def test_out_of_memory() -> None:
    """torch's words, by which accelerate and Lightning know it; the process goes on."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    *messages, last = done.stdout.splitlines()
    assert last == "went on"
    words = "DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    assert sum(words in m for m in messages) == 4, done.stdout


def test_absurd_sizes() -> None:
    """Expanded inputs that fit nowhere: in the layer's own results and in torch's copies."""
    for layer in (rnnkern.GRU(1, 64), rnnkern.LSTM(2, 64)):
        x = torch.zeros(1, 1, layer.input_size).expand(1 << 20, 1 << 20, -1)
        with pytest.raises(RuntimeError, match="DefaultCPUAllocator: can't allocate memory"):
            layer(x)
    x = torch.zeros(1, 1, 1).expand(1 << 20, 1 << 20, 2)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator: can't allocate memory"):
        layer(x)


def test_out_of_memory_on_a_gpu_has_torchs_type(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "CUDA out of memory. Tried to allocate 20.00 MiB."

    def fail(*args: Any) -> None:
        raise RuntimeError(words)

    monkeypatch.setattr(rnnkern.ops.autograd, "NATIVE", None)
    use = Use("GRU")
    out = use.run()
    monkeypatch.setattr(library, "backward", fail)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        out[0].sum().backward()
    monkeypatch.setattr(library, "forward", fail)
    for grad in (True, False):
        with (
            torch.set_grad_enabled(grad),
            pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"),
        ):
            use.run()
