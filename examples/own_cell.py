"""A recurrence of one's own at kernel speed: own_cell.h, checked, trained and looked into.

    python examples/own_cell.py

The first run compiles the header. docs/guide/own-cell.md explains each step.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import rnnkern

HEADER = Path(__file__).with_name("own_cell.h")


def step(x: Tensor, y: Tensor, h: Tensor, leak: Tensor) -> tuple[Tensor]:
    """The equations of own_cell.h once more: x = W_ih x + b_ih, y = W_hh h + b_hh."""
    return (h + torch.sigmoid(leak) * (torch.tanh(x + y) - h),)


class Average(nn.Module):
    """Predicts the mean of what it has seen: the layer has to integrate."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        leaky, _ = rnnkern.cells.load(HEADER, step=step)
        self.layer = leaky(1, hidden_size)
        self.head = nn.Linear(hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        prediction: Tensor = self.head(fused(self.layer, x))
        return prediction


def loop(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's last output by a loop of the step, as it would be written in torch alone."""
    w_ih, w_hh, b_ih, b_hh, params = layer.parameters()
    h = x.new_zeros(x.shape[1], w_hh.shape[1])
    for x_t in x:
        x_sum, h_sum = nn.functional.linear(x_t, w_ih, b_ih), nn.functional.linear(h, w_hh, b_hh)
        (h,) = step(x_sum, h_sum, h, *params)
    return h


def fused(layer: nn.Module, x: Tensor) -> Tensor:
    """The same by the kernels."""
    output: Tensor = layer(x)[0]
    return output[-1]


def seconds(
    last_output: Callable[[nn.Module, Tensor], Tensor], layer: nn.Module, x: Tensor
) -> float:
    """The least time of a forward and a backward pass."""
    times = []
    for _ in range(5):
        began = time.perf_counter()
        torch.autograd.grad(last_output(layer, x).sum(), list(layer.parameters()))
        times.append(time.perf_counter() - began)
    return min(times)


def main(steps: int = 50, epochs: int = 150) -> dict[str, float]:
    """Trains; returns what it prints."""
    torch.manual_seed(0)
    model = Average(hidden_size=32)
    found = {"error of the kernels": rnnkern.cells.check(type(model.layer))}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for epoch in range(epochs):
        x = torch.randn(steps, 64, 1) + torch.randn(64, 1)
        loss = (model(x) - x.mean(0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if epoch == 0:
            found["loss at first"] = loss.item()
    found["loss at last"] = loss.item()
    layer = model.layer
    found["difference from the loop"] = (loop(layer, x) - fused(layer, x)).abs().max().item()
    found["times as fast as the loop"] = seconds(loop, layer, x) / seconds(fused, layer, x)
    trace = rnnkern.trace(layer, x[:, :1])
    found["largest candidate"] = trace.gates["candidate"].abs().max().item()
    return found


if __name__ == "__main__":
    for what, value in main().items():
        print(f"{what:27} {value:.3g}")
