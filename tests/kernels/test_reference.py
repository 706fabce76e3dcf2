"""The NumPy references against torch.nn in float64, and against finite differences.

Everything else in this suite trusts them, so they are checked in every output and every gradient.
"""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

from rnnkern import reference
from rnnkern.state_dict import Weights, layers

MODES = ("LSTM", "GRU", "RNN_TANH", "RNN_RELU")
T, B, I, H = 5, 3, 2, 4
SIZES = [3, 3, 2, 1, 1]


def make(mode: str, bidirectional: bool = False, bias: bool = True, proj_size: int = 0):
    """A layer of torch.nn's in float64, with weights large enough for the gates to move."""
    torch.manual_seed(0)
    kind = {"LSTM": torch.nn.LSTM, "GRU": torch.nn.GRU}.get(mode, torch.nn.RNN)
    extra = {"proj_size": proj_size} if proj_size else {}
    if mode.startswith("RNN"):
        extra["nonlinearity"] = mode.removeprefix("RNN_").lower()
    layer = kind(I, H, bidirectional=bidirectional, bias=bias, dtype=torch.float64, **extra)
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(2)
    return layer


def reference_of(layer, x, state, sizes=None):
    weights = layers({k: v.detach().numpy() for k, v in layer.state_dict().items()})
    return reference.forward(
        layer.mode,
        x.detach().numpy(),
        weights[0],
        [s.detach().numpy() for s in state],
        sizes,
    )


def compare(mode, layer, packed, with_state):
    directions = 2 if layer.bidirectional else 1
    width = layer.proj_size or H
    x = torch.randn(sum(SIZES), I) if packed else torch.randn(T, B, I)
    x = x.double().requires_grad_()
    state = []
    if with_state:
        widths = (width, H) if mode == "LSTM" else (width,)
        state = [torch.randn(directions, B, w).double().requires_grad_() for w in widths]
    given = PackedSequence(x, torch.tensor(SIZES)) if packed else x
    hx = None if not state else tuple(state) if mode == "LSTM" else state[0]
    output, final = layer(given, hx)
    output = output.data if packed else output
    final = final if mode == "LSTM" else (final,)

    tape = reference_of(layer, x, state, SIZES if packed else None)
    assert_same(tape.output, output)
    assert_same(tape.h_n, final[0])
    if mode == "LSTM":
        assert_same(tape.c_n, final[1])

    grads = [torch.randn_like(t) for t in (output, *final)]
    torch.autograd.backward([output, *final], grads)
    found = reference.backward(tape, *(g.numpy() for g in grads))
    assert_same(found.input, x.grad)
    for s, g in zip(state, (found.h_0, found.c_0), strict=False):
        assert_same(g, s.grad)
    flat = [g for w in found.weights for g in w.arrays]
    for (name, p), g in zip(layer.named_parameters(), flat, strict=True):
        assert_same(g, p.grad, name)


def assert_same(ours, theirs, name=""):
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("with_state", [False, True], ids=["zeros", "state"])
@pytest.mark.parametrize("mode", MODES)
def test_outputs_and_gradients_are_torchs(mode, with_state, bidirectional, packed):
    compare(mode, make(mode, bidirectional), packed, with_state)


@pytest.mark.parametrize("mode", MODES)
def test_without_bias(mode):
    compare(mode, make(mode, bias=False), packed=False, with_state=True)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_projection(packed):
    compare("LSTM", make("LSTM", True, proj_size=3), packed, with_state=True)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_finite_differences(mode):
    """Independent of torch: a central difference in the direction of each gradient."""
    rng = np.random.default_rng(0)
    gates = reference.CELLS[mode].gates
    shapes = [(gates * H, I), (gates * H, H), (gates * H,), (gates * H,)]
    shapes += [(T, B, I), *[(1, B, H)] * reference.CELLS[mode].states]
    values = [0.7 * rng.normal(size=shape) for shape in shapes]
    values[2] += 2  # rectified units must not all be off: a zero gradient has no direction
    loss_weights = rng.normal(size=(T, B, H))

    def run(values):
        return reference.forward(mode, values[4], [Weights(*values[:4])], values[5:])

    def loss(values):
        return float((run(values).output * loss_weights).sum())

    found = reference.backward(run(values), loss_weights)
    gradients = [*found.weights[0].arrays, found.input, found.h_0]
    gradients += [] if found.c_0 is None else [found.c_0]
    for k, gradient in enumerate(gradients):
        step = 1e-6 * gradient / np.linalg.norm(gradient)
        ends = [loss([*values[:k], values[k] + s * step, *values[k + 1 :]]) for s in (1, -1)]
        slope = (ends[0] - ends[1]) / 2e-6
        assert slope == pytest.approx(np.linalg.norm(gradient), rel=1e-6)


def unrolled(layer, x):
    """torch.nn's cell step by step, so that autograd can be asked about every h_t and c_t."""
    kind = {"LSTM": torch.nn.LSTMCell, "GRU": torch.nn.GRUCell}.get(layer.mode, torch.nn.RNNCell)
    extra = {"nonlinearity": layer.nonlinearity} if layer.mode.startswith("RNN") else {}
    cell = kind(I, H, dtype=torch.float64, **extra)
    cell.load_state_dict({k.removesuffix("_l0"): v for k, v in layer.state_dict().items()})
    state, states = None, []
    for x_t in x:
        state = cell(x_t, state)
        states.append(state if layer.mode == "LSTM" else (state,))
    return states


