"""WaveRNN: a sample of sound per step

A WaveRNN (Kalchbrenner et al., 2018) draws sound sample by sample: two GRUs of 512 units and four
linear layers give a distribution over 256 values, one is drawn, and it is the next step's input.
The structure, sizes and names are those of torchaudio.models.WaveRNN. The weights are random: the
time of a step does not depend on them, and the sound is noise. Every form draws with the same
random numbers, so that the same samples come out wherever nothing is rounded.

What to see: on the left, the samples of torch.nn's layers and of the frozen copy's streams, one on
the other, around the first that int8 weights draw differently. Random weights forget it at once;
trained ones would go on to another sound. On the right, the time of a step: that of the two GRUs,
and that of all else.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import Result, main, save, typical
from matplotlib.axes import Axes
from stepping import EXACT, Step, alternately, forms, one_thread, spread
from torch import Tensor, nn
from torch.nn import functional as F

import rnnkern
from rnnkern.plot import PALETTE

MELS, AUX, HIDDEN, CLASSES = 128, 32, 512, 256


class WaveRNN(nn.Module):
    """The part of a WaveRNN that runs for every sample.

    `condition` is what the network above it makes of a spectrogram: for every sample MELS numbers
    and four times AUX numbers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1 + MELS + AUX, HIDDEN)
        self.rnn1 = nn.GRU(HIDDEN, HIDDEN, batch_first=True)
        self.rnn2 = nn.GRU(HIDDEN + AUX, HIDDEN, batch_first=True)
        self.fc1 = nn.Linear(HIDDEN + AUX, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN + AUX, HIDDEN)
        self.fc3 = nn.Linear(HIDDEN, CLASSES)


class Sample(NamedTuple):
    """One drawn value of [−1, 1], and the seconds it took."""

    value: float
    of_grus: float
    of_all: float


def generate(model: WaveRNN, rnn1: Step, rnn2: Step, condition: Tensor) -> Iterator[Sample]:
    """Draws a sample for every row of `condition` (T, MELS + 4 AUX), batch size one."""
    random = torch.Generator().manual_seed(0)
    x = torch.zeros(1, 1)
    for row in condition:
        start = time.perf_counter()
        m, *a = row.unsqueeze(0).split([MELS, AUX, AUX, AUX, AUX], 1)
        u = model.fc(torch.cat((x, m, a[0]), 1))
        times = [time.perf_counter()]
        h1 = rnn1(u.unsqueeze(0))[0]
        times.append(time.perf_counter())
        v = u + h1
        joined = torch.cat((v, a[1]), 1)
        times.append(time.perf_counter())
        h2 = rnn2(joined.unsqueeze(0))[0]
        times.append(time.perf_counter())
        w = v + h2
        w = F.relu(model.fc1(torch.cat((w, a[2]), 1)))
        w = F.relu(model.fc2(torch.cat((w, a[3]), 1)))
        drawn = torch.multinomial(model.fc3(w).softmax(1), 1, generator=random)
        x = 2 * drawn / (CLASSES - 1) - 1
        value = x.item()
        of_grus = (times[1] - times[0]) + (times[3] - times[2])
        yield Sample(value, of_grus, time.perf_counter() - start)


def untrained(kind: Any = WaveRNN, **sizes: Any) -> Any:
    """Random weights; the last layer's are enlarged, so that what is drawn depends on the network.

    The entropy of the distribution is then about 3 nats; that of the uniform one is 5.5.
    """
    torch.manual_seed(0)
    model = kind(**sizes)
    with torch.no_grad():
        model.fc3.weight *= 30
    return model.eval()


def generators(model: WaveRNN, condition: Tensor) -> dict[str, Iterator[Sample]]:
    """One of each form."""
    rnn1, rnn2 = forms(model.rnn1), forms(model.rnn2)
    return {form: generate(model, rnn1[form], rnn2[form], condition) for form in rnn1}


def values(generated: dict[str, list[Sample]]) -> dict[str, list[float]]:
    return {form: [sample.value for sample in samples] for form, samples in generated.items()}


def differing(drawn: dict[str, list[float]]) -> dict[str, int]:
    """How many samples of each form are not torch.nn's.

    Raises RuntimeError where a form that rounds nothing draws others.
    """
    first = np.array(drawn["torch.nn"])
    count = {form: int((np.array(own) != first).sum()) for form, own in drawn.items()}
    if any(count[form] for form in EXACT):
        raise RuntimeError(f"samples in float32 differ: {count}")
    return count


