"""forward: shapes, states, packed sequences, messages: section 3 of the contract."""

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from twins import CELLS, LAYERS, agree, close, flat, loss, pack, same_error, state, twins

import rnnkern


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_shapes_and_strides(name: str, batch_first: bool, given: bool) -> None:
    pair = twins(name, 3, 4, 2, batch_first=batch_first, bidirectional=True)
    x = torch.randn(2, 5, 3)
    hx = state(name, 4, 2 if batch_first else 5, 4) if given else None
    theirs, ours = agree(pair, lambda m: m(input=x, hx=hx))
    assert type(ours) is tuple
    assert type(ours[1]) is type(theirs[1])
    for t, o in zip(flat(theirs), flat(ours), strict=True):
        assert t.stride() == o.stride()
    assert ours[0].transpose(0, 1).is_contiguous() if batch_first else ours[0].is_contiguous()
    unbatched = state(name, 4, 4) if given else None
    agree(pair, lambda m: m(torch.ones(5, 3), unbatched))


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("batch", [(), (2,), (0,)])
def test_cells(name: str, bias: bool, given: bool, batch: tuple[int, ...]) -> None:
    pair = twins(name, 3, 4, bias=bias)
    x = torch.randn(*batch, 3)
    hx = state(name, *batch, 4) if given else None
    theirs, ours = agree(pair, lambda m: m(x, hx))
    assert type(ours) is type(theirs)
    for sizes in ((0, 4), (3, 0)):
        odd = twins(name, *sizes, bias=bias)
        agree(odd, lambda m: m(torch.ones(2, sizes[0])))  # noqa: B023


def test_cells_nonlinearity() -> None:
    agree(twins("RNNCell", 3, 4, nonlinearity="relu"), lambda m: m(torch.ones(2, 3)))
    same_error(twins("RNNCell", 3, 4, nonlinearity="foo"), lambda m: m(torch.ones(2, 3)))


def test_hx_forms() -> None:
    pair = twins("LSTM", 3, 4)
    x, (h, c) = torch.randn(5, 2, 3), state("LSTM", 1, 2, 4)
    Pair = namedtuple("Pair", "h c")
    for hx in ((h, c), [h, c], Pair(h, c), (h, h)):
        agree(pair, lambda m: m(x, hx))  # noqa: B023
    h.requires_grad_()
    grads = [torch.autograd.grad(loss(m(x, (h, h))), h)[0] for m in pair]
    close(grads[1:], grads[:1])
    same_error(pair, lambda m: m(x, (h, c, c)))
    same_error(pair, lambda m: m(x, torch.stack([h, c])), message=False)
    cell = twins("LSTMCell", 3, 4)
    agree(cell, lambda m: m(x[0], [h[0].detach(), c[0]]))
    for name in ("GRU", "RNN"):
        same_error(twins(name, 3, 4), lambda m: m(x, (h,)))


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_is_shared(name: str) -> None:
    """Inputs stay as they are; results share no memory with anything."""
    layer = getattr(rnnkern, name)(3, 3, bidirectional=True)
    x, hx = torch.randn(5, 2, 3), state(name, 2, 2, 3)
    tensors = [x, *flat(hx), *layer.parameters()]
    copies = [t.clone() for t in tensors]
    with torch.no_grad():
        results = [*flat(layer(x, hx)), *flat(layer(x, hx))]
    close(tensors, copies, 0)
    storages = [t.untyped_storage().data_ptr() for t in (*tensors, *results)]
    assert len(set(storages)) == len(storages)


@pytest.mark.parametrize("name", LAYERS)
def test_strides(name: str) -> None:
    """Non-contiguous, expanded and offset inputs, states, weights and gradients."""
    pair = twins(name, 3, 4, 2)
    wide = torch.randn(2, 7, 5)
    hx = state(name, 2, 2, 8)
    hx = tuple(h[..., ::2] for h in hx) if name == "LSTM" else hx[..., ::2]
    for x in (
        wide[..., :3].transpose(0, 1),
        wide.permute(1, 0, 2)[::2, :, 2:],
        wide[:, :, ::2].transpose(0, 1),
        torch.randn(1, 1, 3).expand(7, 2, 3),
        torch.randn(7, 2, 1).expand(7, 2, 3),
    ):
        agree(pair, lambda m: m(x, hx))  # noqa: B023
    for module in pair:
        module.weight_hh_l0 = nn.Parameter(
            torch.eye(16)[: module.weight_hh_l0.shape[0], :4].t().contiguous().t()
        )
    agree(pair, lambda m: m(wide[..., :3].transpose(0, 1)))
    for grad in (torch.ones(()).expand(7, 2, 4), torch.randn(4, 2, 7).permute(2, 1, 0)):
        found = []
        for module in pair:
            module.zero_grad()
            module(wide[..., :3].transpose(0, 1))[0].backward(grad)
            found.append([p.grad for p in module.parameters()])
        close(found[1], found[0])


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("lengths", [[7, 7, 7], [7, 4, 1], [2, 7, 5], [1, 1, 1]])
def test_packed(name: str, given: bool, lengths: list[int]) -> None:
    pair = twins(name, 3, 4, 2, bidirectional=True)
    packed = pack(torch.randn(7, 3, 3), lengths)
    hx = state(name, 4, 3, 4) if given else None
    theirs, ours = agree(pair, lambda m: m(packed, hx))
    assert type(ours[0]) is PackedSequence
    assert ours[0].batch_sizes is packed.batch_sizes
    assert ours[0].sorted_indices is packed.sorted_indices
    assert ours[0].unsorted_indices is packed.unsorted_indices
    assert ours[0].data.is_contiguous()
    with torch.no_grad():
        again = pair[1](packed, hx)
    agree(twins(name, 8, 4, 2, bidirectional=True), lambda m: m(*again))  # with its states
    close([pad_packed_sequence(ours[0])[0]], [pad_packed_sequence(theirs[0])[0]])


