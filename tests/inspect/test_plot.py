"""rnnkern.plot: what the pictures show, their scales and labels, and errors."""

import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkern
from rnnkern import plot

T, B, I, H = 5, 2, 3, 4


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def image(ax):
    (found,) = ax.get_images()
    return found


def panels(figure):
    """The axes that are not colour bars."""
    return [ax for ax in figure.axes if ax.get_xlabel()]


def test_states():
    trace = rnnkern.trace(rnnkern.LSTM(I, H), torch.randn(T, B, I))
    figure = plot.states(trace, sample=1)
    hidden, cell = panels(figure)
    np.testing.assert_allclose(image(hidden).get_array(), trace.hidden[:, 1].T)
    np.testing.assert_allclose(image(cell).get_array(), trace.cell[:, 1].T)
    low, high = image(cell).get_clim()
    assert -low == high == pytest.approx(trace.cell[:, 1].abs().max().item())
    assert hidden.get_xlabel() == "time step $t$"
    assert hidden.get_ylabel() == "hidden unit"
    assert len(hidden.texts) == T * H  # few enough to be written
    lines = panels(plot.states(trace, kind="lines"))[0].get_lines()
    np.testing.assert_allclose(lines[2].get_ydata(), trace.hidden[:, 0, 2])


def test_many_units_are_shown_by_their_distribution():
    trace = rnnkern.trace(rnnkern.GRU(I, 40), torch.randn(T, B, I))
    (ax,) = plot.states(trace, kind="lines").axes
    median = np.median(trace.hidden[:, 0].numpy(), axis=1)
    np.testing.assert_allclose(ax.get_lines()[0].get_ydata(), median, rtol=1e-6)


def test_states_of_a_gru_need_one_axes():
    trace = rnnkern.trace(rnnkern.GRU(I, H), torch.randn(T, B, I))
    figure, ax = plt.subplots()
    assert plot.states(trace, ax) is figure
    assert image(ax).get_array().shape == (H, T)


@pytest.mark.parametrize(("kind", "count"), [(rnnkern.LSTM, 4), (rnnkern.GRU, 3)])
def test_gates_have_fixed_scales(kind, count):
    layer = kind(I, H, num_layers=2, bidirectional=True, batch_first=True)
    trace = rnnkern.trace(layer, torch.randn(B, T, I))
    figure = plot.gates(trace, layer=0, direction=1, sample=1)
    shown = panels(figure)
    assert len(shown) == count
    for ax, (name, gate) in zip(shown, trace[0, 1].gates.items(), strict=True):
        assert name in ax.get_title()
        np.testing.assert_allclose(image(ax).get_array(), gate[1].T)
        tanh = name in ("cell", "new")
        assert image(ax).get_clim() == ((-1, 1) if tanh else (0, 1))
        assert image(ax).get_cmap().name == ("RdBu_r" if tanh else "viridis")


def test_given_axes():
    trace = rnnkern.trace(rnnkern.LSTM(I, H), torch.randn(T, I))
    figure, grid = plt.subplots(2, 2)
    assert plot.gates(trace, grid) is figure
    assert all(ax.get_images() for ax in grid.flat)
    with pytest.raises(ValueError, match="needs 2 axes, got 4"):
        plot.states(trace, grid)


def test_packed_sequences_end_where_they_end():
    packed = pack_padded_sequence(torch.randn(T, B, I), [2, 5], enforce_sorted=False)
    layer = rnnkern.LSTM(I, H, batch_first=True)
    figure = plot.states(rnnkern.trace(layer, packed), sample=0)
    assert image(panels(figure)[0]).get_array().shape == (H, 2)
    flow = rnnkern.gradient_flow(layer, packed, lambda output: output.data.sum())
    lines = plot.gradient_flow(flow).axes[0].get_lines()
    # Beyond its end a sequence has no gradient, rather than one of zero.
    np.testing.assert_allclose(lines[0].get_ydata()[2:], flow.hidden[2:, 1])


def test_gradient_flow():
    layer = rnnkern.LSTM(I, H, num_layers=2, bidirectional=True)
    x = torch.randn(T, B, I)
    flow = rnnkern.gradient_flow(layer, x, lambda output: output.square().sum())
    ax = plot.gradient_flow(flow).axes[0]
    assert ax.get_yscale() == "log"
    lines = ax.get_lines()
    assert len(lines) == 8
    np.testing.assert_allclose(lines[0].get_ydata(), flow[0, 0].hidden.numpy().mean(axis=1))
    np.testing.assert_allclose(lines[7].get_ydata(), flow[1, 1].cell.numpy().mean(axis=1))
    assert "layer 1 reverse" in lines[7].get_label()