def draw_samples(ax: Axes, drawn: dict[str, list[float]]) -> None:
    """The steps around the first that int8 draws differently; torch.nn's lie wide and pale."""
    differs = np.flatnonzero(np.array(drawn["int8 stream"]) != drawn["torch.nn"])
    end = min(int(differs[0]) if len(differs) else 0, len(drawn["stream"]) - 20) + 20
    shown = range(max(0, end - 80), end)
    ax.plot(shown, drawn["torch.nn"][shown.start : end], lw=6, alpha=0.35, color=PALETTE[4])
    ax.plot(shown, drawn["stream"][shown.start : end], lw=1.4, color=PALETTE[0])
    ax.plot(shown, drawn["int8 stream"][shown.start : end], lw=1.2, color=PALETTE[1], ls="--")
    ax.set(xlabel="step", ylabel="sample", title="what is drawn", ylim=(-1.1, 1.4))
    ax.legend(["torch.nn", "stream", "int8 stream"], loc="upper center", ncols=3)


def draw_times(ax: Axes, generated: dict[str, list[Sample]]) -> None:
    names = list(generated)[::-1]
    grus = np.array([typical([s.of_grus for s in generated[name]]) for name in names]) * 1e6
    everything = np.array([typical([s.of_all for s in generated[name]]) for name in names]) * 1e6
    ax.barh(names, grus, color=PALETTE[0], label="two GRUs")
    ax.barh(names, everything - grus, left=grus, color="0.8", label="all else")
    ax.set(xlabel="µs", title="time of a step")
    ax.grid(False, axis="y")
    ax.legend(loc="lower right")


def published() -> Any:
    """torchaudio's WaveRNN; None where torchaudio is not installed, or for another torch."""
    try:
        from torchaudio.models import WaveRNN as found
    except (ImportError, OSError):  # OSError: its libraries do not load
        return None
    return found


def of_torchaudio(frames: int) -> list[tuple[str, str, str]]:
    """torchaudio's own loop, before and after rnnkern.freeze; nothing where there is none."""
    kind = published()
    if kind is None:
        return []
    model = untrained(kind, upsample_scales=[5, 5, 8], n_classes=CLASSES, hop_length=200)
    spectrogram = torch.randn(1, MELS, frames)
    models = {"before": model, "after": rnnkern.freeze(model)}
    drawn: dict[str, Tensor] = {}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with one_thread(), torch.inference_mode():
        for _ in range(3):
            for name, either in models.items():
                torch.manual_seed(0)
                start = time.perf_counter()
                drawn[name] = either.infer(spectrogram)[0]
                seconds[name].append((time.perf_counter() - start) / drawn[name].numel())
    if not torch.equal(drawn["before"], drawn["after"]):
        raise RuntimeError("torchaudio's WaveRNN draws other samples when it is frozen")
    times = ", ".join(f"{name} {min(took) * 1e6:.0f} µs" for name, took in seconds.items())
    count = drawn["before"].numel()
    return [("torchaudio's infer, a step", times, ""), ("its samples", f"all {count} the same", "")]


def run(out: Path, steps: int = 2000) -> Result:
    model = untrained()
    condition = torch.randn(steps, MELS + 4 * AUX)
    generated = alternately(generators(model, condition))
    drawn = values(generated)
    rows = [
        (f"GRUs, {form}", spread([s.of_grus for s in samples]), "")
        for form, samples in generated.items()
    ]
    rows += [
        (f"whole step, {form}", spread([s.of_all for s in samples]), "")
        for form, samples in generated.items()
    ]
    rows += [
        (f"samples that differ, {form}", f"{n} of {steps}", "")
        for form, n in differing(drawn).items()
    ]
    rows += of_torchaudio(frames=max(1, steps // 800))

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4))
    draw_samples(left, drawn)
    draw_times(right, generated)
    path = save(figure, out, "wavernn")
    seconds = {form: typical([s.of_all for s in samples]) for form, samples in generated.items()}
    return Result(__doc__.splitlines()[0], rows, "one step", seconds, [path])


if __name__ == "__main__":
    main(run)
