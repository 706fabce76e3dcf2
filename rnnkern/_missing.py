"""What to say where a compiled part or torch is missing. Needs no torch."""

import platform
import sys
from importlib.util import find_spec
from pathlib import Path

#: For whatever needs it; rnnkern.numpy and rnnkern.reference do not.
NO_TORCH = "torch is not installed: pip install torch"


def found(package: str) -> bool:
    """Whether a module of that name can be imported; nothing is imported for it."""
    try:
        return find_spec(package) is not None
    except ValueError:  # it is there, but without a spec
        return True


def built(name: str) -> Path | None:
    """The file `rnnkern/<name>.*so`, if the package has it.

    Python's own finder is not asked: a free-threaded Python passes over the "abi3" of the name.
    """
    return next(Path(__file__).parent.glob(f"{name}.*so"), None)


def python_version() -> str:
    """Of this Python, as its builds are called: 3.13.0, and 3.13.0t if free-threaded."""
    return platform.python_version() + getattr(sys, "abiflags", "")


def not_built(part: str) -> str:
    """Why `rnnkern/<part>*.so` is not there, and what to do."""
    package = Path(__file__).parent
    if (package.parent / "setup.py").exists():
        return (
            f"rnnkern is imported from its sources in {package.parent}, where {part} is not built; "
            "they hide an installed rnnkern. Start Python in another folder, or build in this one: "
            "python setup.py build_ext --inplace"
        )
    return (
        f"the rnnkern installed in {package} has no {part} for Python {python_version()}: "
        "run pip install . in its sources"
    )
