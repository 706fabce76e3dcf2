"""torch.nn's names standing for rnnkern's classes: by hand, by patch()."""

import copy
import inspect
import io
import itertools
import pickle
import textwrap
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from processes import python
from torch import nn
from twins import CELLS, LAYERS, close, flat, same_error

import rnnkern
from rnnkern.nn import _torch_twin

PLACES = (nn, nn.modules, nn.modules.rnn)
OWN = {name: getattr(nn, name) for name in LAYERS + CELLS}  # torch's, as the tests are collected


def names() -> list[type]:
    return [getattr(place, name) for place in PLACES for name in OWN]


TORCHS = [kind for _ in PLACES for kind in OWN.values()]
OURS = [getattr(rnnkern, name) for _ in PLACES for name in OWN]


def data(name: str) -> torch.Tensor:
    return torch.ones(2, 3) if name in CELLS else torch.ones(5, 2, 3)


@pytest.fixture(autouse=True)
def _names_return() -> Iterator[None]:
    yield
    rnnkern.unpatch()
    assert names() == TORCHS


@pytest.mark.parametrize("name", LAYERS + CELLS)
@pytest.mark.parametrize("place", PLACES, ids=lambda m: m.__name__)
def test_assigned_by_hand(monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> None:
    torchs = OWN[name](3, 4)
    monkeypatch.setattr(place, name, getattr(rnnkern, name))
    module = getattr(place, name)(3, 4)
    module.load_state_dict(torchs.state_dict())
    x = data(name)
    expected = flat(torchs(x))
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    for copied in (
        module,
        copy.copy(module),
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(stream, weights_only=False),
    ):
        assert type(copied) is getattr(rnnkern, name)
        close(flat(copied(x)), expected)
    assert type(rnnkern.revert(module)) is OWN[name]
    close(flat(module(x)), expected, 0)
    assert type(rnnkern.convert(module)) is getattr(rnnkern, name)
    close(flat(module(x)), expected)


ORDERS = {
    "before any other import": """
        import torch, rnnkern
        torch.nn.LSTM = rnnkern.LSTM
        """,
    "all names and places": """
        import torch, rnnkern
        for place in (torch.nn, torch.nn.modules, torch.nn.modules.rnn):
            for name in ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"):
                setattr(place, name, getattr(rnnkern, name))
        """,
    "each module of ours after the names": """
        import torch, rnnkern.nn.layers as m
        for place in (torch.nn, torch.nn.modules.rnn):
            place.LSTM, place.GRU, place.RNN = m.LSTM, m.GRU, m.RNN
        import rnnkern, rnnkern.nn.cells, rnnkern.convert, rnnkern.inspect.watch
        """,
    "the package imported anew": """
        import sys, torch, rnnkern
        for name in ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"):
            setattr(torch.nn, name, getattr(rnnkern, name))
        for name in [n for n in sys.modules if n.split(".")[0] == "rnnkern"]:
            if not name.startswith("rnnkern.ops"):  # torch registers an operator once
                del sys.modules[name]
        import rnnkern
        torch.nn.LSTM = rnnkern.LSTM
        """,
    "taken by a stranger before": """
        import torch
        own = torch.nn.LSTM
        torch.nn.LSTM = torch.nn.modules.rnn.LSTM = lambda *a, **k: own(*a, **k)
        import rnnkern
        assert rnnkern.LSTM.__mro__[2] is own
        torch.nn.LSTM = rnnkern.LSTM
        """,
}


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_order_of_imports(order: str) -> None:
    program = textwrap.dedent(ORDERS[order]) + textwrap.dedent("""
        lstm = torch.nn.LSTM(3, 4, 2, dropout=0.5, bidirectional=True)
        lstm(torch.ones(5, 2, 3))[0].sum().backward()
        model = torch.nn.Sequential(lstm)
        rnnkern.revert(model)
        assert type(model[0]).__module__ == "torch.nn.modules.rnn", type(model[0])
        rnnkern.convert(model)
        assert type(model[0]) is rnnkern.LSTM
        torch.jit.script(torch.nn.Sequential(torch.nn.Identity(), rnnkern.LSTM(3, 4)))
        """)
    run = python("-W", "ignore", "-c", program)
    assert run.returncode == 0, run.stderr


def test_swaps_and_returns() -> None:
    assert rnnkern.patch() is not None
    assert names() == OURS
    rnnkern.patch()
    rnnkern.unpatch()
    assert names() == TORCHS
    rnnkern.unpatch()
    assert names() == TORCHS


def test_blocks_nest() -> None:
    with rnnkern.patch() as outer:
        with rnnkern.patch(), outer:
            assert names() == OURS
        assert names() == OURS
    assert names() == TORCHS
    with outer:
        assert names() == OURS
    assert names() == TORCHS
    rnnkern.patch()
    with pytest.raises(ZeroDivisionError), rnnkern.patch():
        1 / 0  # noqa: B018
    assert names() == OURS  # the first call still holds
    with rnnkern.patch():
        rnnkern.unpatch()
        assert names() == TORCHS
    assert names() == TORCHS


def test_blocks_of_threads_overlap() -> None:
    """The first thread's block ends inside the second's: the names stay until both have."""
    entered, left = threading.Event(), threading.Event()
    seen: list[bool] = []

    def second() -> None:
        with rnnkern.patch():
            entered.set()
            left.wait(20)
            seen.append(names() == OURS)

    thread = threading.Thread(target=second)
    with rnnkern.patch():
        thread.start()
        assert entered.wait(20)
    left.set()
    thread.join()
    assert seen == [True]
    assert names() == TORCHS


def test_what_others_assign_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    class Foreign(nn.LSTM):
        pass

    monkeypatch.setattr(nn, "LSTM", Foreign)
    with rnnkern.patch():
        assert nn.LSTM is rnnkern.LSTM
        nn.GRU = Foreign
    assert nn.LSTM is Foreign
    assert nn.GRU is Foreign
    nn.GRU = OWN["GRU"]


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_older_modules(name: str) -> None:
    """Made before the patch: they run, copy, pickle, compile as before, and convert."""
    old = OWN[name](3, 4)
    x = data(name)
    expected = flat(old(x))
    with rnnkern.patch():
        for copied in (old, copy.deepcopy(old), pickle.loads(pickle.dumps(old))):
            assert type(copied) is OWN[name]
            close(flat(copied(x)), expected, 0)
        assert isinstance(getattr(nn, name)(3, 4), OWN[name])
        assert not isinstance(old, getattr(nn, name))  # as `patch` says
        stored = pickle.dumps(old)
    assert type(pickle.loads(stored)) is OWN[name]
    stored = pickle.dumps(old)
    with rnnkern.patch():
        assert type(pickle.loads(stored)) is getattr(rnnkern, name)
        assert type(rnnkern.convert(old)) is getattr(rnnkern, name)
        assert type(rnnkern.revert(old)) is OWN[name]


@pytest.mark.compiler
def test_dynamo_still_refuses_torchs_own() -> None:
    """Dynamo looks nn.LSTM up at each call; traced, torch's own fails in training on a CPU."""
    old = nn.LSTM(3, 4)
    x = torch.ones(5, 2, 3)
    with rnnkern.patch():
        with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU, or LSTM"):
            torch.compile(old, backend="aot_eager", fullgraph=True)(x)
        torch._dynamo.reset()
        new = nn.LSTM(3, 4)
        close(
            flat(torch.compile(new, backend="aot_eager", fullgraph=True)(x)),
            flat(new(x)),
        )
    torch._dynamo.reset()


def test_subclasses_made_meanwhile() -> None:
    with rnnkern.patch():

        class Mine(nn.LSTM):
            def __init__(self, size: int) -> None:
                super().__init__(size, 4, batch_first=True)
                self.scale = 2

            def forward(self, x: torch.Tensor, hx: Any = None) -> Any:
                return nn.LSTM.forward(self, self.scale * x, hx)

        class Cell(nn.GRUCell):
            def reset_parameters(self) -> None:
                for p in self.parameters():
                    nn.init.constant_(p, 0.1)

    mine, cell = Mine(3), Cell(3, 4)
    assert isinstance(mine, (rnnkern.LSTM, OWN["LSTM"]))
    assert mine(torch.ones(2, 5, 3))[0].shape == (2, 5, 4)
    close([copy.deepcopy(cell)(torch.ones(2, 3))], [cell(torch.ones(2, 3))])
    assert rnnkern.explain(mine, torch.ones(2, 5, 3)).name == "fused"


def test_strangers_model_built_meanwhile() -> None:
    with rnnkern.patch():
        model = nn.Transformer(8, 2, 1, 1, 8, batch_first=True)  # has none of ours: untouched
        cell = nn.Sequential(nn.Linear(2, 3), nn.LSTM(3, 4))
    assert not any(type(m).__module__.startswith("rnnkern") for m in model.modules())
    assert type(cell[1]) is rnnkern.LSTM


# Signatures: torch's checks and words with arguments that tools can see.


@pytest.mark.parametrize("name", LAYERS)
def test_signature(name: str) -> None:
    """Names, order and defaults of torch's documentation (its first overload)."""
    expected = {
        "LSTM": "input_size hidden_size num_layers bias batch_first dropout bidirectional "
        "proj_size device dtype",
        "GRU": "input_size hidden_size num_layers bias batch_first dropout bidirectional "
        "device dtype",
        "RNN": "input_size hidden_size num_layers nonlinearity bias batch_first dropout "
        "bidirectional device dtype",
    }[name].split()
    defaults = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0}
    found = inspect.signature(getattr(rnnkern, name)).parameters
    named = [p for p in found.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in named] == expected
    assert {k: found[k].default for k in defaults} == defaults
    assert found["bidirectional"].default is False
    if name == "RNN":
        assert found["nonlinearity"].default == "tanh"


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_skip_init(name: str) -> None:
    module = nn.utils.skip_init(getattr(rnnkern, name), 3, 4, dtype=torch.float64)
    assert all(p.dtype == torch.float64 and p.device.type == "cpu" for p in module.parameters())
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(0.1)
    assert flat(module(data(name).double()))[0].isfinite().all()


@pytest.mark.parametrize("name", ["GRU", "RNN"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"proj_size": 0},
        {"proj_size": 2, "dropout": "a"},
        {"hidden": 4},
        {"mode": "LSTM"},
        {"nonlinearity": "sin"},
    ],
    ids=str,
)
def test_refused_keywords(name: str, kwargs: dict[str, Any]) -> None:
    def construct(package: Any) -> None:
        getattr(package, name)(3, 4, **kwargs)

    same_error((nn, rnnkern), construct)


def test_dropout_warning_names_the_same_place() -> None:
    """Where torch.nn's own points, no frame of rnnkern's."""
    places = []
    for name, package in itertools.product(LAYERS, (nn, rnnkern)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            getattr(package, name)(3, 4, dropout=0.5)
        (warning,) = caught
        places.append((name, warning.filename, warning.lineno, str(warning.message)))
    assert places[::2] == places[1::2]


def test_script_refuses_to_drop_a_forward() -> None:
    class Mine(rnnkern.LSTM):
        def forward(self, input: torch.Tensor, hx: Any = None) -> Any:
            return super().forward(2 * input, hx)

    with pytest.raises(TypeError, match="Mine overrides forward"):
        _torch_twin.to_torch(Mine(3, 4))
