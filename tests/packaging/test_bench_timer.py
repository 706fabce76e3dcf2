"""bench/timer.py: which runs it makes and what it says of them, with a clock that is scripted."""

from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import pytest

pytestmark = pytest.mark.sources("bench")
ROOT = Path(__file__).resolve().parents[2]
FAST, SLOW = (lambda: None), (lambda: None)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """Makes a timer whose runs take the milliseconds that are given for each call, in turn."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from timer import CpuTimer

    class Scripted(CpuTimer):
        def start(self, call: object, number: int) -> Callable[[], float]:
            runs.append((call, number))
            return lambda: 1e-3 * next(times[call])

    runs: list[tuple[object, int]] = []
    times: dict[object, Iterator[float]] = {}

    def make(fast: list[float], slow: list[float]) -> tuple[CpuTimer, list[tuple[object, int]]]:
        times.update({FAST: cycle(fast), SLOW: cycle(slow)})
        return Scripted(1), runs

    return make


def test_rounds(scripted: Callable[..., object]) -> None:
    """Calls take turns, the faster one more often in a run; two calls of each warm up."""
    timer, runs = scripted([1.0], [3.0])
    assert timer.alternately([FAST, SLOW], 0.37) == [(1e-3, 0), (3e-3, 0)]
    assert runs == [(FAST, 1), (SLOW, 1), *[(FAST, 18), (SLOW, 4)] * 9]
    del runs[:]
    timer.alternately([SLOW], 0.001)
    assert runs == [(SLOW, 1)] * 4


def test_least_noisy(scripted: Callable[..., object]) -> None:
    """A calm first try counts; of noisy ones the calmest, whatever it says of the ratio."""
    timer, runs = scripted([1.0, 1.0, 1.1, 1.2], [3.0])
    assert timer.least_noisy([FAST, SLOW], 0.001)[0] == pytest.approx((1.1e-3, 0.1e-3))
    assert len(runs) == 2 * 4
    del runs[:]
    timer, _ = scripted(
        [1.0, *(1.0, 2.0, 3.0), 1.0, *(2.0, 3.0, 4.0), 1.0, *(1.0, 3.0, 5.0)], [3.0]
    )
    assert timer.least_noisy([FAST, SLOW], 0.001)[0] == pytest.approx((3e-3, 1e-3))
    assert len(runs) == 3 * 2 * 4
