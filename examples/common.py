"""What the examples share: both sides, training and timing them in turn, what a task reports."""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any, TypeVar

import matplotlib

matplotlib.use("Agg")  # figures go to files, no display is needed
import matplotlib.pyplot as plt
import numpy as np
import torch
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import rnnkern
from rnnkern.plot import PALETTE

#: Where the layers come from. A model built from either, after the same seed, has the same weights.
SIDES = {"torch.nn": torch.nn, "rnnkern": rnnkern}

plt.rcParams.update(
    {
        "axes.grid": True,
        "axes.prop_cycle": cycler(color=PALETTE),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "figure.constrained_layout.use": True,
        "font.size": 11,
        "grid.alpha": 0.3,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "savefig.dpi": 130,
    }
)


@dataclass
class Result:
    """What a task gave.

    task     its title
    rows     (what, ours, the course's own figure or "") as text, the first being the main metric
    timed    what the times are of
    seconds  by side, measured alternately in one process
    figures  the files that were written
    """

    task: str
    rows: list[tuple[str, str, str]]
    timed: str
    seconds: dict[str, float]
    figures: list[Path] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return self.seconds["torch.nn"] / self.seconds["rnnkern"]


@dataclass
class Curve:
    """Loss and duration of every epoch."""

    losses: list[float] = field(default_factory=list)
    durations: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """The whole training at the pace of its typical epoch."""
        return len(self.durations) * typical(self.durations)


Model = Callable[[Any], nn.Module]  # from a side's layers
M = TypeVar("M", bound=nn.Module)


def build(model: Callable[[Any], M], after: Sequence[Model] = ()) -> dict[str, M]:
    """The same model on both sides, from the same weights.

    `after` are the models of earlier tasks: the course draws the weights of its whole day from one
    generator, seeded once.
    """
    built = {}
    for name, layers in SIDES.items():
        torch.manual_seed(0)
        for earlier in after:
            earlier(layers)
        built[name] = model(layers)
    return built


def course_numbers(drawn: int) -> np.random.RandomState:
    """The course's generator of data, after the uniform numbers that earlier tasks took from it."""
    numbers = np.random.RandomState(0)
    numbers.standard_normal(95)  # the weights of tasks 1 and 3
    numbers.random_sample(drawn)
    return numbers


def train(
    models: Mapping[str, nn.Module],
    loss_of: Callable[[nn.Module], Tensor],
    learning_rate: float,
    epochs: int,
    tolerance: float,
) -> dict[str, Curve]:
    """Trains both models with Adam, epoch by epoch in turn.

    `loss_of(model)` is one epoch's forward pass. Raises RuntimeError if the loss curves differ, at
    any epoch, by more than `tolerance` times the first loss.
    """
    curves = {name: Curve() for name in models}
    optimizers = {
        name: torch.optim.Adam(m.parameters(), learning_rate) for name, m in models.items()
    }
    for epoch in tqdm(range(epochs), unit="epoch", leave=False):
        for name in list(models) if epoch % 2 else reversed(list(models)):
            start = time.perf_counter()
            loss = loss_of(models[name])
            optimizers[name].zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizers[name].step()
            curves[name].durations.append(time.perf_counter() - start)
            curves[name].losses.append(loss.item())
    difference = curve_difference(curves)
    if not difference <= tolerance:
        raise RuntimeError(f"the loss curves differ by {difference:.1e}, more than {tolerance:.0e}")
    return curves


def curve_difference(curves: Mapping[str, Curve]) -> float:
    """The largest difference of the two loss curves, relative to the first loss."""
    one, other = (torch.tensor(c.losses) for c in curves.values())
    return float((one - other).abs().max() / one[0])


def in_turn(calls: Mapping[str, Callable[[], object]], repeats: int = 200) -> dict[str, float]:
    """Typical seconds of each call, the calls made alternately."""
    durations: dict[str, list[float]] = {name: [] for name in calls}
    for k in range(repeats + 10):
        for name in list(calls) if k % 2 else reversed(list(calls)):
            start = time.perf_counter()
            calls[name]()
            if k >= 10:  # the first calls warm up
                durations[name].append(time.perf_counter() - start)
    return {name: typical(d) for name, d in durations.items()}


def typical(durations: Sequence[float]) -> float:
    """The first quartile: other programs on the machine only ever add to a duration."""
    return quantiles(durations, n=4)[0]


def plot_curves(ax: Axes, curves: Mapping[str, Curve]) -> None:
    """Both loss curves on a log scale; torch.nn's lies under ours, wide and pale."""
    ax.semilogy(curves["torch.nn"].losses, lw=6, alpha=0.35, color=PALETTE[4], label="torch.nn")
    ax.semilogy(curves["rnnkern"].losses, color=PALETTE[0], label="rnnkern")
    ax.set(xlabel="epoch", ylabel="training loss", title="training")
    ax.legend()


def save(figure: Figure, out: Path, name: str) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.png"
    figure.savefig(path)
    plt.close(figure)
    return path


def main(run: Callable[[Path], Result]) -> None:
    """The command line of every example."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("figures"), help="folder for the figures")
    result = run(parser.parse_args().out)
    print(result.task)
    for what, ours, theirs in result.rows:
        print(f"  {what:36} {ours}" + (f"   (the course: {theirs})" if theirs else ""))
    times = ", ".join(f"{name} {duration(s)}" for name, s in result.seconds.items())
    print(f"  {result.timed}: {times}, ratio {result.ratio:.1f}")
    print("  " + ", ".join(map(str, result.figures)))


def duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.{0 if seconds >= 1e-5 else 1}f} µs"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
