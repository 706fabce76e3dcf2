"""Task 5: is the sentence positive?

Five hundred sentences of five words each, all words of one being positive or all negative, teach an
LSTM to read a sentence and to judge it by its last hidden state. Four unseen sentences have three
words. Sentences of different lengths share a batch as a packed sequence: each is judged by its
state after its own last word, so that padding has no influence, and index 0 is kept for padding
alone.

What to see: on the left, the loss of both sides and, from the right scale, the accuracy, which
reaches 1 while the loss goes on falling. On the right, the judgement after each word of the unseen
sentences, read from the hidden state of that step: it moves away from undecided with every word,
and after three words it is a little less sure than it would be after the five that it was trained
on.
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
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
from task4_sine_lstm import TESTS, TRAINING, Predictor
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_sequence

import rnnkern
from rnnkern.plot import PALETTE

EQUATIONS = [
    "h_t, c_t = LSTM(e(x_t), h_{t−1}, c_{t−1})",
    "p = σ(w · h_T + b),  T the length of the sentence",
    "L = −mean (y log p + (1 − y) log(1 − p))",
]

POSITIVE = [
    "great", "excellent", "amazing", "wonderful", "fantastic",
    "love", "best", "perfect", "awesome", "brilliant",
]  # fmt: skip
NEGATIVE = [
    "terrible", "awful", "horrible", "worst", "hate",
    "bad", "poor", "disappointing", "pathetic", "useless",
]  # fmt: skip
INDEX = {word: 1 + k for k, word in enumerate(sorted(POSITIVE + NEGATIVE))}  # 0 is padding
UNSEEN = [
    "amazing wonderful excellent",
    "terrible awful horrible",
    "great best love",
    "worst hate bad",
]
UNSEEN_COURSE = [0.979, 0.074, 0.981, 0.071]
EPOCHS = 100
COURSE = {
    20: (0.673, 0.878),
    40: (0.482, 0.946),
    60: (0.200, 0.996),
    80: (0.091, 1),
    100: (0.048, 1),
}


class Classifier(nn.Module):
    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(INDEX) + 1, 16, padding_idx=0)
        self.lstm = layers.LSTM(16, 32, batch_first=True)
        self.out = nn.Linear(32, 1)

    def packed(self, x: Tensor, lengths: Tensor) -> PackedSequence:
        return pack_padded_sequence(self.embedding(x), lengths, True, enforce_sorted=False)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Probabilities (B,) of being positive, from padded indices (B, T) and lengths (B,)."""
        _, (h_n, _) = self.lstm(self.packed(x, lengths))
        p: Tensor = self.out(h_n[-1]).squeeze(-1).sigmoid()
        return p


def encode(sentences: list[str]) -> tuple[Tensor, Tensor]:
    """Indices, padded with 0, and the sentences' lengths."""
    rows = [torch.tensor([INDEX[word] for word in s.split()]) for s in sentences]
    return pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows])


def run(out: Path) -> Result:
    numbers = course_numbers(drawn=TRAINING + TESTS)
    words = [POSITIVE if k % 2 == 0 else NEGATIVE for k in range(500)]
    x, lengths = encode([" ".join(numbers.choice(w, size=5)) for w in words])
    y = torch.tensor([1.0, 0.0]).repeat(250)
    models = build(Classifier, after=[CharRNN, Predictor])
    accuracy: list[float] = []

    def loss_of(model: nn.Module) -> Tensor:
        p = model(x, lengths)
        if model is models["rnnkern"]:
            accuracy.append(((p > 0.5) == y).float().mean().item())
        return F.binary_cross_entropy(p, y)

    curves = train(models, loss_of, learning_rate=1e-3, epochs=EPOCHS, tolerance=1e-3)
    model = models["rnnkern"]
    with torch.inference_mode():
        p = model(*encode(UNSEEN))
        beside_longer = model(*encode([*UNSEEN, " ".join(POSITIVE)]))[:4]
        trace = rnnkern.trace(model.lstm, model.packed(*encode(UNSEEN)))
        p_by_word = model.out(trace.hidden).squeeze(-1).sigmoid()
    if not torch.equal(p, beside_longer):
        raise RuntimeError("padding has changed a sentence's probability")

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4))
    plot_curves(left, curves)
    left.legend(loc="lower center")
    twin = left.twinx()
    twin.plot(accuracy, color=PALETTE[2], ls="--")
    twin.set_ylabel("accuracy (dashed)", color=PALETTE[2])
    twin.grid(False)
    for k, sentence in enumerate(UNSEEN):
        right.plot([0, 1, 2, 3], [0.5, *p_by_word[k]], "o-", color=PALETTE[k])
        for t, word in enumerate(sentence.split()):
            upper = p_by_word[k, t] > p_by_word[(k + 2) % 4, t]  # of the two of one kind
            right.annotate(word, (t + 1, p_by_word[k, t]), (0, 9 if upper else -17), ha="center",
                           textcoords="offset points", color=PALETTE[k], fontsize=9)  # fmt: skip
    right.axhline(0.5, color="0.6", lw=0.8)
    right.set(xlim=(-0.1, 3.5), ylim=(-0.05, 1.05), xticks=range(4), xlabel="words read")
    right.set(ylabel="probability of positive", title="unseen sentences, word by word")

    losses = curves["rnnkern"].losses
    rows = [("accuracy", f"{accuracy[-1]:.3f}", "1.000")]
    rows += [
        (f"loss, accuracy after epoch {n}", f"{losses[n - 1]:.3f}, {accuracy[n - 1]:.3f}",
         f"{loss:.3f}, {right_share:.3f}")
        for n, (loss, right_share) in COURSE.items()
    ]  # fmt: skip
    rows += [
        (f"“{sentence}”", f"{p[k]:.3f}", f"{UNSEEN_COURSE[k]:.3f}")
        for k, sentence in enumerate(UNSEEN)
    ]
    rows += [("loss curves differ by at most", f"{curve_difference(curves):.0e}", "")]
    seconds = {name: curve.seconds for name, curve in curves.items()}
    path = save(figure, out, "task5_sentiment")
    return Result(__doc__.splitlines()[0], rows, f"training, {EPOCHS} epochs", seconds, [path])


if __name__ == "__main__":
    main(run)
