"""rnnkern.trace and gradient_flow against the float64 references: values, layouts, errors."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkern
from rnnkern import reference
from rnnkern.state_dict import layers

T, B, I, H = 9, 3, 4, 21  # more units than one block of what the kernels keep
LENGTHS = [5, 9, 2]  # not sorted
MODES = ("LSTM", "GRU", "RNN_TANH", "RNN_RELU")


def make(mode: str, **options) -> nn.RNNBase:
    kind = {"LSTM": rnnkern.LSTM, "GRU": rnnkern.GRU}.get(mode, rnnkern.RNN)
    if mode.startswith("RNN"):
        options["nonlinearity"] = mode.removeprefix("RNN_").lower()
    return kind(I, H, dtype=torch.float64, **options)


def random_state(layer: nn.RNNBase, batch: int = B):
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    widths = (layer.proj_size or H, H)
    state = tuple(torch.randn(count, batch, width).double() for width in widths)
    return state if layer.mode == "LSTM" else state[0]


def stack(layer, x: Tensor, hx) -> list[reference.Tape]:
    """The references of every layer, for one batch of equally long sequences (T, B, I)."""
    tapes = []
    states = () if hx is None else hx if isinstance(hx, tuple) else (hx,)
    weights = layers({k: v.detach().numpy() for k, v in layer.state_dict().items()})
    d = len(weights[0])
    for k, own in enumerate(weights):
        given = tapes[-1].output if tapes else x.numpy()
        state = [s[k * d : (k + 1) * d].numpy() for s in states]
        tapes.append(reference.forward(layer.mode, given, own, state))
    return tapes


def flows(tapes, grad_output, grad_h=None, grad_c=None) -> list[reference.Gradients]:
    """Their gradients, back through the stack; the final states' are the last layer's."""
    found = [reference.backward(tapes[-1], grad_output, grad_h, grad_c)]
    for tape in tapes[-2::-1]:
        found.append(reference.backward(tape, found[-1].input))
    return found[::-1]


def same(ours: Tensor, theirs: np.ndarray) -> None:
    theirs = torch.as_tensor(theirs).reshape(ours.shape)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize(("mode", "extra"), [*((m, {}) for m in MODES), ("LSTM", {"proj_size": 2})])
def test_trace_and_flow_are_the_references(mode, extra, num_layers, bidirectional):
    layer = make(mode, num_layers=num_layers, bidirectional=bidirectional, **extra)
    x, hx = torch.randn(T, B, I).double(), random_state(layer)
    trace = rnnkern.trace(layer, x, hx)
    tapes = stack(layer, x, hx)

    output, state = layer(x, hx)
    torch.testing.assert_close(trace.output, output, rtol=0, atol=0)
    torch.testing.assert_close(trace.state, state, rtol=0, atol=0)
    for k, tape in enumerate(tapes):
        for d, wanted in enumerate(tape.directions):
            steps = trace[k, d]
            same(steps.hidden, wanted.hidden)
            assert set(steps.gates) == set(wanted.saved) - {"q"}
            for name, gate in steps.gates.items():
                same(gate, wanted.saved[name])
            if mode == "LSTM":
                same(steps.cell, wanted.cell)
            else:
                assert steps.cell is None

    # A loss on the output in the middle and on the last layer's final hidden states.
    def loss(output, state):
        h_n = state[0] if mode == "LSTM" else state
        return output[T // 2].sin().sum() + h_n[-(2 if bidirectional else 1) :].square().sum()

    flow = rnnkern.gradient_flow(layer, x, loss, hx)
    grad_output = np.zeros_like(tapes[-1].output)
    grad_output[T // 2] = np.cos(tapes[-1].output[T // 2])
    for k, gradients in enumerate(flows(tapes, grad_output, 2 * tapes[-1].h_n)):
        for d in range(len(gradients.flow_h)):
            same(flow[k, d].hidden, np.linalg.norm(gradients.flow_h[d], axis=-1))
            if mode == "LSTM":
                same(flow[k, d].cell, np.linalg.norm(gradients.flow_c[d], axis=-1))
            else:
                assert flow[k, d].cell is None


@pytest.mark.parametrize("mode", MODES)
def test_layouts(mode):
    layer = make(mode, num_layers=2, bidirectional=True)
    by_batch = make(mode, num_layers=2, bidirectional=True, batch_first=True)
    by_batch.load_state_dict(layer.state_dict())
    x = torch.randn(T, B, I).double()
    wanted, trace = rnnkern.trace(layer, x), rnnkern.trace(by_batch, x.transpose(0, 1))
    alone = rnnkern.trace(by_batch, x[:, 1])
    for k in range(2):
        for d in range(2):
            assert wanted[k, d].hidden.shape == (T, B, H)
            for ours, single, theirs in zip(
                tensors(trace[k, d]), tensors(alone[k, d]), tensors(wanted[k, d]), strict=True
            ):
                torch.testing.assert_close(ours, theirs.transpose(0, 1), rtol=0, atol=0)
                torch.testing.assert_close(single, theirs[:, 1], rtol=0, atol=1e-14)
    torch.testing.assert_close(trace.hidden, trace.output[..., :H], rtol=0, atol=0)
    assert trace.gates is trace[-1, 0].gates
    assert trace.cell is trace[1, 0].cell

    def last(output):
        return output.square().sum()

    flow = rnnkern.gradient_flow(layer, x, last)
    assert flow.hidden.shape == (T, B)
    torch.testing.assert_close(
        rnnkern.gradient_flow(by_batch, x.transpose(0, 1), last).hidden, flow.hidden
    )
    single = rnnkern.gradient_flow(by_batch, x[:, 1], last)
    assert single.hidden.shape == (T,)
    torch.testing.assert_close(single.hidden, flow.hidden[:, 1])


def tensors(steps) -> list[Tensor]:
    return [steps.hidden, *steps.gates.values(), *([] if steps.cell is None else [steps.cell])]


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_packed_is_each_sequence_alone(mode, batch_first):
    layer = make(mode, num_layers=2, bidirectional=True, batch_first=batch_first)
    x, hx = torch.randn(T, B, I).double(), random_state(layer)
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    trace = rnnkern.trace(layer, packed, hx)
    assert trace.lengths.tolist() == LENGTHS
    assert trace.hidden.shape == ((B, T, H) if batch_first else (T, B, H))

    def loss(output):
        return output.square().sum()

    flow = rnnkern.gradient_flow(layer, packed, lambda output: output.data.square().sum(), hx)
    assert flow.lengths.tolist() == LENGTHS
    for b, n in enumerate(LENGTHS):
        one = tuple(s[:, b] for s in hx) if mode == "LSTM" else hx[:, b]
        alone = rnnkern.trace(layer, x[:n, b], one)
        alone_flow = rnnkern.gradient_flow(layer, x[:n, b], loss, one)
        for k in range(2):
            for d in range(2):
                for ours, theirs in zip(tensors(trace[k, d]), tensors(alone[k, d]), strict=True):
                    ours = ours[b] if batch_first else ours[:, b]
                    torch.testing.assert_close(ours[:n], theirs, rtol=0, atol=1e-14)
                    assert not ours[n:].any()
                norms = flow[k, d].hidden[:, b]
                torch.testing.assert_close(norms[:n], alone_flow[k, d].hidden)
                assert not norms[n:].any()


def test_trace_is_what_a_call_returns_and_differentiable():
    layer, x = make("GRU"), torch.randn(T, B, I).double()
    trace = rnnkern.trace(layer, x)
    trace.output.sum().backward()
    found = layer.weight_hh_l0.grad.clone()
    layer.zero_grad()
    layer(x)[0].sum().backward()
    torch.testing.assert_close(found, layer.weight_hh_l0.grad, rtol=0, atol=0)
    assert not trace.hidden.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(rnnkern.trace(layer, x).gates, trace.gates)


def test_flow_leaves_no_gradient_behind_and_takes_either_loss():
    layer, x = make("LSTM"), torch.randn(T, B, I).double().requires_grad_()
    with torch.no_grad():
        one = rnnkern.gradient_flow(layer, x, lambda output, scale=2.0: scale * output.sum())
        two = rnnkern.gradient_flow(layer, x, lambda output, state: 2 * output.sum())
        three = rnnkern.gradient_flow(layer, x, torch.sum)
    torch.testing.assert_close(one.hidden, two.hidden, rtol=0, atol=0)
    torch.testing.assert_close(one.hidden, 2 * three.hidden)
    assert x.grad is None
    assert all(p.grad is None for p in layer.parameters())


def test_flow_is_zero_where_the_loss_does_not_look():
    layer = make("LSTM", num_layers=2)
    x = torch.randn(T, B, I).double()
    flow = rnnkern.gradient_flow(layer, x, lambda output, state: state[0][0].sum())
    assert flow[0, 0].hidden.all()
    for state in (flow.hidden, flow.cell):
        assert state.shape == (T, B)
        assert not state.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types(dtype):
    layer = make("LSTM")
    x = torch.randn(T, B, I).double()
    wanted = rnnkern.trace(layer, x)
    found = rnnkern.trace(layer.to(dtype), x.to(dtype))
    tolerance = 20 * torch.finfo(dtype).eps
    for ours, theirs in zip(tensors(found[0, 0]), tensors(wanted[0, 0]), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance)


def test_repr_says_what_is_there():
    layer, x = make("GRU", num_layers=2), torch.randn(T, B, I).double()
    text = "layers=2, directions=1"
    assert text in repr(rnnkern.trace(layer, x))
    assert "reset, update, new" in repr(rnnkern.trace(layer, x))
    assert text in repr(rnnkern.gradient_flow(layer, x, torch.sum))


def test_errors():
    layer, x = make("LSTM"), torch.randn(T, B, I).double()
    with pytest.raises(TypeError, match=r"got LSTM; rnnkern\.convert"):
        rnnkern.trace(nn.LSTM(I, H), x)
    with pytest.raises(ValueError, match=r"scalar tensor, got \(9, 3, 21\)"):
        rnnkern.gradient_flow(layer, x, lambda output: output)
    with pytest.raises(ValueError, match="scalar tensor, got float"):
        rnnkern.gradient_flow(layer, x, lambda output: 1.0)
    with pytest.raises(RuntimeError, match="Expected 4, got 3"):
        rnnkern.trace(layer, x[..., :3])
    assert rnnkern.ops.autograd.OBSERVER.get() is None
    complex_layer = rnnkern.GRU(I, H, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match=r"does not run fused .*complex64"):
        rnnkern.trace(complex_layer, torch.randn(T, B, I, dtype=torch.complex64))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_resets(mode: str, batch_first: bool) -> None:
    """Steps and norms are those of every episode alone; the flow ends at a reset."""
    layer = make(mode, num_layers=2, bidirectional=True, batch_first=batch_first)
    x = torch.randn(*((B, T) if batch_first else (T, B)), I, dtype=torch.float64)
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[4, 0] = resets[2, 2] = resets[7, 2] = True
    given = resets.T if batch_first else resets
    trace = rnnkern.trace(layer, x, resets=given)
    flow = rnnkern.gradient_flow(layer, x, lambda y: y.square().sum(), resets=given)
    steps = x.transpose(0, 1) if batch_first else x
    for row, first, end in ((0, 0, 4), (0, 4, T), (1, 0, T), (2, 0, 2), (2, 2, 7), (2, 7, T)):
        own = rnnkern.trace(layer, steps[first:end, row])
        own_flow = rnnkern.gradient_flow(layer, steps[first:end, row], lambda y: y.square().sum())
        for k, d in ((0, 0), (0, 1), (1, 0), (1, 1)):
            values = {"hidden": trace[k, d].hidden, **trace[k, d].gates}
            for name, wanted in {"hidden": own[k, d].hidden, **own[k, d].gates}.items():
                by_step = values[name].transpose(0, 1) if batch_first else values[name]
                same(by_step[first:end, row], wanted)
            same(flow[k, d].hidden[first:end, row], own_flow[k, d].hidden)


def test_resets_of_unbatched_input_and_of_first_steps() -> None:
    layer = make("LSTM")
    x = torch.randn(T, I, dtype=torch.float64)
    resets = torch.zeros(T, dtype=torch.bool)
    fresh = random_state(layer, 1)
    resets[0] = True
    trace = rnnkern.trace(layer, x, None, resets, tuple(s[:, 0] for s in fresh))
    same(trace.hidden, layer(x, tuple(s[:, 0] for s in fresh))[0].detach())
    resets[3] = True
    flow = rnnkern.gradient_flow(layer, x, lambda y: y[-1].sum(), None, resets)
    assert not flow.hidden[:3].any()
    assert flow.hidden[3:].all()
