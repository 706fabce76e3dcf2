"""convert and revert; what a model's owner keeps through them."""

import copy
import logging
import pickle

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
        return super().forward(2 * input, hx)


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
    import rnnkern.trace

    assert callable(rnnkern.convert)
    assert callable(rnnkern.trace)
