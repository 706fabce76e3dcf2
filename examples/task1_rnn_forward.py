"""Task 1: an RNN's forward pass, step by step

A recurrent network reads a sequence one element at a time. All that it knows of the past is its
hidden state, a short vector that every step computes anew from the input and from the state before.
Here five numbers, 0.1 to 0.5, pass through a network of three hidden units; a linear layer turns
each state into an output. The weights are random, nothing is trained.

What to see: on the left, the dotted lines are the network without its recurrent weights: each unit
follows the rising input alone, in its own direction and size. The solid lines are the whole
network. At step 0 both agree, for there is nothing to remember yet; from then on the gap between
them is memory. On the right, the input, and the output that is read from the state.
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from common import SIDES, Result, build, in_turn, main, save
from torch import Tensor, nn

import rnnkern
from rnnkern import reference
from rnnkern.plot import PALETTE
from rnnkern.state_dict import Weights

EQUATIONS = ["h_t = tanh(W_{ih} x_t + W_{hh} h_{t−1} + b_h)", "y_t = W_{ho} h_t + b_o"]


class SimpleRNN(nn.Module):
    def __init__(self, layers: Any) -> None:
        super().__init__()
        self.rnn = layers.RNN(input_size=1, hidden_size=3)
        self.out = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.rnn(x)[0])
        return y


def run(out: Path) -> Result:
    models = build(SimpleRNN)
    ours = models["rnnkern"]
    x = torch.linspace(0.1, 0.5, 5).unsqueeze(1)  # 5 steps of 1 number
    trace = rnnkern.trace(ours.rnn, x)
    with torch.inference_mode():
        y = ours(x)

    # The same equations in NumPy and float64, forward and backward.
    w_ih, w_hh, b_ih, b_hh = (p.detach().double().numpy() for p in ours.rnn.parameters())
    steps = x.double().numpy()[:, None]  # (T, B, I)
    tape = reference.forward("RNN_TANH", steps, [Weights(w_ih, w_hh, b_ih, b_hh)])
    error = np.abs(tape.output[:, 0] - trace.hidden.numpy()).max()
    gradients = reference.backward(tape, np.ones_like(tape.output))
    trace.output.sum().backward()
    slope_error = np.abs(gradients.weights[0].w_hh - ours.rnn.weight_hh_l0.grad.numpy()).max()
    with torch.inference_mode():
        difference = (models["torch.nn"](x) - y).abs().max().item()
    forgetful = reference.forward("RNN_TANH", steps, [Weights(w_ih, 0 * w_hh, b_ih, b_hh)])
    if max(error, slope_error, difference) > 1e-6:
        raise RuntimeError(f"results differ by {error:.1e}, {slope_error:.1e}, {difference:.1e}")

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=[3, 2])
    for unit, color in enumerate(PALETTE[:3]):
        left.plot(forgetful.output[:, 0, unit], ":", color=color, alpha=0.6)
    rnnkern.plot.states(trace, left, kind="lines")
    left.set_title("hidden state; dotted: without $W_{hh}$")
    right.plot(x, "s-", color=PALETTE[4], label="input $x_t$")
    right.plot(y, "o-", color=PALETTE[0], label="output $y_t$")
    right.set(xlabel="time step $t$", ylabel="value", title="input and output")
    right.legend()

    calls = {name: lambda m=models[name]: m(x) for name in SIDES}
    with torch.inference_mode():
        seconds = in_turn(calls)
    rows = [
        ("error to float64", f"{error:.0e}", ""),
        ("error of ∂L/∂W_hh against float64", f"{slope_error:.0e}", "no backward pass"),
        ("difference from torch.nn", f"{difference:.0e}", ""),
        ("outputs", "  ".join(f"{v:.3f}" for v in y.flatten().tolist()), "unseeded"),
    ]
    title = __doc__.splitlines()[0]
    return Result(title, rows, "one forward pass", seconds, [save(figure, out, "task1_states")])


if __name__ == "__main__":
    main(run)
