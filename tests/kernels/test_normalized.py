"""Layers with normalised sums: BatchNormLiGRU and LayerNormLSTM against their definitions."""

import copy
import pickle
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from torch.nn.utils.rnn import pad_packed_sequence
from twins import flat, pack

import rnnkern
import rnnkern.numpy
from rnnkern.cells import BatchNormLiGRU, LayerNormLSTM
from rnnkern.cells.normalized import _recurrence
from rnnkern.cells.shelf import FOLDER, OF_SUMS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
F64 = torch.float64
T, B, I = 6, 3, 5


@pytest.fixture(autouse=True)
def _quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXXFLAGS", "-O0")


def assert_same(ours: object, truth: object) -> None:
    for mine, other in zip(flat(ours), flat(truth), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)


def random(module: nn.Module) -> nn.Module:
    """With gains and biases that are no longer ones and zeros."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return module


def layer_norm_lstm(
    layer: nn.Module, direction: int, x: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A direction, by the definition."""
    H, end = h.shape[-1], "_reverse" * direction
    w_ih = layer.w.weight[4 * H * direction :][: 4 * H]
    w_hh = getattr(layer.recurrence, f"weight_hh_l0{end}")
    params = getattr(layer.recurrence, f"params_l0{end}")
    outputs = []
    for step in x.flip(0) if direction else x:
        of_x, of_h = layer.norms[direction](step @ w_ih.T), h @ w_hh.T
        i, f, g, o = (of_x + layer_norm(of_h, (4 * H,), params[:4].flatten())).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * layer_norm(c, (H,), params[4], params[5]).tanh()
        outputs.append(h)
    output = torch.stack(outputs)
    return output.flip(0) if direction else output, h, c


def of_directions(
    layer: nn.Module, x: Tensor, state: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    directions = len(layer.norms)
    results = [layer_norm_lstm(layer, d, x, *(s[d] for s in state)) for d in range(directions)]
    output, h, c = zip(*results, strict=True)
    return torch.cat(output, -1), torch.stack(h), torch.stack(c)


@pytest.mark.parametrize("name", OF_SUMS)
def test_against_the_step(name: str) -> None:
    assert rnnkern.cells.check(type(_recurrence(name, 8 if "LSTM" in name else 4, 2))) < 1e-11


@pytest.mark.parametrize(
    ("hidden", "batch", "both"),
    [(1, 2, False), (3, 1, True), (16, 4, False), (20, 3, True), (72, 90, False), (192, 2, True)],
)
def test_layer_norm_lstm(hidden: int, batch: int, both: bool) -> None:
    """Outputs, states and every gradient, whole vectors and others."""
    module = random(LayerNormLSTM(I, hidden, bidirectional=both, dtype=F64))
    x, h, c = (
        torch.randn(*shape, dtype=F64, requires_grad=True)
        for shape in ((T, batch, I), *[(1 + both, batch, hidden)] * 2)
    )
    found = flat(module(x, (h, c)))
    truth = of_directions(module.layers[0], x, (h, c))
    assert_same(found, truth)
    leaves, upstream = [x, h, c, *module.parameters()], [torch.randn_like(t) for t in truth]
    grads = [torch.autograd.grad(results, leaves, upstream) for results in (found, truth)]
    scale = max(1.0, *(g.abs().max().item() for g in grads[1]))
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine / scale, other / scale, rtol=1e-9, atol=1e-11)
    with torch.no_grad():
        assert all(map(torch.equal, flat(module(x, (h, c))), found))


