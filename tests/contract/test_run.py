"""python -m rnnkern run: a program as Python would run it, on our layers."""

from pathlib import Path

import pytest
from processes import python

import rnnkern

PROGRAM = """
import os, sys
import neighbour
print(__name__, __file__, __spec__ and (__spec__.name, __spec__.origin), __package__)
print(sys.argv, sys.path[0])
print(sys.modules["__main__"].__dict__ is globals(), "argparse" in globals())
if "fail" in sys.argv:
    raise KeyError("the program's own")
if "exit" in sys.argv:
    sys.exit(7)
if "words" in sys.argv:
    sys.exit("words")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "neighbour.py").write_text("")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "neighbour.py").write_text("")
    (tmp_path / "package" / "__main__.py").write_text(PROGRAM)
    (tmp_path / "broken.py").write_text("x = (\n")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    "args",
    [
        ("program.py", "-m", "--help", "x y", "fail"),
        ("./program.py", "exit"),
        ("-m", "package", "words", "--y"),
        ("-m", "program", "fail"),
        ("package",),
        ("broken.py",),
        ("missing.py",),
        ("-m", "missing"),
    ],
    ids=" ".join,
)
def test_run_is_what_python_does(folder: Path, args: tuple[str, ...]) -> None:
    """Output, status and traceback of `python args…`, and one more line on stderr."""
    expected = python(*args, cwd=folder)
    found = python("-m", "rnnkern", "run", *args, cwd=folder)
    assert found.stdout == expected.stdout
    assert found.returncode == expected.returncode
    *lines, last = found.stderr.splitlines()
    wanted = [line for line in expected.stderr.splitlines() if "frozen runpy" not in line]
    assert lines == wanted
    assert last == "rnnkern: no LSTM, GRU, RNN or cell was made through torch.nn's names"


LAYERS_PROGRAM = """
import torch
from torch import nn
from torch.nn import GRU
model = nn.Sequential(nn.LSTM(3, 4), nn.Identity())
for _ in range(3):
    model[0](torch.ones(5, 2, 3))
for _ in range(2):
    gru = GRU(3, 4, dtype=torch.complex64)
    gru(torch.ones(5, 2, 3, dtype=torch.complex64))
nn.RNNCell(3, 4)
compiled = nn.LSTM(3, 5)
torch.compile(compiled, backend="eager", fullgraph=True)(torch.ones(5, 2, 3))
cell = nn.GRUCell(3, 5)
torch.compile(cell, backend="eager", fullgraph=True)(torch.ones(2, 3))
for _ in range(3):
    replica = model[0]._replicate_for_data_parallel()
    replica(torch.ones(5, 2, 3))
class Own(nn.GRU):
    def forward(self, x): return x
Own(3, 4)(1)
"""


@pytest.mark.slow
@pytest.mark.compiler
def test_run_says_what_ran_fused(folder: Path) -> None:
    (folder / "layers.py").write_text(LAYERS_PROGRAM)
    run = python("-m", "rnnkern", "run", "layers.py", cwd=folder)
    assert run.returncode == 0, run.stderr
    assert run.stderr.splitlines() == [
        "rnnkern: layers: 7 made; 4 called; 2 all fused; "
        "2× GRU(3, 4): torch: dtype torch.complex64 (1 of 1 calls); "
        "3 not called, or only by compiled code or a forward of its own"
    ]


@pytest.mark.slow
def test_run_needs_a_program() -> None:
    run = python("-m", "rnnkern", "run")
    assert run.returncode == 2
    assert "run needs a script or -m and a module" in run.stderr


@pytest.mark.slow
def test_without_a_command() -> None:
    run = python("-m", "rnnkern")
    assert run.returncode == 0
    assert f"rnnkern  {rnnkern.__version__}" in run.stdout
    assert "instruction set" in run.stdout
