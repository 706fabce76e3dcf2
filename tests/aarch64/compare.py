"""Compares the results that two levels wrote for the same layers (tests/sanitize/engine.cpp)."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

# Of an array's largest magnitude: many times what x86's own levels differ by in these layers, where
# weights of deviation 0.5 amplify a rounding from step to step.
ALLOWED = {2: 0.03, 4: 2e-4, 8: 1e-12}
# The share of elements beyond that: a rectified unit whose sum is a rounding from zero may pass a
# gradient on at one level alone.
BEYOND = 2e-3
TYPES = {2: "bfloat16", 4: "float32", 8: "float64"}


def arrays(path: Path) -> Iterator[tuple[int, np.ndarray]]:
    """Each array of the file, as float64, with the size of its elements."""
    data, at = path.read_bytes(), 0
    while at < len(data):
        size, count = np.frombuffer(data, np.int64, 2, at)
        raw = np.frombuffer(data, f"<u{size}", count // size, at + 16)
        if size == 2:
            yield 2, (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        else:
            yield int(size), raw.view(f"<f{size}").astype(np.float64)
        at += 16 + int(count)


def compare(wanted: Path, found: Path) -> bool:
    """Prints the largest difference per type; whether all are allowed."""
    ours, theirs = list(arrays(found)), list(arrays(wanted))
    assert len(ours) == len(theirs) > 0, (found, wanted)
    ok = True
    # In a layer of bfloat16, float32 arrays carry its rounding.
    coarse = any(size == 2 for size, _ in ours)
    for size in sorted({size for size, _ in ours}):
        pairs = [
            (a, b) for (s, a), (_, b) in zip(ours, theirs, strict=True) if s == size and a.size
        ]
        error = max(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30) for a, b in pairs)
        finite = all(np.isfinite(a).all() for a, _ in pairs)
        same = np.concatenate([a == b for a, b in pairs]).mean()
        limit = ALLOWED[2 if coarse else size]
        beyond = np.concatenate([np.abs(a - b) > limit * np.abs(b).max() for a, b in pairs]).mean()
        good = finite and beyond <= BEYOND
        ok &= bool(good)
        print(
            f"{found.name} beside {wanted.name}, {TYPES[size]}: {error:.1e} of the largest, "
            f"{same:.1%} identical, {beyond:.2%} beyond {limit}{'' if good else ': NOT ALLOWED'}"
        )
    return ok


if __name__ == "__main__":
    wanted, *found = map(Path, sys.argv[1:])
    good = [compare(wanted, path) for path in found]
    sys.exit(not all(good))
