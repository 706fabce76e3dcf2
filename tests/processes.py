"""Programs in a Python of their own."""

import subprocess
import sys
from typing import Any


def python(*args: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """`python args…`, with what it said as text."""
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, timeout=100, **kwargs
    )
