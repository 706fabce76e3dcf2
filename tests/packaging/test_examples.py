"""The examples that take no training, and the page that the demo writes.

Each example checks its own results against torch.nn; `make demo` runs them all.
"""

import io
import re
import sys
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.sources("examples")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(autouse=True)
def _examples_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for name in [n for n, m in sys.modules.items() if _lies_in_examples(m)]:
        del sys.modules[name]


def _lies_in_examples(module) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).parent == EXAMPLES


@pytest.mark.slow
def test_page_and_table(tmp_path, monkeypatch):
    import demo
    import task1_rnn_forward
    import task3_lstm_gates
    from rich.console import Console

    tasks = [task1_rnn_forward, task3_lstm_gates]
    monkeypatch.setattr(demo, "TASKS", tasks)
    results = [task.run(tmp_path) for task in tasks]
    for result in results:
        assert set(result.seconds) == {"torch.nn", "rnnkern"}
        for figure in result.figures:
            colors = Image.open(figure).convert("RGB").getcolors(maxcolors=1 << 24)
            assert len(colors) > 50  # something is drawn

    page = demo.render(results)
    assert '<h2 id="lesson2">Task 3: inside an LSTM</h2>' in page
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r'(src|href)="(?!#|data:)', page)  # needs no network and no other file
    assert "_{" not in page

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(demo.table(results))
    assert "…" not in console.export_text()


def test_equations():
    from demo import typeset

    x_t = "<i>x</i><sub><i>t</i></sub>"
    assert typeset("x_t < h^{2}_{t−1}") == (f"{x_t} &lt; <i>h</i><sup>2</sup><sub><i>t</i>−1</sub>")
    assert typeset("tanh(W_{ih} x_t)") == f"tanh(<i>W</i><sub>ih</sub> {x_t})"


def test_a_training_that_differs_is_refused():
    import torch
    from common import build, train

    def model(layers):
        return layers.GRU(2, 3)

    models = build(model)
    with torch.no_grad():
        models["rnnkern"].weight_hh_l0.mul_(1.1)
    x = torch.randn(4, 2, 2)
    with pytest.raises(RuntimeError, match="loss curves differ"):
        train(models, lambda m: m(x)[0].square().mean(), 1e-2, epochs=3, tolerance=1e-3)
