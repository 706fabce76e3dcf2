"""The worked example under torchrun: two gloo processes give the gradients of one."""

import copy
import gc
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from twins import close, loss, pack

import rnnkern

pytestmark = [pytest.mark.slow, pytest.mark.sources("examples")]
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("option", [[], ["--sharded"]], ids=["ddp", "fsdp"])
def test_two_processes(option: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    # A file each: what two processes write to one pipe can mix within a line.
    command += ["--redirects", "1", "--log-dir", str(tmp_path), "--nproc-per-node", "2"]
    command += [str(ROOT / "examples" / "distributed.py"), *option]
    home = str(Path(rnnkern.__file__).parents[1])
    with subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": home, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as run:
        try:
            said, _ = run.communicate(timeout=100)
        except subprocess.TimeoutExpired:
            run.terminate()  # which, unlike a kill, ends its processes too
            said, _ = run.communicate()
    assert run.returncode == 0, said
    printed = [path.read_text() for path in tmp_path.rglob("stdout.log")]
    assert len(printed) == 2
    for text in printed:
        (difference,) = re.findall(r"largest difference from one process (\S+)", text)
        assert float(difference) < 1e-5


@pytest.fixture
def _alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process only."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    gc.collect()  # models first, as in the example
    dist.destroy_process_group()


DDP_OPTIONS: list[dict[str, Any]] = [
    {"static_graph": True},
    {"gradient_as_bucket_view": True},
    {"find_unused_parameters": True},
]


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", DDP_OPTIONS, ids=str)
def test_ddp_options(options: dict[str, Any], packed: bool) -> None:
    layer = rnnkern.GRU(3, 4, 2, bidirectional=True)
    model = DistributedDataParallel(copy.deepcopy(layer), **options)
    x = torch.ones(5, 2, 3)
    value = pack(x, [3, 5]) if packed else x
    for _ in range(2):
        for module in (layer, model):
            module.zero_grad()
            loss(module(value)[0]).backward()
        close([p.grad for p in model.parameters()], [p.grad for p in layer.parameters()], 1e-6)


@pytest.mark.usefixtures("_alone")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed.*")
def test_fsdp1() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    layer = rnnkern.LSTM(3, 4, 2)
    model = FullyShardedDataParallel(
        copy.deepcopy(layer), use_orig_params=True, device_id=torch.device("cpu")
    )
    x = torch.ones(5, 2, 3)
    results = [module(x)[0] for module in (layer, model)]
    close(results[1:], results[:1])
    for result in results:
        loss(result).backward()
    grads = [torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (layer, model)]
    close(grads[1:], grads[:1])