@pytest.mark.parametrize("name", LAYERS)
def test_packed_rows_are_their_own_sequences(name: str) -> None:
    layer = getattr(rnnkern, name)(3, 4, bidirectional=True)
    x, lengths = torch.randn(7, 3, 3), [2, 7, 5]
    output, h = layer(pack(x, lengths))
    padded = pad_packed_sequence(output)[0]
    for row, n in enumerate(lengths):
        alone = layer(x[:n, row])
        close([padded[:n, row]], [alone[0]])
        close([t[:, row] for t in flat(h)], flat(alone[1]))


def test_packed_by_hand_and_refused() -> None:
    lstm, gru = rnnkern.LSTM(3, 4), rnnkern.GRU(3, 4)
    data = torch.randn(5, 3)
    sizes = torch.tensor([2, 2, 1])
    close(flat(gru(PackedSequence(data, sizes))), flat(nn_copy(gru)(PackedSequence(data, sizes))))
    for bad in (sizes.int(), torch.tensor([1, 2, 2]), torch.tensor([2, 2]), sizes[None], sizes[:0]):
        for layer in (lstm, gru):
            with pytest.raises((RuntimeError, IndexError, TypeError, ValueError)):
                layer(PackedSequence(data, bad))
    for wrong in (torch.randn(5, 4), torch.randn(5, 1, 3), torch.randn(5, 3).double()):
        for layer in (lstm, gru):
            with pytest.raises((RuntimeError, ValueError)):
                layer(PackedSequence(wrong, sizes))
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size"):
        lstm(PackedSequence(data, sizes), state("LSTM", 1, 3, 4))
    same_error(twins("GRU", 3, 4), lambda m: m(PackedSequence(data, sizes), torch.randn(1, 3, 4)))
    same_error(twins("RNN", 3, 4), lambda m: m(PackedSequence(torch.randn(5, 4), sizes)))


def nn_copy(layer: nn.Module) -> nn.Module:
    twin = getattr(nn, type(layer).__name__)(layer.input_size, layer.hidden_size)
    twin.load_state_dict(layer.state_dict())
    return twin


@pytest.mark.parametrize("name", LAYERS)
def test_empty_batch(name: str) -> None:
    pair = twins(name, 3, 4, 2, bidirectional=True)
    agree(pair, lambda m: m(torch.zeros(5, 0, 3), state(name, 4, 0, 4)))
    agree(pair, lambda m: m(torch.zeros(5, 0, 3)))
    nothing = PackedSequence(torch.zeros(0, 3), torch.tensor([0]))
    agree(pair, lambda m: m(nothing))
    same_error(pair, lambda m: m(torch.zeros(0, 2, 3)))
    same_error(pair, lambda m: m(torch.zeros(0, 3)))


@pytest.mark.parametrize("name", LAYERS)
def test_not_finite(name: str) -> None:
    """A NaN stays in its row, from its step on; infinities do what they do in torch.nn."""
    pair = twins(name, 3, 4)
    x = torch.randn(6, 3, 3)
    x[2, 1, 0] = float("nan")
    output = pair[1](x)[0]
    assert output[:, [0, 2]].isfinite().all()
    assert output[:2].isfinite().all()
    assert output[2:, 1].isnan().all()
    for value in (float("inf"), -float("inf"), 1e30, -1e30):
        x[2, 1, 0] = value
        outputs = [flat(m(x)) for m in pair]
        torch.testing.assert_close(outputs[1], outputs[0], equal_nan=True)


