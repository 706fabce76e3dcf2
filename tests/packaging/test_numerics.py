"""The published errors against float64 hold."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "numerics.py"

pytestmark = pytest.mark.sources("bench/results/numerics.json")


@pytest.mark.slow
@pytest.mark.timeout(600)  # 15 s of processor time, on a machine that may be busy
def test_errors_are_those_kept() -> None:
    """At every level of this CPU; see docs/performance/numerics.md."""
    done = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
