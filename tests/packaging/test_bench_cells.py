"""The benchmark's group `cells`: what it says of the shelf, and that both sides agree."""

from pathlib import Path

import pytest

import rnnkern
from rnnkern.cells.shelf import SHELF
from rnnkern.ops.library import BY_MODE

pytestmark = [pytest.mark.sources("bench"), pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _bench(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    monkeypatch.setenv("CXXFLAGS", "-O0")  # as in tests/kernels/test_added_cells.py


@pytest.mark.parametrize("name", sorted(SHELF))
def test_a_row(name: str) -> None:
    import own_cells
    import torch
    from measure import AGREE, Side, disagreement
    from peers import takes
    from rows import Row

    row = Row(name, 5, 3, 4, 20, train=True, group="cells")
    cell = BY_MODE[getattr(rnnkern.cells, name).own.mode]
    assert row.gates == len(cell.gates)
    assert row.recurrent_gates == (row.gates if cell.recurs else 0)
    results = [Side(row, package).results() for package in (rnnkern, torch.nn)]
    assert len(results[0]) == len(results[1]) > 4
    assert not disagreement(*results, AGREE[torch.float32])
    assert takes("torch.compile", row)
    assert not takes("JAX", row)
    with pytest.raises(ValueError, match="one layer in one direction"):
        own_cells.StepLoop(name, 4, 20, 2)
