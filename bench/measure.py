"""Compares two layers in one process, on the same weights and inputs.

A row whose results disagree gets no times.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from calls import tensor_of
from peers import Peer, takes
from rows import Row
from timer import CpuTimer
from torch import Tensor
from torch.autograd.graph import increment_version, saved_tensors_hooks

from rnnkern.nn.layers import Layer

# Largest difference between the two results relative to the largest value. It catches a wrong
# kernel; the tight bounds, against float64, are the test suite's.
AGREE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 6e-2}


@dataclass
class Machine:
    """The limits of this machine at one number of threads, measured in the same run."""

    threads: int
    peak: float | None  # GFLOP/s of fp32 multiply-adds
    cache: float  # GB/s read from a core's L2, all cores together
    memory: float  # GB/s copied through memory
    sigmoids: float | None  # 1e9 values of sigmoid or tanh per second

    @classmethod
    def measure(cls, threads: int) -> Machine:
        torch.set_num_threads(threads)  # another count's measurement may have left its own
        loaded = 0.0 if hasattr(torch.ops.rnnkern, "peak") else None
        cache, memory = threads * _cache_bandwidth(), _memory_bandwidth(threads)
        machine = cls(threads, loaded, cache, memory, loaded)
        machine.look_again()
        return machine

    def look_again(self) -> None:
        """Raises the arithmetic's limits to what the cores give now, if that is more: where others
        share them, one measurement may be a third too low."""
        if self.peak is None or self.sigmoids is None:
            return
        torch.set_num_threads(self.threads)
        self.peak = max(self.peak, float(torch.ops.rnnkern.peak(self.threads)))
        self.sigmoids = max(self.sigmoids, self.threads * _sigmoid_rate())

    def limit_seconds(self, row: Row) -> float | None:
        """The time no implementation of the same arithmetic can beat: the multiply-adds at peak
        and the gate functions as fast as ours alone, or one reading of the recurrent weights per
        step. bfloat16 has limits of its own."""
        if self.peak is None or self.sigmoids is None or row.precision is torch.bfloat16:
            return None
        arithmetic = row.flops() / self.peak + row.sigmoids() / self.sigmoids
        return max(arithmetic, row.recurrent_bytes() / self.cache) * 1e-9


@dataclass
class Result:
    """What one row gave. Times are seconds per call; the spreads are interquartile ranges."""

    row: Row
    machine: Machine
    ours: float = float("nan")
    ours_iqr: float = float("nan")
    theirs: float = float("nan")
    theirs_iqr: float = float("nan")
    saved: dict[str, int] = field(default_factory=dict)  # bytes kept for backward, by side
    peak: dict[str, int] = field(default_factory=dict)  # bytes a training call adds, by side
    peers: dict[str, float] = field(default_factory=dict)  # seconds, by the peer's title
    peers_wrong: dict[str, str] = field(default_factory=dict)  # what disagreed, by title
    wrong: str = ""  # what disagreed; such a row has no times

    @property
    def threads(self) -> int:
        return self.machine.threads

    @property
    def limit(self) -> float | None:
        """Seconds, by what has been seen of the machine so far."""
        return self.machine.limit_seconds(self.row)

    @property
    def ratio(self) -> float:
        return self.theirs / self.ours

    @property
    def gflops(self) -> float:
        return self.row.flops() / self.ours * 1e-9

    @property
    def keeps_more(self) -> bool:
        """Whether we keep more for backward than torch.nn."""
        return bool(self.saved) and self.saved["ours"] > self.saved["theirs"]

    @property
    def share(self) -> float | None:
        """Share of the machine's limit that our time reaches."""
        return None if self.limit is None else self.limit / self.ours

    @property
    def ceiling(self) -> float | None:
        """The ratio that a layer at the machine's limit would have."""
        return None if self.limit is None else self.theirs / self.limit


