"""Rows with resets as one packed batch of episodes: which row goes where.

An episode runs from a row's first step, or from a reset, to the step before the next reset. The
episodes of a batch are its sequences, of falling length, as torch's PackedSequence has them.
Letters: T steps, B batch rows, N episodes, K the steps of the longest one.
"""

from typing import Any, NamedTuple

import numpy as np

__all__ = ["Ends", "Episodes", "pack"]

Array = np.ndarray


class Episodes(NamedTuple):
    """Where the steps and the episodes of a batch are; integers, unless said otherwise.

    to_packed    (T·B,): packed row n is the batch's row to_packed[n], t·B + b or b·T + t; the first
                 N are the first steps of all episodes
    from_packed  (T·B,): the reverse, the batch's row n is packed row from_packed[n]
    batch_sizes  (K,): how many episodes reach each of their steps
    packed_row   (N,): batch row of each episode, in packed order
    keeps_hx     (N,) bool: whether it begins with its row's initial state, in packed order
    rank         (N,): place in packed order of each episode, these in the order of (row, step)
    row, end     (N,): batch row and last step of each episode, in the order of (row, step)
    last         (B,): place in packed order of each row's last episode
    """

    to_packed: Array
    from_packed: Array
    batch_sizes: Array
    packed_row: Array
    keeps_hx: Array
    rank: Array
    row: Array
    end: Array
    last: Array


class Ends(NamedTuple):
    """The states in which the episodes of a call end, in the order of (row, step).

    state  h (L·D, N, R), for an LSTM the pair of it and c, (L·D, N, H); as in h_n the second
           direction's are those after the episode's first step
    row    (N,) int64: the episode's batch row
    step   (N,) int64: its last step

    Tensors; arrays from rnnkern.numpy. To have the states beside the output, at (step, row):

    >>> h_at_ends = torch.zeros(T, B, H)
    >>> h_at_ends[ends.step, ends.row] = ends.state[0]  # a GRU's layer 0
    """

    state: Any
    row: Any
    step: Any


def pack(resets: Array, batch_first: bool = False) -> Episodes:
    """Cuts the rows of a batch into episodes.

    resets  bool (T, B), or (B, T) with batch_first, not empty: whether the row's state is reset
            before the step
    """
    by_row = np.ascontiguousarray(resets if batch_first else resets.T)
    batch, steps = by_row.shape
    begins = by_row.copy()
    begins[:, 0] = True
    first = np.flatnonzero(begins)  # of each episode, as b·T + t
    length = np.diff(first, append=batch * steps)
    row = first // steps
    order = np.argsort(-length, kind="stable")
    rank = _inverse(order)
    batch_sizes = len(first) - np.cumsum(np.bincount(length))[:-1]

    step = np.arange(batch * steps) - np.repeat(first, length)
    from_packed = (np.cumsum(batch_sizes) - batch_sizes)[step] + np.repeat(rank, length)
    if not batch_first:
        from_packed = from_packed.reshape(batch, steps).T.ravel()
    return Episodes(
        to_packed=_inverse(from_packed),
        from_packed=from_packed,
        batch_sizes=batch_sizes,
        packed_row=row[order],
        keeps_hx=~by_row.ravel()[first[order]],  # only a first step begins without a reset
        rank=rank,
        row=row,
        end=first + length - 1 - row * steps,
        last=rank[np.cumsum(begins.sum(1)) - 1],
    )


def _inverse(permutation: Array) -> Array:
    inverse = np.empty_like(permutation)
    inverse[permutation] = np.arange(len(permutation))
    return inverse
