"""Times calls in turn, on a CPU or on a GPU."""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch.utils import benchmark

Call = Callable[[], object]
MAX_SPREAD, MAX_TRIES = 0.25, 3
FLUSH_BYTES = 256 << 20  # overwritten before every call on a GPU: more than any L2 cache holds


class Timing(NamedTuple):
    """Seconds per call: the median of several runs and their interquartile range."""

    median: float
    iqr: float


def _timing(runs: list[float]) -> Timing:
    low, middle, high = statistics.quantiles(runs, n=4, method="inclusive")
    return Timing(middle, high - low)


class Timer(ABC):
    """Times calls in runs; a subclass says what a run is."""

    ROUNDS: ClassVar[tuple[int, int]]  # least and most runs of a call
    WARM_UPS: ClassVar[int]  # calls of a run before those that are timed
    REPEATS: ClassVar[bool]  # whether a run times more than one call

    @abstractmethod
    def start(self, call: Call, number: int) -> Callable[[], float]:
        """Begins a run of `number` calls; what it returns waits for the run's end and gives the
        seconds per call."""

    def alternately(self, calls: list[Call], seconds: float) -> list[Timing]:
        """Times the calls in turn, for about `seconds` in all."""
        for call in calls:
            call()
        first = [self.start(call, 1)() for call in calls]
        least, most = self.ROUNDS
        rounds = max(least, min(most, int(seconds / ((1 + self.WARM_UPS) * sum(first)))))
        each = seconds / (len(calls) * rounds)
        numbers = [max(1, int(each / t) - self.WARM_UPS) if self.REPEATS else 1 for t in first]
        # All runs begin before the first is waited for, so that a GPU always has work queued.
        runs = [
            [self.start(call, number) for call, number in zip(calls, numbers, strict=True)]
            for _ in range(rounds)
        ]
        return [_timing([run() for run in of_call]) for of_call in zip(*runs, strict=True)]

    def least_noisy(self, calls: list[Call], seconds: float) -> list[Timing]:
        """Times the calls alternately, up to MAX_TRIES times while a side's interquartile range
        exceeds MAX_SPREAD of its median. The try with the least spread counts, whatever its
        ratio."""

        def spread(timed: list[Timing]) -> float:
            return max(t.iqr / t.median for t in timed)

        best = self.alternately(calls, seconds)
        for _ in range(MAX_TRIES - 1):
            if spread(best) <= MAX_SPREAD:
                break
            best = min(best, self.alternately(calls, seconds), key=spread)
        return best


@dataclass(frozen=True)
class CpuTimer(Timer):
    """A run is a call of torch.utils.benchmark's `timeit`, which warms up with two calls."""

    threads: int

    ROUNDS = (3, 9)
    WARM_UPS = 2
    REPEATS = True

    def start(self, call: Call, number: int) -> Callable[[], float]:
        timer = benchmark.Timer("call()", globals={"call": call}, num_threads=self.threads)
        mean = timer.timeit(number).mean
        return lambda: mean


class GpuTimer(Timer):
    """A run is one call between two CUDA events, with the L2 cache overwritten before."""

    ROUNDS = (5, 50)
    WARM_UPS = 0
    REPEATS = False

    def __init__(self, device: str) -> None:
        self.cache = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def start(self, call: Call, number: int) -> Callable[[], float]:
        assert number == 1
        begin, end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        self.cache.zero_()
        begin.record()
        call()
        end.record()

        def seconds() -> float:
            end.synchronize()
            return 1e-3 * float(begin.elapsed_time(end))

        return seconds
