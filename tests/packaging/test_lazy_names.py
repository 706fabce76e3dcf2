"""What `import rnnkern` gives: names that load on first use, and operators that need no use."""

import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest
import torch
from processes import python
from torch import nn

import rnnkern

# Nearly every test imports torch in a process of its own.
pytestmark = pytest.mark.slow


def run_program(program: str, *args: str) -> subprocess.CompletedProcess[str]:
    return python("-c", textwrap.dedent(program), *args)


def passes(program: str, *args: str) -> None:
    run = run_program(program, *args)
    assert run.returncode == 0, run.stderr


MISSING = {
    "matplotlib": ["plot"],
    "torch": sorted({*rnnkern._HOMES, "plot"}),
}


@pytest.mark.parametrize("package", MISSING)
def test_without(package: str) -> None:
    passes(
        f"""
        import inspect, pydoc, sys
        sys.modules[{package!r}] = None
        missing = {MISSING[package]}
        import rnnkern
        assert not any(hasattr(rnnkern, name) for name in missing)
        assert not {{*missing}} & {{*dir(rnnkern)}}
        assert not {{*missing}} & {{name for name, _ in inspect.getmembers(rnnkern)}}
        assert "drop-in" in pydoc.render_doc(rnnkern, renderer=pydoc.plaintext)
        assert getattr(rnnkern, missing[0], 5) == 5
        assert not hasattr(rnnkern, "no_such_name")
        from rnnkern import *
        assert {{*rnnkern.__all__}} < {{*globals()}}
        import rnnkern.numpy, rnnkern.reference
        assert rnnkern.numpy.Layer and rnnkern.reference
        """
    )


def test_words_without_matplotlib() -> None:
    words = {
        "rnnkern.plot": "AttributeError: rnnkern.plot is not available: rnnkern.plot needs ",
        "import rnnkern.plot": "ImportError: rnnkern.plot needs matplotlib: pip install rnnkern[",
        "from rnnkern import plot": "ImportError: rnnkern.plot needs matplotlib: pip install ",
    }
    run = run_program(
        f"""
        import sys, traceback
        sys.modules["matplotlib"] = None
        import rnnkern
        for use in {[*words]}:
            try:
                exec(use)
            except Exception:
                print(traceback.format_exc(), end="\\0")
        """
    )
    said = run.stdout.split("\0")[:-1]
    for error, text in zip(words.values(), said, strict=True):
        assert error in text.splitlines()[-1]
        assert "pip install rnnkern[plot]" in text
        assert "direct cause" in text


@pytest.mark.parametrize(
    ("use", "error"),
    [
        ("rnnkern.LSTM", "AttributeError: rnnkern.LSTM is not available: "),
        ("rnnkern.plot", "AttributeError: rnnkern.plot is not available: "),
        ("from rnnkern import LSTM", "ModuleNotFoundError: "),
        ("from rnnkern import convert", "ModuleNotFoundError: "),
    ],
)
def test_words_without_torch(use: str, error: str) -> None:
    run = run_program(f"import sys; sys.modules['torch'] = None; import rnnkern; {use}")
    assert run.stderr.splitlines()[-1] == f"{error}torch is not installed: pip install torch"


def test_command_line_without_torch() -> None:
    """`python -m rnnkern` says what is there; a program to run is refused in one line."""
    for arguments, status in (([], 0), (["run", "program.py"], 1)):
        run = run_program(
            """
            import runpy, sys
            sys.modules["torch"] = None
            runpy.run_module("rnnkern", run_name="__main__")
            """,
            *arguments,
        )
        assert run.returncode == status, run.stderr
        assert "not installed: pip install torch" in (run.stdout or run.stderr)
        assert ("rnnkern.numpy  instruction set" in run.stdout) == (status == 0)


