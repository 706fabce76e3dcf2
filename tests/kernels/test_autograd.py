"""Gradients of every order and kind, and what autograd promises around them: contract section 4."""

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from installed import require_native
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.utils.checkpoint import checkpoint
from twins import CELLS, LAYERS, agree, close, flat, loss, pack, state, twins

import rnnkern
import rnnkern.ops.autograd

ALL = LAYERS + CELLS


@pytest.fixture(autouse=True, params=["C++", "Python"])
def node(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything holds on the C++ autograd node, and without the library that has it."""
    if request.param == "Python":
        monkeypatch.setattr(rnnkern.ops.autograd, "NATIVE", None)
    else:
        require_native()


def example(name: str, **kwargs: Any) -> tuple[nn.Module, Tensor]:
    """A small rnnkern module and an input for it."""
    options = {} if name in CELLS else {"num_layers": 2, "bidirectional": True}
    module = getattr(rnnkern, name)(2, 3, **options | kwargs)
    shape = (2, 2) if name in CELLS else (3, 2, 2)
    return module, torch.randn(*shape, dtype=kwargs.get("dtype"))


def functional(module: nn.Module, packed: bool = False) -> Any:
    """The module as a function of its input and all its parameters."""
    names = [n for n, _ in module.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip(names, parameters, strict=True))
        args = (pack(x, [2, 3]) if packed else x,)
        return tuple(flat(functional_call(module, values, args)))

    return call


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [*((n, {}) for n in ALL), ("LSTM", {"proj_size": 2})])
def test_gradcheck(name: str, options: dict[str, int]) -> None:
    """First and second order, forward mode, batched gradients; all inputs and parameters."""
    if name in ("GRU", "RNN"):  # the stack of layers is the LSTM's
        options = {"num_layers": 1}
    module, x = example(name, dtype=torch.float64, **options)
    args = (x.requires_grad_(), *module.parameters())
    call = functional(module)
    assert gradcheck(call, args, check_batched_grad=True, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(call, args, fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_gradcheck_packed_and_states(name: str) -> None:
    module, x = example(name, dtype=torch.float64, num_layers=1)
    args = (x.requires_grad_(), *module.parameters())
    assert gradcheck(functional(module, packed=True), args, fast_mode=True)
    assert gradgradcheck(functional(module, packed=True), args, fast_mode=True)
    hx = flat(state(name, 2, 2, 3, dtype=torch.float64))

    def call(x: Tensor, *hx: Tensor) -> tuple[Tensor, ...]:
        return tuple(flat(module(x, tuple(hx) if len(hx) > 1 else hx[0])))

    args = (x, *(h.requires_grad_() for h in hx))
    assert gradcheck(call, args, fast_mode=True)
    assert gradgradcheck(call, args, fast_mode=True)


@pytest.mark.parametrize("name", ALL)
def test_any_subset(name: str) -> None:
    """Gradients of what asks for them, None for the rest; through one output at a time."""
    pair = twins(name, 3, 4)
    for which in ("input", "state", "weight_ih", "weight_hh", "bias_ih", "bias_hh", "nothing"):
        found = []
        for module in pair:
            x = torch.ones(2, 3) if name in CELLS else torch.ones(5, 2, 3)
            hx = state(name, 2, 4) if name in CELLS else state(name, 1, 2, 4)
            x.requires_grad_(which == "input")
            for h in flat(hx):
                h.requires_grad_(which == "state")
            for key, p in module.named_parameters():
                p.requires_grad_(key.startswith(which))
                p.grad = None
            leaves = [x, *flat(hx), *module.parameters()]
            results = flat(module(x, hx))
            for k, out in enumerate(results):
                assert out.requires_grad == (which != "nothing")
                if out.requires_grad:
                    loss(out).backward(retain_graph=k + 1 < len(results))
            found.append([leaf.grad for leaf in leaves])
        assert [g is None for g in found[1]] == [g is None for g in found[0]]
        close(*([g for g in grads if g is not None] for grads in reversed(found)))


@pytest.mark.parametrize("name", LAYERS)
def test_eval_mode_and_frozen(name: str) -> None:
    pair = twins(name, 3, 4, 2, dropout=0.5)
    for module in pair:
        module.eval()
    agree(pair, lambda m: m(torch.ones(5, 2, 3)))


@pytest.mark.parametrize("name", ALL)
def test_create_graph(name: str) -> None:
    """create_graph leaves the first gradient alone; a gradient penalty trains as in torch.nn."""
    pair = twins(name, 3, 4)
    penalties = []
    for module in pair:
        x = (torch.ones(2, 3) if name in CELLS else torch.ones(5, 2, 3)).requires_grad_()
        plain = torch.autograd.grad(loss(module(x)), x)[0]
        first = torch.autograd.grad(loss(module(x)), x, create_graph=True)[0]
        close([first], [plain])
        second = torch.autograd.grad(
            first.square().sum(), [x, *module.parameters()], allow_unused=True
        )
        penalties.append([torch.zeros(1) if g is None else g for g in second])
    close(penalties[1], penalties[0], 1e-4)


def test_create_graph_where_inputs_depend_on_weights() -> None:
    """The layer used twice: what flows through the first use must not be counted in the second."""
    grads = []
    for module in twins("GRU", 3, 3, dtype=torch.float64):
        x = torch.ones(4, 2, 3, dtype=torch.float64)
        y = module(module(x)[0])[0]
        first = torch.autograd.grad(loss(y), list(module.parameters()), create_graph=True)
        total = sum(g.square().sum() for g in first)
        grads.append([*first, *torch.autograd.grad(total, list(module.parameters()))])
    close(grads[1], grads[0], 1e-9)


@pytest.mark.parametrize("name", LAYERS)
def test_retain_and_reuse(name: str) -> None:
    pair = twins(name, 3, 3)
    x = torch.ones(5, 2, 3)
    agree(pair, lambda m: m(m(x)[0]))  # used twice

    def steps(m: nn.Module) -> Any:  # truncated backpropagation
        hx, total = None, []
        for _ in range(3):
            out, hx = m(x, hx)
            total.append(out)
            hx = tuple(h.detach() for h in hx) if isinstance(hx, tuple) else hx.detach()
        return total

    agree(pair, steps)
    module = pair[1]
    module.zero_grad()
    out = loss(module(x))
    out.backward(retain_graph=True)
    once = module.weight_hh_l0.grad.clone()
    module.zero_grad()
    out.backward()
    close([module.weight_hh_l0.grad], [once], 0)
    with pytest.raises(RuntimeError, match="second time"):
        out.backward()
    with torch.autograd.set_detect_anomaly(True):
        loss(module(x)).backward()


@pytest.mark.parametrize("name", LAYERS)
def test_saved_tensor_hooks(name: str) -> None:
    module = getattr(rnnkern, name)(3, 4, 2, dropout=0.5)
    x = torch.ones(5, 2, 3, requires_grad=True)

    def grads(call: Any) -> list[Tensor]:
        torch.manual_seed(3)
        return list(torch.autograd.grad(loss(call(x)), [x, *module.parameters()]))

    expected = grads(module)
    with torch.autograd.graph.save_on_cpu():
        close(grads(module), expected, 0)
    seen: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        close(grads(module), expected, 0)
    assert seen
    close(grads(lambda x: checkpoint(module, x, use_reentrant=False)), expected, 0)
    module.zero_grad()
    torch.manual_seed(3)
    loss(checkpoint(lambda x: tuple(flat(module(x))), x, use_reentrant=True)).backward()
    close([p.grad for p in module.parameters()], expected[1:], 0)


def test_checkpoint_by_both_ways_to_the_operator() -> None:
    """The first call after functional_call goes by the dispatcher, the repeated one does not."""
    module = rnnkern.GRU(3, 4)
    packed = pack(torch.randn(5, 2, 3), [5, 3])
    data = packed.data.requires_grad_()
    functional_call(module, {n: p + 0 for n, p in module.named_parameters()}, (packed,))

    def call(data: Tensor) -> Tensor:
        return module(packed._replace(data=data))[0].data

    found = torch.autograd.grad(checkpoint(call, data, use_reentrant=False).sum(), data)
    close(found, torch.autograd.grad(call(data).sum(), data), 0)


@pytest.mark.parametrize("name", LAYERS)
def test_changed_in_place(name: str) -> None:
    """Between forward and backward: x, hx, weights and output raise; h_n and c_n may change."""
    layer = getattr(rnnkern, name)(3, 4)

    def run() -> tuple[Tensor, Any, Any]:
        x, hx = torch.ones(5, 2, 3), state(name, 1, 2, 4)
        return x, hx, layer(x, hx)

    for touch in (
        lambda x, hx, r: x.add_(1),
        lambda x, hx, r: flat(hx)[0].add_(1),
        lambda x, hx, r: layer.weight_hh_l0.data.add_(0) + layer.weight_hh_l0.detach().add_(1),
        lambda x, hx, r: r[0].detach().add_(1),
    ):
        x, hx, result = run()
        with torch.no_grad():
            touch(x, hx, result)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss(result[0]).backward()
    x, hx, result = run()
    expected = torch.autograd.grad(loss(result[0]), layer.weight_hh_l0)
    x, hx, result = run()
    with torch.no_grad():
        for final in flat(result[1]):
            final.zero_()
    close(torch.autograd.grad(loss(result[0]), layer.weight_hh_l0), expected, 0)


@pytest.mark.parametrize("name", ALL)
def test_functional(name: str) -> None:
    """functional_call, vjp, jacrev, jacfwd, hessian: the module's own gradients."""
    module, x = example(name, dtype=torch.float64)
    values = dict(module.named_parameters())

    def value(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss(functional_call(module, values, (x,)))

    before = list(module.parameters())
    expected = torch.autograd.grad(value(values, x), list(values.values()))
    close(grad(value)(values, x).values(), expected)
    assert all(a is b for a, b in zip(module.parameters(), before, strict=True))
    generated = {k: (v * 1.0) for k, v in values.items()}
    close(torch.autograd.grad(value(generated, x), list(values.values())), expected)
    out, pull = vjp(lambda x: flat(module(x))[0], x)
    close(pull(torch.ones_like(out)), jacrev(lambda x: flat(module(x))[0].sum())(x)[None])
    full = jacrev(lambda x: flat(module(x))[0])(x)
    close([jacfwd(lambda x: flat(module(x))[0])(x)], [full])
    h = hessian(lambda x: loss(module(x)))(x).reshape(x.numel(), x.numel())
    close([h], [h.T])
    assert h.abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ALL)
def test_forward_mode(name: str, dtype: torch.dtype) -> None:
    module, x = example(name, dtype=dtype)
    tangent = torch.randn_like(x)
    out, along = jvp(lambda x: flat(module(x))[0], (x,), (tangent,))
    jacobian = torch.autograd.functional.jacobian(lambda x: flat(module(x))[0], x)
    close([along], [torch.tensordot(jacobian, tangent, x.dim())], 1e-4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        got = torch.autograd.forward_ad.unpack_dual(flat(module(dual))[0])
        close(got, [out, along])


@pytest.mark.parametrize("name", ALL)
def test_vmap(name: str) -> None:
    """Over inputs, over stacked weights, and per-sample gradients."""
    module, x = example(name)
    many = torch.stack([x, x + 1, x * 2])
    for k, results in enumerate(zip(*flat(vmap(module)(many)), strict=True)):
        close(results, flat(module(many[k])))
    values = dict(module.named_parameters())

    def value(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return flat(functional_call(module, values, (x,)))[0].square().sum()

    each = vmap(grad(value), (None, 0))(values, many)
    for k in range(3):
        alone = torch.autograd.grad(
            value(values, many[k]), list(values.values()), allow_unused=True
        )
        got = [each[n][k] for n, g in zip(values, alone, strict=True) if g is not None]
        close(got, [g for g in alone if g is not None])
    ensemble = [copy.deepcopy(module) for _ in range(3)]
    for member in ensemble:
        member.reset_parameters()
    stacked, buffers = stack_module_state(ensemble)
    base = copy.deepcopy(module).to("meta")
    outputs = vmap(lambda p, b: flat(functional_call(base, (p, b), (x,)))[0])(stacked, buffers)
    close(outputs, [flat(m(x))[0] for m in ensemble])


@pytest.mark.parametrize("name", LAYERS)
def test_vmap_packed(name: str) -> None:
    module, x = example(name)
    packed = pack(x, [3, 2])
    many = torch.stack([packed.data, packed.data * 2])
    outputs = vmap(lambda data: module(packed._replace(data=data))[0].data)(many)
    for data, output in zip(many, outputs, strict=True):
        close([output], [module(packed._replace(data=data))[0].data])


def test_no_grad_and_inference_mode() -> None:
    lstm = rnnkern.LSTM(3, 4)
    x = torch.ones(5, 2, 3)
    with torch.no_grad():
        assert not lstm(x)[0].requires_grad
    with torch.inference_mode():
        made = rnnkern.LSTM(3, 4)
        result = made(torch.ones(5, 2, 3))
        assert all(t.is_inference() for t in flat(result))
        assert all(t.is_inference() for t in flat(lstm(x)))
    inference_input = flat(result)[0][..., :3]
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        lstm(inference_input)
    assert not lstm.requires_grad_(False)(inference_input)[0].requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_no_leaks(name: str) -> None:
    layer = getattr(rnnkern, name)(3, 4, 2)

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def iteration(backward: bool) -> list[weakref.ref[Kept]]:
        watched = []

        def keep(t: Tensor) -> Kept:
            kept = Kept(t.detach())  # the output itself would keep its own graph
            watched.append(weakref.ref(kept))
            return kept

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
            out = flat(layer(torch.ones(5, 2, 3, requires_grad=True)))[0]
        assert watched
        assert all(w() is not None for w in watched)
        if backward:
            loss(out).backward()
        return watched

    gc.collect()
    gc.disable()  # reference counts alone must free everything
    try:
        assert all(w() is None for w in iteration(True))
        assert all(w() is None for w in iteration(False))
    finally:
        gc.enable()
    saved: list[Tensor] = []
    with (
        torch.no_grad(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        layer(torch.ones(5, 2, 3))
    assert not saved


@pytest.mark.parametrize("name", LAYERS)
def test_deterministic(name: str) -> None:
    layer = getattr(rnnkern, name)(20, 40, 2, bidirectional=True)
    x = torch.randn(9, 7, 20, requires_grad=True)

    def run() -> list[Tensor]:
        out = layer(x)
        return [*flat(out), *torch.autograd.grad(loss(out), [x, *layer.parameters()])]

    torch.use_deterministic_algorithms(True)
    try:
        first = run()
        for threads in (2, 1, 5):
            torch.set_num_threads(threads)
            got = run()
            close(got, first, 0 if threads == 2 else 1e-5)
            close(got[:2], first[:2], 0)  # forward: bit for bit at any number of threads
    finally:
        torch.use_deterministic_algorithms(False)