def test_layers() -> None:
    """Several layers, batch_first, packed and no state; dropout between layers."""
    module = LayerNormLSTM(I, 12, num_layers=2, batch_first=True, bidirectional=True, dtype=F64)
    x = torch.randn(B, T, I, dtype=F64)
    rows, finals = x.transpose(0, 1), []
    for layer in module.layers:
        rows, *final = of_directions(layer, rows, [x.new_zeros(2, B, 12)] * 2)
        finals.append(final)
    h_n, c_n = (torch.cat(s) for s in zip(*finals, strict=True))
    output, state = module(x)
    assert_same((output, *state), (rows.transpose(0, 1), h_n, c_n))
    packed, _ = module(pack(x, [4, 6, 2], batch_first=True))
    padded, _ = pad_packed_sequence(packed, batch_first=True)
    for row, length in enumerate((4, 6, 2)):
        assert_same(padded[row, :length], module(x[row : row + 1, :length])[0][0])
    module.dropout = 0.5
    assert not torch.equal(module(x)[0], output)
    assert torch.equal(module.eval()(x)[0], output)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_li_gru(training: bool, both: bool) -> None:
    """By the definition, with the masks and the running moments of training."""
    H, rate = 20, 0.4
    module = random(BatchNormLiGRU(I, H, recurrent_dropout=rate, bidirectional=both, dtype=F64))
    with torch.no_grad():
        module.layers[0].norm.running_var.uniform_(0.5, 2)
    layer = copy.deepcopy(module.train(training)).layers[0]
    x, D = torch.randn(T, B, I, dtype=F64, requires_grad=True), 1 + both
    hx = torch.rand(D, B, H, dtype=F64)
    torch.manual_seed(3)
    found = module(x, hx)
    torch.manual_seed(3)
    mask = layer.recurrence.masks((1, T, D * B, 1, H), x).expand(1, T, D * B, 1, H)
    assert torch.equal(mask, mask[:, :1].expand_as(mask))
    assert (0 in mask) == training
    sums, outputs, finals = layer.norm((x @ layer.w.weight.T).flatten(0, 1)), [], []
    for d, dropped in zip(range(D), mask[0, 0, :, 0].chunk(D), strict=True):
        h, steps = hx[d], []
        by_step = sums.unflatten(0, (T, B))
        for step in by_step.flip(0) if d else by_step:
            a, z = (step + h @ layer.recurrence.weight_hh_l0.T).chunk(2, -1)
            h = z.sigmoid() * h + (1 - z.sigmoid()) * (a.relu() * dropped)
            steps.append(h)
        outputs.append(torch.stack(steps).flip(0) if d else torch.stack(steps))
        finals.append(h)
    truth = torch.cat(outputs, -1), torch.stack(finals)
    assert_same(found, truth)
    assert_same([*module.layers[0].norm.buffers()], [*layer.norm.buffers()])
    upstream = [torch.randn_like(t) for t in truth]
    assert_same(
        torch.autograd.grad(found, [x, *module.parameters()], upstream),
        torch.autograd.grad(truth, [x, *layer.parameters()], upstream),
    )


def test_li_gru_layers() -> None:
    module = BatchNormLiGRU(I, 12, num_layers=2, batch_first=True, bidirectional=True).eval()
    x = torch.randn(B, T, I)
    output, h_n = module(x)
    assert output.shape == (B, T, 24)
    assert torch.equal(output[:, -1, :12], h_n[2])
    assert torch.equal(output[:, 0, 12:], h_n[3])


@pytest.mark.parametrize("kind", [BatchNormLiGRU, LayerNormLSTM])
def test_what_layers_have(kind: type[nn.Module]) -> None:
    module = kind(I, 20, num_layers=2, bidirectional=True).eval()
    x = torch.randn(T, B, I)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert all(map(torch.equal, flat(other(x)), flat(module(x))))
    other = kind(I, 20, num_layers=2, bidirectional=True).eval()
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x)[0], module(x)[0])
    with torch.inference_mode():
        assert torch.equal(rnnkern.freeze(module)(x)[0], module(x)[0])
        rounded = rnnkern.freeze(module, "int8")(x)[0]
        torch.testing.assert_close(rounded, module(x)[0], rtol=0, atol=0.1)
        torch.testing.assert_close(
            copy.deepcopy(module).double()(x.double())[0].float(), module(x)[0]
        )
    layer = module.layers[0]
    sums = torch.randn(T, B, layer.recurrence.input_size)
    trace = rnnkern.trace(layer.recurrence, sums)
    assert torch.equal(trace[0, 0].hidden, layer.recurrence(sums)[0][..., :20])
    assert repr(module).startswith(f"{kind.__name__}(\n  5, 20, num_layers=2")


