"""The C++ functions that serve the usual call: the same results as the Python they stand for, and
every reason to leave a call to Python is seen, also after calls that they have served."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from twins import CELLS, LAYERS, flat, loss, pack, state

import rnnkern
from rnnkern.nn import cells, layers
from rnnkern.ops import autograd

NATIVE: Any = autograd.NATIVE
pytestmark = pytest.mark.skipif(NATIVE is None, reason="the C++ library is not of this torch")

ALL = LAYERS + CELLS


def served(module: Any, x: Any, hx: Any = None) -> Any:
    """What the C++ function returns: None where Python must do the call."""
    if isinstance(module, nn.RNNCellBase):
        return NATIVE.plain_cell(module, cells._NAMES, module._mode, x, hx)
    return NATIVE.plain_layer(module, x, hx)


def example(name: str, **options: Any) -> tuple[Any, Tensor]:
    module = getattr(rnnkern, name)(4, 6, **options)
    dtype = options.get("dtype")
    x = torch.randn(2, 4, dtype=dtype) if name in CELLS else torch.randn(3, 2, 4, dtype=dtype)
    assert served(module, x) is not None
    return module, x


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "batch first": {"batch_first": True},
    "two directions": {"bidirectional": True},
    "stack": {"num_layers": 3, "bidirectional": True, "batch_first": True},
    "stack without dropout": {"num_layers": 2, "dropout": 0.0},
    "projection": {"proj_size": 3, "num_layers": 2},
}


def forms(name: str) -> Iterator[tuple[dict[str, Any], bool]]:
    for case, options in OPTIONS.items():
        if name in CELLS and not options.keys() <= {"bias", "dtype"}:
            continue
        if case == "projection" and name != "LSTM":
            continue
        yield from ((options, True), (options, False))


def states_of(module: Any, name: str, batch: tuple[int, ...]) -> Any:
    dtype = module.weight_ih.dtype if name in CELLS else module.weight_ih_l0.dtype
    if name in CELLS:
        return state(name, *batch, 6, dtype=dtype)
    rows = module.num_layers * (1 + module.bidirectional)
    h = torch.randn(rows, *batch, module.proj_size or 6, dtype=dtype)
    return (h, torch.randn(rows, *batch, 6, dtype=dtype)) if name == "LSTM" else h


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_as_python_does(name: str, given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits, layouts, nesting and gradients, with the C++ functions and without them."""
    for options, batched in forms(name):
        module = getattr(rnnkern, name)(4, 6, **options)
        batch = (2,) if batched else ()
        sizes = (*batch, 4) if name in CELLS else (3, *batch, 4)
        if options.get("batch_first") and batched:
            sizes = (2, 3, 4)
        x = torch.randn(sizes, dtype=options.get("dtype")).requires_grad_()
        hx = states_of(module, name, batch) if given else None
        found = []
        for _ in range(2):
            with torch.no_grad():
                frozen = module(x, hx)
            result = module(x, hx)
            leaves = [x, *module.parameters()]
            tensors = [*flat(frozen), *flat(result)]
            found.append(
                (
                    tensors,
                    torch.autograd.grad(loss(result), leaves),
                    [(t.stride(), t._is_view(), t.requires_grad) for t in tensors],
                    [type(result), *map(type, result)],
                )
            )
            if len(found) == 1:
                assert served(module, x, hx) is not None
                for function in ("plain_layer", "plain_cell"):
                    monkeypatch.setattr(NATIVE, function, lambda *_: None)
        monkeypatch.undo()
        assert found[0][2:] == found[1][2:]
        for mine, pythons in zip(found[0][:2], found[1][:2], strict=True):
            assert all(map(torch.equal, mine, pythons))


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def observed() -> Iterator[None]:
    token = autograd.OBSERVER.set(object())  # type: ignore[arg-type]
    yield
    autograd.OBSERVER.reset(token)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu"),
    "autocast elsewhere": lambda: torch.autocast("xpu"),
    "forward AD": forward_ad.dual_level,
    "function mode": Functions,
    "observer": observed,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ALL)
def test_modes(name: str, mode: str) -> None:
    module, x = example(name)
    with MODES[mode]():
        assert served(module, x) is None
    assert served(module, x) is not None


@pytest.mark.parametrize("name", ALL)
def test_transforms_and_traces(name: str) -> None:
    module, x = example(name)
    seen = []

    def call(t: Tensor) -> Tensor:
        seen.append(served(module, x))
        return t

    torch.vmap(call)(x)
    torch.func.functionalize(call)(x)
    torch.jit.trace(call, x)
    assert seen[0] is seen[1] is seen[2] is None


