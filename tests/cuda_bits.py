"""Hashes every result of the CUDA engine on the simulated chip, as bits.py does for the CPU engine.

    python tests/cuda_bits.py --save FILE      writes {engine: {case: hash}} as JSON
    python tests/cuda_bits.py --against FILE   compares with it; exits 1 and names what differs

The stepwise engine runs the table in chunks of a few steps and in one; the persistent engine runs
its own cases under two orders of threads. Run both trees on one machine: products between the
kernels are torch's. Only layers are called, so the same script judges trees before and after.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from bits import Hashes, digest
from cases import PERSISTENT, TABLE
from simulated import compile_operators, in_place, loaded

CHUNKS = (200, 1 << 26)  # pre-activations of a chunk
SEEDS = (0, 3)


def hashes() -> dict[str, Hashes]:
    ops = torch.ops.rnnkern_cuda_on_host
    found: dict[str, Hashes] = {}
    for chunk in CHUNKS:
        ops.set_chunk(chunk)
        found[f"stepwise, chunk {chunk}"] = {str(case): digest(case) for case in TABLE}
    for seed in SEEDS:
        ops.set_persistent(True, seed)
        found[f"persistent, seed {seed}"] = {str(case): digest(case) for case in PERSISTENT}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--save", type=Path, metavar="FILE")
    action.add_argument("--against", type=Path, metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "cuda_on_host.so")
        compile_operators(library)
        with loaded(library), in_place():
            found = hashes()
    if args.save:
        args.save.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    base = json.loads(args.against.read_text())
    names = sorted(
        {(engine, case) for tree in (base, found) for engine in tree for case in tree[engine]}
    )
    differing = [(e, c) for e, c in names if base.get(e, {}).get(c) != found.get(e, {}).get(c)]
    for engine, case in differing:
        print(f"{engine}: {case} differs")
    print(f"{len(names)} hashes, {len(differing)} differ")
    return bool(differing)


if __name__ == "__main__":
    sys.exit(main())
