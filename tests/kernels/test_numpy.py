"""rnnkern.numpy: the CPU engine on NumPy arrays against the references, and its errors."""

import copy
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

import rnnkern.numpy
from rnnkern import _numpy, reference
from rnnkern.call_spec import CallSpec
from rnnkern.numpy.library import CELLS as EXPORTED
from rnnkern.state_dict import Weights

T, B, I, H = 7, 3, 5, 6
SIZES = [3, 3, 3, 2, 2, 1, 1]
CELLS = {cell.mode: cell for cell in EXPORTED}
MODES = list(CELLS)


def state_dict(mode, num_layers=2, directions=2, bias=True, dtype=np.float64, proj_size=0, H=H):
    rng = np.random.default_rng(0)
    gates, width = reference.CELLS[mode].gates, proj_size or H
    arrays = {}
    for layer in range(num_layers):
        inputs = directions * width if layer else I
        for suffix in ("", "_reverse")[:directions]:
            shapes = {"weight_ih": (gates * H, inputs), "weight_hh": (gates * H, width)}
            shapes |= {"bias_ih": (gates * H,), "bias_hh": (gates * H,)} if bias else {}
            shapes |= {"weight_hr": (width, H)} if proj_size else {}
            for name, shape in shapes.items():
                arrays[f"{name}_l{layer}{suffix}"] = rng.normal(scale=0.5, size=shape).astype(dtype)
    return arrays


def make(mode, **options):
    arrays = state_dict(mode, **options)
    nonlinearity = "relu" if mode == "RNN_RELU" else "tanh"
    return rnnkern.numpy.Layer(arrays, nonlinearity=nonlinearity)


def random(*shape):
    return np.random.default_rng(1).normal(size=shape)


def expected(layer, x, states, sizes=None):
    """Tapes of the references, one per layer of the stack."""
    tapes, d = [], layer.directions
    for k, weights in enumerate(layer.weights):
        x = tapes[-1].output if tapes else x
        state = [s[k * d : (k + 1) * d] for s in states]
        tapes.append(reference.forward(layer.cell.mode, x, weights, state, sizes))
    return tapes


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("mode", "proj_size"), [*((mode, 0) for mode in MODES), ("LSTM", 4)])
@pytest.mark.parametrize("H", [H, 37])  # in one block of what is kept, and in several
def test_outputs_and_steps_are_the_references(H, mode, proj_size, bias, directions, packed):
    layer = make(mode, bias=bias, directions=directions, proj_size=proj_size, H=H)
    x = random(sum(SIZES), I) if packed else random(T, B, I)
    widths = (proj_size or H, H)[: len(layer.cell.states)]
    states = [random(2 * directions, B, width) for width in widths]
    hx = tuple(states) if mode == "LSTM" else states[0]
    sizes = SIZES if packed else None

    output, final, steps = layer.record(x, hx, sizes)
    tapes = expected(layer, x, states, sizes)
    np.testing.assert_allclose(output, tapes[-1].output, atol=1e-12)
    finals = final if mode == "LSTM" else (final,)
    np.testing.assert_allclose(finals[0], np.concatenate([t.h_n for t in tapes]), atol=1e-12)
    if mode == "LSTM":
        np.testing.assert_allclose(finals[1], np.concatenate([t.c_n for t in tapes]), atol=1e-12)
    for tape, found in zip(tapes, steps, strict=True):
        for wanted, step in zip(tape.directions, found, strict=True):
            named = {"hidden": wanted.hidden, "cell_state": wanted.cell, **wanted.saved}
            for name, value in step.items():
                np.testing.assert_allclose(value, named[name], atol=1e-12, err_msg=name)

    inferred, _ = layer(x, hx, sizes)
    np.testing.assert_array_equal(inferred, output)


