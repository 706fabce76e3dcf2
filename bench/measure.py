"""Times two layers alternately in one process, on the same weights and inputs.

Timing itself is torch.utils.benchmark.Timer. A row whose results disagree gets no times.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import torch
from peers import Peer, takes
from rows import Row
from torch import Tensor
from torch.autograd.graph import increment_version, saved_tensors_hooks
from torch.nn.utils.rnn import PackedSequence
from torch.utils.benchmark import Measurement, Timer

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
    """One of the two layers, with its call ready to be timed."""

    def __init__(self, row: Row, package: object) -> None:
        self.row = row
        self.module = row.module(package)
        self.parameters = list(self.module.parameters())
        self.x, self.hx = row.inputs()
        if row.train:
            self.leaf = self.x.data if isinstance(self.x, PackedSequence) else self.x
            self.leaf.requires_grad_(row.input_requires_grad)
            self.gradient = row.gradient()

    @staticmethod
    def _data(output: Tensor | PackedSequence) -> Tensor:
        return output.data if isinstance(output, PackedSequence) else output

    def forward(self) -> tuple[Any, Any]:
        results: tuple[Any, Any] = self.module(self.x, self.hx)
        return results

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
            read = self._data(output)
        read.backward(self.gradient)

    @property
    def call(self) -> Callable[[], object]:
        return self.train if self.row.train else self.infer

    def results(self) -> dict[str, Tensor]:
        """Every result of the call by name, for comparison."""
        output, state = self.forward() if self.row.train else self.infer()
        h, *c = state if isinstance(state, tuple) else (state,)
        named = {"output": self._data(output), "h_n": h}
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


def disagreement(ours: dict[str, Tensor], theirs: dict[str, Tensor], dtype: torch.dtype) -> str:
    """Names the results that differ by more than AGREE, with the difference; empty when none."""
    bad = []
    for name, want in theirs.items():
        got = ours[name]
        if got.shape != want.shape:
            bad.append(f"{name} {tuple(got.shape)} is not {tuple(want.shape)}")
            continue
        scale = want.double().abs().max().clamp_min(1e-30)
        error = ((got.double() - want.double()).abs().max() / scale).item()
        if not error <= AGREE[dtype]:  # a NaN is a disagreement too
            bad.append(f"{name} {error:.1e}")
    return ", ".join(bad)


def alternately(
    calls: list[Callable[[], object]], threads: int, seconds: float, most: int = 9
) -> list[Measurement]:
    """Times the calls in turn, in at most `most` rounds, for about `seconds` in all."""
    timers = [Timer("call()", globals={"call": call}, num_threads=threads) for call in calls]
    # Timer.timeit warms up with two calls, so a round costs number + 2 calls of each side.
    first = [t.timeit(2).mean for t in timers]
    rounds = max(3, min(most, int(seconds / (3 * sum(first)))))
    numbers = [max(1, int(seconds / (len(calls) * rounds * t)) - 2) for t in first]
    runs: list[list[Measurement]] = [[] for _ in calls]
    for _ in range(rounds):
        for timer, number, done in zip(timers, numbers, runs, strict=True):
            done.append(timer.timeit(number))
    return [Measurement.merge(done)[0] for done in runs]


MAX_SPREAD, MAX_TRIES = 0.25, 3


def least_noisy(
    calls: list[Callable[[], object]], threads: int, seconds: float
) -> list[Measurement]:
    """Times the calls alternately, up to MAX_TRIES times while a side's interquartile range exceeds
    MAX_SPREAD of its median. The try with the least spread counts, whatever its ratio."""

    def spread(timed: list[Measurement]) -> float:
        return max(m.iqr / m.median for m in timed)

    best = alternately(calls, threads, seconds)
    for _ in range(MAX_TRIES - 1):
        if spread(best) <= MAX_SPREAD:
            break
        best = min(best, alternately(calls, threads, seconds), key=spread)
    return best


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
        result.wrong = disagreement(mine.results(), expected, row.precision)
        if result.wrong:
            return result
        if row.train:
            result.saved = {"ours": mine.saved_bytes(), "theirs": other.saved_bytes()}
        a, b = least_noisy([mine.call, other.call], threads, seconds)
        result.ours, result.ours_iqr = a.median, a.iqr
        result.theirs, result.theirs_iqr = b.median, b.iqr
        for title, peer in (peers or {}).items():
            if takes(title, row):
                one = peer(row, threads)
                wrong = disagreement(one.results(), expected, row.precision)
                if wrong:
                    result.peers_wrong[title] = wrong
                else:
                    result.peers[title] = alternately([one.call], threads, seconds / 2)[0].median
    return result


def _seconds(stmt: str, threads: int, **names: object) -> float:
    timer = Timer(stmt, globals={"torch": torch, **names}, num_threads=threads)
    return timer.blocked_autorange(min_run_time=0.1).median


def _rate(inputs: list[Any], f: Callable[[Any], object]) -> float:
    """1e9 elements per second that `f` takes on one thread: the difference of a small and a large
    input, free of the cost of a call."""
    timers = [Timer("f(a)", globals={"f": f, "a": a}, num_threads=1) for a in inputs]
    rounds = [[timer.timeit(100).mean for timer in timers] for _ in range(40)]
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
    return 2 * a.nbytes / _seconds("b.copy_(a)", threads, a=a, b=b) * 1e-9


def processor() -> str:
    """The processor's name, as the system gives it."""
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
