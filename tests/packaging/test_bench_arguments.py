"""The command line of bench/run.py: what is left out or wrong is an error."""

import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.sources("bench")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import run

    monkeypatch.setattr(run, "installed", lambda: ["jax"])
    return run


def test_peers(run, capsys):
    assert run.arguments([]).peers == ["jax"]
    assert run.arguments(["--peers", "none"]).peers == []
    assert run.arguments(["--peers", "jax"]).peers == ["jax"]
    for wrong, message in (
        (["--peers"], "expected at least one argument"),
        (["--peers", "none", "jax"], "none excludes the others"),
        (["--peers", "openvino"], "not installed: openvino"),
        (["--peers", "torch"], "invalid choice: 'torch'"),
        (["--match", "("], "--match"),
        (["--threads", "two"], "--threads"),
        (["--threads", "0"], "--threads"),
    ):
        with pytest.raises(SystemExit):
            run.arguments(wrong)
        assert message in capsys.readouterr().err


def test_no_row_is_no_report(run, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py", "--match", "no such row"])
    with pytest.raises(SystemExit, match="no row fits"):
        run.main()