def anything(*_: Any) -> Any:
    raise AssertionError("only looked at")


METHODS = ("select_backend", "_update_flat_weights", "__getattr__", "__getattribute__")
OF_LAYERS = ("_state", "_result", "_check", "_spec", "_run", "_weights_have_changed")
OF_CELLS = ("_regular", "_mode")


@pytest.mark.parametrize("name", ALL)
def test_overridden_methods(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a subclass, the module itself, or somebody who patches the class or a base of it."""
    module, x = example(name)
    cls = type(module)
    own = OF_CELLS if name in CELLS else OF_LAYERS
    run = NATIVE.plain_cell if name in CELLS else NATIVE.plain_layer
    args = (cells._NAMES, module._mode, x, None) if name in CELLS else (x, None)
    for method in (*METHODS, *own):
        if method in METHODS[1:]:
            value: Any = getattr(nn.Module, method, anything)
            value = (lambda f: lambda *given: f(*given))(value)  # as it is, but another
        else:
            value = anything
        with monkeypatch.context() as patch:
            patch.setattr(module, "__class__", type("Mine", (cls,), {method: value}))
            assert run(module, *args) is None, method
        with monkeypatch.context() as patch:
            patch.setitem(vars(module), method, MethodType(anything, module))
            assert run(module, *args) is None, method
        shared = cells.Cell if name in CELLS else layers.Layer
        for owner in (cls,) if method in vars(cls) else (cls, shared):
            with monkeypatch.context() as patch:
                patch.setattr(owner, method, value, raising=False)
                assert run(module, *args) is None, method
        assert run(module, *args) is not None, method


@pytest.mark.parametrize("name", ALL)
def test_subclasses(name: str) -> None:
    """One that changes nothing is plain; a property over an attribute is something else."""
    module, x = example(name)

    class Plain(type(module)):  # type: ignore[misc]
        def extra(self) -> None:
            pass

    module.__class__ = Plain
    assert served(module, x) is not None
    for attribute in ("input_size", "hidden_size"):
        values = {attribute: property(lambda self: 4, lambda self, value: None)}
        module.__class__ = type("Odd", (Plain,), values)
        assert served(module, x) is None
    Plain.select_backend = anything  # type: ignore[method-assign]
    module.__class__ = Plain
    assert served(module, x) is None


SETTINGS: dict[str, Any] = {
    "input_size": [5, 0, 4.0],
    "hidden_size": [0, 6.0],
    "bias": [1, 0],
    "mode": ["OTHER", None],
    "num_layers": [2, 0, 1.0],
    "bidirectional": [True, 0],
    "proj_size": [None, "1"],
    "batch_first": [0, None],
    "_flat_weights": [[], None],
    "_flat_weights_names": [[], None],
}


@pytest.mark.parametrize("name", ALL)
def test_changed_settings(name: str) -> None:
    module, x = example(name)
    for attribute, values in SETTINGS.items():
        if name in CELLS and attribute not in ("input_size", "hidden_size"):
            continue
        before = getattr(module, attribute)
        for value in (*values, None):
            vars(module)[attribute] = value
            assert served(module, x) is None, (attribute, value)
        del vars(module)[attribute]
        assert served(module, x) is None, attribute
        vars(module)[attribute] = before
        assert served(module, x) is not None


def test_dropout() -> None:
    """Masks are drawn in Python. The live values are looked at."""
    module = rnnkern.LSTM(4, 6, 2, dropout=0.5)
    x = torch.randn(3, 2, 4)
    assert served(module, x) is None
    assert served(module.eval(), x) is not None
    module.train().dropout = 0.0
    assert served(module, x) is not None
    module.dropout = 1
    assert served(module, x) is None


@pytest.mark.parametrize("name", LAYERS)
def test_rounding_is_pythons_to_decide(name: str) -> None:
    module, x = example(name)
    setting = torch.backends.mkldnn.rnn if name == "LSTM" else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        assert served(module, x) is None
        assert served(module.double(), x.double()) is not None
    finally:
        setting.fp32_precision = before
    assert served(module.float(), x) is not None


class Subclass(Tensor):
    pass


@pytest.mark.parametrize("name", ALL)
def test_unusual_inputs(name: str) -> None:
    module, x = example(name)
    odd: list[Any] = [
        None, [x], x.as_subclass(Subclass), x.to_sparse(), x.double(), x.int(), x.to("meta"),
        x[None], x[None, None], x[..., :3], x[0, ..., 0], torch.tensor(1.0),
    ]  # fmt: skip
    if name in LAYERS:
        odd += [x[:0], x[:0, 0], pack(x, [3, 2])]
    for value in odd:
        assert served(module, value) is None
    assert served(module, nn.Parameter(x)) is not None


@pytest.mark.parametrize("name", ALL)
def test_unusual_states(name: str) -> None:
    module, x = example(name)
    rows = () if name in CELLS else (1,)
    h = torch.randn(*rows, 2, 6)
    good: Any = (h, h) if name.startswith("LSTM") else h
    assert served(module, x, good) is not None
    odd = [h.as_subclass(Subclass), h[..., :5], h[None], h[..., :1, :], "h", 1]
    if not name.startswith("LSTM"):
        for value in [*odd, (h,), [h], ()]:
            assert served(module, x, value) is None
        return
    assert served(module, x, [h, h]) is not None
    for value in odd:
        assert served(module, x, (h, value)) is served(module, x, (value, h)) is None
    for value in (h, (), (h,), (h, h, h), (None, h), {0: h, 1: h}):
        assert served(module, x, value) is None


@pytest.mark.parametrize("name", ALL)
def test_weights_of_another_kind(name: str) -> None:
    for change in (
        lambda m: m.double(),
        lambda m: m.to("meta"),
        lambda m: m.register_parameter(next(iter(m._parameters)), None),
    ):
        module, x = example(name)
        change(module)
        assert served(module, x) is None


# Without the dispatcher: nobody who would see a call there misses it.


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


OPERATORS = ("rnnkern::forward", "rnnkern::backward")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_dispatch_modes_and_profilers_see_the_operators(name: str, training: bool) -> None:
    module, x = example(name)

    def call() -> list[Tensor]:
        results = flat(module(x))
        if not training:
            return results
        return [*results, *torch.autograd.grad(loss(results), list(module.parameters()))]

    with torch.enable_grad() if training else torch.inference_mode():
        expected = call()
        with Calls() as calls:
            within = call()
        with profile() as profiler:
            recorded = call()
        after = call()
    names = [event.name for event in profiler.events()]
    for operator in OPERATORS[: 1 + training]:
        assert calls.names.count(operator) == names.count(operator) == 1
    for results in (within, recorded, after):
        assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.filterwarnings("ignore:.*overrid")
def test_a_replaced_kernel_is_called(name: str, operator: str) -> None:
    module, x = example(name)
    before = flat(module(x))
    library = torch.library.Library("rnnkern", "IMPL")

    def replacement(*args: Any) -> Any:
        raise NotImplementedError("replaced")

    library.impl(operator.removeprefix("rnnkern::"), replacement, "CPU")
    try:
        with pytest.raises(NotImplementedError, match="replaced"):
            loss(module(x)).backward()
    finally:
        library._destroy()
    loss(module(x)).backward()
    assert all(map(torch.equal, flat(module(x)), before))


@pytest.mark.parametrize("name", ALL)
def test_gradients_as_the_operators_give_them(name: str) -> None:
    """Bit for bit, whatever is wanted and whatever autograd hands over."""
    module, x = example(name)
    hx = states_of(module, name, (2,))
    leaves = [x, *(hx if isinstance(hx, tuple) else (hx,)), *module.parameters()]
    for wanted in (leaves, leaves[:1], leaves[1:2], leaves[-1:]):
        for leaf in leaves:
            leaf.requires_grad_(any(leaf is w for w in wanted))
        results = flat(module(x, hx))
        for of in (results, results[:1], results[-1:]):
            for grads in ([torch.ones(()).expand_as(t) for t in of], [t.detach() for t in of]):
                direct = torch.autograd.grad(of, wanted, grads, retain_graph=True)
                with Calls() as calls:
                    operators = torch.autograd.grad(of, wanted, grads, retain_graph=True)
                assert "rnnkern::backward" in calls.names
                assert all(map(torch.equal, direct, operators))


@pytest.mark.parametrize("name", ALL)
def test_results_share_nothing(name: str) -> None:
    """Also where a result of the operator's is empty and not allocated."""
    module, x = example(name)
    for mode in (nullcontext, torch.no_grad, torch.inference_mode):
        with mode():
            tensors = [t for _ in range(2) for t in flat(module(x))]
        memory = {t.untyped_storage().data_ptr() for t in tensors}
        assert len(memory) == len(tensors)
