"""`make wheel`: one wheel for every CPython here, with C++ autograd for each torch asked for.

The engine and the torch library know neither: they are compiled once. The NumPy module is compiled
per Python, the autograd module per Python and torch; their file names say for which. Where one is
missing, autograd runs in Python, and rnnkern.numpy says that this Python has no module. A
free-threaded Python gets the NumPy module alone.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import distribution, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "wheel"
GLIBC = ROOT / "release" / "older_glibc.cpp"
WITH_GIL = ("3.10", "3.11", "3.12", "3.13", "3.14")
SLOTS = (*WITH_GIL, "3.13t", "3.14t")  # t: free-threaded
#: The newest of the releases of torch that share an autograd module, and the oldest Python, 3.N, of
#: each.
TORCHES = {"2.10.0": 10, "2.11.0": 10, "2.12.1": 10, "2.13.0": 10, "2.14.1": 10, "2.15.0": 11}
#: torch's own libraries come with torch.
EXCLUDED = ("libc10.so", "libtorch.so", "libtorch_cpu.so", "libtorch_python.so")
LIMIT = 10 << 20
PYTHON_HELP = "interpreters or versions, as in 3.12; otherwise one per version found"
SETTINGS = {"DIST_EXTRA_CONFIG": "release/wheel.cfg", "RNNKERN_CUDA": "0"}


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(
            f"{done.stdout[-4000:]}{done.stderr[-4000:]}\nfailed: {' '.join(map(str, command))}"
        )
    return done.stdout


def pythons(versions: Iterable[str] = SLOTS) -> list[str]:
    """One interpreter per version, with its headers: manylinux's, pyenv's or one on the path."""
    header = "sysconfig.get_path('include') + '/Python.h'"
    asks = f"import os, sysconfig; print(os.path.exists({header}))"
    found = []
    for slot in versions:
        version, free, _ = slot.partition("t")
        tag = f"cp{version.replace('.', '')}"
        kept = [*Path("/opt/python").glob(f"{tag}-{tag}{free}/bin/python")]
        ends = "*t" if free else "*[0-9]"
        own = Path.home().glob(f".pyenv/versions/{version}.{ends}/bin/python")
        kept += sorted(own, reverse=True)
        for candidate in (*map(str, kept), shutil.which(f"python{slot}")):
            if candidate and run(candidate, "-c", asks).strip() == "True":
                found.append(candidate)
                break
    return found


def interpreters(asked: list[str] | None, versions: Iterable[str] = SLOTS) -> list[str]:
    """Those of a command line, each a path or a version; without any, one per version found.

    Exits where a version is not there.
    """
    if not asked:
        return pythons(versions)
    named = {word: pythons([word]) if word in SLOTS else [word] for word in asked}
    missing = [word for word, found in named.items() if not found]
    if missing:
        sys.exit(f"no Python {', '.join(missing)} with its headers")
    return [found for (found,) in named.values()]


@contextmanager
def torch_of(release: str, python: str, pip_args: list[str]) -> Iterator[Path]:
    """A folder with that torch alone: the environment's own, or this Python's, from uv's cache.

    Its headers and libraries serve every Python: what is of one Python is only imported, never
    linked. Dependencies are not fetched, as nothing of it runs.
    """
    own = distribution("torch")
    with tempfile.TemporaryDirectory(dir=WORK) as name:
        folder = Path(name)
        if own.version.partition("+")[0] == release:
            (folder / "torch").symlink_to(str(own.locate_file("torch")))
        else:
            install = (sys.executable, "-m", "uv", "pip", "install", "-q", "--no-deps")
            where = ("--python", python, "--target", folder)
            run(*install, "--no-build", *where, *pip_args, f"torch=={release}")
        yield folder


def linked_for_older_glibc() -> str:
    """LDFLAGS: older_glibc.cpp, and its functions in the place of what glibc 2.28 has not.

    std::exception_ptr's parts that GCC 11 took out of line come from the static libstdc++, as they
    do with the compilers of manylinux.
    """
    compiled, pointer = WORK / "older_glibc.o", WORK / "eh_ptr.o"
    if not compiled.exists() or compiled.stat().st_mtime < GLIBC.stat().st_mtime:
        shutil.rmtree(WORK / "lib", ignore_errors=True)  # all is linked anew
    cxx = os.environ.get("CXX", "c++")
    run(cxx, "-std=c++20", "-O2", "-fPIC", "-c", GLIBC, "-o", compiled)
    static = run(cxx, "-print-file-name=libstdc++.a").strip()
    run("ar", "x", "--output", WORK, static, pointer.name)
    wrapped = re.findall(r"__wrap_(\w+)[(\"]", GLIBC.read_text())
    return " ".join((str(compiled), str(pointer), *(f"-Wl,--wrap={name}" for name in wrapped)))


def build(python: str, torch: Path, tools: Path, flags: str) -> None:
    """The package's modules for one Python and torch, into WORK/lib; nothing twice.

    setup.py leaves out an autograd module that does not compile. Here that is an error.
    """
    run(python, "setup.py", "-q", "build", PYTHONPATH=f"{tools}:{torch}", LDFLAGS=flags, **SETTINGS)


def fits(python: str, release: str) -> bool:
    """Whether that release of torch is for this Python."""
    minor = run(python, "-c", "import sys; print(sys.version_info[1])")
    return int(minor) >= TORCHES.get(release, 0)


def build_for(python: str, release: str, torch: Path, tools: Path, flags: str) -> None:
    """`build`; exits where the module is not there then that setup.py may leave out."""
    print(f"torch {release}, {python}", flush=True)
    build(python, torch, tools, flags)
    suffix = run(python, "-c", "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))")
    minor = "_".join(release.split(".")[:2])
    free = run(python, "-c", "import sys; print('t' in sys.abiflags)").strip() == "True"
    module = ("_numpy" if free else f"_autograd_torch{minor}") + suffix.strip()
    if not (WORK / "lib" / "rnnkern" / module).exists():
        sys.exit(f"not built: {module}")


def build_all(
    pythons: list[str], release: str, tools: Path, flags: str, options: argparse.Namespace
) -> None:
    with torch_of(release, pythons[0], options.pip_args) as torch:
        build_for(pythons[0], release, torch, tools, flags)  # and what serves every Python
        with ThreadPoolExecutor(options.jobs) as pool:
            work = [pool.submit(build_for, p, release, torch, tools, flags) for p in pythons[1:]]
            for done in work:
                done.result()


def assemble(tools: Path, dist: Path) -> Path:
    """The folder as a wheel, repaired to the oldest platform that its symbols allow."""
    raw = WORK / "raw"
    shutil.rmtree(raw, ignore_errors=True)
    run("strip", "--strip-unneeded", *WORK.glob("lib/rnnkern/*.so"))
    command = ("bdist_wheel", "--skip-build", "--dist-dir", raw)
    run(sys.executable, "setup.py", "-q", *command, PYTHONPATH=str(tools), **SETTINGS)
    (wheel,) = raw.glob("*.whl")
    # No tag names several Pythons and leaves room for the next: this is xformers' way too.
    tags = ("--python-tag", "py310", "--abi-tag", "none", "--remove")
    run(sys.executable, "-m", "wheel", "tags", *tags, wheel)
    (wheel,) = raw.glob("*.whl")
    excluded = [part for name in EXCLUDED for part in ("--exclude", name)]
    repaired = WORK / "repaired"
    shutil.rmtree(repaired, ignore_errors=True)
    run(sys.executable, "-m", "auditwheel", "repair", *excluded, "-w", repaired, wheel)
    (wheel,) = repaired.glob("*.whl")
    dist.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(wheel, dist))


def check(wheel: Path) -> None:
    print(run(sys.executable, "-m", "auditwheel", "show", wheel))
    stable = WORK.glob("lib/rnnkern/*.abi3.so")  # what is of one Python is no business of abi3audit
    run(sys.executable, "-m", "abi3audit", "--strict", *stable)
    run(sys.executable, "-m", "twine", "check", "--strict", wheel)
    size = wheel.stat().st_size
    if size > LIMIT:
        sys.exit(f"{wheel.name} has {size} bytes, more than {LIMIT}")
    print(f"{wheel}: {size / 1e6:.1f} MB")


def releases(asked: list[str] | None) -> list[str]:
    if asked == ["all"]:
        return list(TORCHES)
    return asked or [version("torch").partition("+")[0]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", nargs="*", help=PYTHON_HELP)
    parser.add_argument(
        "--torch", nargs="*", help="releases, or `all`; otherwise the environment's"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="Pythons built for at once"
    )
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="where the wheel goes")
    parser.add_argument("--pip-args", type=str.split, default=[], help="to fetch torch")
    parser.add_argument("--no-check", action="store_true", help="without abi3audit and twine")
    options = parser.parse_args()
    asked = interpreters(options.python)
    WORK.mkdir(parents=True, exist_ok=True)
    tools = WORK / "tools"
    if not tools.exists():
        run(sys.executable, "-m", "pip", "install", "-q", "--target", tools, "setuptools>=77")
    flags = linked_for_older_glibc()
    for release in releases(options.torch):
        chosen = [python for python in asked if fits(python, release)]
        build_all(chosen, release, tools, flags, options)
    wheel = assemble(tools, options.dist.resolve())
    if not options.no_check:
        check(wheel)


if __name__ == "__main__":
    main()