@pytest.mark.parametrize("isa", _numpy.isas())
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    ("mode", "H", "P"), [*((mode, 37, 0) for mode in MODES), ("LSTM", 37, 21), ("LSTM", 128, 64)]
)
def test_gradients_are_the_references(mode, H, P, packed, isa):
    """One layer in both directions, at every instruction set, cut by rows and by units."""
    cell, width = CELLS[mode], P or H
    for threads, batch in ((1, 3), (4, 3), (4, 30)):
        sizes = [batch] * 3 + [batch // 2, 1, 1] if packed else None
        rows, rng = (sum(sizes) if packed else 6 * batch), np.random.default_rng(2)
        x = rng.normal(size=(rows, I) if packed else (6, batch, I))
        gates = len(cell.gates) * H
        weights = [
            Weights(
                *(rng.normal(scale=0.5 / np.sqrt(H), size=s) for s in ((gates, I), (gates, width))),
                *rng.normal(size=(2, gates)),
                rng.normal(scale=1 / np.sqrt(H), size=(P, H)) if P else None,
            )
            for _ in range(2)
        ]
        state = [rng.normal(size=(2, batch, n)) for n in (width, H)[: len(cell.states)]]
        tape = reference.forward(mode, x, weights, state, sizes)
        finals = [tape.h_n, tape.c_n][: len(cell.states)]
        grads = [rng.normal(size=a.shape) for a in (tape.output, *finals)]
        wanted = reference.backward(tape, *grads)

        arrays = [w for direction in weights for w in direction.arrays]
        level = _numpy.isa()
        _numpy.set_isa(isa)
        rnnkern.numpy.set_threads(threads)
        try:
            spec = CallSpec(cell.id, 2, projection=P > 0)
            output, _, _, saved, c_states = _numpy.forward(x, sizes, state, arrays, spec, True)
            d_x, d_h, d_c, d_weights, flow_h, flow_c = _numpy.backward(
                *grads, *[None] * (3 - len(grads)), x, sizes, state, arrays, output, saved,
                c_states, spec,
            )  # fmt: skip
        finally:
            _numpy.set_isa(level)
            rnnkern.numpy.set_threads(os.cpu_count())
        pairs = [(output, tape.output), (d_x, wanted.input), (d_h, wanted.h_0)]
        pairs += zip(d_weights, (w for d in wanted.weights for w in d.arrays), strict=True)
        pairs += [(flow_h, np.stack(wanted.flow_h))]
        if mode == "LSTM":
            pairs += [(d_c, wanted.c_0), (flow_c, np.stack(wanted.flow_c))]
        for ours, theirs in pairs:
            np.testing.assert_allclose(ours, theirs, atol=1e-12 * max(1, abs(theirs).max()))


def test_layouts_and_the_zero_state():
    arrays, x = state_dict("LSTM"), random(T, B, I)
    layer = rnnkern.numpy.Layer(arrays)
    output, (h_n, c_n) = layer(x)
    zeros = np.zeros((4, B, H))
    np.testing.assert_array_equal(layer(x, (zeros, zeros))[0], output)

    by_batch = rnnkern.numpy.Layer(arrays, batch_first=True)
    swapped, (h_swapped, _) = by_batch(x.swapaxes(0, 1))
    np.testing.assert_array_equal(swapped, output.swapaxes(0, 1))
    np.testing.assert_array_equal(h_swapped, h_n)
    _, _, steps = by_batch.record(x.swapaxes(0, 1))
    np.testing.assert_array_equal(steps[1][0]["hidden"], output[..., :H].reshape(-1, H))

    alone, (_, c_alone) = by_batch(x[:, 1], (zeros[:, 1], zeros[:, 1]))  # without a batch
    np.testing.assert_allclose(alone, output[:, 1], atol=1e-14)
    np.testing.assert_allclose(c_alone, c_n[:, 1], atol=1e-14)


@pytest.mark.parametrize("mode", MODES)
def test_float32(mode):
    layer, x = make(mode, dtype=np.float32), random(T, B, I).astype(np.float32)
    output, _ = layer(x)
    assert output.dtype == np.float32
    wanted = expected(layer, x, [])[-1].output
    np.testing.assert_allclose(output, wanted, atol=2e-6 * max(1, abs(wanted).max()))


def test_reads_a_layer_out_of_a_model():
    arrays = state_dict("GRU")
    model = {f"encoder.rnn.{name}": w for name, w in arrays.items()} | {"head.weight": random(2, H)}
    x = random(T, B, I)
    found = rnnkern.numpy.Layer(model, prefix="encoder.rnn.")
    np.testing.assert_array_equal(found(x)[0], rnnkern.numpy.Layer(arrays)(x)[0])
    assert repr(found) == "Layer(GRU, 5, 6, num_layers=2, bidirectional=True, float64)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("bias_hh_l0"), "lacks bias_hh_l0"),
        (lambda w: w.pop("weight_hh_l1_reverse"), "lacks weight_hh_l1_reverse"),
        (lambda w: w.update(head=random(2)), "'head' is not a weight of a recurrent layer"),
        (lambda w: w.update(weight_hh_l0=random(9, H)), "belongs to no LSTM"),
        (lambda w: w.update(weight_ih_l1=random(24, 7)), r"w_ih of layer 1, .* \(24, 12\), got"),
        (lambda w: w.update(weight_hr_l0=random(2, H)), "lacks weight_hr_l0_reverse"),
        (lambda w: w.update(bias_ih_l0=w["bias_ih_l0"].astype("f")), "both float64 and float32"),
        (lambda w: w.update(weight_ih_l0=w["weight_ih_l0"].astype(int)), "float32 or float64"),
        (lambda w: w.clear(), "no recurrent layer's weights"),
    ],
)
def test_wrong_weights(change, message):
    arrays = state_dict("LSTM")
    change(arrays)
    with pytest.raises(ValueError, match=message):
        rnnkern.numpy.Layer(arrays)


