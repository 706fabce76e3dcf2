"""Voice activity: is somebody speaking, every 10 ms?

Sound arrives in chunks of 10 ms. Each one gives the energies of 24 bands, these take an LSTM one
step further, and its output tells whether somebody speaks. The sound is made here: utterances of
voiced, gliding formants and of hissing consonants, in five kinds of noise, at signal-to-noise
ratios from 0 to 20 dB. The detector is trained on it for a few seconds, and then listens to new
sound step by step, through torch.nn's layer, rnnkern's, its frozen copy and streams of three
weight formats.

What to see: at the top, the sound, with the true utterances shaded. Below, the probability of
speech and, as bars, the decisions. All float32 forms decide alike in every chunk.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import Result, main, save, typical
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sound import RATE, Sound, Truth, by_chunk, scenes
from stepping import EXACT, Step, alternately, forms, spread
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import rnnkern
from rnnkern.plot import PALETTE

CHUNK, WINDOW = 160, 400  # samples: 10 and 25 ms
BANDS, HIDDEN = 24, 64
Probabilities = NDArray[np.float64]  # of the chunks


def bands() -> Tensor:
    """(frequencies, BANDS): overlapping triangles, evenly spaced on the mel scale."""
    mel = np.linspace(2595 * np.log10(1 + 80 / 700), 2595 * np.log10(1 + 7600 / 700), BANDS + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    f = np.fft.rfftfreq(WINDOW, 1 / RATE)[:, None]
    rising = (f - edges[:-2]) / np.diff(edges)[:-1]
    falling = (edges[2:] - f) / np.diff(edges)[1:]
    return torch.from_numpy(np.minimum(rising, falling).clip(0)).float()


class Features(nn.Module):
    """Log energies of the bands, of windows (..., WINDOW): (..., BANDS)."""

    taper: Tensor
    bands: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("taper", torch.hann_window(WINDOW))
        self.register_buffer("bands", bands())
        self.register_buffer("mean", torch.zeros(BANDS))
        self.register_buffer("scale", torch.ones(BANDS))

    def forward(self, windows: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(windows * self.taper)
        energy = (spectrum.real.square() + spectrum.imag.square()) @ self.bands
        even: Tensor = ((energy + 1e-6).log() - self.mean) * self.scale
        return even

    def of_sound(self, sound: Tensor) -> Tensor:
        """Of every chunk of sounds (B, samples): (chunks, B, BANDS)."""
        padded = F.pad(sound, (WINDOW - CHUNK, 0))
        features: Tensor = self(padded.unfold(-1, WINDOW, CHUNK).transpose(0, 1))
        return features


class Detector(nn.Module):
    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.features = Features()
        self.lstm = layers.LSTM(BANDS, HIDDEN)
        self.out = nn.Linear(HIDDEN, 1)

    def probability(self, h: Tensor) -> Tensor:
        p: Tensor = self.out(h).squeeze(-1).sigmoid()
        return p


def trained(clips: int = 48, epochs: int = 60) -> Detector:
    """A detector trained on `clips` scenes of four seconds."""
    sounds, truths = scenes(seed=0, count=clips, seconds=4)
    sound = torch.from_numpy(sounds).view(clips, -1)
    truth = torch.from_numpy(by_chunk(truths, CHUNK)).float().view(clips, -1).T
    torch.manual_seed(0)
    model = Detector(rnnkern)
    x = model.features.of_sound(sound)
    model.features.mean = x.mean((0, 1))
    model.features.scale = 1 / x.std((0, 1))
    x = model.features.of_sound(sound)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in tqdm(range(epochs), unit="epoch", leave=False):
        p = model.out(model.lstm(x)[0]).squeeze(-1)
        loss = F.binary_cross_entropy_with_logits(p, truth)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


class Chunk(NamedTuple):
    """What the loop gave for 10 ms of sound: the probability, and the seconds it took."""

    p: float
    of_step: float  # the LSTM alone
    of_all: float


def listen(model: Detector, step: Step, sound: Sound) -> Iterator[Chunk]:
    """The loop over a sound that arrives chunk by chunk."""
    window = torch.zeros(WINDOW)
    for chunk in torch.from_numpy(sound).view(-1, CHUNK):
        start = time.perf_counter()
        window = torch.cat((window[CHUNK:], chunk))
        x = model.features(window).view(1, 1, BANDS)
        before = time.perf_counter()
        h = step(x)
        after = time.perf_counter()
        p = model.probability(h).item()
        yield Chunk(p, after - before, time.perf_counter() - start)


def check(p: dict[str, Probabilities]) -> dict[str, int]:
    """The number of decisions of each form that differ from the first's.

    Raises RuntimeError where a form that rounds nothing decides otherwise, or where one of
    rnnkern's has other bits than its layer.
    """
    decisions = {form: values > 0.5 for form, values in p.items()}
    first = next(iter(decisions.values()))
    differing = {form: int((those != first).sum()) for form, those in decisions.items()}
    if any(differing[form] for form in EXACT):
        raise RuntimeError(f"decisions in float32 differ: {differing}")
    for form in ("frozen", "stream"):
        if not np.array_equal(p[form], p["rnnkern"]):
            raise RuntimeError(f"{form}: not the bits of the layer")
    return differing


def table(heard: dict[str, list[Chunk]], truth: Truth, length: float) -> list[tuple[str, str, str]]:
    """The accuracy, and of every form its times and the decisions that differ.

    length  of a chunk, in seconds
    """
    p = probabilities(heard)
    accuracy = np.mean((p["stream"] > 0.5) == truth)
    rows = [("chunks decided rightly", f"{accuracy:.1%} of {len(truth)}", "")]
    rows += [
        (f"step, {form}", spread([chunk.of_step for chunk in chunks]), "")
        for form, chunks in heard.items()
    ]
    for form, chunks in heard.items():
        took = typical([chunk.of_all for chunk in chunks])
        share = f"{took * 1e6:.0f} µs, {took / length:.2%} of {length * 1e3:.0f} ms"
        rows.append((f"whole chunk, {form}", share, ""))
    rows += [(f"decisions that differ, {form}", str(n), "") for form, n in check(p).items()]
    return rows


def probabilities(heard: dict[str, list[Chunk]]) -> dict[str, Probabilities]:
    return {form: np.array([chunk.p for chunk in chunks]) for form, chunks in heard.items()}


def step_times(heard: dict[str, list[Chunk]]) -> dict[str, float]:
    return {form: typical([chunk.of_step for chunk in chunks]) for form, chunks in heard.items()}


def spans(flags: Truth, length: float) -> list[tuple[float, float]]:
    """Start and duration of every run of true chunks, each of `length` seconds."""
    edges = np.flatnonzero(np.diff(np.r_[False, flags, False])) * length
    return [(start, end - start) for start, end in edges.reshape(-1, 2).tolist()]


def picture(sound: Sound, truth: Truth, p: Probabilities) -> Figure:
    """The sound with its true utterances, the probability, and the decisions, of 20 seconds."""
    chunk = len(sound) // len(truth)
    count = min(len(truth), 20 * RATE // chunk)
    sound, truth, p = sound[: count * chunk], truth[:count], p[:count]
    length = chunk / RATE
    columns = sound[: len(sound) // 500 * 500].reshape(500, -1)
    seconds = np.linspace(0, count * length, 500)
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(10, 4.6), sharex=True)
    top.fill_between(seconds, columns.min(1), columns.max(1), color=PALETTE[0], lw=0)
    top.set(ylabel="sound", title="utterances (shaded) in noise", xlim=(0, count * length))
    bottom.plot(np.arange(count) * length, p, color=PALETTE[1], lw=1.2)
    bottom.broken_barh(spans(p > 0.5, length), (-0.14, 0.08), color=PALETTE[2])
    bottom.axhline(0.5, color="0.6", lw=0.8)
    bottom.set(xlabel="seconds", ylabel="probability", title="probability and decisions (bars)")
    for ax in (top, bottom):
        for start, duration in spans(truth, length):
            ax.axvspan(start, start + duration, color="0.5", alpha=0.2, lw=0)
    return figure


def run(out: Path, clips: int = 48, epochs: int = 60, count: int = 6) -> Result:
    model = trained(clips, epochs)
    sound, truth = scenes(seed=1, count=count, seconds=10)
    truth = by_chunk(truth, CHUNK)
    heard = alternately({f: listen(model, step, sound) for f, step in forms(model.lstm).items()})
    rows = table(heard, truth, CHUNK / RATE)
    figure = picture(sound, truth, probabilities(heard)["stream"])
    path = save(figure, out, "voice_activity")
    return Result(__doc__.splitlines()[0], rows, "one step", step_times(heard), [path])


if __name__ == "__main__":
    main(run)