MESSAGES: list[tuple[Any, ...]] = [
    ((3,), None),
    ((1, 2, 5, 3), None),
    ((5, 2, 4), None),
    ((5, 4), None),
    ((5, 2, 3), (1, 4)),
    ((5, 3), (1, 1, 4)),
    ((5, 2, 3), (1, 3, 4)),
    ((5, 2, 3), (2, 2, 4)),
    ((5, 2, 3), (1, 2, 5)),
    ((5, 3), (1, 5)),
    ((5, 2, 4), (1, 3, 4)),
    ((5, 2, 4), (1, 4)),
]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("shape", "hidden"), MESSAGES)
def test_messages(
    name: str, batch_first: bool, shape: tuple[int, ...], hidden: tuple[int, ...] | None
) -> None:
    pair = twins(name, 3, 4, batch_first=batch_first)
    if batch_first and len(shape) == 3:
        shape = (shape[1], shape[0], shape[2])
    hx = None if hidden is None else state(name, *hidden)
    same_error(pair, lambda m: m(torch.zeros(shape), hx))


@pytest.mark.parametrize("name", LAYERS)
def test_dtype_messages(name: str) -> None:
    pair = twins(name, 3, 4)
    x = torch.zeros(5, 2, 3)
    for dtype in (torch.float64, torch.int64, torch.bfloat16, torch.complex64):
        same_error(pair, lambda m: m(x.to(dtype)))  # noqa: B023
    same_error(pair, lambda m: m(x, state(name, 1, 2, 4, dtype=torch.float64)), message=False)
    same_error(pair, lambda m: m(x.tolist()))
    same_error(pair, lambda m: m(x.to("meta")))


@pytest.mark.parametrize("name", ["GRU", "RNN"])
def test_packed_state_message(name: str) -> None:
    x = torch.zeros(5, 2, 3)
    for hidden in ((2, 4), (1, 2, 5), (1, 3, 4), (2, 2, 4)):
        packed = pack_padded_sequence(x, [5, 3])
        same_error(twins(name, 3, 4), lambda m: m(packed, torch.zeros(hidden)))  # noqa: B023


def test_cell_state_message() -> None:
    pair = twins("LSTM", 3, 4)
    h, c = torch.zeros(1, 2, 4), torch.zeros(1, 2, 5)
    same_error(pair, lambda m: m(torch.zeros(5, 2, 3), (h, c)))
    same_error(twins("LSTM", 3, 4, proj_size=2), lambda m: m(torch.zeros(5, 2, 3), (h, c)))


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("hidden", [(1, 4), (2, 4), (4, 4), (4, 5)])
def test_unbatched_cell_with_a_batched_state(name: str, hidden: tuple[int, int]) -> None:
    """torch.nn reads outside the state, or names a size that is right, where ours says the rank."""
    cell = getattr(rnnkern, name)(3, 4)
    with pytest.raises(RuntimeError, match=r"For unbatched 1-D input, .* should also be 1-D"):
        cell(torch.zeros(3), state(name, *hidden))


@pytest.mark.parametrize("name", CELLS)
def test_cell_messages(name: str) -> None:
    pair = twins(name, 3, 4)
    for shape, hidden in (
        ((1, 2, 3), None),
        ((), None),
        ((2, 4), None),
        ((4,), None),
        ((2, 3), (1, 2, 4)),
        ((2, 3), (2, 5)),
        ((2, 3), (3, 4)),
    ):
        hx = None if hidden is None else state(name, *hidden)
        same_error(pair, lambda m: m(torch.zeros(shape), hx))  # noqa: B023
    same_error(pair, lambda m: m(torch.zeros(2, 3).double()))
    same_error(pair, lambda m: m(), message=False)
    if name == "LSTMCell":
        good = torch.zeros(2, 4)
        same_error(pair, lambda m: m(torch.zeros(2, 3), (good, torch.zeros(2, 5))))


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_projection(given: bool, packed: bool) -> None:
    pair = twins("LSTM", 3, 4, 2, bidirectional=True, proj_size=2)
    x = torch.randn(5, 3, 3)
    hx = (torch.randn(4, 3, 2), torch.randn(4, 3, 4)) if given else None
    agree(pair, lambda m: m(pack(x, [5, 2, 3]) if packed else x, hx))
    agree(pair, lambda m: m(x[:, 0], None if hx is None else tuple(s[:, 0] for s in hx)))
    agree(pair, lambda m: m(x[:, :0]))
    assert rnnkern.explain(pair[1], x).name == "fused"


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize("name", ["GRU", "RNN"])
def test_complex(name: str, dtype: torch.dtype) -> None:
    torchs, ours = twins(name, 3, 4, dtype=dtype)
    x = torch.randn(5, 2, 3, dtype=dtype)
    close(flat(ours(x)), flat(torchs(x)))
    assert rnnkern.explain(ours, x).name == "torch"


@pytest.mark.parametrize("name", LAYERS)
def test_explain(name: str) -> None:
    layer = getattr(rnnkern, name)(3, 4)
    x = torch.randn(5, 2, 3)
    assert str(rnnkern.explain(layer, x)).startswith("fused")
    assert rnnkern.explain(getattr(nn, name)(3, 4), x).name == "torch"
    torch.func.vmap(lambda x: _is_composite(layer, x))(x.expand(2, 5, 2, 3))


def _is_composite(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    assert rnnkern.explain(layer, x).name == "decomposition"
    return x
