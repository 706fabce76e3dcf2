"""convert and revert; what a model's owner keeps through them."""

import copy
import logging
import pickle
import sys
from abc import ABCMeta
from typing import Any, ClassVar, final

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import pad_packed_sequence
from twins import CELLS, LAYERS, close, flat, pack

import rnnkern


class Plain(nn.LSTM):
    """Keeps torch.nn's forward."""

    extra = 3


class Own(nn.LSTM):
    """Has a forward of its own."""

    def forward(self, input, hx=None):
        return nn.LSTM.forward(self, 2 * input, hx)


class Tagger(nn.Module):
    """A stranger's model: packed, bidirectional, two layers, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.rnn = nn.LSTM(5, 7, 2, batch_first=True, bidirectional=True, dropout=0.3)
        self.out = nn.Linear(14, 3)

    def forward(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        packed = pack(self.embed(tokens), lengths, batch_first=True)
        return self.out(pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])


def test_a_strangers_model_trains_identically() -> None:
    """One convert in the middle of a training: the optimizer goes on, the losses stay the same."""
    torch.manual_seed(4)
    model = Tagger()
    pair = [model, copy.deepcopy(model)]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in pair]
    assert rnnkern.convert(pair[1]) is pair[1]
    lengths = [6, 2, 9, 4]
    tokens, target = torch.randint(11, (4, 9)), torch.randint(3, (4, 9))
    losses: list[list[float]] = [[], []]
    for k, (m, optimizer) in enumerate(zip(pair, optimizers, strict=True)):
        torch.manual_seed(5)
        for _ in range(20):
            optimizer.zero_grad()
            value = nn.functional.cross_entropy(m(tokens, lengths).flatten(0, 1), target.flatten())
            value.backward()
            optimizer.step()
            losses[k].append(value.item())
    assert losses[0][-1] < 0.95 * losses[0][0]
    close([torch.tensor(losses[1])], [torch.tensor(losses[0])], 1e-4)
    close(pair[1].parameters(), pair[0].parameters(), 1e-3)


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_there_and_back(name: str) -> None:
    module = getattr(nn, name)(3, 4).double().eval()
    x = torch.ones(2, 3).double() if name in CELLS else torch.ones(5, 2, 3).double()
    expected = flat(module(x))
    parameters, calls = list(module.parameters()), []
    module.register_forward_hook(lambda *_: calls.append(1))
    parameters[0].requires_grad_(False)
    assert rnnkern.convert(module) is module
    assert type(module) is getattr(rnnkern, name)
    assert rnnkern.explain(module, x).name == "fused"
    assert not module.training
    close(flat(module(x)), expected, 1e-12)
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    assert not parameters[0].requires_grad
    assert calls == [1]
    close(flat(rnnkern.convert(module)(x)), expected, 1e-12)  # again: nothing happens
    assert rnnkern.revert(module) is module
    assert type(module) is getattr(nn, name)
    close(flat(module(x)), expected, 0)
    fresh = rnnkern.revert(getattr(rnnkern, name)(3, 4))
    assert type(fresh) is getattr(nn, name)


def test_subclasses(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.ModuleDict({"plain": Plain(3, 4), "own": Own(3, 4), "gru": nn.GRU(3, 4)})
    model["patched"] = nn.GRU(3, 4)
    model["patched"].forward = lambda x: x
    x = torch.ones(5, 2, 3)
    expected = {k: flat(model[k](x)) for k in model}
    with caplog.at_level(logging.INFO, "rnnkern"):
        rnnkern.convert(model, verbose=True)
    assert caplog.messages == [
        "plain: Plain now runs on rnnkern",
        "own: left alone, Own overrides forward",
        "gru: GRU now runs on rnnkern",
        "patched: left alone, it has a forward of its own",
        "Tools that look a layer up by its exact class (torch.ao.quantization, thop, BackPACK) do "
        "not know rnnkern's: call rnnkern.revert(model) before them",
    ]
    assert capsys.readouterr().out.splitlines() == caplog.messages
    assert type(model["own"]) is Own
    assert isinstance(model["plain"], (Plain, rnnkern.LSTM))
    assert model["plain"].extra == 3
    for key in model:
        close(flat(model[key](x)), expected[key])
    for other in (copy.deepcopy(model["plain"]), pickle.loads(pickle.dumps(model["plain"]))):
        assert type(other) is type(model["plain"])
        close(flat(other(x)), expected["plain"])
    rnnkern.revert(model)
    assert [type(m) for m in model.values()] == [Plain, Own, nn.GRU, nn.GRU]


def test_parametrised() -> None:
    gru = parametrizations.weight_norm(nn.GRU(3, 4), "weight_hh_l0")
    x = torch.ones(5, 2, 3)
    expected = flat(gru(x))
    rnnkern.convert(gru)
    assert isinstance(gru, rnnkern.GRU)
    close(flat(gru(x)), expected)
    parametrize.remove_parametrizations(gru, "weight_hh_l0")
    assert type(gru) is rnnkern.GRU
    close(flat(gru(x)), expected)


def test_import_order_keeps_the_functions() -> None:
    import rnnkern.convert
    import rnnkern.inspect.trace

    assert callable(rnnkern.convert)
    assert callable(rnnkern.trace)


# Classes that hear of their subclasses.


class Keyed:
    """Wants a keyword of every subclass and keeps a list of them."""

    known: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, key: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Keyed.known[key] = cls


class WithKey(Keyed, nn.GRU, key="gru"):
    pass


class AsksItsClass(Keyed, nn.GRU, key="asks"):
    def kind(self) -> str:
        return next(key for key, cls in self.known.items() if cls is type(self))


class Registry(type):
    seen: ClassVar[list[str]] = []

    def __init__(cls, *args: Any) -> None:
        super().__init__(*args)
        Registry.seen.append(cls.__name__)


class Registered(nn.GRU, metaclass=Registry):
    pass


class Quiet(ABCMeta):
    """Changes nothing about the making of a class."""

    @property
    def shout(cls) -> str:
        return cls.__name__.upper()


class UnderQuiet(nn.GRU, metaclass=Quiet):
    pass


@final
class Final(nn.GRU):
    __final__ = True  # as `final` sets it since Python 3.11


class Slots(nn.GRU):
    __slots__ = ("memory",)


class Frozen(nn.GRU):
    """Counts what is set on it."""

    def __setattr__(self, name: str, value: Any) -> None:
        vars(self).setdefault("sets", []).append(name)
        super().__setattr__(name, value)


def test_nobody_hears_of_the_classes(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = [
        nn.GRU, WithKey, AsksItsClass, Registered, UnderQuiet, Final, Slots, Frozen, nn.LSTM,
    ]  # fmt: skip
    model = nn.Sequential(*(kind(3, 4) for kind in kinds))
    model[3] = parametrizations.weight_norm(model[3], "weight_hh_l0")
    model[7].sets.clear()
    known, seen = dict(Keyed.known), [*Registry.seen]
    x = torch.ones(5, 2, 3)
    expected = [flat(m(x)) for m in model]
    rnnkern.convert(model, verbose=True)
    assert capsys.readouterr().out.splitlines()[:-1] == [
        "0: GRU now runs on rnnkern",
        "1: WithKey now runs on rnnkern",
        "2: left alone, AsksItsClass registers its subclasses and asks for its exact class",
        "3: left alone, the metaclass Registry acts on the classes that derive from it",
        "4: UnderQuiet now runs on rnnkern",
        "5: left alone, Final is final",
        "6: Slots now runs on rnnkern",
        "7: Frozen now runs on rnnkern",
        "8: LSTM now runs on rnnkern",
    ]
    for m, values in zip(model, expected, strict=True):
        close(flat(m(x)), values)
    assert Keyed.known == known
    assert Registry.seen == seen
    assert model[7].sets == []
    made = type(model[1])
    assert (made.__name__, made.__qualname__, made.__module__) == ("WithKey", "WithKey", __name__)
    assert made.__bases__[:2] == (WithKey, rnnkern.GRU)
    copied = pickle.loads(pickle.dumps(model[1]))
    assert type(copied) is made
    rnnkern.revert(model)
    assert [type(m) for k, m in enumerate(model) if k != 3] == kinds[:3] + kinds[4:]
    assert Keyed.known == known
    assert Registry.seen == seen


class Listed:
    """Keeps a list of its subclasses."""

    names: ClassVar[list[str]] = []

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Listed.names.append(cls.__name__)


class InList(Listed, nn.GRU):
    pass


def test_parametrised_subclass_that_is_listed() -> None:
    """torch makes a class for the parametrisation, which is listed; ours are not."""
    gru = parametrizations.weight_norm(InList(3, 4), "weight_hh_l0")
    x = torch.ones(5, 2, 3)
    expected = flat(gru(x))
    names = [*Listed.names]
    for _ in range(2):
        rnnkern.convert(gru)
        assert isinstance(gru, (InList, rnnkern.GRU))
        close(flat(gru(x)), expected)
        rnnkern.revert(gru)
        assert type(gru).__bases__ == (InList,)
        close(flat(gru(x)), expected)
    rnnkern.convert(gru)
    parametrize.remove_parametrizations(gru, "weight_hh_l0")
    assert isinstance(gru, (InList, rnnkern.GRU))
    assert type(rnnkern.revert(gru)) is InList
    assert Listed.names == names


def test_decided_before_the_first_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong in deciding leaves the whole model as it was."""
    from rnnkern import convert

    model = nn.Sequential(nn.GRU(3, 4), Plain(3, 4))
    home = sys.modules[convert.__module__]

    def fail(cls: type, ours: type) -> None:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(home, "_class_refusal", fail)
    with pytest.raises(RuntimeError, match="unforeseen"):
        convert(model)
    assert [type(m) for m in model] == [nn.GRU, Plain]


