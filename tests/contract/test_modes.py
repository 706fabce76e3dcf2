"""Dropout, dtypes, autocast, threads and processes: sections 5 and 6 of the contract."""

import os
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from twins import CELLS, LAYERS, agree, close, flat, loss, pack, same_error, state, twins

import rnnkern
from rnnkern import precision

HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_dropout_masks_are_torchs(name: str, batch_first: bool) -> None:
    """The very masks that torch.nn draws, and the generator left where torch.nn leaves it."""
    pair = twins(name, 3, 4, 3, dropout=0.4, batch_first=batch_first, bidirectional=True)
    x = torch.ones(5, 6, 3)
    ends = []

    def run(m: nn.Module, x: Any) -> Any:
        out = m(x)
        ends.append(torch.get_rng_state())
        return out

    for data in (x, pack(x, [5, 3, 4, 1, 5] if batch_first else [5, 3, 4, 1, 5, 2], batch_first)):
        agree(pair, lambda m: run(m, data))  # noqa: B023
        assert torch.equal(ends[-1], ends[-2])
    layer = pair[1]
    assert not torch.equal(flat(layer(x))[0], flat(layer(x))[0])


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_draws_nothing(name: str) -> None:
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match="non-zero dropout expects"):
        single = twins(name, 3, 4, 1, dropout=0.5)[1]
    off, evaluated = twins(name, 3, 4, 2)[1], twins(name, 3, 4, 2, dropout=0.5)[1].eval()
    torch.set_rng_state(before)
    for layer in (single, off, evaluated):
        layer(torch.ones(5, 2, 3))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_of_a_live_module(name: str) -> None:
    pair = twins(name, 3, 4, 2, dropout=0.5)
    x = torch.ones(5, 2, 3)
    for p in (0.0, 1.0, 0.25):
        for module in pair:
            module.dropout = p
        agree(pair, lambda m: m(x))
    for module in pair:
        module.batch_first = True
    agree(pair, lambda m: m(x))


@pytest.mark.parametrize("name", LAYERS + CELLS)
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """No further from the float32 module than torch's own half module is, plus a rounding."""
    cell = name in CELLS
    wide = getattr(rnnkern, name)(3, 4)
    x = torch.randn(2, 3) if cell else torch.randn(5, 2, 3)
    expected = [*flat(wide(x)), *torch.autograd.grad(loss(wide(x)), list(wide.parameters()))]
    errors = []
    for package in (nn, rnnkern):
        module = getattr(package, name)(3, 4).to(dtype)
        module.load_state_dict(wide.state_dict())
        out = module(x.to(dtype))
        got = [*flat(out), *torch.autograd.grad(loss(out), list(module.parameters()))]
        assert all(t.dtype == dtype for t in got)
        errors.append([(g.float() - e).abs().max() for g, e in zip(got, expected, strict=True)])
    eps = torch.finfo(dtype).eps
    for torchs, ours, e in zip(*errors, expected, strict=True):
        assert ours <= 1.5 * torchs + 4 * eps * e.abs().max()


def outcome(
    module: nn.Module, args: tuple[Any, ...], dtype: torch.dtype
) -> list[torch.dtype] | None:
    """The dtypes of a call's results under autocast; None if it is refused."""
    with torch.autocast("cpu", dtype):
        try:
            return [t.dtype for t in flat(module(*args))]
        except (RuntimeError, ValueError):
            return None


def onednn_has_bfloat16() -> bool:
    mkldnn = torch.backends.mkldnn
    return mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("name", "extra"), [*((n, {}) for n in LAYERS + CELLS), ("LSTM", {"proj_size": 2})]
)
def test_autocast_dtypes(name: str, extra: dict[str, int], packed: bool) -> None:
    """bfloat16 autocast gives the dtypes that torch.nn gives, irregular as they are.

    Its LSTM on padded input is oneDNN's, which turns all but float64 to bfloat16. On a CPU whose
    oneDNN has no bfloat16, torch.nn refuses some of these calls and takes its other path, with
    other dtypes, for the rest; ours are the same on every CPU.
    """
    cell = name in CELLS
    elsewhere = name == "LSTM" and not (extra or packed or onednn_has_bfloat16())
    if cell and packed:
        pytest.skip("cells take no packed sequences")
    kinds = (torch.float32, torch.bfloat16, torch.float64)
    for weight in kinds:
        pair = twins(name, 3, 4, dtype=weight, **extra)
        for kind in kinds:
            for hidden in (None, *kinds):
                x = torch.ones(2, 3, dtype=kind) if cell else torch.ones(5, 2, 3, dtype=kind)
                shape = (2, 4) if cell else (1, 2, 4)
                hx = None if hidden is None else state(name, *shape, dtype=hidden)
                if extra and hx is not None:
                    hx = (hx[0][..., :2], hx[1])
                args = (pack(x, [5, 3]) if packed else x, hx)
                theirs, ours = (outcome(m, args, torch.bfloat16) for m in pair)
                if elsewhere and torch.float64 not in (weight, kind, hidden):
                    theirs = [torch.bfloat16] * 3
                assert ours == theirs, (weight, kind, hidden)


