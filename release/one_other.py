"""`make test-wheel`: a wheel for one other Python and one other torch, installed, under the tests.

What CI runs of the matrix. It compiles for these alone. Without another Python it says so and ends.
"""

import argparse
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from build_wheel import ROOT, TORCHES, fits, pythons

PLACE = ROOT / "build" / "test-wheel"
ORDER = ("3.12", "3.13", "3.11", "3.10", "3.14")


def pair() -> tuple[str, str] | None:
    """An interpreter and the oldest torch for it, neither of them the environment's."""
    own = "{}.{}".format(*sys.version_info)
    others = pythons(version for version in ORDER if version != own)
    torch = version("torch").partition("+")[0]
    found = ((p, t) for p in others for t in TORCHES if t != torch and fits(p, t))
    return next(found, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pip-args", default="")
    parser.add_argument("pytest_args", nargs="*", help="after --")
    options = parser.parse_args()
    found = pair()
    if not found:
        print("the wheel was not tried: there is no other Python with its headers")
        return
    for old in PLACE.glob("*.whl"):
        old.unlink()
    python, torch = found
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
