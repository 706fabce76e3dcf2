"""Pictures of a `Trace` or a `Flow`: states, gates, gradients, and several of them side by side.

Every function draws into `axes` if given and returns the Figure. Colours are told apart by readers
with any colour vision: viridis for what lies between 0 and 1, red and blue around 0, the palette of
Okabe and Ito for lines. Needs matplotlib.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch

from .inspect.results import Flow, Trace

try:
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError("rnnkern.plot needs matplotlib: pip install rnnkern[plot]") from error

__all__ = ["PALETTE", "compare", "gates", "gradient_flow", "states"]

AxesLike = Axes | Sequence[Axes] | np.ndarray | None

#: Okabe & Ito (2008), without the yellow, which is too light on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")
OPEN_SHUT, AROUND_ZERO = "viridis", "RdBu_r"
LEGIBLE = 12  # so many units have a line each; of more, a picture shows their distribution
WRITABLE = 60  # a map of at most so many cells has its values written into them
SYMBOLS = {
    "input": "$i_t$", "forget": "$f_t$", "cell": "$g_t$", "output": "$o_t$",
    "reset": "$r_t$", "update": "$z_t$", "new": "$n_t$",
}  # fmt: skip
TANH_GATES = ("cell", "new")


def states(
    trace: Trace,
    axes: AxesLike = None,
    *,
    layer: int = -1,
    direction: int = 0,
    sample: int = 0,
    kind: str = "map",
) -> Figure:
    """The hidden state over time and, for an LSTM, the cell state below it.

    kind    "map": unit × time, coloured around 0. "lines": one line per unit, for many units the
            range, the quartiles and the median over the units
    sample  which sequence of the batch
    axes    one, for an LSTM two
    """
    if kind not in ("map", "lines"):
        raise ValueError(f"kind must be 'map' or 'lines', got {kind!r}")
    _require(trace, Trace)
    steps = trace[layer, direction]
    shown = {"hidden state $h_t$": steps.hidden}
    if steps.cell is not None:
        shown["cell state $c_t$"] = steps.cell
    figure, cells = _axes(axes, len(shown), columns=1)
    for ax, (title, value) in zip(cells, shown.items(), strict=True):
        values = _sample(trace, value, sample)
        if kind == "map":
            limit = float(np.abs(values).max()) or 1.0
            _map(ax, values, AROUND_ZERO, -limit, limit, "value")
        else:
            _lines(ax, values)
        ax.set_title(title)
    return figure


def gates(
    trace: Trace,
    axes: AxesLike = None,
    *,
    layer: int = -1,
    direction: int = 0,
    sample: int = 0,
) -> Figure:
    """Every gate as a map, unit × time: sigmoid gates from 0 (shut) to 1 (open), an LSTM's cell
    gate and a GRU's new gate, which are tanh, from -1 to 1.

    axes    one per gate: four for an LSTM, three for a GRU
    Raises ValueError for an RNN, which has no gates.
    """
    _require(trace, Trace)
    named = trace[layer, direction].gates
    if not named:
        raise ValueError("an RNN has no gates; rnnkern.plot.states shows its hidden state")
    figure, cells = _axes(axes, len(named), columns=2 if len(named) == 4 else 1)
    for ax, (name, value) in zip(cells, named.items(), strict=True):
        values = _sample(trace, value, sample)
        if name in TANH_GATES:
            _map(ax, values, AROUND_ZERO, -1, 1, "proposed value")
        else:
            _map(ax, values, OPEN_SHUT, 0, 1, "0 shut … 1 open")
        ax.set_title(f"{name} gate {SYMBOLS[name]}")
    return figure


def gradient_flow(flow: Flow, axes: AxesLike = None) -> Figure:
    """‖∂L/∂h_t‖ and, for an LSTM, ‖∂L/∂c_t‖ of every layer and direction, on a log scale.

    Lines are the median over the batch, bands reach from its smallest to its largest norm. Steps at
    which no gradient at all arrives have no point.

    axes    one
    """
    _require(flow, Flow)
    figure, (ax,) = _axes(axes, 1, columns=1)
    several = len(flow.norms) * len(flow.norms[0]) > 1
    k = 0
    for layer, directions in enumerate(flow.norms):
        for direction, norms in enumerate(directions):
            where = f", layer {layer}{' reverse' * direction}" if several else ""
            for state, symbol in (("hidden", "h"), ("cell", "c")):
                norm = getattr(norms, state)
                if norm is not None:
                    label = rf"$\|\partial L/\partial {symbol}_t\|${where}"
                    color = PALETTE[k % len(PALETTE)]
                    _norms(ax, norm, label, color, DASHES[state == "cell"])
            k += 1
    _log_scale(ax, r"norm of the gradient at step $t$")
    return figure


def compare(
    shown: Mapping[str, Trace] | Mapping[str, Flow],
    axes: AxesLike = None,
    *,
    state: str = "hidden",
    layer: int = -1,
    direction: int = 0,
    sample: int = 0,
) -> Figure:
    """Several traces or flows under their names: flows as lines on one log scale, traces as maps of
    their states on one colour scale.

    >>> rnnkern.plot.compare({"RNN": rnn_flow, "LSTM": lstm_flow})

    state   "hidden" or, for LSTMs, "cell"
    sample  for traces, which sequence of the batch
    axes    for flows one, for traces one each
    """
    if not isinstance(shown, Mapping):
        raise TypeError(f"compare takes traces or flows by name, got {type(shown).__name__}")
    if not shown:
        raise ValueError("nothing to compare")
    for one in shown.values():
        _require(one, (Trace, Flow))
    if len({type(one) for one in shown.values()}) > 1:
        raise ValueError("compare either traces or flows, not both")
    if state not in ("hidden", "cell"):
        raise ValueError(f"state must be 'hidden' or 'cell', got {state!r}")
    values = {name: getattr(one[layer, direction], state) for name, one in shown.items()}
    for name, value in values.items():
        if value is None:
            raise ValueError(f"{name} is a {shown[name].mode} and has no cell state")
    symbol = "h" if state == "hidden" else "c"
    if isinstance(next(iter(shown.values())), Flow):
        figure, (ax,) = _axes(axes, 1, columns=1)
        for k, (name, norm) in enumerate(values.items()):
            color, dash = PALETTE[k % len(PALETTE)], DASHES[k % len(DASHES)]
            _norms(ax, norm, name, color, dash)
        _log_scale(ax, rf"$\|\partial L/\partial {symbol}_t\|$")
        return figure
    traces = cast(Mapping[str, Trace], shown)
    arrays = {name: _sample(traces[name], value, sample) for name, value in values.items()}
    limit = max(float(np.abs(a).max()) for a in arrays.values()) or 1.0
    figure, cells = _axes(axes, len(arrays), columns=1)
    for ax, (name, array) in zip(cells, arrays.items(), strict=True):
        _map(ax, array, AROUND_ZERO, -limit, limit, f"${symbol}_t$")
        ax.set_title(name)
    return figure


def _require(shown: object, kinds: type | tuple[type, ...]) -> None:
    """Raises TypeError for what is not of these kinds: a Flow has states by the same names."""
    if not isinstance(shown, kinds):
        makers = {Trace: "rnnkern.trace", Flow: "rnnkern.gradient_flow"}
        wanted = [makers[kind] for kind in (kinds if isinstance(kinds, tuple) else (kinds,))]
        got = type(shown).__name__
        raise TypeError(f"expected what {' or '.join(wanted)} returns, got {got}")


def _axes(axes: AxesLike, count: int, columns: int) -> tuple[Figure, list[Axes]]:
    if axes is None:
        rows = -(-count // columns)
        size = (5.2 * columns + 2.8 * (columns == 1), 0.6 + 2.9 * rows)
        figure, grid = plt.subplots(
            rows, columns, figsize=size, layout="constrained", squeeze=False
        )
        return figure, list(grid.flat)
    given = list(np.asarray(axes, dtype=object).ravel())
    for one in given:
        if not isinstance(one, Axes):
            raise TypeError(f"axes must be matplotlib's Axes, got {type(one).__name__}")
    if len(given) != count:
        raise ValueError(f"this picture needs {count} axes, got {len(given)}")
    return given[0].get_figure(root=True), given


def _sample(trace: Trace, value: torch.Tensor, sample: int) -> np.ndarray:
    """(T, H) of one sequence, without padding."""
    batch = 1 if value.dim() == 2 else value.shape[0 if trace.batch_first else 1]
    if not -batch <= sample < batch:
        raise IndexError(f"no sample {sample} in a batch of {batch}")
    if value.dim() == 3:
        value = value[sample] if trace.batch_first else value[:, sample]
    if trace.lengths is not None:
        value = value[: int(trace.lengths[sample])]
    return value.detach().double().cpu().numpy()


def _map(ax: Axes, values: np.ndarray, colors: str, low: float, high: float, label: str) -> None:
    image = ax.imshow(values.T, cmap=colors, vmin=low, vmax=high, aspect="auto")
    if values.size <= WRITABLE:
        for (t, unit), value in np.ndenumerate(values):
            rgba = cast(tuple[float, float, float, float], image.cmap(image.norm(value)))
            dark = np.dot(to_rgb(rgba), (0.3, 0.6, 0.1)) < 0.5
            digits = 2 if high >= 0.1 else 3
            text = f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")
            color = "white" if dark else "black"
            ax.text(t, unit, text, ha="center", va="center", color=color, fontsize=8)
    ax.grid(False)
    cast(Figure, ax.get_figure()).colorbar(image, ax=ax, label=label, fraction=0.05, pad=0.02)
    _time(ax)
    ax.set_ylabel("hidden unit")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


def _lines(ax: Axes, values: np.ndarray) -> None:
    steps, units = values.shape
    if units <= LEGIBLE:
        marker = "o" if steps <= 20 else None
        for unit, line in enumerate(values.T):
            color, dash = PALETTE[unit % len(PALETTE)], DASHES[unit // len(PALETTE)]
            ax.plot(line, dash, color=color, marker=marker, label=f"unit {unit}")
    else:
        low, lower, middle, upper, high = np.percentile(values, (0, 25, 50, 75, 100), axis=1)
        t, color = np.arange(steps), PALETTE[0]
        ax.fill_between(t, low, high, color=color, alpha=0.15, lw=0, label=f"all {units} units")
        ax.fill_between(t, lower, upper, color=color, alpha=0.3, lw=0, label="their middle half")
        ax.plot(t, middle, color=color, label="median")
    ax.axhline(0, color="0.6", lw=0.8, zorder=0)
    ax.set_ylabel("value")
    ax.legend(ncols=1 + units // 7 if units <= LEGIBLE else 1, fontsize=8)
    _time(ax)


def _norms(ax: Axes, norm: torch.Tensor, label: str, color: str, dash: str) -> None:
    values = norm.detach().double().cpu().numpy().reshape(len(norm), -1)
    values = np.ma.masked_equal(values, 0)  # padding, and steps that no gradient reaches
    median = np.ma.median(values, axis=1)  # type: ignore[no-untyped-call]
    ax.plot(median, dash, color=color, label=label, lw=2)
    if values.shape[1] > 1:
        low, high = values.min(axis=1), values.max(axis=1)
        ax.fill_between(np.arange(len(values)), low, high, color=color, alpha=0.15, lw=0)


def _log_scale(ax: Axes, label: str) -> None:
    lines: list[np.ma.MaskedArray] = [np.ma.asarray(line.get_ydata()) for line in ax.get_lines()]
    values = np.ma.concatenate(lines)  # type: ignore[no-untyped-call]
    if (np.ma.masked_invalid(values) > 0).any():
        ax.set_yscale("log")
    else:  # no logarithm: all of it has vanished, or overflowed
        ax.text(0.5, 0.5, "no finite gradient", ha="center", transform=ax.transAxes)
    ax.set_ylabel(label)
    ax.grid(alpha=0.3)
    if len(ax.get_lines()) > 4:
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    else:
        ax.legend()
    _time(ax)


def _time(ax: Axes) -> None:
    ax.set_xlabel("time step $t$")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
