"""The specifications that Python and the library both know: of the cells, and of a call."""

import pytest
from cases import CELLS

import rnnkern.numpy
from rnnkern.call_spec import CallSpec
from rnnkern.cell_spec import Cell
from rnnkern.ops import library
from rnnkern.ops.library import CALL_SPECS


def test_cells() -> None:
    """Both libraries export the same cells, by id; an LSTM's facts are in torch.nn's order."""
    built_in = [cell for cell in library.CELLS if cell.built_in]  # other tests add some
    assert built_in == rnnkern.numpy.library.CELLS
    assert [(cell.id, cell.mode) for cell in built_in] == list(enumerate(CELLS))
    gates = ("input", "forget", "cell", "output")
    assert library.CELLS[0] == Cell("LSTM", 0, gates, gates, ("h", "c"), projects=True)


@pytest.mark.parametrize("operator", [library.forward, library.backward])
def test_call_spec(operator: object) -> None:
    """An operator takes the fields of a CallSpec side by side, under their names."""
    arguments = [(a.name, str(a.type)) for a in operator._schema.arguments]
    fields = [(name, kind.__name__) for name, kind in CallSpec.__annotations__.items()]
    first = arguments.index(fields[0])
    assert arguments[first : first + len(fields)] == fields


def test_every_call_spec() -> None:
    assert all(tuple(spec) == fields for fields, spec in CALL_SPECS.items())
    assert len(CALL_SPECS) == len(library.CELLS) * 2 * 2**3
    assert library.weights_per_direction(CallSpec(0, bias=False, projection=True)) == 3