@pytest.mark.parametrize("source", [True, False])
@pytest.mark.parametrize("part", ["numpy", "ops"])
def test_words_without_a_library(part: str, source: bool, tmp_path: Path) -> None:
    """A source tree hides the installed package; an installed one lacks this Python's module."""
    package = Path(rnnkern.__file__).parent
    shutil.copytree(package, tmp_path / "rnnkern", ignore=shutil.ignore_patterns("*.so"))
    if source:
        (tmp_path / "setup.py").touch()
    run = run_program(
        f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
        import rnnkern.{part}
        """
    )
    words = run.stderr.splitlines()[-1]
    assert words.startswith("ImportError: ")
    assert str(tmp_path) in words
    assert ("they hide an installed rnnkern" in words) == source
    assert ("pip install . in its sources" in words) != source


def test_other_failures_of_an_import() -> None:
    """A library that does not load, a module that does not know its torch."""
    passes("""
        import sys, types
        sys.modules["rnnkern.nn"] = types.ModuleType("rnnkern.nn")  # without LSTM
        class Broken:
            def find_spec(self, name, path=None, target=None):
                if name == "rnnkern.inspect.trace":
                    raise OSError("libtorch.so: no such file")
        sys.meta_path.insert(0, Broken())
        import rnnkern
        assert not hasattr(rnnkern, "LSTM")
        assert not hasattr(rnnkern, "trace")
        try:
            rnnkern.trace
        except AttributeError as error:
            assert isinstance(error.__cause__, OSError)
            assert "no such file" in str(error)
        """)


def test_everything_public_is_there() -> None:
    assert set(rnnkern.__all__) == {"__version__", *rnnkern._HOMES, *rnnkern._ROOMS}
    for name in rnnkern.__all__:
        assert getattr(rnnkern, name) is getattr(rnnkern, name)


def test_a_torch_without_a_spec() -> None:
    passes("""
        import sys, types
        sys.modules["torch"] = types.ModuleType("torch")
        import rnnkern, rnnkern.reference
        """)


# The operators.


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = rnnkern.GRU(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x)[0]


@pytest.mark.parametrize(
    "imports",
    [
        "import torch; import rnnkern",
        "import rnnkern.numpy; import torch",
        "import importlib.util, rnnkern; importlib.util.find_spec('torch'); import torch",
        "import rnnkern; from torch import nn; import torch",
    ],
)
def test_operators_are_there(imports: str) -> None:
    """They run and train after a bare import in any order: nothing of rnnkern's was used before."""
    passes(f"""
        import sys
        {imports}
        assert "rnnkern.nn.layers" not in sys.modules
        x, w = (torch.ones(*size, requires_grad=True) for size in ((5, 2, 3), (4, 3)))
        spec = 2, 1, False, False, False  # an RNN
        operator = torch.ops.rnnkern.forward
        operator(x, None, None, None, [w, torch.ones(4, 4)], *spec, True)[0].sum().backward()
        assert w.grad.all() and x.grad.all()
        """)


@pytest.mark.compiler
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_exported_program_loads(tmp_path: Path) -> None:
    """Likewise a program that was exported, with the fakes that torch asks for when it loads."""
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(Model(), (torch.ones(5, 2, 3),)), path)
    passes(
        """
        import sys
        import rnnkern; import torch
        assert "rnnkern.nn.layers" not in sys.modules
        module = torch.export.load(sys.argv[1]).module()
        module(torch.ones(5, 2, 3)).sum().backward()
        assert all(p.grad is not None for p in module.parameters())
        """,
        str(path),
    )


def test_import_leaves_cuda_alone() -> None:
    """is_available() initialises CUDA: CUDA_VISIBLE_DEVICES is settled then, and forks fail."""
    passes("""
        import torch
        def fail(*args):
            raise AssertionError("CUDA was initialised")
        torch.cuda.is_available = torch._C._cuda_init = fail
        import rnnkern.ops
        rnnkern.LSTM
        """)


def test_torch_comes_without_its_finder_left() -> None:
    passes("""
        import sys, rnnkern
        own = [f for f in sys.meta_path if type(f).__module__ == "rnnkern._after_import"]
        assert [f.name for f in own] == ["torch"]
        import torch
        assert not {*map(id, own)} & {*map(id, sys.meta_path)}
        """)


def test_beside_another_finder_that_asks_all() -> None:
    passes("""
        import sys, rnnkern
        class All:
            def find_spec(self, name, path=None, target=None):
                for finder in sys.meta_path:
                    if finder is not self and (spec := finder.find_spec(name, path, target)):
                        return spec
        sys.meta_path.insert(0, All())
        import torch
        torch.ops.rnnkern.forward.default
        """)


def test_a_library_that_is_not_built_does_not_stop_torch() -> None:
    passes("""
        import sys
        sys.modules["rnnkern.ops"] = None
        import rnnkern
        import torch
        torch.ones(2)
        assert not hasattr(rnnkern, "LSTM")
        """)
