"""`make test-wheel`: a wheel for one other Python and one other torch, installed, under the tests.

What CI runs of the matrix. It compiles for these alone. Where there is no other Python, or the
index with that torch is out of reach or slow, it says so and ends.
"""

import argparse
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from build_wheel import ROOT, TORCHES, fits, pythons
from matrix import install

PLACE = ROOT / "build" / "test-wheel"
ORDER = ("3.12", "3.13", "3.11", "3.10", "3.14")
SECONDS_TO_FETCH = 240  # torch for CUDA, which PyPI has, is some gigabytes


def pair() -> tuple[str, str] | None:
    """An interpreter and the oldest torch for it, neither of them the environment's."""
    own = "{}.{}".format(*sys.version_info)
    others = pythons(version for version in ORDER if version != own)
    torch = version("torch").partition("+")[0]
    found = ((p, t) for p in others for t in TORCHES if t != torch and fits(p, t))
    return next(found, None)


def fetch(python: str, torch: str, pip_args: list[str]) -> bool:
    """Puts what the tests' environment needs into uv's cache; False where that does not succeed."""
    needed = [*pip_args, f"torch=={torch}", "-r", f"{ROOT}/pyproject.toml"]
    needed += ["--extra", "test"]
    with tempfile.TemporaryDirectory(dir=PLACE) as folder:
        try:
            install(Path(folder, "environment"), python, needed, SECONDS_TO_FETCH)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            print(error, file=sys.stderr)
            return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pip-args", default="")
    parser.add_argument("pytest_args", nargs="*", help="after --")
    options = parser.parse_args()
    found = pair()
    if not found:
        print("the wheel was not tried: there is no other Python with its headers")
        return
    python, torch = found
    PLACE.mkdir(parents=True, exist_ok=True)
    for old in PLACE.glob("*.whl"):
        old.unlink()
    if not fetch(python, torch, options.pip_args.split()):
        print(f"the wheel was not tried: torch {torch} could not be fetched")
        return
    chosen = ("--python", python, "--torch", torch, f"--pip-args={options.pip_args}")
    here = Path(__file__).parent
    build = (sys.executable, here / "build_wheel.py", *chosen, "--dist", PLACE)
    subprocess.run(build, check=True)
    (wheel,) = PLACE.glob("*.whl")
    matrix = (sys.executable, here / "matrix.py", *chosen, "--wheel", wheel)
    done = subprocess.run((*matrix, "--", *options.pytest_args), check=False)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
