"""What a compiled library says of its cells: the constants of their headers in csrc/cells."""

import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """One kind of recurrent cell.

    mode    torch.nn's name of it (`RNNBase.mode`); of an added cell its own
    id      the number that crosses the bindings (enum class CellId)
    gates   gates in the order of torch's weight rows; the weights have `len(gates) * hidden_size`
    saved   what the kernels save per unit and step for the backward pass, in their order
    states  the states a step hands to the next one: h and others
    params  learned values per unit, (len(params), H) in each direction
    masks_hidden  whether h is multiplied by the last mask before W_hh multiplies it
    normalizes_hidden  whether W_hh h is standardised over a row: then there is no b_hh
    input   what the gates take of the input: "dense", W_ih x + b_ih, or "given", sums that the
            caller computes, (…, D·G·H) for D directions
    recurrent  what W_hh is: "dense" (G·H, H), "heads" (heads, G·H/heads, H/heads) or "none"
    masks   values per unit and step that a call is given, without a gradient
    projects  whether h may be projected before it is handed on (proj_size)
    """

    mode: str
    id: int
    gates: tuple[str, ...]
    saved: tuple[str, ...]
    states: tuple[str, ...]
    projects: bool
    params: tuple[str, ...] = ()
    recurrent: str = "dense"
    masks: tuple[str, ...] = ()
    input: str = "dense"
    normalizes_hidden: bool = False
    masks_hidden: bool = False

    @property
    def built_in(self) -> bool:
        """Whether it is one of torch.nn's; the mode of an added cell has an @ (own_cell.py)."""
        return "@" not in self.mode

    @property
    def recurs(self) -> bool:
        """Whether there are a W_hh and a b_hh."""
        return self.recurrent != "none"

    @property
    def given_sums(self) -> bool:
        """Whether the input's sums are given: there are no W_ih and no b_ih."""
        return self.input == "given"

    @property
    def biases(self) -> tuple[bool, bool]:
        """Whether there are a b_ih and a b_hh, in a layer with biases."""
        return not self.given_sums, self.recurs and not self.normalizes_hidden


def exported(table: str) -> list[Cell]:
    """The cells by id; `table` is the JSON that the library exports (csrc/core/cell_table.h)."""
    return [
        Cell(
            mode=facts["mode"],
            id=id,
            gates=tuple(facts["gates"]),
            saved=tuple(facts["saved"]),
            states=tuple(facts["states"]),
            projects=facts["projects"],
            params=tuple(facts["params"]),
            input=facts["input"],
            normalizes_hidden=facts["normalizes_hidden"],
            masks_hidden=facts["masks_hidden"],
            recurrent=facts["recurrent"],
            masks=tuple(facts["masks"]),
        )
        for id, facts in enumerate(json.loads(table))
    ]