def test_a_class_that_cannot_be_derived(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Fixed(nn.GRU):
        pass

    model = nn.Sequential(Fixed(3, 4), nn.GRU(3, 4))
    home = sys.modules[rnnkern.convert.__module__]
    monkeypatch.setattr(home, "derive", lambda *_: type("Bad", (int, str), {}))
    rnnkern.convert(model, verbose=True)
    first, second, _ = capsys.readouterr().out.splitlines()
    assert first.startswith("0: left alone, no class can be derived from Fixed: multiple bases")
    assert second == "1: GRU now runs on rnnkern"
    assert type(model[0]) is Fixed


def test_own_reduce_is_kept() -> None:
    gru = rnnkern.convert(Reduced(3, 4))
    assert isinstance(gru, rnnkern.GRU)
    assert type(pickle.loads(pickle.dumps(gru))) is Reduced


class Reduced(nn.GRU):
    """Says itself how it is pickled."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Reduced, (self.input_size, self.hidden_size)


def test_subclass_of_ours_is_not_reverted(capsys: pytest.CaptureFixture[str]) -> None:
    class Mine(rnnkern.GRU):
        pass

    assert type(rnnkern.revert(Mine(3, 4), verbose=True)) is Mine
    assert capsys.readouterr().out == (
        "the model itself: left alone, Mine derives from rnnkern's class\n"
    )


# Tools that go by the exact class.


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per:UserWarning")
def test_dynamic_quantisation() -> None:
    """Ours stay as they are; after `revert` torch swaps them as ever."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("needs a quantised engine")
    model = nn.Sequential(rnnkern.LSTM(3, 4))
    kinds = {nn.LSTM, rnnkern.LSTM}
    x = torch.ones(5, 2, 3)
    left = torch.ao.quantization.quantize_dynamic(model, kinds)
    assert type(left[0]) is rnnkern.LSTM
    close(flat(left(x)), flat(model(x)))
    swapped = torch.ao.quantization.quantize_dynamic(rnnkern.revert(model), kinds)
    assert type(swapped[0]) is torch.ao.nn.quantized.dynamic.LSTM
    close(flat(swapped(x)), flat(model(x)), 0.05)


def test_a_table_by_class() -> None:
    """How thop and BackPACK choose what to do: by `type(module)`."""
    table = {getattr(nn, name): name for name in LAYERS + CELLS}
    model = nn.Sequential(*(getattr(nn, name)(3, 4) for name in LAYERS + CELLS))
    assert not any(type(m) in table for m in rnnkern.convert(model))
    assert [table[type(m)] for m in rnnkern.revert(model)] == [*LAYERS, *CELLS]
    with rnnkern.patch():  # a table made meanwhile knows ours
        table = {getattr(nn, name): name for name in LAYERS + CELLS}
        assert all(type(getattr(nn, name)(3, 4)) in table for name in LAYERS + CELLS)
