"""Hashes every result of the CPU engine, to show that a change of the code changes no bit.

    python tests/bits.py --save FILE      writes {level: {case: hash}} as JSON
    python tests/bits.py --against FILE   compares with it; exits 1 and names the cases that differ

A hash is the SHA-256 over the raw bytes of a case's outputs, final states and all gradients, and
of its outputs without a gradient. Cases are those of cases.py and larger ones that reach every
plan of the engine. Each runs at every instruction-set level of this CPU (a process per level,
RNNKERN_CPU=level) and on one and two threads. Only public layers are called, so that the same
script judges trees before and after a change: it imports the rnnkern that is first on the path.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from cases import CELLS, TABLE, Case, call, results

import rnnkern
from rnnkern.ops import library

F64, BF16 = torch.float64, torch.bfloat16
Hashes = dict[str, str]


def plans() -> Iterator[Case]:
    """Cases for the plans that the table's sizes do not reach."""
    for cell in CELLS:
        yield Case(cell, T=20, B=49, I=32, H=96, hx=True)  # threads split the rows
        yield Case(cell, T=6, B=250, I=24, H=64, packed=True)  # blocks of weight gradients
        yield Case(cell, T=9, B=4, I=64, H=512)  # threads split the units
        yield Case(cell, T=40, B=12, I=200, H=130, bidirectional=True)  # chunks of the input
        yield Case(cell, T=1, B=3, I=200, H=700, hx=True)  # unpacked weights
        yield Case(cell, T=1, B=40, I=64, H=704, dtype=BF16)
        yield Case(cell, T=10, B=17, I=20, H=192)  # gate gradients in blocks of units
        yield Case(cell, T=10, B=21, I=66, H=256, dtype=BF16, hx=True)
        yield Case(cell, T=5, B=50, I=34, H=70, dtype=BF16, packed=True)  # no whole AMX tiles
        yield Case(cell, T=2, B=3, I=100, H=130, dtype=BF16, hx=True)
        yield Case(cell, T=7, B=25, I=40, H=200, dtype=F64, bidirectional=True)
    yield Case("LSTM", T=64, B=32, I=512, H=512)
    yield Case("LSTM", T=33, B=70, I=16, H=300, packed=True, bidirectional=True)
    yield Case("LSTM", T=12, B=24, I=64, H=256, proj=128, packed=True, bidirectional=True, hx=True)
    yield Case("LSTM", T=1, B=2, I=64, H=600, proj=64, hx=True)
    yield Case("LSTM", T=3, B=600, I=8, H=40, dtype=BF16)


def digest(case: Case) -> str:
    """The hash of a case's results, in a fixed order of their names."""
    named = dict(results(case, rnnkern))
    x, states = case.inputs()
    with torch.no_grad():
        output, final = call(case, case.layer(rnnkern), x, states)
    for i, tensor in enumerate([output, *final]):
        named[f"inference {i}"] = tensor.double()  # exact, as in results()
    hashed = hashlib.sha256()
    for name in sorted(named):
        hashed.update(name.encode() + named[name].contiguous().numpy().tobytes())
    return hashed.hexdigest()


def hashes() -> Hashes:
    """All cases at the level of this process."""
    found = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for case in (*TABLE, *plans()):
            found[f"{case} threads={threads}"] = digest(case)
    return found


def all_levels() -> dict[str, Hashes]:
    found = {}
    for level in library.info()["available"]:
        env = os.environ | {"RNNKERN_CPU": level}
        command = [sys.executable, __file__, "--this-level"]
        run = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
        found[level] = json.loads(run.stdout)
    return found


def save_or_compare(description: str, hash_all: Callable[[], dict[str, Hashes]]) -> int:
    """The command line: writes what `hash_all` returns, or prints how it differs from a file."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--save", type=Path, metavar="FILE")
    action.add_argument("--against", type=Path, metavar="FILE")
    args = parser.parse_args()
    found = hash_all()
    if args.save:
        args.save.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    base = json.loads(args.against.read_text())
    names = sorted({(part, case) for tree in (base, found) for part in tree for case in tree[part]})
    differing = [(p, c) for p, c in names if base.get(p, {}).get(c) != found.get(p, {}).get(c)]
    for part, case in differing:
        print(f"{part}: {case} differs")
    print(f"{len(names)} hashes, {len(differing)} differ")
    return bool(differing)


if __name__ == "__main__":
    if sys.argv[1:] == ["--this-level"]:  # a process that all_levels started
        print(json.dumps(hashes()))
    else:
        sys.exit(save_or_compare(__doc__, all_levels))