@pytest.mark.parametrize(
    ("x", "hx", "sizes", "message"),
    [
        (random(T), None, None, "2 or 3 dimensions, got 1"),
        (random(T, B, I), None, SIZES, r"2 \(packed\) dimensions, got 3"),
        (random(T, B, 4), None, None, "5 features, got 4"),
        (random(T, B, I).astype("f"), None, None, "float32, but the weights are float64"),
        (random(0, B, I), None, None, "sequence length"),
        (random(T, B, I), random(4, B, H), None, "h_0, c_0, got 1"),
        (random(T, B, I), (random(4, B, H), random(4, 1, H)), None, r"c_0 must .* \(4, 3, 6\)"),
        (random(T, B, I), (random(4, B, H).astype("f"),) * 2, None, "h_0 is float32"),
        (random(9, I), None, [2, 3, 4], "must not grow"),
        (random(9, I), None, [3, 3], "do not add up"),
    ],
)
def test_wrong_inputs(x, hx, sizes, message):
    with pytest.raises(ValueError, match=message):
        make("LSTM")(x, hx, sizes)


def test_the_bindings_own_check():
    """No array that the kernels would read beyond, whoever calls them."""
    weights = [random(4 * H, I), random(4 * H, H)]
    x, spec = random(T, B, I), CallSpec(0, bias=False)
    for arguments, message in (
        ((x, None, [], weights[:1], spec), "expected 2 weights, got 1"),
        ((x[0], None, [], weights, spec), "input must have 3 dimensions, got 2"),
        ((x, None, [], [random(4 * H, 2), weights[1]], spec), "weight_ih must have the"),
        ((x, None, [random(1, B, H)], weights, spec), "expected 2 states, got 1"),
        ((x, None, [], weights, spec._replace(cell=999)), "no cell 999"),
        ((x, None, [], weights, spec._replace(directions=3)), "expected 1 or 2 direct"),
        ((x, None, [], weights, spec._replace(cell=1, projection=True)), "only LSTM"),
        ((x[0], [1, 2], [], weights, spec), "must not grow"),
        ((x[0], [2], [], weights, spec), "add up to 2 rows, but the data has 3"),
    ):
        with pytest.raises(ValueError, match=message):
            _numpy.forward(*arguments, False)


