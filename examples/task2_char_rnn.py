"""Task 2: predict the next character

The text is "hello world". Every character is looked up in a table of vectors (an embedding), an RNN
reads them in order, and a linear layer scores all eight characters that could come next. Training
makes the right one likely. Which one is right depends on the past: after "l" come "l", "o" and "d".

What to see: on the left, the training loss falls by four orders of magnitude, and the curves of
torch.nn and rnnkern, started from the same weights, cover each other. On the right, each column is
one step: the model has read the character below and gives each character at the left a probability.
The three columns of "l" have three different answers: the hidden state knows where in the text it
is.
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from common import Result, build, curve_difference, main, plot_curves, save, train
from torch import Tensor, nn
from torch.nn import functional as F

from rnnkern.plot import PALETTE

EQUATIONS = [
    "h_t = tanh(W_{ih} e(x_t) + b_{ih} + W_{hh} h_{t−1} + b_{hh})",
    "p(x_{t+1}) = softmax(W_{ho} h_t + b_o)",
    "L = −mean_t log p(x_{t+1})",
]

TEXT = "hello world"
CHARACTERS = sorted(set(TEXT))
EPOCHS = 500
COURSE = {100: 0.0020, 200: 0.0010, 300: 0.0006, 400: 0.0004, 500: 0.0003}


class CharRNN(nn.Module):
    def __init__(self, layers: Any, characters: int = len(CHARACTERS), hidden: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, hidden)
        self.rnn = layers.RNN(hidden, hidden, batch_first=True)
        self.out = nn.Linear(hidden, characters)

    def forward(self, x: Tensor) -> Tensor:
        """Scores (B, T, characters) of the next character, from indices (B, T)."""
        y: Tensor = self.out(self.rnn(self.embedding(x))[0])
        return y


def run(out: Path) -> Result:
    indices = torch.tensor([[CHARACTERS.index(c) for c in TEXT]])
    x, y = indices[:, :-1], indices[:, 1:]
    models = build(CharRNN)

    def loss_of(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    curves = train(models, loss_of, learning_rate=0.01, epochs=EPOCHS, tolerance=1e-3)
    with torch.inference_mode():
        probabilities = models["rnnkern"](x)[0].softmax(dim=-1)
    predicted = probabilities.argmax(dim=-1)
    right = int((predicted == y[0]).sum())

    figure, (left, table) = plt.subplots(1, 2, figsize=(12, 4.2))
    plot_curves(left, curves)
    image = table.imshow(probabilities.T, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    figure.colorbar(image, ax=table, label="probability")
    table.plot(y[0], "o", mec=PALETTE[1], mfc="none", ms=13, mew=2, label="true next character")
    names = ["␣" if c == " " else c for c in CHARACTERS]
    table.set_xticks(range(len(TEXT) - 1), [names[i] for i in x[0]])
    table.set_yticks(range(len(names)), names)
    table.set(xlabel="character read", ylabel="next character")
    table.set_title(f"{right} of {len(predicted)} predicted right")
    table.grid(False)
    table.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15))

    losses = curves["rnnkern"].losses
    rows = [
        ("characters right", f"{right} of {len(predicted)}", "10 of 10"),
        *((f"loss after epoch {n}", f"{losses[n - 1]:.4f}", f"{v:.4f}") for n, v in COURSE.items()),
        ("loss curves differ by at most", f"{curve_difference(curves):.0e}", ""),
    ]
    seconds = {name: curve.seconds for name, curve in curves.items()}
    path = save(figure, out, "task2_characters")
    return Result(__doc__.splitlines()[0], rows, f"training, {EPOCHS} epochs", seconds, [path])


if __name__ == "__main__":
    main(run)
