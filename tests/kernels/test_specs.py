"""The specifications that Python and the library both have: of the cells, and of a call."""

import json
from dataclasses import asdict

import pytest

from rnnkern import _numpy
from rnnkern.call_spec import CALL_SPECS, CallSpec
from rnnkern.cell_spec import CELLS
from rnnkern.ops import library


@pytest.mark.parametrize("table", [library.cells(), json.loads(_numpy.cells())], ids=["C", "numpy"])
def test_cells(table: list[dict]) -> None:
    """Python's table of cells is the one that the cells' headers define."""
    assert [cell.id for cell in CELLS] == list(range(len(table)))
    for cell, exported in zip(CELLS, table, strict=True):
        own = json.loads(json.dumps(asdict(cell)))
        assert own == exported | {"id": cell.id}


@pytest.mark.parametrize("operator", [library.forward, library.backward])
def test_call_spec(operator: object) -> None:
    """An operator takes the fields of a CallSpec side by side, under their names."""
    arguments = [(a.name, str(a.type)) for a in operator._schema.arguments]
    fields = [(name, kind.__name__) for name, kind in CallSpec.__annotations__.items()]
    first = arguments.index(fields[0])
    assert arguments[first : first + len(fields)] == fields


def test_every_call_spec() -> None:
    assert all(tuple(spec) == fields for fields, spec in CALL_SPECS.items())
    assert len(CALL_SPECS) == len(CELLS) * 2 * 2**3
    assert CallSpec(0, bias=False, projection=True).weights_per_direction == 3