@pytest.mark.parametrize("mode", MODES)
def test_flow_is_autograds_on_the_unrolled_cell(mode):
    layer = make(mode)
    x = torch.randn(T, B, I).double()
    states = unrolled(layer, x)
    loss = (states[-1][0] ** 2).sum() + states[1][0].sin().sum()
    wanted = torch.autograd.grad(loss, [s for pair in states for s in pair])

    tape = reference_of(layer, x, [])
    grad_output = np.zeros_like(tape.output)
    grad_output[-1] = 2 * tape.output[-1]
    grad_output[1] = np.cos(tape.output[1])
    found = reference.backward(tape, grad_output)
    flows = [found.flow_h[0], *found.flow_c]
    for k, flow in enumerate(flows):
        assert_same(flow.reshape(T, B, H), torch.stack(wanted[k :: len(flows)]))


def test_sigmoid_saturates_without_overflow():
    with np.errstate(all="raise"):
        assert reference.cells.sigmoid(np.array([-1e4, 0.0, 1e4])).tolist() == [0.0, 0.5, 1.0]


def test_imports_no_torch():
    program = "import sys, rnnkern.reference; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_wrong_arguments():
    x, w = np.ones((3, 2, 4)), reference.Weights(np.ones((15, 4)), np.ones((15, 5)))

    def run(mode="GRU", x=x, weights=(w,), state=(), sizes=None):
        return reference.forward(mode, x, weights, state, sizes)

    state = np.zeros((1, 2, 5))
    for wrong, message in (
        ({"mode": "RNN"}, "one of LSTM, GRU, RNN_TANH, RNN_RELU, got 'RNN'"),
        ({"x": x[0]}, "3 dimensions, got 2"),
        ({"x": np.ones((3, 2, 3))}, r"w_ih must have the shape \(15, 3\), got \(15, 4\)"),
        ({"mode": "LSTM"}, r"w_ih must have the shape \(12, 4\)"),
        ({"weights": w}, "one Weights per direction"),
        ({"state": state}, r"h_0 must have the shape \(1, 2, 5\), got \(2, 5\)"),
        ({"state": [state[:, :1]]}, r"h_0 must have .*, got \(1, 1, 5\)"),
        ({"state": [state, state]}, "have 1 arrays, got 2"),
        ({"x": x[0], "sizes": [1, 2]}, "must not grow"),
        ({"x": x[0], "sizes": [1]}, "add up to the 2 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**wrong)
    with pytest.raises(ValueError, match=r"gradient of output must .*, got \(3, 2, 6\)"):
        reference.backward(run(), np.ones((3, 2, 6)))
    with pytest.raises(ValueError, match="gradient of c_n"):
        reference.backward(run(), None, None, state)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_resets(mode: str, bidirectional: bool) -> None:
    """Every result and gradient, of each episode as torch.nn computes it alone."""
    layer = make(mode, bidirectional)
    directions, count = 1 + bidirectional, 2 if mode == "LSTM" else 1
    x = torch.randn(T, B, I).double().requires_grad_()
    h_0 = [torch.randn(directions, B, H).double().requires_grad_() for _ in range(count)]
    fresh = [torch.randn(directions, T, B, H).double().requires_grad_() for _ in range(count)]
    resets = np.array([[1, 0, 0], [0, 0, 1], [0, 0, 0], [1, 0, 1], [1, 0, 0]], bool)
    outputs, final = [], [[] for _ in range(count)]
    for b in range(B):
        starts = [t for t in range(T) if resets[t, b] or t == 0]
        parts = []
        for t, end in zip(starts, [*starts[1:], T], strict=True):
            state = [s[:, t, b] for s in fresh] if resets[t, b] else [s[:, b] for s in h_0]
            y, state = layer(x[t:end, b], tuple(state) if count > 1 else state[0])
            parts.append(y)
        outputs.append(torch.cat(parts))
        for k, s in enumerate(state if count > 1 else (state,)):
            final[k].append(s)
    results = [torch.stack(outputs, 1), *(torch.stack(s, 1) for s in final)]
    grads = [torch.randn_like(r) for r in results]
    torch.autograd.backward(results, grads)

    arrays = ([t.detach().numpy() for t in ts] for ts in (h_0, fresh))
    weights = layers({k: v.detach().numpy() for k, v in layer.state_dict().items()})[0]
    state, after_reset = arrays
    tape = reference.forward(
        mode, x.detach().numpy(), weights, state, resets=resets, after_reset=after_reset
    )
    found = reference.backward(tape, *(g.numpy() for g in grads))
    pairs = [(tape.output, results[0]), (tape.h_n, results[1]), (found.input, x.grad)]
    pairs += [(tape.c_n, results[2])] if count > 1 else []
    pairs += zip([found.h_0, found.c_0], [s.grad for s in h_0], strict=False)
    for d in range(directions):
        pairs += zip(found.after_reset[d], [s.grad[d] for s in fresh], strict=True)
        theirs = [getattr(layer, n).grad for n in layer._all_weights[d]]
        pairs += zip([w for w in found.weights[d] if w is not None], theirs, strict=True)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="resets must have the shape"):
        reference.forward(mode, x.detach().numpy(), weights, resets=resets.T)
