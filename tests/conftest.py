"""Settings of the whole suite: poisoned outputs, fixed threads, reproducible examples."""

import os
from collections import Counter
from collections.abc import Iterator
from itertools import compress

# Read when the library loads: every output it allocates starts as NaN, so that an element which no
# kernel writes fails a comparison.
os.environ["RNNKERN_POISON"] = "1"

# Threads of OpenMP, which torch.nn runs on, sleep while they wait: spinning they would take most of
# the suite's processor time from each other. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from pathlib import Path

import profiles  # noqa: F401 (chooses one, before any test is defined)
import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--part",
        metavar="K/N",
        help="of each parametrised test the K-th N-th of its parameters, from 0; others whole",
    )


def _in_part(part: str, items: list[pytest.Item]) -> Iterator[bool]:
    """Of N neighbours one, at another place each time: neighbours differ in dtype, most often."""
    k, n = map(int, part.split("/"))
    counts: Counter[str] = Counter()
    for item in items:
        name = item.nodeid.partition("[")[0]
        i, counts[name] = counts[name], counts[name] + 1
        yield not hasattr(item, "callspec") or (i + i // n) % n == k


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks what runs in bfloat16 by its parameters: a dtype, or a case or tensor of it."""
    if part := config.getoption("--part"):
        items[:] = compress(items, list(_in_part(part, items)))
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any(torch.bfloat16 is getattr(value, "dtype", value) for value in values):
            item.add_marker("bfloat16")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what reads sources where tests/ alone stands beside an installed package."""
    for mark in item.iter_markers("sources"):
        if not (Path(__file__).resolve().parents[1] / mark.args[0]).exists():
            pytest.skip(f"needs {mark.args[0]} beside tests/")


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Two threads and a fixed seed for every test, and torch's settings as they were after it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
