"""bench/gpu.py without a GPU: its whole way on CPU tensors, with stand-ins for torch.cuda."""

import json
import os
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.sources("bench")
ROOT = Path(__file__).resolve().parents[2]


class Event:
    def __init__(self, enable_timing: bool) -> None:
        self.timed = enable_timing

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.time - self.time)

    def synchronize(self) -> None:
        pass


class Graph:
    def replay(self) -> None:
        pass


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> object:
    """bench/gpu.py, with calls that are short."""
    monkeypatch.setenv("CXXFLAGS", "-O0")  # as in test_added_cells.py
    for entry in (str(ROOT), str(ROOT / "bench")):
        monkeypatch.syspath_prepend(entry)
    import gpu
    import timer
    from rows import Row

    def rows() -> list[object]:
        short = {"T": 3, "B": 2, "I": 4, "H": 4}
        kinds = ({}, {"train": True}, {"train": True, "packed": True, "L": 2, "T": 9})
        calls = [Row("LSTM", **(short | kind)) for kind in kinds]
        calls.append(Row("MinGRU", **short, train=True, group="cells"))
        return [gpu.GpuRow(call, "fp32") for call in calls]

    stream = SimpleNamespace(wait_stream=lambda other: None)
    properties = SimpleNamespace(name="none", multi_processor_count=0)
    stand_ins = {
        "is_available": lambda: True,
        "get_device_properties": lambda index: properties,
        "Event": Event,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": Graph,
        "graph": lambda graph: nullcontext(),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 0)  # it asks each device
    monkeypatch.setattr(gpu, "rows", rows)
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(timer, "FLUSH_BYTES", 1 << 10)
    return gpu


def test_all(gpu: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every row has its three times, and the files say where they were taken."""
    (tmp_path / "facts").write_text("cluster_launch 1\n")
    arguments = ["--seconds", "0.001", "--out", f"{tmp_path}/gpu", "--facts", f"{tmp_path}/facts"]
    assert gpu.main(arguments) == 0
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["machine"]["cluster_launch"] == 1
    assert {"date", "gpu", "driver", "torch", "cudnn", "commit"} <= written["machine"].keys()
    assert [r["steps"] for r in written["results"]] == [3, 6, 36, 6]
    for result in written["results"]:
        assert not result["notes"]
        assert min(result[side] for side in ("ours", "theirs", "graph")) > 0
    table = (tmp_path / "gpu.txt").read_text()
    assert all(line in table for line in capsys.readouterr().out.splitlines() if "LSTM" in line)


def test_failures(gpu: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that raises and a row that is wrong are told, and the others still have their times."""
    out, compare = str(tmp_path / "gpu"), gpu.compare

    def failing(row: object, *arguments: object) -> object:
        if not row.row.train:
            raise RuntimeError("out of memory")
        return compare(row, *arguments)

    monkeypatch.setattr(gpu, "compare", failing)
    monkeypatch.setattr(gpu, "disagreement", lambda *_: "result 0 by 1")
    assert gpu.main(["--seconds", "0.001", "--out", out]) == 4
    written = json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert [r["wrong"] for r in written] == ["out of memory", *["result 0 by 1"] * 3]
    assert written[0]["ours"] is None
    assert written[1]["ours"] > 0
    assert "out of memory" in (tmp_path / "gpu.txt").read_text()


def test_limit(gpu: object, tmp_path: Path) -> None:
    """No row begins after its time, and the number of those left out is said."""
    assert gpu.main(["--limit", "-1", "--out", str(tmp_path / "gpu")]) == 0
    assert not (tmp_path / "gpu.json").exists()


def test_profile(gpu: object) -> None:
    """A trace as torch's profiler writes it: by kernel and grid, the longest first."""
    import gpu_profile

    def event(name: str, dur: float, blocks: int) -> dict[str, object]:
        facts = {"grid": [blocks, 1, 1], "block": [256, 1, 1], "registers per thread": 255}
        return {"cat": "kernel", "name": name, "dur": dur, "args": facts | {"shared memory": 2048}}

    name = "void rnnkern::cuda::(anonymous namespace)::persistent_kernel<rnnkern::Lstm, float>(P)"
    events = [event(name, 10.0, 64), event("gemm", 30.0, 1), event(name, 14.0, 64), {"cat": "cpu"}]
    found = gpu_profile.kernels(events)
    assert [k.name for k in found] == ["gemm", "persistent_kernel<Lstm, float>(P)"]
    assert list(found.values()) == [[30.0], [10.0, 14.0]]
    assert list(found)[1].grid == (64, 1, 1)
    lines = gpu_profile.report("LSTM", found).splitlines()
    assert lines[0] == "LSTM: 54 µs in 3 kernels"
    assert lines[3].split()[:5] == ["12.0", "44.4%", "2", "64x1x1", "256x1x1"]


STUB = """#!/bin/bash
echo "$(basename "$0") [$RNNKERN_ON_CHIP] $*"
[[ "$*" != *gpu_profile* ]]  # this one fails
"""


def test_every_step_runs(tmp_path: Path) -> None:
    """gpu.sh with programs that say how they were called: the one that fails keeps none from it."""
    tools, bench = tmp_path / "tools", tmp_path / "bench"
    for folder in (tools, bench / "results"):
        folder.mkdir(parents=True)
    for name in ("python", "nvcc", "nvidia-smi", "ncu", "compute-sanitizer"):
        (tools / name).write_text(STUB)
        (tools / name).chmod(0o755)
    (bench / "gpu.sh").write_text((ROOT / "bench" / "gpu.sh").read_text())
    variables = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHON": "python"}
    command = ["bash", str(bench / "gpu.sh"), "--quick"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    lines = iter(done.stdout.splitlines())
    for expected in (
        *(f"python [{groups}] -m pytest" for groups in ("clusters", "grid", "block,clusters")),
        *(f"python [{groups}] bench/gpu.py" for groups in ("clusters", "grid", "block,clusters")),
        *(f"python [{groups}] bench/gpu_profile.py" for groups in ("clusters", "grid")),
        *(f"compute-sanitizer [{groups}] --tool memcheck" for groups in ("clusters", "grid")),
        "compute-sanitizer [clusters] --tool racecheck",
    ):
        assert any(line.startswith(expected) for line in lines), expected
    assert "ncu" in (bench / "results" / "gpu-ncu.txt").read_text()
    assert done.returncode == 1
    assert "failed: profile of clusters" in done.stdout
