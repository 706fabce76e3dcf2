"""The plan's rules and the CPU quota, on machines that the tests define: C++ without torch."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUNTIME = ROOT / "csrc" / "cpu" / "runtime"

pytestmark = [pytest.mark.sources("csrc"), pytest.mark.slow]


def built(program: Path, *runtime: str) -> Path:
    """The program of the same name beside this file, with those sources of the runtime."""
    if not (compiler := shutil.which("c++")):
        pytest.skip("needs a C++ compiler")
    sources = [
        Path(__file__).with_name(f"{program.name}.cpp"),
        *(RUNTIME / name for name in runtime),
    ]
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([compiler, *flags, *map(str, sources), "-o", str(program)], check=True)
    return program


def test_rules(tmp_path: Path) -> None:
    """Each rule fires for the shape that it is made for; see plan.cpp beside it."""
    program = built(tmp_path / "plan", "plan.cpp", "tuning.cpp", "cpu_quota.cpp")
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def v1(group: str, quota: int, period: int) -> dict[str, str]:
    """A group's files in version 1 of the control groups, below /sys/fs/cgroup."""
    return {
        f"cpu{group}/cpu.cfs_quota_us": f"{quota}",
        f"cpu{group}/cpu.cfs_period_us": f"{period}",
    }


V1 = "5:memory:/box\n3:cpu,cpuacct:/box/job\n2:cpuset:/other\n1:name=systemd:/box\n0::/\n"
V2 = "0::/box/job\n"
TWO_AND_A_HALF = {"box/job/cpu.max": "800000 100000", "box/cpu.max": "250000 100000"}
#: Name: /proc/self/cgroup, the files below /sys/fs/cgroup, and the cores.
GROUPS = {
    "no control groups": ("", {}, 0),
    "v1": (V1, v1("/box/job", 150000, 100000), 2),
    "v1, of a group above": (V1, v1("/box", 100000, 50000) | v1("", -1, 100000), 2),
    "v1, without a limit": (V1, v1("/box/job", -1, 100000), 0),
    "v1, seen from inside": (V1, v1("", 50000, 100000), 1),
    "v1, another controller's path": (V1, v1("/other", 100000, 100000), 0),
    "v2": (V2, {"box/job/cpu.max": "200000 100000"}, 2),
    "v2, the strictest": (V2, TWO_AND_A_HALF, 3),
    "v2, without a limit": (V2, {"box/job/cpu.max": "max 100000"}, 0),
    "v2, seen from inside": (V2, {"cpu.max": "10000 100000"}, 1),
    "v2, outside its namespace": ("0::/../job\n", {"job/cpu.max": "100000 100000"}, 0),
    "v2, not a number": (V2, {"box/job/cpu.max": "much"}, 0),
}


def test_cpu_quota(tmp_path: Path) -> None:
    """The strictest limit of the process's groups counts, as whole cores; see cpu_quota.cpp."""
    program = built(tmp_path / "cpu_quota", "cpu_quota.cpp")
    for name, (groups, files, _) in GROUPS.items():
        paths = {f"sys/fs/cgroup/{path}": text for path, text in files.items()}
        for path, text in (paths | {"proc/self/cgroup": groups}).items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_text(text)
    places = [str(tmp_path / name) for name in GROUPS]
    done = subprocess.run([program, *places], capture_output=True, text=True, check=True)
    found = dict(zip(GROUPS, map(int, done.stdout.split()), strict=True))
    assert found == {name: cores for name, (_, _, cores) in GROUPS.items()}
