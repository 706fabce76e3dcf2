"""Task 4: predict the next value of a sine wave

A thousand sine waves, each two periods long in 50 steps and starting anywhere, teach a two-layer
LSTM to give the next value at every step. A hundred other waves test it. One number of input says
nothing about where the wave is going: up and down look alike. Only the memory of earlier steps
tells.

What to see: top left, the loss of both sides, from the same weights; after 50 epochs it is still
falling. Top right, three test waves (dashed) and the predictions (solid): the first steps are the
worst, before the memory has seen enough. Bottom left, one wave in detail: the prediction belongs on
the true next value, one step ahead of the input. Bottom right, the errors over all test waves.
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import (
    Result,
    build,
    course_numbers,
    curve_difference,
    main,
    plot_curves,
    save,
    train,
)
from task2_char_rnn import CharRNN
from torch import Tensor, nn
from torch.nn import functional as F

from rnnkern.plot import PALETTE

EQUATIONS = [
    "h^{1}_t, c^{1}_t = LSTM^{1}(x_t, h^{1}_{t−1}, c^{1}_{t−1})",
    "h^{2}_t, c^{2}_t = LSTM^{2}(h^{1}_t, h^{2}_{t−1}, c^{2}_{t−1})",
    "x̂_{t+1} = W h^{2}_t + b",
    "L = mean_t (x̂_{t+1} − x_{t+1})^{2}",
]

EPOCHS, STEPS, TRAINING, TESTS = 50, 50, 1000, 100
COURSE = {10: 0.477, 20: 0.446, 30: 0.389, 40: 0.260, 50: 0.048}


class Predictor(nn.Module):
    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.lstm = layers.LSTM(input_size=1, hidden_size=32, num_layers=2, batch_first=True)
        self.out = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The next value at every step, (B, T, 1), from the values (B, T, 1)."""
        y: Tensor = self.out(self.lstm(x)[0])
        return y


def waves(start: np.ndarray) -> tuple[Tensor, Tensor]:
    """Inputs and next values, each (waves, STEPS, 1), of waves starting at a part of a period."""
    start = 2 * np.pi * start[:, None]
    sines = np.sin(start + np.linspace(0, 4 * np.pi, STEPS + 1))
    values = torch.tensor(sines, dtype=torch.float32).unsqueeze(-1)
    return values[:, :-1], values[:, 1:]


def run(out: Path) -> Result:
    numbers = course_numbers(drawn=0)
    x, y = waves(numbers.random_sample(TRAINING))
    x_test, y_test = waves(numbers.random_sample(TESTS))
    models = build(Predictor, after=[CharRNN])
    curves = train(
        models, lambda model: F.mse_loss(model(x), y), learning_rate=1e-3, epochs=EPOCHS,
        tolerance=1e-3,
    )  # fmt: skip
    with torch.inference_mode():
        predicted = models["rnnkern"](x_test)
    test_loss = F.mse_loss(predicted, y_test).item()
    errors = (predicted - y_test).flatten()

    figure, axes = plt.subplots(2, 2, figsize=(12, 8))
    plot_curves(axes[0, 0], curves)
    axes[0, 0].axhline(test_loss, ls=":", color="0.3")
    axes[0, 0].annotate(f"test loss {test_loss:.3f}", (2, test_loss * 1.1))
    for k, color in enumerate(PALETTE[:3]):
        axes[0, 1].plot(y_test[k, :, 0], "--", color=color, alpha=0.6)
        axes[0, 1].plot(predicted[k, :, 0], color=color, label=f"wave {k}")
    axes[0, 1].set(title="test waves (dashed) and predictions", xlabel="time step $t$")
    axes[0, 1].set_ylim(top=1.55)
    axes[0, 1].legend(loc="upper center", ncols=3)
    detail = axes[1, 0]
    detail.plot(x_test[0, :, 0], "o", ms=3, color="0.6", label="input $x_t$")
    detail.plot(y_test[0, :, 0], "--", color=PALETTE[1], label="true next $x_{t+1}$")
    detail.plot(predicted[0, :, 0], color=PALETTE[0], label=r"predicted $\hat{x}_{t+1}$")
    detail.set(title="wave 0 in detail", xlabel="time step $t$", ylabel="value")
    detail.set_ylim(top=1.55)
    detail.legend(loc="upper center", ncols=3)
    axes[1, 1].hist(errors, bins=50, color=PALETTE[0], edgecolor="white", linewidth=0.3)
    axes[1, 1].set(xlabel="prediction error", ylabel="count")
    axes[1, 1].set_title(f"errors: mean {errors.mean():.3f}, deviation {errors.std():.3f}")

    losses = curves["rnnkern"].losses
    rows = [
        ("test loss", f"{test_loss:.4f}", "0.0486"),
        *((f"loss after epoch {n}", f"{losses[n - 1]:.3f}", f"{v:.3f}") for n, v in COURSE.items()),
        ("loss curves differ by at most", f"{curve_difference(curves):.0e}", ""),
    ]
    seconds = {name: curve.seconds for name, curve in curves.items()}
    path = save(figure, out, "task4_sine")
    return Result(__doc__.splitlines()[0], rows, f"training, {EPOCHS} epochs", seconds, [path])


if __name__ == "__main__":
    main(run)
