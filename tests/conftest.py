"""Settings of the whole suite: poisoned outputs, fixed threads, reproducible examples."""

import os
from collections.abc import Iterator

# Read when the library loads: every output it allocates starts as NaN, so that an element which no
# kernel writes fails a comparison.
os.environ["RNNKERN_POISON"] = "1"

# Threads of OpenMP, which torch.nn runs on, sleep while they wait: spinning they would take most of
# the suite's processor time from each other. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from pathlib import Path

import hypothesis
import pytest
import torch

# The same examples in every run; a search for new ones: HYPOTHESIS_PROFILE=search.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("search", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what runs in bfloat16 by its parameters: a dtype, or a case or tensor of it."""
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
