"""Settings of the whole suite: poisoned outputs, fixed threads, reproducible examples."""

import os
from collections.abc import Iterator

# Read when the library loads: every output it allocates starts as NaN, so that an element which no
# kernel writes fails a comparison.
os.environ["RNNKERN_POISON"] = "1"

import hypothesis
import pytest
import torch

# The same examples in every run; a search for new ones: HYPOTHESIS_PROFILE=search.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("search", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Two threads and a fixed seed for every test, and torch's settings as they were after it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