@pytest.mark.parametrize(
    "sizes",
    [
        tuple(SIZES),
        np.array(SIZES),
        np.array(SIZES, np.uint8),
        np.array([SIZES, SIZES])[:, ::1].T[:, 0],
        [np.int32(b) for b in SIZES],
        range(7, 0, -2),
    ],
    ids=lambda sizes: type(sizes).__name__,
)
def test_batch_sizes_of_every_kind(sizes):
    layer = make("GRU", num_layers=1, directions=1)
    x = random(int(sum(sizes)), I)
    output, _, steps = layer.record(x, None, sizes)
    np.testing.assert_array_equal(output, layer(x, None, [int(b) for b in sizes])[0])
    assert steps[0][0]["hidden"].shape == (len(x), H)


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ([3.0, 2.0], TypeError, "whole numbers, got float64"),
        (np.array([3, 2], np.float32), TypeError, "whole numbers, got float32"),
        ([True, True], TypeError, "whole numbers, got bool"),
        (["3", "2"], TypeError, "whole numbers, got <U1"),
        ([3, None], TypeError, "whole numbers, got object"),
        ([[3, 2]], ValueError, "1 dimension, got 2"),
        (5, ValueError, "1 dimension, got 0"),
        ("32", ValueError, "1 dimension, got 0"),
        ({3: 2}, ValueError, "1 dimension, got 0"),
        ([], ValueError, "a size for each step"),
        (np.zeros(0, int), ValueError, "a size for each step"),
        ([3, 0, 2], ValueError, "at least 1, got 0"),
        ([6, -1], ValueError, "at least 1, got -1"),
        ([2, 3], ValueError, r"must not grow, got \[2, 3\]"),
        ([1] * 99 + [2], ValueError, r"must not grow, got \[1, .*1, \.\.\.\]$"),
        ([3, 3], ValueError, "do not add up to the rows of input: 6 instead of 5"),
        (np.uint8([200, 100]), ValueError, "300 instead of 5"),
    ],
)
def test_wrong_batch_sizes(sizes, error, message):
    for mode in ("LSTM", "RNN_TANH"):
        with pytest.raises(error, match=message) as raised:
            make(mode)(random(5, I), None, sizes)
        assert len(str(raised.value)) < 200


@pytest.mark.parametrize(
    ("x", "hx", "message"),
    [
        (None, None, "2 or 3 dimensions, got 0"),
        ("text", None, "2 or 3 dimensions, got 0"),
        (random(T, B, I).astype(object), None, "input is object"),
        (random(T, B, I).astype(complex), None, "input is complex128"),
        (np.ones((T, B, I), bool), None, "input is bool"),
        (random(T, B, I), {"h": 1}, "h_0, c_0, got 1"),
        (random(T, B, I), (None, None), r"h_0 must .*, got \(\)"),
        (random(T, B, I), "ab", "h_0, c_0, got 1"),
        (random(T, B, I), (random(4, B, H).astype(object),) * 2, "h_0 is object"),
        (random(T, B, I), [random(4, B, H)] * 3, "got 3"),
    ],
)
def test_wrong_types_of_input(x, hx, message):
    with pytest.raises(ValueError, match=message) as raised:
        make("LSTM")(x, hx)
    assert len(str(raised.value)) < 200


def test_what_is_no_state_dict():
    with pytest.raises(TypeError, match=r"got str; of a layer give its state_dict"):
        rnnkern.numpy.Layer("lstm.npz")
    with pytest.raises(ValueError, match="under the prefix 'encoder'; with its dot it is"):
        rnnkern.numpy.Layer({"encoder.weight_ih_l0": random(4, 4)}, prefix="encoder")
    with pytest.raises(ValueError, match="3 is not a weight"):
        rnnkern.numpy.Layer({3: random(4, 4)})
    with pytest.raises(ValueError, match="'tanh' or 'relu', got None"):
        rnnkern.numpy.Layer(state_dict("RNN_TANH"), nonlinearity=None)


