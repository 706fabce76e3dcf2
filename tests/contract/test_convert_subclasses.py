"""convert and revert of subclasses whose forward prepares a call of torch.nn's, or replaces it."""

import copy
import functools
import pickle
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

import pytest
import torch
from torch import _VF, Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence
from twins import close, flat, pack

import rnnkern
from rnnkern.nn import _torch_twin


class Lengths(ABC, nn.RNNBase):
    """In the shape of pytorch-forecasting's RNN: packs by lengths and makes the first state."""

    @abstractmethod
    def first(self, x: Tensor) -> Any: ...

    def forward(self, x: Any, hx: Any = None, lengths: Any = None) -> Any:
        if isinstance(x, PackedSequence) or lengths is None:
            return super().forward(x, hx=hx)
        if hx is None:
            hx = self.first(x)
        packed = pack(x, lengths, self.batch_first)
        out, hx = super().forward(packed, hx)
        return pad_packed_sequence(out, batch_first=self.batch_first)[0], hx


class LSTM(Lengths, nn.LSTM):
    def first(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = x.new_full((self.num_layers, x.shape[1], self.hidden_size), 0.5)
        return h, h


class GRU(Lengths, nn.GRU):
    def first(self, x: Tensor) -> Tensor:
        return x.new_full((self.num_layers, x.shape[1], self.hidden_size), 0.5)


class Step(nn.GRUCell):
    def forward(self, input: Tensor, hx: Any = None) -> Tensor:
        return super().forward(input, super().forward(input, hx))


class TwoArguments(nn.GRU):
    def forward(self, x: Tensor, *rest: Any) -> Any:
        out, h = super(TwoArguments, self).forward(self.double_it(x), *rest)  # noqa: UP008
        return out * self.scale, h

    @staticmethod
    def double_it(x: Tensor) -> Tensor:
        return 2 * x

    @property
    def scale(self) -> float:
        return 3 * next(self.parameters()).new_ones(1)


Kind = TypeVar("Kind")


class Decorated(nn.RNN):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        return super().forward(x)


class OfType(Generic[Kind], nn.RNN):
    def forward(self, x: Tensor) -> Any:
        return super().forward(-x)


DELEGATE = [LSTM, GRU, Step, TwoArguments, Decorated, OfType]


@pytest.mark.parametrize("kind", DELEGATE, ids=lambda k: k.__name__)
def test_delegating_subclass(kind: type) -> None:
    module = kind(3, 4).double()
    x = torch.ones((2, 3) if kind is Step else (5, 2, 3)).double()
    calls = [lambda m: m(x)]
    if issubclass(kind, Lengths):
        calls.append(lambda m: m(x, lengths=[2, 5]))
    expected = [flat(call(module)) for call in calls]
    rnnkern.convert(module)
    torchs = _torch_twin.torch_class(kind)
    ours = getattr(rnnkern, torchs.__name__)
    order = type(module).__mro__
    assert order.index(kind) < order.index(ours) < order.index(torchs)
    for other in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        for call, values in zip(calls, expected, strict=True):
            close(flat(call(other)), values, 1e-12)
    assert type(rnnkern.revert(module)) is kind


def _help_from_outside(module: nn.Module, x: Tensor) -> Any:
    return _VF.gru(x, x.new_zeros(1, 2, 4), module._flat_weights, True, 1, 0.0, False, False, False)


Alias = nn.GRU


def _replacing() -> dict[str, type]:
    """Classes whose forward does more than prepare a call, by what is said of them."""

    class Kernel(nn.GRU):
        def forward(self, x: Tensor) -> Any:
            if x.requires_grad:
                return super().forward(x)
            h = x.new_zeros(1, 2, 4)
            return torch.gru(x, h, [], True, 1, 0.0, False, False, False)

    class Vf(nn.GRUCell):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.own(x)

        def own(self, x: Tensor) -> Tensor:
            return _VF.gru_cell(x, x)

    class Outside(nn.GRU):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) if x.requires_grad else _help_from_outside(self, x)

    class Weights(nn.GRU):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x @ self.weight_ih_l0.T)

    class ByName(nn.GRU):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x + sum(getattr(self, f"bias_{k}_l0").sum() for k in ("ih",)))

    class Named(nn.GRU):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) if x.requires_grad else nn.GRU.forward(self, x)

    class Aliased(nn.GRU):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) if x.requires_grad else Alias.forward(self, x)

    local = nn.GRU

    class Closed(nn.GRU):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) if x.requires_grad else local.forward(self, x)

    class Nested(nn.GRU):
        def forward(self, x: Tensor) -> Any:
            run = lambda: super(nn.GRU, self).forward(x)  # noqa: E731
            return super().forward(x) if x.requires_grad else run()

    class Bases(nn.GRU):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x) if x.requires_grad else type(self).__mro__[1].forward(self, x)

    class Nothing(nn.GRU):
        def forward(self, x: Tensor) -> Any:
            return x

    class Object(nn.GRU):
        forward = functools.partialmethod(nn.GRU.forward, hx=None)

    class Checks(nn.GRU):
        def check_forward_args(self, *args: Any) -> None:
            super().check_forward_args(*args)

    class Name(nn.GRU):
        def _run(self) -> None: ...

    return {
        "overrides forward, which calls gru": Kernel,
        "overrides forward, which calls _VF": Vf,
        "overrides forward, which calls _VF ": Outside,
        "overrides forward, which uses weight_ih_l0": Weights,
        "overrides forward, which uses 'bias_'": ByName,
        "overrides forward, which names GRU": Named,
        "overrides forward, which names Alias": Aliased,
        "overrides forward, which names local": Closed,
        "overrides forward, which names GRU ": Nested,
        "overrides forward, which uses __mro__": Bases,
        "overrides forward": Nothing,
        "overrides forward ": Object,
        "overrides check_forward_args": Checks,
        "has a member _run, as rnnkern's class has": Name,
    }


@pytest.mark.parametrize("reason", _replacing())
def test_replacing_subclass(reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    kind = _replacing()[reason]
    model = nn.Sequential(kind(3, 4))
    rnnkern.convert(model, verbose=True)
    assert capsys.readouterr().out == f"0: left alone, {kind.__name__} {reason.strip()}\n"
    assert type(model[0]) is kind


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("_state", "it has a member _state, as rnnkern's class has"),
        ("check_input", "it has a check_input of its own"),
        ("forward", "it has a forward of its own"),
    ],
)
def test_attributes_of_an_instance(
    name: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    gru = nn.GRU(3, 4)
    setattr(gru, name, lambda *_: None)
    rnnkern.convert(gru, verbose=True)
    assert capsys.readouterr().out == f"the model itself: left alone, {reason}\n"
    assert type(gru) is nn.GRU
