"""The worked example under torchrun: two gloo processes give the gradients of one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

import rnnkern

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("option", [[], ["--sharded"]], ids=["ddp", "fsdp"])
def test_two_processes(option: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(ROOT / "examples" / "distributed.py"), *option]
    home = str(Path(rnnkern.__file__).parents[1])
    run = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": home, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = [float(v) for v in re.findall(r"largest difference from one process (\S+)", run.stdout)]
    assert len(found) == 2
    assert max(found) < 1e-5
