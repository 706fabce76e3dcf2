"""Data-parallel training of an rnnkern layer: the same gradients as one process on the whole batch.

    torchrun --nproc-per-node 2 examples/distributed.py            # DistributedDataParallel
    torchrun --nproc-per-node 2 examples/distributed.py --sharded  # fully_shard (FSDP2)

Every process trains on its share of the batch over gloo, on the CPU, and compares its gradients and
its trained weights with those of the same model trained alone on all of it.
"""

import argparse
import copy
import gc
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import rnnkern

BATCH, STEPS, FEATURES, HIDDEN = 8, 12, 6, 16


class Tagger(nn.Module):
    """Fits a number to every step of a sequence: (T, B, I) and (T, B, 1) -> the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = rnnkern.LSTM(FEATURES, HIDDEN, 2, bidirectional=True)
        self.out = nn.Linear(2 * HIDDEN, 1)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        y, _ = self.rnn(x)
        return nn.functional.mse_loss(self.out(y), target)


def whole(t: Tensor) -> Tensor:
    """A tensor as one process sees it: FSDP's parameters are spread over the processes."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def train(model: nn.Module, x: Tensor, target: Tensor, steps: int = 5) -> list[list[Tensor]]:
    """The gradients of every step, then the weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    history = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(x, target).backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        history.append([whole(g).clone() for g in grads])
        optimizer.step()
    return [*history, [whole(p.detach()).clone() for p in model.parameters()]]


def largest_difference(sharded: bool) -> float:
    """Between what the processes train together and what one trains alone."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    alone = Tagger()
    x = torch.randn(STEPS, BATCH, FEATURES)
    target = x.sum(-1, keepdim=True).cumsum(0).sin()
    tagger = copy.deepcopy(alone)
    model: nn.Module = tagger
    if sharded:
        torch.distributed.device_mesh.init_device_mesh("cpu", (world,))
        fully_shard(tagger.rnn)
        fully_shard(model)
    else:
        model = DistributedDataParallel(model)

    mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    together = train(model, x[:, mine], target[:, mine])
    expected = train(alone, x, target)
    return max(
        float((a - b).abs().max())
        for left, right in zip(together, expected, strict=True)
        for a, b in zip(left, right, strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sharded", action="store_true", help="fully_shard instead of DDP")
    sharded = parser.parse_args().sharded

    # Who waits longer than this for another process says so, and ends.
    dist.init_process_group("gloo", timeout=timedelta(minutes=1))
    worst = largest_difference(sharded)
    way = "fully_shard" if sharded else "DistributedDataParallel"
    print(
        f"{way}, process {dist.get_rank()} of {dist.get_world_size()}: "
        f"largest difference from one process {worst:.1e}"
    )
    # First the model, which DDP may leave in a cycle of references. Were it to let go of the group
    # last, torch 2.13 could hang: it would wait, with Python's lock, for a thread of the group that
    # wants that lock to end.
    gc.collect()
    dist.destroy_process_group()
    if worst > 1e-4:
        raise SystemExit("the gradients differ")


if __name__ == "__main__":
    main()
