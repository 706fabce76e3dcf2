"""The operators of prepacked weights, for those who call them without rnnkern.freeze."""

from typing import Any

import pytest
import torch
from freezing import NAMES, equal, input_of, module, run
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from twins import flat, pack

import rnnkern
from rnnkern.ops import library


def prepacked(**changes: Any) -> tuple[Any, ...]:
    """The arguments of `forward_prepacked`, some of them others."""
    layer = rnnkern.LSTM(4, 6)
    weights = [p.detach() for p in layer.parameters()]
    spec = (0, 1, True, False, False)
    args = {
        "input": torch.randn(3, 2, 4),
        "batch_sizes": None,
        "h_0": None,
        "c_0": None,
        "prepacked": library.prepack(weights, *spec, 0),
        "spec": spec,
        "hidden_size": 6,
        "proj_size": 0,
    } | changes
    return (*list(args.values())[:5], *args["spec"], args["hidden_size"], args["proj_size"])


@pytest.mark.parametrize(
    "changes",
    [
        {"prepacked": torch.zeros(10, dtype=torch.uint8)},
        {"prepacked": torch.zeros(10_000, dtype=torch.uint8)},
        {"prepacked": torch.zeros(10_000)},
        {"spec": (1, 1, True, False, False)},
        {"spec": (0, 2, True, False, False)},
        {"spec": (0, 1, True, True, False)},
        {"hidden_size": 5},
        {"proj_size": 3},
        {"input": torch.randn(3, 2, 5)},
        {"input": torch.randn(3, 2, 4, dtype=torch.float64)},
        {"h_0": torch.zeros(1, 2, 6), "c_0": torch.zeros(1, 2, 7)},
        {"h_0": torch.zeros(1, 3, 6), "c_0": torch.zeros(1, 3, 6)},
    ],
)
def test_operator_refuses(changes: dict[str, Any]) -> None:
    library.forward_prepacked(*prepacked())
    with pytest.raises(RuntimeError, match="rnnkern: "):
        library.forward_prepacked(*prepacked(**changes))


def test_operator_refuses_other_memory() -> None:
    """Cut off, moved off its alignment, and packed at another level."""
    args = prepacked()
    memory = args[4]
    moved = torch.zeros(len(memory) + 1, dtype=torch.uint8)[1:].copy_(memory)
    other = memory.clone()
    level = library.info()["isa"].encode()
    at = bytes(memory.numpy()).index(level)
    other[at] += 1
    for wrong in (memory[:-1], memory[:64], moved, other):
        with pytest.raises(RuntimeError, match="rnnkern: "):
            library.forward_prepacked(*args[:4], wrong, *args[5:])


@pytest.mark.parametrize("format", [-1, 3])
def test_prepack_refuses(format: int) -> None:
    weights = [p.detach() for p in rnnkern.LSTM(4, 6).parameters()]
    spec = (0, 1, True, False, False)
    with pytest.raises(RuntimeError, match="rnnkern: "):
        library.prepack(weights, *spec, format)
    with pytest.raises(RuntimeError, match="rnnkern: "):
        library.prepack([w.double() for w in weights], *spec, 2)
    with pytest.raises(RuntimeError, match="rnnkern: "):
        library.prepack(weights[:3], *spec, 0)
    with pytest.raises(RuntimeError, match="rnnkern: "):
        library.prepack([w.to("meta") for w in weights], *spec, 0)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_fake_results(name: str, batch_first: bool) -> None:
    """Shapes, strides and dtypes of the operator's results without data."""
    frozen = rnnkern.freeze(module(name, 5, 6, bidirectional=True))
    spec = frozen._specs[batch_first]
    args = (torch.randn(4, 2, 5), None, None, None, frozen._prepacked[0], *spec, 6, 0)
    real = library.forward_prepacked(*args)
    fake = library.forward_prepacked(*(a.to("meta") if isinstance(a, Tensor) else a for a in args))
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)
    with pytest.raises(RuntimeError, match="different devices"):
        library.forward_prepacked(args[0].to("meta"), *args[1:])


def test_packed_sequences_keep_their_order() -> None:
    layer = module("LSTM", 5, 6, num_layers=2, bidirectional=True)
    frozen = rnnkern.freeze(layer)
    packed = pack(torch.randn(4, 3, 5), [2, 4, 3])
    with torch.no_grad():
        found, expected = frozen(packed), layer(packed)
    assert isinstance(found[0], PackedSequence)
    assert torch.equal(found[0].unsorted_indices, expected[0].unsorted_indices)
    assert equal(flat(found), flat(expected))


@pytest.mark.parametrize("name", NAMES)
def test_frozen_in_inference_mode(name: str) -> None:
    """Its buffers are ordinary tensors all the same."""
    layer = module(name)
    with torch.inference_mode():
        frozen = rnnkern.freeze(layer)
    other = getattr(nn, name)(5, 6)
    frozen.load_state_dict(other.state_dict())
    assert not any(w.is_inference() for w in frozen.buffers())
    x = input_of(layer)
    assert equal(run(frozen, x), run(rnnkern.convert(other), x))


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_no_other_weights_are_held(name: str) -> None:
    """torch's list of a layer's weights is that of the buffers, whatever happened to them."""
    frozen = rnnkern.freeze(module(name))
    for act in (
        lambda: None,
        lambda: frozen.refresh(module(name)),
        lambda: frozen.load_state_dict(module(name).state_dict(), assign=True),
        lambda: frozen.double(),
    ):
        act()
        assert all(a is b for a, b in zip(frozen._flat_weights, frozen.buffers(), strict=True))
