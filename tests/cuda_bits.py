"""Hashes every result of the CUDA engine on the simulated chip, as bits.py does for the CPU engine.

    python tests/cuda_bits.py --save FILE      writes {engine: {case: hash}} as JSON
    python tests/cuda_bits.py --against FILE   compares with it; exits 1 and names what differs

The stepwise engine runs the table in chunks of a few steps and in one; the persistent engine runs
its own cases under two orders of threads. Run both trees on one machine: products between the
kernels are torch's. Only layers are called, so the same script judges trees before and after.
"""

from __future__ import annotations

import sys

import torch
from bits import Hashes, digest, save_or_compare
from cases import PERSISTENT, TABLE
from simulated import in_place, loaded, operators

CHUNKS = (200, 1 << 26)  # pre-activations of a chunk
SEEDS = (0, 3)


def hashes() -> dict[str, Hashes]:
    ops = torch.ops.rnnkern_cuda_on_host
    found: dict[str, Hashes] = {}
    for chunk in CHUNKS:
        ops.set_chunk(chunk)
        found[f"stepwise, chunk {chunk}"] = {str(case): digest(case) for case in TABLE}
    for seed in SEEDS:
        ops.set_persistent("clusters", seed)
        found[f"persistent, seed {seed}"] = {str(case): digest(case) for case in PERSISTENT}
    return found


def hashes_of_a_build() -> dict[str, Hashes]:
    with loaded(operators()), in_place():
        return hashes()


if __name__ == "__main__":
    sys.exit(save_or_compare(__doc__, hashes_of_a_build))
