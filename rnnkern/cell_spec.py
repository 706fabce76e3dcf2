"""What a compiled library says of its cells: the constants of their headers in csrc/cells."""

import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """One kind of recurrent cell.

    mode    torch.nn's name of it (`RNNBase.mode`)
    id      the number that crosses the bindings (enum class CellId)
    gates   gates in the order of torch's weight rows; the weights have `len(gates) * hidden_size`
    saved   what the kernels save per unit and step for the backward pass, in their order
    states  the states a step hands to the next one
    projects  whether h may be projected before it is handed on (proj_size)
    """

    mode: str
    id: int
    gates: tuple[str, ...]
    saved: tuple[str, ...]
    states: tuple[str, ...]
    projects: bool


def exported(table: str) -> tuple[Cell, ...]:
    """The cells by id; `table` is the JSON that the library exports (csrc/cells/table.h)."""
    return tuple(
        Cell(
            mode=facts["mode"],
            id=id,
            gates=tuple(facts["gates"]),
            saved=tuple(facts["saved"]),
            states=tuple(facts["states"]),
            projects=facts["projects"],
        )
        for id, facts in enumerate(json.loads(table))
    )
