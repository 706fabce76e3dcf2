"""Draws the gallery's pictures into docs/img, from the examples' own code.

Only the detector of voice activity is trained for it, for some seconds.

python docs/scripts/figures.py      needs rnnkern built, and matplotlib
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import common  # noqa: F401  the examples' style
import matplotlib.pyplot as plt
import torch
import voice_activity
import wavernn
from matplotlib.figure import Figure
from reflection_vanishing import BATCH, BIASES, HIDDEN, STEPS, loss, lstm_with_forget_bias
from sound import by_chunk, scenes
from stepping import alternately, forms

import rnnkern

IMAGES = Path(__file__).resolve().parents[1] / "img"


def save(figure: Figure, name: str) -> None:
    """The same picture gives the same file: no date, no random names."""
    figure.savefig(IMAGES / f"{name}.svg", facecolor="white", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    plt.rcParams.update({"svg.hashsalt": "rnnkern", "svg.fonttype": "none"})
    torch.manual_seed(0)
    lstm = rnnkern.LSTM(input_size=1, hidden_size=4)
    trace = rnnkern.trace(lstm, torch.tensor([0.1, 0.5, 0.9, 0.3, 0.7]).unsqueeze(1))
    save(rnnkern.plot.gates(trace), "gates")
    save(rnnkern.plot.states(trace), "states")

    torch.manual_seed(0)
    x = torch.randn(STEPS, BATCH, 1, dtype=torch.float64)
    layers = {"RNN": rnnkern.RNN, "LSTM": rnnkern.LSTM, "GRU": rnnkern.GRU}
    flows = {
        name: rnnkern.gradient_flow(layer(1, HIDDEN, dtype=torch.float64), x, loss)
        for name, layer in layers.items()
    }
    save(rnnkern.plot.compare(flows), "vanishing")
    by_bias = {
        f"forget bias {bias}": rnnkern.gradient_flow(lstm_with_forget_bias(bias), x, loss)
        for bias in BIASES
    }
    save(rnnkern.plot.compare(by_bias, state="cell"), "forget_bias")
    real_time()


def real_time() -> None:
    """What the two loops of single steps give; their times differ in every run."""
    model = voice_activity.trained()
    sound, truth = scenes(seed=1, count=2, seconds=10)
    step = forms(model.lstm)["stream"]
    heard = alternately({"stream": voice_activity.listen(model, step, sound)})
    p = voice_activity.probabilities(heard)["stream"]
    truth = by_chunk(truth, voice_activity.CHUNK)
    save(voice_activity.picture(sound, truth, p), "voice_activity")

    network = wavernn.untrained()
    condition = torch.randn(300, wavernn.MELS + 4 * wavernn.AUX)
    generated = alternately(wavernn.generators(network, condition))
    figure, ax = plt.subplots(figsize=(8, 3.6))
    wavernn.draw_samples(ax, wavernn.values(generated))
    save(figure, "wavernn")


if __name__ == "__main__":
    main()
