"""The episodes into which resets cut each row of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .cells import Array, States


@dataclass
class Episodes:
    """Where one direction begins and ends a row's episodes; padded data only.

    resets       (T, B): whether the state is replaced before the step
    first        (T, B): first step of the episode that the step belongs to
    begins, ends (T, B): whether the walk enters the step with an initial state; leaves its row's
                 last episode after it
    initial      states with which the step's episode begins, each (T, B, ·)
    """

    resets: Array
    first: Array
    begins: Array
    ends: Array
    initial: States

    @classmethod
    def of(cls, resets: Array, h_0: States, after_reset: States, reverse: bool) -> "Episodes":
        """h_0 (B, ·) and the states after resets, each (T, B, ·)."""
        steps, rows = np.indices(resets.shape)
        first = np.maximum.accumulate(np.where(resets, steps, 0))
        last_step = steps == len(resets) - 1
        begins, ends = resets | (steps == 0), last_step
        if reverse:  # from the end of each episode to its first step
            begins = np.concatenate([resets[1:], last_step[-1:]])
            ends = steps == first[-1]
        at_first = resets[first, rows][..., None]
        initial = tuple(
            np.where(at_first, s[first, rows], h) for h, s in zip(h_0, after_reset, strict=True)
        )
        return cls(resets, first, begins, ends, initial)

    def enter(self, step: int, states: Sequence[Array]) -> list[Array]:
        """The states before a step."""
        begins = self.begins[step][:, None]
        return [np.where(begins, new[step], s) for new, s in zip(self.initial, states, strict=True)]

    def add_final(self, step: int, d_states: Sequence[Array], d_final: Sequence[Array]) -> None:
        """Adds the derivatives by the final states to those by the states after a step."""
        ends = self.ends[step]
        for d, d_end in zip(d_states, d_final, strict=True):
            d[ends] += d_end[ends]

    def cut(self, step: int, d_states: Sequence[Array], d_begins: Sequence[Array]) -> None:
        """Moves the derivatives by the states before a step to `d_begins`, (T, B, ·), where an
        episode begins."""
        begins = self.begins[step]
        for d, d_begin in zip(d_states, d_begins, strict=True):
            d_begin[step, begins] = d[begins]
            d[begins] = 0

    def gradients(self, d_begins: Sequence[Array]) -> tuple[States, States]:
        """Derivatives by h_0 (B, ·) and by the states after resets (T, B, ·), from those by the
        initial state of the episode that begins at a step."""
        rows = np.indices(self.resets.shape)[1]
        by_first = tuple(np.zeros_like(d) for d in d_begins)
        for total, d in zip(by_first, d_begins, strict=True):
            np.add.at(total, (self.first, rows), d)
        reset = self.resets[..., None]
        h_0 = tuple(np.where(reset, 0, total)[0] for total in by_first)
        return h_0, tuple(np.where(reset, total, 0) for total in by_first)
