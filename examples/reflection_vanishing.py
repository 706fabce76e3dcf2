"""Reflection: why gradients vanish

A loss at the end of a sequence teaches a step far back only through the product of the derivatives
of all steps between. In an RNN each factor is the recurrent matrix times slopes below 1, and the
product shrinks (or grows) like a power. An LSTM's cell state has a second way back: from one step
to the one before, its gradient is multiplied by the forget gate alone, and a gate can learn to stay
near 1. It starts near one half unless its bias says otherwise, which is why many set that bias to 1
or more.

What to see: on the left, the gradient of a loss at the last step, on its way back through 120 steps
of untrained networks, on a log scale where a power is a straight line. All three vanish: the RNN
fastest, and LSTM and GRU too, for their gates are half open. In the middle, the LSTM's cell state
for four values of the forget bias: the line flattens as the gate opens, from a loss of twenty-four
orders of magnitude to next to none. On the right, what that means for learning: the networks see a
sign in the first of 60 steps, then noise, and have to tell the sign at the end. Only the LSTM with
the open forget gate learns it; the others, whose curves cover each other, stay at chance.
"""

import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from common import Result, in_turn, main, save
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import rnnkern
from rnnkern.plot import PALETTE

EQUATIONS = [
    "∂L/∂h_t = (∂L/∂h_T) ∏_{s=t+1…T} ∂h_s/∂h_{s−1}",
    "RNN:  ∂h_s/∂h_{s−1} = diag(1 − h_s^{2}) W_{hh}",
    "LSTM:  ∂c_s/∂c_{s−1} = diag(f_s),  where h_{s−1} is held fixed",
]

STEPS, BATCH, HIDDEN = 120, 16, 32
BIASES = (0, 1, 3, 5)
RECALL_STEPS, RECALL_BATCH, RECALL_EPOCHS = 60, 64, 150


def lstm_with_forget_bias(
    bias: float, inputs: int = 1, dtype: torch.dtype = torch.float64
) -> rnnkern.LSTM:
    """An untrained LSTM whose forget gates start at σ(bias)."""
    torch.manual_seed(0)
    lstm = rnnkern.LSTM(inputs, HIDDEN, dtype=dtype)
    with torch.no_grad():
        lstm.bias_ih_l0[HIDDEN : 2 * HIDDEN] = bias  # rows of the gates: i, f, g, o
        lstm.bias_hh_l0[HIDDEN : 2 * HIDDEN] = 0
    return lstm


def loss(output: Tensor | list[Tensor]) -> Tensor:
    return output[-1].square().sum()


def unrolled_flow(lstm: nn.LSTM, x: Tensor) -> tuple[Tensor, Tensor]:
    """The same norms by autograd on torch.nn's cell: its LSTM hides every state but the last."""
    cell = nn.LSTMCell(1, HIDDEN, dtype=x.dtype)
    cell.load_state_dict({k.removesuffix("_l0"): w for k, w in lstm.state_dict().items()})
    h: list[Tensor] = []
    c: list[Tensor] = []
    for x_t in x:
        for s, states in zip(cell(x_t, (h[-1], c[-1]) if h else None), (h, c), strict=True):
            states.append(s)
    gradients = torch.stack(torch.autograd.grad(loss(h), h + c)).norm(dim=-1)
    of_h, of_c = gradients.chunk(2)
    return of_h, of_c


def recall(layer: nn.RNNBase) -> list[float]:
    """Loss of telling, after noise, the sign seen at the first step; a fresh batch every epoch."""
    torch.manual_seed(1)
    head = nn.Linear(HIDDEN, 1)
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=3e-3)
    losses = []
    for _ in tqdm(range(RECALL_EPOCHS), unit="epoch", leave=False):
        sign = torch.randint(2, (RECALL_BATCH, 1)).float()
        x = 0.3 * torch.randn(RECALL_STEPS, RECALL_BATCH, 1)
        x[0] = 2 * sign - 1
        error = F.binary_cross_entropy_with_logits(head(layer(x)[0][-1]), sign)
        optimizer.zero_grad()
        error.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        losses.append(error.item())
    return losses


def run(out: Path) -> Result:
    torch.manual_seed(0)
    x = torch.randn(STEPS, BATCH, 1, dtype=torch.float64)
    kinds = {"RNN": rnnkern.RNN, "LSTM": rnnkern.LSTM, "GRU": rnnkern.GRU}
    flows = {
        name: rnnkern.gradient_flow(kind(1, HIDDEN, dtype=torch.float64), x, loss)
        for name, kind in kinds.items()
    }
    by_bias = {
        f"forget bias {b}": rnnkern.gradient_flow(lstm_with_forget_bias(b), x, loss) for b in BIASES
    }

    lstm = lstm_with_forget_bias(1)
    flow = rnnkern.gradient_flow(lstm, x, loss)
    difference = max(
        ((ours - theirs).abs() / theirs).max().item()
        for ours, theirs in zip((flow.hidden, flow.cell), unrolled_flow(lstm, x), strict=True)
    )
    if not difference < 1e-9:
        raise RuntimeError(f"gradient flow and autograd differ by a factor of 1 ± {difference:.0e}")
    seconds = in_turn(
        {
            "torch.nn": lambda: unrolled_flow(lstm, x),
            "rnnkern": lambda: rnnkern.gradient_flow(lstm, x, loss),
        },
        repeats=15,
    )
    learners = {
        "RNN": rnnkern.RNN(1, HIDDEN),
        "GRU": rnnkern.GRU(1, HIDDEN),
        "LSTM, bias 0": lstm_with_forget_bias(0, dtype=torch.float32),
        "LSTM, bias 3": lstm_with_forget_bias(3, dtype=torch.float32),
    }
    learned = {name: recall(layer) for name, layer in learners.items()}

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13.5, 4.4))
    rnnkern.plot.compare(flows, left)
    left.set_title("hidden states of three cells")
    rnnkern.plot.compare(by_bias, middle, state="cell")
    middle.set_title("cell state of the LSTM")
    for (name, losses), color in zip(learned.items(), PALETTE, strict=False):
        right.plot(losses, color=color, label=name)
    right.set(xlabel="epoch", ylabel="loss", title=f"recalling a sign after {RECALL_STEPS} steps")
    right.axhline(math.log(2), color="0.6", lw=0.8, zorder=0)
    right.annotate("chance", (0, math.log(2) - 0.04), color="0.4")
    right.legend(loc="lower left")

    def left_over(norm: Tensor) -> str:
        return f"{(norm[0] / norm[-1]).median().item():.0e}"

    rows = [(f"gradient left, {name}", left_over(f.hidden), "") for name, f in flows.items()]
    rows += [
        (f"gradient left in c, LSTM, {name}", left_over(f.cell), "") for name, f in by_bias.items()
    ]
    rows += [(f"loss of the recall, {name}", f"{v[-1]:.3f}", "") for name, v in learned.items()]
    rows += [("difference from autograd, unrolled", f"{difference:.0e}", "")]
    path = save(figure, out, "reflection_vanishing")
    title = __doc__.splitlines()[0]
    return Result(title, rows, "gradient at every step of an LSTM", seconds, [path])


if __name__ == "__main__":
    main(run)