@torch.inference_mode()
def test_numpy_and_streams() -> None:
    """The recurrence alone, on sums that are normalised outside."""
    layer, sums = LayerNormLSTM(I, 20).layers[0].recurrence, torch.randn(T, B, 80)
    arrays = {name: value.numpy() for name, value in layer.state_dict().items()}
    header = FOLDER / OF_SUMS["LayerNormLSTMOfSums"].header
    own = rnnkern.numpy.Layer(arrays, cell=header)
    np.testing.assert_array_equal(own(sums.numpy())[0], layer(sums)[0].numpy())
    stream = rnnkern.freeze(layer).stream(B)
    assert torch.equal(torch.stack([*map(stream, sums)]), layer(sums)[0])
    arrays["bias_hh_l0"] = np.zeros(80, np.float32)
    with pytest.raises(ValueError, match="has bias_hh_l0"):
        rnnkern.numpy.Layer(arrays, cell=header)


def test_transforms() -> None:
    module = LayerNormLSTM(I, 8, dtype=F64)
    x = torch.randn(2, B, I, dtype=F64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: module(x)[0][-1, 0, :2], x)
    grad = torch.func.grad(lambda x: module(x)[0].sum())(x.detach())
    assert_same(grad, torch.autograd.grad(module(x)[0].sum(), x)[0])


@pytest.mark.compiler
@pytest.mark.parametrize("kind", [BatchNormLiGRU, LayerNormLSTM])
def test_compile(kind: type[nn.Module]) -> None:
    torch.compiler.reset()
    module, x = kind(I, 20, dtype=F64).eval(), torch.randn(T, B, I, dtype=F64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x), module(x))


def test_resets() -> None:
    layer = random(LayerNormLSTM(I, 20, dtype=F64)).layers[0].recurrence
    sums = torch.randn(T, B, 80, dtype=F64, requires_grad=True)
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[3] = True
    output = layer(sums, resets=resets)[0]
    truth = torch.cat([layer(sums[:3])[0], layer(sums[3:])[0]])
    assert_same(output, truth)
    leaves, weight = [sums, *layer.parameters()], torch.randn_like(truth)
    assert_same(*(torch.autograd.grad(y, leaves, weight) for y in (output, truth)))


def test_threads() -> None:
    """Rows are split, never units: the bits stay."""
    module = LayerNormLSTM(64, 256)
    for batch in (1, 2, 40):
        x, results = torch.randn(9, batch, 64), []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            output = module(x)[0]
            results.append([output, *torch.autograd.grad(output.sum(), [*module.parameters()])])
        plan = rnnkern.plan(module.layers[0].recurrence, torch.randn(9, batch, 1024))
        assert plan["split"] == "rows"
        assert plan["threads"] <= batch
        for one, two in zip(*results, strict=True):
            torch.testing.assert_close(one, two)
        assert torch.equal(results[0][0], results[1][0])


def test_wrong_arguments() -> None:
    for kind in (BatchNormLiGRU, LayerNormLSTM):
        with pytest.raises(ValueError, match="hidden_size must be greater than zero"):
            kind(I, 0)
        module = kind(I, 20)
        with pytest.raises(TypeError, match="input must be a tensor, got list"):
            module([1.0])
        with pytest.raises(RuntimeError, match="3 dimensions and 5 features"):
            module(torch.randn(T, B, I + 1))
        with pytest.raises(RuntimeError, match=r"state\(s\) of the shape \(1, batch, 20\)"):
            module(torch.randn(T, B, I), torch.zeros(1, B, 19))
    with pytest.raises(TypeError, match="got PackedSequence"):
        BatchNormLiGRU(I, 20)(pack(torch.randn(T, B, I), [4, 6, 2]))
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        BatchNormLiGRU(I, 20, recurrent_dropout=1)
    with pytest.raises(ValueError, match="dropout must be between 0 and 1"):
        LayerNormLSTM(I, 20, dropout=-1)
    with pytest.raises(RuntimeError, match="zoneout is around a cell without layer normalisation"):
        rnnkern.cells.zoneout(type(_recurrence("LayerNormLSTMOfSums", 80, 20)))
