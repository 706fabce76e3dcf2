"""The examples in short forms or without training, and the page that the demo writes.

Each example checks its own results against torch.nn; `make demo` runs the course day's.
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


def assert_drawn(result):
    for figure in result.figures:
        colors = Image.open(figure).convert("RGB").getcolors(maxcolors=1 << 24)
        assert len(colors) > 50


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
        assert_drawn(result)

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


def share(text: str) -> float:
    """The first percentage of a text."""
    return float(text.split("%")[0]) / 100


@pytest.mark.slow
def test_voice_activity(tmp_path):
    import voice_activity

    result = voice_activity.run(tmp_path, clips=8, epochs=20, count=1)
    rows = {what: ours for what, ours, _ in result.rows}
    assert share(rows["chunks decided rightly"]) > 0.7
    assert rows["decisions that differ, stream"] == "0"
    assert int(rows["decisions that differ, bfloat16 stream"]) < 10  # of 1000
    assert int(rows["decisions that differ, int8 stream"]) < 50
    assert_drawn(result)


def test_decisions_that_differ_are_refused():
    import numpy as np
    from voice_activity import check

    p = {form: np.array([0.4, 0.6]) for form in ("torch.nn", "rnnkern", "frozen", "stream")}
    assert check(p | {"int8 stream": np.array([0.6, 0.6])})["int8 stream"] == 1
    with pytest.raises(RuntimeError, match="decisions in float32 differ"):
        check(p | {"rnnkern": np.array([0.6, 0.6])})
    with pytest.raises(RuntimeError, match="not the bits of the layer"):
        check(p | {"stream": np.array([0.41, 0.6])})


@pytest.mark.slow
def test_wavernn(tmp_path):
    import wavernn

    result = wavernn.run(tmp_path, steps=60)
    rows = {what: ours for what, ours, _ in result.rows}
    assert rows["samples that differ, stream"] == "0 of 60"
    for to in ("bfloat16", "int8"):
        assert int(rows[f"samples that differ, {to} stream"].split()[0]) < 10
    assert_drawn(result)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.xdist_group("added_cells")
def test_own_cell(monkeypatch):
    import own_cell

    monkeypatch.setenv("CXXFLAGS", "-O0")
    found = own_cell.main(steps=10, epochs=40)
    assert found["loss at last"] < 0.5 * found["loss at first"]
    assert found["difference from the loop"] < 1e-5


def test_samples_that_differ_are_refused():
    from wavernn import differing

    drawn = {form: [0.5, -1.0] for form in ("torch.nn", "rnnkern", "frozen", "stream")}
    assert differing(drawn | {"int8 stream": [0.5, 1.0]})["int8 stream"] == 1
    with pytest.raises(RuntimeError, match="samples in float32 differ"):
        differing(drawn | {"frozen": [0.25, -1.0]})


@pytest.mark.peers
@pytest.mark.slow
def test_silero(tmp_path):
    """The shipped model's probabilities and decisions, with the streams in its cell's place."""
    pytest.importorskip("silero_vad")
    import silero

    result = silero.run(tmp_path, count=1)
    rows = {what: ours for what, ours, _ in result.rows}
    assert share(rows["chunks decided rightly"]) > 0.9
    assert rows["decisions that differ, stream"] == "0"
    assert float(rows["probabilities differ from it by"]) < 1e-5
    assert_drawn(result)


@pytest.mark.peers
def test_wavernn_is_torchaudios():
    """The same samples as torchaudio's own loop, from the same weights and random numbers."""
    import torch
    import wavernn

    kind = wavernn.published()
    if kind is None:
        pytest.skip("torchaudio is not installed, or its libraries do not load")
    model = wavernn.untrained()
    published = kind([2, 5], wavernn.CLASSES, hop_length=10).eval()
    published.load_state_dict(
        model.state_dict() | published.upsample.state_dict(prefix="upsample.")
    )
    spectrogram = torch.randn(1, wavernn.MELS, 2)
    with torch.inference_mode():
        padded = torch.nn.functional.pad(spectrogram, (published._pad, published._pad))
        condition = torch.cat(published.upsample(padded), 1)[0].T
        torch.manual_seed(0)
        expected = published.infer(spectrogram)[0].flatten().tolist()
        drawn = [sample.value for sample in wavernn.generators(model, condition)["stream"]]
    assert drawn == expected
    assert len(expected) == 20