class Side:
    """One of the two layers on a device, with its call ready to be timed."""

    def __init__(self, row: Row, package: object, device: str = "cpu") -> None:
        self.row = row
        self.module = row.layer(package).to(device)
        self.parameters = list(self.module.parameters())
        x, states = row.inputs()
        self.x, self.hx = row.arguments(x.to(device), [state.to(device) for state in states])
        self.leaf = tensor_of(self.x)
        self.resets = row.mask().to(device) if row.resets else None
        if row.train:
            self.leaf.requires_grad_(row.input_requires_grad)
            self.gradient = row.gradient().to(device)

    def forward(self) -> tuple[Any, Any]:
        results: tuple[Any, Any]
        if self.resets is None:
            results = self.module(self.x, self.hx)
        elif isinstance(self.module, Layer):
            results = self.module(self.x, self.hx, self.resets)
        else:
            results = self.step_by_step()
        return results

    def step_by_step(self) -> tuple[Any, Any]:
        """What libraries do where the layer takes no resets."""
        outputs, state = [], self.hx
        assert isinstance(self.x, Tensor)
        assert self.resets is not None
        for x, keeps in zip(self.x[:, None], ~self.resets[:, None, :, None], strict=True):
            if isinstance(state, tuple):
                state = tuple(keeps * s for s in state)
            elif state is not None:
                state = keeps * state
            output, state = self.module(x, state)
            outputs.append(output)
        return torch.cat(outputs), state

    def infer(self) -> tuple[Any, Any]:
        with torch.inference_mode():
            return self.forward()

    def train(self) -> None:
        """Forward and backward, as between two optimizer steps: the optimizer has just changed the
        weights, so nothing derived from their values may be kept from the call before."""
        increment_version(self.parameters)
        for p in self.parameters:
            p.grad = None
        self.leaf.grad = None
        output, state = self.forward()
        if self.row.loss_on == "h_n":
            read = state[0] if isinstance(state, tuple) else state
        else:
            read = tensor_of(output)
        read.backward(self.gradient)

    @property
    def call(self) -> Callable[[], object]:
        return self.train if self.row.train else self.infer

    def results(self) -> dict[str, Tensor]:
        """Every result of the call by name, for comparison."""
        output, state = self.forward() if self.row.train else self.infer()
        h, *c = state if isinstance(state, tuple) else (state,)
        named = {"output": tensor_of(output), "h_n": h}
        if c:
            named["c_n"] = c[0]
        if self.row.train:
            self.train()
            if self.row.input_requires_grad:
                named["input.grad"] = self.leaf.grad
            named |= {f"{k}.grad": p.grad for k, p in self.module.named_parameters()}
        return {k: v.detach().clone() for k, v in named.items()}

    def saved_bytes(self) -> int:
        """Bytes of the distinct buffers that the graph keeps for backward, without the input and
        the parameters, which live anyway."""
        known = {p.untyped_storage().data_ptr() for p in [*self.parameters, self.leaf]}
        buffers: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            storage = t.untyped_storage() if t.layout is torch.strided else None
            if storage is not None and storage.data_ptr() not in known:
                buffers[storage.data_ptr()] = storage.nbytes()
            return t

        with saved_tensors_hooks(pack, lambda t: t):
            kept_alive = self.forward()
        del kept_alive
        return sum(buffers.values())


def relative_error(got: Tensor, want: Tensor) -> float:
    """The largest difference relative to the largest value."""
    want = want.double()
    return ((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()


def disagreement(ours: dict[str, Tensor], theirs: dict[str, Tensor], limit: float) -> str:
    """Names the results that differ by more than `limit`, with the difference; empty when none."""
    bad = []
    for name, want in theirs.items():
        got = ours[name]
        if got.shape != want.shape:
            bad.append(f"{name} {tuple(got.shape)} is not {tuple(want.shape)}")
            continue
        error = relative_error(got, want)
        if not error <= limit:  # a NaN is a disagreement too
            bad.append(f"{name} {error:.1e}")
    return ", ".join(bad)


def compare(
    row: Row,
    machine: Machine,
    ours: ModuleType,
    theirs: ModuleType,
    seconds: float,
    peers: dict[str, type[Peer]] | None = None,
) -> Result:
    """Times `row` with the layers of both packages alternately, for about `seconds` in all, and
    then with each of the peers for half as long: its threads may spin for a while after a call."""
    threads = machine.threads
    machine.look_again()
    result = Result(row, machine)
    torch.set_num_threads(threads)
    with row.settings():
        mine, other = Side(row, ours), Side(row, theirs)
        expected = other.results()
        result.wrong = disagreement(mine.results(), expected, AGREE[row.precision])
        if result.wrong:
            return result
        if row.train:
            result.saved = {"ours": mine.saved_bytes(), "theirs": other.saved_bytes()}
        timer = CpuTimer(threads)
        a, b = timer.least_noisy([mine.call, other.call], seconds)
        result.ours, result.ours_iqr = a.median, a.iqr
        result.theirs, result.theirs_iqr = b.median, b.iqr
        for title, peer in (peers or {}).items():
            if takes(title, row):
                one = peer(row, threads)
                wrong = disagreement(one.results(), expected, AGREE[row.precision])
                if wrong:
                    result.peers_wrong[title] = wrong
                else:
                    result.peers[title] = timer.alternately([one.call], seconds / 2)[0].median
    return result


def _rate(inputs: list[Any], f: Callable[[Any], object]) -> float:
    """1e9 elements per second that `f` takes on one thread: the difference of a small and a large
    input, free of the cost of a call."""
    timer, calls = CpuTimer(1), [partial(f, a) for a in inputs]
    rounds = [[timer.start(call, 100)() for call in calls] for _ in range(40)]
    small, large = map(min, zip(*rounds, strict=True))
    rate: float = (len(inputs[1]) - len(inputs[0])) / (large - small) * 1e-9
    return rate


def _cache_bandwidth() -> float:
    """GB/s that one core reads from its L2 in torch's sum of 256 and of 768 KB. A lower bound: the
    sum may be slower than the reading."""
    return 4 * _rate([torch.ones(2**16), torch.ones(3 * 2**16)], torch.sum)


def _sigmoid_rate() -> float:
    """1e9 values that our own sigmoid and tanh give per second on one core, half of each, from the
    first-level cache; as above, from the difference of two sizes."""
    from rnnkern import _numpy

    def both(x: np.ndarray) -> None:
        _numpy.math("sigmoid", x)
        _numpy.math("tanh", x)

    return 2 * _rate([np.ones(n, np.float32) for n in (1024, 3072)], both)


def _memory_bandwidth(threads: int) -> float:
    """GB/s of a copy between buffers that no cache holds, reading and writing."""
    a, b = torch.ones(2**25), torch.empty(2**25)
    timing = CpuTimer(threads).alternately([partial(b.copy_, a)], 0.1)[0]
    return 2 * a.nbytes / timing.median * 1e-9


def processor() -> str:
    """The processor's name, as the system gives it."""
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
