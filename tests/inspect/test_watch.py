"""rnnkern.watch: the same records during training, without changing results."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkern

T, B, I, H = 6, 4, 3, 5


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = rnnkern.LSTM(I, H, num_layers=2, bidirectional=True)
        self.decoder = rnnkern.GRU(2 * H, H)
        self.head = nn.Linear(H, 1)

    def forward(self, x):
        return self.head(self.decoder(self.encoder(x)[0])[0]).square().mean()


def train(model, steps=5):
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        loss = model(torch.randn(T, B, I, generator=generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def make():
    torch.manual_seed(0)
    return Model()


def test_records_every_nth_step_without_changing_results():
    plain, watched, seen = make(), make(), []
    wanted = train(plain)
    with rnnkern.watch(watched, every=2, callback=seen.append) as w:
        assert train(watched) == wanted
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [(o.step, o.name) for o in seen] == [
        (step, name) for step in (0, 2, 4) for name in ("decoder", "encoder")
    ]
    assert {o.name: o for o in seen} == w.latest
    train(watched)
    assert len(seen) == 6  # the hooks are gone


def test_observation_is_trace_and_flow():
    model, x = make(), torch.randn(T, B, I)
    with rnnkern.watch(model) as w:
        loss = model(x)
        assert not w.latest
        loss.backward()
    seen = w.latest["encoder"]
    wanted = rnnkern.trace(model.encoder, x)
    flow = rnnkern.gradient_flow(
        model.encoder, x, lambda output: model.head(model.decoder(output)[0]).square().mean()
    )
    for k in range(2):
        for d in range(2):
            torch.testing.assert_close(seen.trace[k, d].hidden, wanted[k, d].hidden)
            torch.testing.assert_close(seen.trace[k, d].cell, wanted[k, d].cell)
            torch.testing.assert_close(seen.trace[k, d].gates, wanted[k, d].gates)
            torch.testing.assert_close(seen.flow[k, d].hidden, flow[k, d].hidden)
            torch.testing.assert_close(seen.flow[k, d].cell, flow[k, d].cell)
    torch.testing.assert_close(seen.trace.output, wanted.output.detach())
    assert not seen.trace.output.requires_grad
    assert w.latest["decoder"].flow.cell is None


def test_a_frozen_first_layer_has_no_flow():
    model = make()
    for name, p in model.encoder.named_parameters():
        p.requires_grad_("_l1" in name)
    with rnnkern.watch(model) as w:
        train(model, steps=1)
    flow = w.latest["encoder"].flow
    assert flow[1, 0].hidden.all()
    assert not flow[0, 0].hidden.any()


def test_evaluation_is_not_a_step():
    model, seen = make(), []
    with rnnkern.watch(model, callback=seen.append):
        with torch.no_grad():
            model(torch.randn(T, B, I))
        model.eval()
        model(torch.randn(T, B, I)).backward()
        model.train()
        model(torch.randn(T, B, I))  # a loss thrown away
        train(model, steps=1)
    assert {(o.name, o.step) for o in seen} == {("encoder", 1), ("decoder", 1)}


def test_packed_and_the_model_itself():
    layer = rnnkern.LSTM(I, H, batch_first=True)
    packed = pack_padded_sequence(
        torch.randn(B, T, I), [2, 6, 3, 1], batch_first=True, enforce_sorted=False
    )
    with rnnkern.watch(layer) as w:
        layer(input=packed)[0].data.sum().backward()
    seen = w.latest["LSTM"]
    assert seen.trace.lengths.tolist() == [2, 6, 3, 1]
    assert seen.trace.hidden.shape == (B, T, H)
    assert seen.flow.hidden.shape == (T, B)


class Writer:
    def __init__(self):
        self.scalars, self.histograms = {}, {}

    def add_scalar(self, tag, value, step):
        self.scalars[tag, step] = value

    def add_histogram(self, tag, values, step):
        self.histograms[tag, step] = values


def test_writer():
    layer, writer = rnnkern.LSTM(I, H, bidirectional=True), Writer()
    packed = pack_padded_sequence(torch.randn(T, 2, I), [6, 3])
    with rnnkern.watch(layer, writer=writer) as w:
        layer(packed)[0].data.square().sum().backward()
    seen = w.latest["LSTM"]
    forget = writer.histograms["LSTM/layer 0 reverse/gates/forget", 0]
    assert forget.numel() == 9 * H  # no padding
    assert ((forget > 0) & (forget < 1)).all()
    assert {tag.rsplit("/", 1)[1] for tag, _ in writer.histograms} == {
        "input", "forget", "cell", "output", "hidden"
    }  # fmt: skip
    norms = seen.flow[0, 0].cell
    last = writer.scalars["LSTM/layer 0/gradient/cell, last step", 0]
    assert last == pytest.approx((norms[5, 0] + norms[2, 1]).item() / 2)
    first = writer.scalars["LSTM/layer 0/gradient/hidden, first step", 0]
    assert first == pytest.approx(seen.flow[0, 0].hidden[0].mean().item())


def test_a_call_that_raises_leaves_nothing_behind():
    layer = rnnkern.GRU(I, H)
    with rnnkern.watch(layer) as w:
        with pytest.raises(RuntimeError, match="Expected 3, got 4"):
            layer(torch.randn(T, B, 4))
        assert rnnkern.ops.autograd.OBSERVER.get() is None
        layer(torch.randn(T, B, I))[0].sum().backward()
    assert w.latest["GRU"].step == 1


def test_warns_once_of_calls_it_cannot_see():
    layer = rnnkern.LSTM(I, H, dtype=torch.complex64)
    x = torch.randn(T, B, I, dtype=torch.complex64)
    with rnnkern.watch(layer) as w, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            layer(x)
    (warning,) = said
    assert "LSTM cannot be watched (this call does not run fused" in str(warning.message)
    assert "complex64" in str(warning.message)
    assert not w.latest


def test_errors():
    with pytest.raises(ValueError, match="no rnnkern layer"):
        rnnkern.watch(nn.LSTM(I, H))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        rnnkern.watch(make(), every=0)


@pytest.mark.parametrize("by_name", [False, True])
def test_resets(by_name):
    layer = rnnkern.LSTM(3, 4)
    x, resets = torch.randn(5, 2, 3), torch.zeros(5, 2, dtype=torch.bool)
    resets[3, 1] = True
    with rnnkern.watch(layer) as w:
        if by_name:
            output, _, _ = layer(x, resets=resets, return_ends=True)
        else:
            output, _ = layer(x, None, resets)
        output[-1].sum().backward()
    (seen,) = w.latest.values()
    assert torch.equal(seen.trace.hidden, output)
    assert seen.flow.hidden[:, 0].all()
    assert seen.flow.hidden[:, 1].bool().tolist() == [False, False, False, True, True]