@pytest.mark.parametrize("hidden", [None, torch.float16, torch.float32])
@pytest.mark.parametrize("name", LAYERS)
def test_autocast_of_float16_input(name: str, hidden: torch.dtype | None) -> None:
    """float16 autocast of float16 input, where torch.nn's LSTM leaves oneDNN and follows hx."""
    hx = None if hidden is None else state(name, 1, 2, 4, dtype=hidden)
    args = (torch.ones(5, 2, 3, dtype=torch.float16), hx)
    theirs, ours = (outcome(m, args, torch.float16) for m in twins(name, 3, 4))
    assert ours == theirs


@pytest.mark.parametrize("library", ["C++", "Python"])
@pytest.mark.parametrize("name", LAYERS)
def test_autocast_casts_a_weight_once(
    name: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All calls in a block share one cast of each matrix; the next block has casts of its own."""
    if library == "Python":
        monkeypatch.setattr(precision, "NATIVE", None)
    layer = getattr(rnnkern, name)(6, 8)
    x = torch.randn(1, 2, 6, requires_grad=True)
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        if t.shape == layer.weight_hh_l0.shape and t.dtype == torch.bfloat16:
            kept.append(t)
        return t

    places = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                hx = state(name, 1, 2, 8, dtype=torch.bfloat16)
                results = [layer(x, hx) for _ in range(3)]
            places.append({t.data_ptr() for t in kept})
    assert len(kept) >= 6
    assert len(places[0]) == 1
    assert len(places[1]) == 2
    loss(results[0]).backward()
    assert layer.weight_hh_l0.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_autocast_values(name: str, dtype: torch.dtype) -> None:
    """Near the float32 values, gradients in each leaf's dtype, and no cast kept from before."""
    module = getattr(rnnkern, name)(3, 4)
    x = torch.randn(2, 3) if name in CELLS else torch.randn(5, 2, 3)
    for _ in range(2):
        x = x.detach().requires_grad_()
        expected = torch.autograd.grad(loss(module(x)), [x, *module.parameters()])
        with torch.autocast("cpu", dtype):
            out = module(x)
            with torch.autocast("cpu", enabled=False):
                close(flat(module(x)), flat(module(x.detach())), 0)
        got = torch.autograd.grad(loss([t.float() for t in flat(out)]), [x, *module.parameters()])
        assert all(g.dtype == torch.float32 for g in got)
        close(flat([t.float() for t in flat(out)]), flat(module(x)), 0.03)
        close(got, expected, 0.1)
        with torch.no_grad():
            for p in module.parameters():
                p.mul_(1.5)


@pytest.mark.parametrize("name", LAYERS)
def test_python_threads(name: str) -> None:
    """One module, many threads, forward and backward."""
    layer = getattr(rnnkern, name)(8, 16, 2)
    xs = [torch.randn(7, 3, 8, requires_grad=True) for _ in range(6)]
    expected = [torch.autograd.grad(loss(layer(x)), x)[0] for x in xs]
    found: list[list[Tensor]] = [[] for _ in xs]

    def work(k: int) -> None:
        for _ in range(5):
            found[k].append(torch.autograd.grad(loss(layer(xs[k])), xs[k])[0])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for grads, e in zip(found, expected, strict=True):
        assert len(grads) == 5
        close(grads, [e] * 5, 1e-6)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_forked_worker() -> None:
    """A DataLoader's worker may use a layer after the parent has used its threads."""
    layer = rnnkern.LSTM(64, 128)
    x = torch.randn(20, 32, 64)
    with torch.no_grad():
        expected = layer(x)[0]
        dataset = _Rows(layer, x)
        for batch in torch.utils.data.DataLoader(
            dataset, batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60
        ):
            close([batch], [expected], 1e-6)


# What torch itself spreads over its threads would hang in the child: sums, comparisons, poison.
FORKED = """
import os, signal, sys
import numpy, torch, rnnkern
torch.set_num_threads(2)
layer, x, weight = rnnkern.LSTM(128, 256), torch.randn(20, 32, 128), torch.randn(20, 32, 256)

def results():
    y = layer(x)[0]
    return [t.detach().numpy() for t in (y, *torch.autograd.grad(y, layer.parameters(), weight))]

expected = results()
for _ in range(2):  # a child, and its child
    if child := os.fork():
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    signal.alarm(60)  # should it hang
    assert all(map(numpy.array_equal, results(), expected))
    assert torch.get_num_threads() == 2
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_fork_after_use() -> None:
    """A child runs large layers, in which torch.nn's hang: its pool has lost its threads."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED]
    clean = {name: value for name, value in os.environ.items() if name != "RNNKERN_POISON"}
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


class _Rows(torch.utils.data.Dataset[Tensor]):
    def __init__(self, layer: nn.Module, x: Tensor) -> None:
        self.layer, self.x = layer, x

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        if index >= len(self):
            raise IndexError
        with torch.no_grad():
            return self.layer(self.x)[0]


@pytest.mark.compiler
def test_settings_are_left_alone() -> None:
    import torch._dynamo

    def settings() -> tuple[Any, ...]:
        return (
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.backends.mkldnn.enabled,
            torch._dynamo.config.allow_rnn,
            torch.is_autocast_enabled("cpu"),
        )

    before = settings()
    layer = rnnkern.GRU(3, 4, 2)
    loss(layer(torch.ones(5, 2, 3))).backward()
    torch.compile(layer, backend="eager", fullgraph=True)(torch.ones(5, 2, 3))
    assert settings() == before


@pytest.mark.parametrize(
    ("name", "extra"), [*((n, {}) for n in LAYERS), ("LSTM", {"proj_size": 2})]
)
def test_meta_and_fake(name: str, extra: dict[str, Any]) -> None:
    """Shapes, dtypes and strides without data, forward and backward."""
    from torch._subclasses import FakeTensorMode

    for batch_first in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            options = {"batch_first": batch_first, "bidirectional": True} | extra
            real = getattr(rnnkern, name)(3, 4, 2, dtype=dtype, **options)
            results = flat(real(torch.ones(2, 5, 3, dtype=dtype)))

            def same(module: nn.Module, x: Tensor) -> None:
                got = module(x)
                for g, r in zip(flat(got), results, strict=True):  # noqa: B023
                    assert (g.shape, g.dtype, g.stride()) == (r.shape, r.dtype, r.stride())
                flat(got)[0].sum().backward()
                for p in module.parameters():
                    assert p.grad.shape == p.shape
                assert x.grad is None or x.grad.stride() == x.stride()

            meta = getattr(rnnkern, name)(3, 4, 2, dtype=dtype, device="meta", **options)
            same(meta, torch.ones(2, 5, 3, dtype=dtype, device="meta"))
            with FakeTensorMode():
                fake = getattr(rnnkern, name)(3, 4, 2, dtype=dtype, **options)
                same(fake, torch.ones(2, 5, 3, dtype=dtype))
    same_error(twins(name, 3, 4, device="meta"), lambda m: m(torch.ones(5, 2, 4, device="meta")))


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_modes_see_the_call(name: str) -> None:
    """TorchFunctionMode, TorchDispatchMode and device contexts, with unchanged results."""
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    class Dispatches(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    module = getattr(rnnkern, name)(3, 4)
    x = torch.ones(2, 3) if name in CELLS else torch.ones(5, 2, 3)
    expected = flat(module(x))
    for mode in (Functions, Dispatches):
        seen.clear()
        with mode():
            close(flat(module(x)), expected, 0)
        assert any("rnnkern" in s for s in seen)
    with torch.device("meta"):
        close(flat(module(x)), expected, 0)
