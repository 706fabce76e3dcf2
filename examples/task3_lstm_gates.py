"""Task 3: inside an LSTM

An LSTM keeps two states. The cell state is its memory: each step multiplies it by the forget gate
and adds what the input gate lets in of a new proposal, the cell gate. The hidden state is what the
output gate shows of it. Gates are computed from the input and the last hidden state, one value for
each hidden unit and time step. Here four units read 0.1, 0.5, 0.9, 0.3, 0.7, with random weights.

What to see: each small square is one gate of one unit at one step, shut at 0 and open at 1. The
cell gate is a proposed value rather than a gate proper: it lies between -1 and 1 and so has a scale
of its own, diverging around 0. Without training all gates are half open. Below, the cell state adds
up what came in, so its colours deepen with time; the hidden state is a squeezed and gated view of
it.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import SIDES, Result, in_turn, main, save

import rnnkern
from rnnkern import reference
from rnnkern.state_dict import layers

EQUATIONS = [
    "i_t = σ(W_{ii} x_t + b_{ii} + W_{hi} h_{t−1} + b_{hi})",
    "f_t = σ(W_{if} x_t + b_{if} + W_{hf} h_{t−1} + b_{hf})",
    "g_t = tanh(W_{ig} x_t + b_{ig} + W_{hg} h_{t−1} + b_{hg})",
    "o_t = σ(W_{io} x_t + b_{io} + W_{ho} h_{t−1} + b_{ho})",
    "c_t = f_t ⊙ c_{t−1} + i_t ⊙ g_t",
    "h_t = o_t ⊙ tanh(c_t)",
]


def run(out: Path) -> Result:
    lstms = {}
    for name, side in SIDES.items():
        torch.manual_seed(0)
        lstms[name] = side.LSTM(input_size=1, hidden_size=4)
    x = torch.tensor([0.1, 0.5, 0.9, 0.3, 0.7]).unsqueeze(1)
    trace = rnnkern.trace(lstms["rnnkern"], x)

    # The same equations in NumPy and float64, forward and backward.
    arrays = {name: w.double().numpy() for name, w in lstms["rnnkern"].state_dict().items()}
    tape = reference.forward("LSTM", x.double().numpy()[:, None], layers(arrays)[0])
    truth = tape.directions[0]
    error = max(np.abs(trace.gates[name].numpy() - truth.saved[name]).max() for name in trace.gates)
    error = max(error, np.abs(trace.cell.numpy() - truth.cell).max())
    gradients = reference.backward(tape, np.ones_like(tape.output))
    trace.output.sum().backward()
    slope = lstms["rnnkern"].weight_hh_l0.grad.numpy()
    slope_error = np.abs(gradients.weights[0].w_hh - slope).max()
    with torch.inference_mode():
        difference = (lstms["torch.nn"](x)[0] - trace.output).abs().max().item()
    if max(error, slope_error, difference) > 1e-6:
        raise RuntimeError(f"results differ by {error:.1e}, {slope_error:.1e}, {difference:.1e}")

    figures = [
        save(rnnkern.plot.gates(trace), out, "task3_gates"),
        save(rnnkern.plot.states(trace), out, "task3_states"),
    ]
    with torch.inference_mode():
        seconds = in_turn({name: partial(lstm, x) for name, lstm in lstms.items()})
    rows = [
        ("error to float64", f"{error:.0e}", ""),
        ("error of ∂L/∂W_hh against float64", f"{slope_error:.0e}", "no backward pass"),
        ("difference from torch.nn", f"{difference:.0e}", ""),
    ]
    return Result(__doc__.splitlines()[0], rows, "one forward pass", seconds, figures)


if __name__ == "__main__":
    main(run)