def test_tensors_of_torch():
    torch = pytest.importorskip("torch")
    lstm = torch.nn.LSTM(I, H)
    x = torch.randn(T, B, I)
    output, _ = rnnkern.numpy.Layer(lstm.state_dict())(x)
    np.testing.assert_allclose(output, lstm(x)[0].detach(), atol=1e-6)
    for layer, word in ((lstm.to("meta"), "meta"), (torch.nn.LSTM(I, H).bfloat16(), "BFloat16")):
        with pytest.raises(ValueError, match=f"weight_ih_l0 cannot be read as .*{word}"):
            rnnkern.numpy.Layer(layer.state_dict())
    with pytest.raises(ValueError, match=r"weight_ih_l0 cannot be read .*detach"):
        rnnkern.numpy.Layer(dict(torch.nn.LSTM(I, H).named_parameters()))


def test_wrong_nonlinearity():
    with pytest.raises(ValueError, match="'tanh' or 'relu', got 'sin'"):
        rnnkern.numpy.Layer(state_dict("RNN_TANH"), nonlinearity="sin")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("weight_hr_l1"), "lacks weight_hr_l1"),
        (lambda w: w.update(weight_hr_l1=random(3, H)), r"w_hr of layer 1, .* \(2, 6\), got"),
        (lambda w: w.update(weight_hr_l0=random(2, 2 * H)), "belongs to no LSTM"),
        (lambda w: w.update(weight_hh_l0=random(4 * H, H)), r"w_hh of layer 0, .* \(24, 2\), got"),
    ],
)
def test_wrong_projection(change, message):
    arrays = state_dict("LSTM", directions=1, proj_size=2)
    assert "6, proj_size=2, num_layers=2" in repr(rnnkern.numpy.Layer(arrays))
    change(arrays)
    with pytest.raises(ValueError, match=message):
        rnnkern.numpy.Layer(arrays)


def test_imports_no_torch():
    program = "import sys, rnnkern.numpy; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_wrong_numbers_of_threads():
    for wrong in ("2", 1.5, None, True):
        with pytest.raises(TypeError, match="must be a whole number, got"):
            rnnkern.numpy.set_threads(wrong)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="at least 1, got"):
            rnnkern.numpy.set_threads(wrong)


# Weights that are packed once.


def test_weights_are_a_snapshot():
    arrays = state_dict("LSTM")
    layer = rnnkern.numpy.Layer(arrays)
    x = random(T, B, I)
    expected, _ = layer(x)
    for array in arrays.values():
        array *= 2
    assert np.array_equal(layer(x)[0], expected)
    assert not np.array_equal(layer.record(x)[0], expected)


def test_copies_pack_anew():
    layer = make("GRU")
    x = random(T, B, I)
    expected, _ = layer(x)
    for same in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert np.array_equal(same(x)[0], expected)
        assert repr(same) == repr(layer)
    assert b"_packed" not in pickle.dumps(layer)


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_rounded_weights_are_not_recorded(weights):
    arrays = state_dict("LSTM", dtype=np.float32)
    layer = rnnkern.numpy.Layer(arrays, weights=weights)
    assert repr(layer).endswith(f"float32, weights={weights!r})")
    assert rnnkern.numpy.Layer(arrays).weight_format == "float32"
    with pytest.raises(ValueError, match=f"record is not there for weights='{weights}'"):
        layer.record(random(T, B, I).astype(np.float32))


def test_prepacked_memory_is_checked():
    layer = make("LSTM", num_layers=1, directions=1)
    x, spec = random(T, B, I), layer._spec(False)
    good = layer._packed[0]
    other = good.copy()
    other[:8] = 0
    for wrong in (good[:-1].copy(), np.zeros(4, np.uint8), other):
        with pytest.raises(ValueError, match="prepacked"):
            _numpy.forward_prepacked(x, None, [], wrong, spec, H, 0)
        with pytest.raises(ValueError, match="prepacked"):
            _numpy.Stream([wrong], 1, 1)
    for hidden, proj in ((H + 1, 0), (H, 2)):
        with pytest.raises(ValueError, match="prepacked weights are another layer's"):
            _numpy.forward_prepacked(x, None, [], good, spec, hidden, proj)
    with pytest.raises(ValueError, match="prepacked weights are another layer's"):
        _numpy.forward_prepacked(x.astype(np.float32), None, [], good, spec, H, 0)
