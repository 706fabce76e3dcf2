"""The plan's rules, on a machine that the test defines: a C++ program without torch."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUNTIME = ROOT / "csrc" / "cpu" / "runtime"


@pytest.mark.sources("csrc")
@pytest.mark.slow
def test_rules(tmp_path: Path) -> None:
    """Each rule fires for the shape that it is made for; see plan.cpp beside it."""
    if not (compiler := shutil.which("c++")):
        pytest.skip("needs a C++ compiler")
    program = tmp_path / "plan"
    sources = [
        ROOT / "tests" / "kernels" / "plan.cpp",
        RUNTIME / "plan.cpp",
        RUNTIME / "tuning.cpp",
    ]
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *flags, *map(str, sources), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
