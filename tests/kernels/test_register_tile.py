"""The assembly of the microkernel's loop over k: a full register tile has no stack access, and no
more loads than its drawing in csrc/cpu/gemm/microkernel.h says."""

import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILERS = {"x86": "g++", "aarch64": "aarch64-linux-gnu-g++"}
FMA = re.compile(r"vfmadd\d+p[sd]|vdpbf16ps|fmla|bfdot")
JUMP = re.compile(r"(?:j\w+|b[. ]?\w*|cbn?z|tbn?z)\s+(?:\S+,\s*)*(\.L\w+)$")


class Tile(NamedTuple):
    level: str
    element: str
    variant: str
    vectors: int
    rows: int
    unroll: int  # k of an iteration
    loads: int  # registers, of an iteration
    instructions: float  # for one FMA, at most

    @property
    def fmas(self) -> int:
        return self.rows * self.vectors * self.unroll


# Loads of an iteration: rows of B, then of A. On NEON a load of A has all k of an iteration or, if
# A is column-major, several rows.
TILES = [
    Tile("avx2", "float", "RowMajorA", 4, 3, 4, 4 * (4 + 3), 1.8),
    Tile("avx512", "float", "RowMajorA", 4, 6, 1, 4 + 6, 1.7),
    Tile("avx512", "double", "RowMajorA", 4, 6, 1, 4 + 6, 1.7),
    Tile("avx512_bf16", "bf16x2", "RowMajorA", 4, 6, 1, 4 + 6, 1.7),
    Tile("neon", "float", "RowMajorA", 4, 6, 4, 4 * 4 + 6, 1.36),
    Tile("neon", "float", "RowMajorA", 3, 7, 4, 4 * 3 + 7, 1.4),
    Tile("neon", "float", "RowMajorA", 2, 10, 4, 4 * 2 + 10, 1.42),
    Tile("neon", "float", "RowMajorA", 1, 12, 4, 4 * 1 + 12, 1.7),
    Tile("neon", "float", "ColumnMajorA", 4, 6, 1, 4 + 2, 1.45),
    Tile("neon", "float", "WithBf16B<RowMajorA>", 4, 6, 2, 4 + 6, 1.65),
    Tile("neon", "double", "RowMajorA", 4, 6, 2, 2 * 4 + 6, 1.5),
    Tile("neon_bf16", "bf16x2", "RowMajorA", 4, 6, 4, 4 * 4 + 6, 1.36),
]


def assembly(tile: Tile) -> list[str]:
    """The microkernel's instructions and labels."""
    lines = (ROOT / "csrc/cpu/levels.txt").read_text().splitlines()
    where, flags = next((w, f) for w, name, *f in map(str.split, lines) if name == tile.level)
    if where == "x86" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("needs an x86 compiler")
    if not (compiler := shutil.which(COMPILERS[where])):
        pytest.skip(f"needs {COMPILERS[where]}")
    flags += [f"-DTILE_ELEMENT={tile.element}", f"-DTILE_VARIANT={tile.variant}"]
    flags += [f"-DTILE_VECTORS={tile.vectors}", f"-DRNNKERN_ISA={tile.level}"]
    source = ROOT / "tests/kernels/register_tile.cpp"
    command = [compiler, "-std=c++20", "-O3", "-fPIC", "-g0", *flags, "-S", source, "-o", "-"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return re.findall(r"^(?:\t[a-z].*|\.L\w+:)$", done.stdout, re.MULTILINE)


def innermost_loop(lines: list[str]) -> list[str]:
    """The instructions from a label to a jump back to it, without a label between: the loop with
    the most FMAs."""
    loops, begin = [[]], 0
    for end, line in enumerate(lines):
        if line.endswith(":"):
            begin = end
        elif (jump := JUMP.match(line.strip())) and f"{jump[1]}:" == lines[begin]:
            loops.append([text.strip() for text in lines[begin + 1 : end + 1]])
    return max(loops, key=lambda loop: sum(map(bool, map(FMA.match, loop))))


def loaded_registers(instruction: str) -> int:
    """How many registers it loads from memory; an FMA may load an operand."""
    name, _, operands = instruction.partition("\t")
    if "(" in operands:  # x86
        return int(not name.startswith(("lea", "prefetch")))
    return {"ldp": 2}.get(name, int(name.startswith("ld")))


@pytest.mark.sources("csrc")
@pytest.mark.compiler
@pytest.mark.slow
@pytest.mark.parametrize("tile", TILES, ids=lambda t: f"{t.level}-{t.element}-{t.rows}x{t.vectors}")
def test_loop(tile: Tile) -> None:
    loop = innermost_loop(assembly(tile))
    assert sum(map(bool, map(FMA.match, loop))) == tile.fmas, loop
    assert not [text for text in loop if re.search(r"\bsp\b|%[re](sp|bp)", text)]
    assert sum(map(loaded_registers, loop)) == tile.loads, loop
    assert len(loop) <= tile.instructions * tile.fmas, len(loop)