def test_compare():
    x = torch.randn(T, B, I)
    layers = {"RNN": rnnkern.RNN(I, H), "LSTM": rnnkern.LSTM(I, 2 * H)}
    flows = {name: rnnkern.gradient_flow(layer, x, torch.sum) for name, layer in layers.items()}
    ax = plot.compare(flows).axes[0]
    assert [line.get_label() for line in ax.get_lines()] == ["RNN", "LSTM"]
    assert ax.get_yscale() == "log"
    traces = {name: rnnkern.trace(layer, x) for name, layer in layers.items()}
    shown = panels(plot.compare(traces))
    assert [ax.get_title() for ax in shown] == ["RNN", "LSTM"]
    assert image(shown[0]).get_clim() == image(shown[1]).get_clim()

    ax = plot.compare({"LSTM": flows["LSTM"]}, state="cell").axes[0]
    np.testing.assert_allclose(
        ax.get_lines()[0].get_ydata(), flows["LSTM"].cell.numpy().mean(axis=1)
    )
    with pytest.raises(ValueError, match="RNN is a RNN_TANH and has no cell state"):
        plot.compare(flows, state="cell")
    with pytest.raises(ValueError, match="not both"):
        plot.compare({"a": flows["RNN"], "b": traces["RNN"]})
    with pytest.raises(ValueError, match="nothing to compare"):
        plot.compare({})
    with pytest.raises(ValueError, match="'hidden' or 'cell', got 'h'"):
        plot.compare(flows, state="h")


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "hidden"), [(1, 1), (5, 4), (2000, 512)])
def test_readable_at_every_size(steps, hidden):
    trace = rnnkern.trace(rnnkern.LSTM(1, hidden), torch.randn(steps, 1))
    figures = [plot.gates(trace), plot.states(trace), plot.states(trace, kind="lines")]
    for figure in figures:
        figure.canvas.draw()  # warnings, of an impossible layout for one, are errors here
        ax = panels(figure)[0]
        assert len(ax.get_xticks()) <= 10
        assert len(ax.texts) <= 60


def test_errors():
    trace = rnnkern.trace(rnnkern.RNN(I, H), torch.randn(T, I))
    with pytest.raises(ValueError, match="an RNN has no gates"):
        plot.gates(trace)
    with pytest.raises(ValueError, match="'map' or 'lines', got 'bars'"):
        plot.states(trace, kind="bars")


def test_what_is_not_there_or_of_another_kind_is_named():
    layer, x = rnnkern.LSTM(I, H), torch.randn(T, B, I)
    trace, flow = rnnkern.trace(layer, x), rnnkern.gradient_flow(layer, x, torch.sum)
    for draw, wrong in ((plot.states, flow), (plot.gates, flow), (plot.states, layer)):
        with pytest.raises(TypeError, match=r"what rnnkern\.trace returns, got (Flow|LSTM)"):
            draw(wrong)
    for wrong in (trace, layer, {"a": flow}):
        with pytest.raises(TypeError, match=r"what rnnkern\.gradient_flow returns, got"):
            plot.gradient_flow(wrong)
    for wrong in (flow, [flow, flow]):
        with pytest.raises(TypeError, match="traces or flows by name, got"):
            plot.compare(wrong)
    with pytest.raises(TypeError, match=r"trace or rnnkern\.gradient_flow returns, got LSTM"):
        plot.compare({"a": layer})
    with pytest.raises(TypeError, match="matplotlib's Axes, got Figure"):
        plot.states(trace, plt.figure())
    with pytest.raises(IndexError, match="no sample 2 in a batch of 2"):
        plot.states(trace, sample=2)
    with pytest.raises(IndexError, match="no sample 1 in a batch of 1"):
        plot.states(rnnkern.trace(layer, x[:, 0]), sample=1)
    with pytest.raises(IndexError, match=r"no layer 1, direction 0 in 1 layer"):
        plot.gates(trace, layer=1)


@pytest.mark.slow
@pytest.mark.parametrize("factor", [0.0, float("inf"), float("nan")])
def test_a_gradient_that_vanished_or_overflowed_is_a_picture_too(factor):
    layer, x = rnnkern.RNN(I, H), torch.randn(T, B, I)
    flow = rnnkern.gradient_flow(layer, x, lambda output: (factor * output).sum())
    for figure in (plot.gradient_flow(flow), plot.compare({"a": flow})):
        figure.canvas.draw()
        (ax,) = figure.axes
        assert ax.get_yscale() == "linear"
        assert ax.texts[0].get_text() == "no finite gradient"
