"""A torch.nn module and rnnkern's with the same weights, and what the tests ask of them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnkern

LAYERS = ("LSTM", "GRU", "RNN")
CELLS = ("LSTMCell", "GRUCell", "RNNCell")


def twins(name: str, *args: Any, seed: int = 0, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """(torch.nn's, rnnkern's) with equal weights."""
    pair = []
    for package in (nn, rnnkern):
        torch.manual_seed(seed)
        pair.append(getattr(package, name)(*args, **kwargs))
    return pair[0], pair[1]


def flat(result: Any) -> list[Tensor]:
    """All tensors of a layer's or cell's result, in order."""
    if isinstance(result, PackedSequence):
        return [result.data]
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in flat(part)]


def state(name: str, *shape: int, seed: int = 7, **kwargs: Any) -> Any:
    """hx of those sizes: a pair for LSTM and LSTMCell, else a tensor."""
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(*shape, generator=generator).to(**kwargs) for _ in range(2)]
    return (draws[0], draws[1]) if name.startswith("LSTM") else draws[0]


def pack(x: Tensor, lengths: Sequence[int], batch_first: bool = False) -> PackedSequence:
    return pack_padded_sequence(
        x, torch.tensor(lengths), batch_first=batch_first, enforce_sorted=False
    )


def loss(result: Any) -> Tensor:
    """A scalar that depends on every element of the result differently."""
    return sum(
        (t * torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).view(t.shape)).square().sum()
        for t in flat(result)
    )


def close(got: Iterable[Tensor], expected: Iterable[Tensor], tol: float = 1e-5) -> None:
    """Same shapes, dtypes and (within tol) values."""
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=tol, atol=tol)


def agree(pair: tuple[nn.Module, nn.Module], call: Callable[[nn.Module], Any]) -> list[Any]:
    """Both modules give the same results and the same parameter gradients under `call`."""
    results, grads = [], []
    for module in pair:
        module.zero_grad()
        torch.manual_seed(1)
        results.append(call(module))
        loss(results[-1]).backward()
        grads.append([p.grad for p in module.parameters()])
    close(flat(results[1]), flat(results[0]))
    close(grads[1], grads[0], 2e-5)
    return results


def same_error(pair: Sequence[Any], call: Callable[[Any], Any], message: bool = True) -> None:
    """Both raise the same type of error, with the same message."""
    caught = []
    for module in pair:
        with pytest.raises(Exception) as info:  # noqa: PT011, the type is what is compared
            call(module)
        caught.append(info)
    assert caught[0].type is caught[1].type
    if message:
        assert str(caught[0].value) == str(caught[1].value)
