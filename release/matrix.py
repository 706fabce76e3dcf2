"""`make test-matrix`: the wheel in fresh environments, one per Python and torch, under the tests.

Beside the installed package stand tests/, bench/ and pyproject.toml alone. A row per environment
and instruction-set level is added to build/matrix.md, the tests' output to a log of its own.
"""

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from build_wheel import PYTHON_HELP, ROOT, TORCHES, WITH_GIL, fits, interpreters, run

LOGS = ROOT / "build" / "matrix"
TABLE = ROOT / "build" / "matrix.md"
HEAD = "| date | Python | torch | autograd | level | tests |\n|:--|:--|:--|:--|:--|:--|\n"


def install(
    folder: Path, python: str, packages: Sequence[str | Path], seconds: float | None = None
) -> Path:
    """The interpreter of an environment, made where it is missing, with what `uv pip` gets there.

    Raises subprocess.TimeoutExpired if that takes longer.
    """
    uv = (sys.executable, "-m", "uv")
    inside = folder / "bin" / "python"
    if not inside.exists():
        subprocess.run([*uv, "venv", "-q", "--python", python, folder], check=True)
    get = [*uv, "pip", "install", "-q", "--python", str(inside)]
    subprocess.run([*get, *packages], check=True, timeout=seconds)
    return inside


def environment(folder: Path, python: str, torch: str, wheel: Path, pip_args: list[str]) -> Path:
    """An interpreter with the wheel, that torch and what the tests import.

    In a folder that is there already, torch is found and the wheel replaced. uv links the packages
    of one torch into all environments from its cache, where pip would unpack gigabytes for each.
    """
    install(folder, python, [*pip_args, f"torch=={torch}", f"{wheel}[test]"])
    return install(
        folder, python, ["--no-deps", "--reinstall-package", "rnnkern", *pip_args, wheel]
    )


def clean() -> dict[str, str]:
    """The process's environment, less what would reach the source tree."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def facts(inside: Path, folder: Path) -> dict[str, str]:
    """What `python -m rnnkern` prints, by line."""
    command = [str(inside), "-m", "rnnkern"]
    done = subprocess.run(
        command, cwd=folder, env=clean(), check=True, capture_output=True, text=True
    )
    return dict(re.findall(r"^ *(\S.*?)  (.+)$", done.stdout, re.MULTILINE))


def tests(inside: Path, folder: Path, level: str, log: Path, pytest_args: list[str]) -> str:
    """pytest's closing line."""
    command = [str(inside), "-m", "pytest", "-q", "-p", "no:cacheprovider", *pytest_args]
    with log.open("w") as out:
        variables = {**clean(), "RNNKERN_CPU": level}
        subprocess.run(command, cwd=folder, env=variables, stdout=out, stderr=out, check=False)
    lines = re.findall(r"^=* ?(\d+ .* in [\d.]+s.*?) ?=*$", log.read_text(), re.MULTILINE)
    return lines[-1] if lines else f"no result: {log.relative_to(ROOT)}"


def row(python: str, torch: str, options: argparse.Namespace) -> bool:
    """Runs one environment at each level asked for; False if a test failed."""
    passed = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        asks = "import platform, sys; print(platform.python_version() + sys.abiflags)"
        of = run(python, "-c", asks).strip()
        place = (options.keep or folder).resolve() / f"{of}-{torch}"
        inside = environment(place, python, torch, options.wheel, options.pip_args)
        alone = folder / "alone"
        for part in ("tests", "bench"):  # the tests' cases derive from the benchmark's calls
            shutil.copytree(ROOT / part, alone / part)
        shutil.copy(ROOT / "pyproject.toml", alone)
        found = facts(inside, alone)
        version = found["python"].split()[0]
        highest, _, available = found["instruction set"].partition(" of ")
        for level in available.split(", ") if options.every_level else [highest]:
            log = LOGS / f"{version}-{torch}-{level}.log"
            result = tests(inside, alone, level, log, options.pytest_args)
            passed &= "passed" in result and not re.search("failed|error", result)
            cells = [str(datetime.date.today()), version, found["torch"]]
            cells += [found["autograd"].partition(",")[0], level, result]
            with TABLE.open("a") as table:
                table.write(f"| {' | '.join(cells)} |\n")
            print(*cells, flush=True)
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--wheel", type=Path, help="otherwise the newest in dist/")
    parser.add_argument("--python", nargs="*", help=PYTHON_HELP)
    parser.add_argument("--torch", nargs="*", default=[*TORCHES], help="releases")
    parser.add_argument("--keep", type=Path, help="where environments stay, for the next run")
    parser.add_argument("--every-level", action="store_true", help="not the highest level alone")
    parser.add_argument("--pip-args", type=str.split, default=[])
    parser.add_argument("pytest_args", nargs="*", help="after --")
    options = parser.parse_args()
    wheels = sorted(ROOT.glob("dist/*.whl"), key=lambda path: path.stat().st_mtime)
    if not (options.wheel or wheels):
        parser.error("no wheel in dist/: make wheel")
    options.wheel = (options.wheel or wheels[-1]).resolve()
    LOGS.mkdir(parents=True, exist_ok=True)
    if not TABLE.exists():
        TABLE.write_text(HEAD)
    # A free-threaded Python, which few releases of torch serve, runs where it is asked for.
    pythons = interpreters(options.python, WITH_GIL)
    results = [
        row(python, torch, options)
        for torch in options.torch
        for python in pythons
        if fits(python, torch)
    ]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
