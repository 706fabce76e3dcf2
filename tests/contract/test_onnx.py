"""ONNX: both of torch's exporters make of our layers what they make of torch.nn's, and ONNX Runtime
computes our numbers from it. Needs the extra `onnx`."""

import io
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from twins import CELLS, LAYERS, close, flat, same_error, state, twins

onnx = pytest.importorskip("onnx", reason="pip install rnnkern[onnx]")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install rnnkern[onnx]")
pytest.importorskip("onnxscript", reason="pip install rnnkern[onnx]")

# torch's exporters warn of their own ways: deprecation, tracing, a batch size that is kept.
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
both_exporters = pytest.mark.parametrize("dynamo", [False, True], ids=["traced", "dynamo"])
OPTIONS: list[tuple[bool, dict[str, Any]]] = [
    (False, {"bias": False}),
    (False, {"num_layers": 2, "batch_first": True, "dropout": 0.5}),
    (True, {"num_layers": 2, "bidirectional": True}),
]


def export(module: nn.Module, args: tuple[Any, ...], dynamo: bool, dynamic: str = "") -> Any:
    """The ONNX model; `dynamic` names what of the first argument (batch first) may change."""
    axes = [("batch", "steps").index(name) for name in dynamic.split()]
    if dynamo:
        shapes = (dict.fromkeys(axes, torch.export.Dim.DYNAMIC),) if axes else None
        return torch.onnx.export(
            module, args, dynamo=True, dynamic_shapes=shapes, verbose=False
        ).model_proto
    buffer = io.BytesIO()
    torch.onnx.export(
        module, args, buffer, dynamo=False, input_names=["x"], dynamic_axes={"x": axes}
    )
    return onnx.load_from_string(buffer.getvalue())


def operators(model: Any) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def computed(model: Any, args: tuple[Any, ...]) -> list[Tensor]:
    """ONNX Runtime's results."""
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    inputs = zip(session.get_inputs(), flat(args), strict=True)
    return [torch.from_numpy(y) for y in session.run(None, {i.name: t.numpy() for i, t in inputs})]


@both_exporters
@pytest.mark.parametrize(("hx", "options"), OPTIONS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, hx: bool, options: dict[str, Any], dynamo: bool) -> None:
    """LSTM and GRU are one operator of that name per layer, and so is RNN where torch's is: the
    newer exporter unrolls it."""
    pair = [m.eval() for m in twins(name, 3, 4, **options)]
    layers = options.get("num_layers", 1)
    args: tuple[Any, ...] = (torch.randn(2, 5, 3),)
    if hx:
        args += (state(name, layers * (1 + options.get("bidirectional", False)), 5, 4),)
    theirs, ours = (export(m, args, dynamo) for m in pair)
    assert operators(ours) == operators(theirs)
    assert operators(ours)[name] == (0 if dynamo and name == "RNN" else layers)
    close(computed(ours, args), flat(pair[1](*args)))


@both_exporters
@pytest.mark.parametrize("name", CELLS)
def test_cells(name: str, dynamo: bool) -> None:
    pair = twins(name, 3, 4)
    args = (torch.randn(2, 3), state(name, 2, 4))
    theirs, ours = (export(m, args, dynamo) for m in pair)
    assert operators(ours) == operators(theirs)
    close(computed(ours, args), flat(pair[1](*args)))


class Model(nn.Module):
    """Gives the output alone; with lengths, of a packed sequence."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if lengths is None:
            return self.layer(x)[0]
        packed = pack_padded_sequence(x, lengths, batch_first=True)
        return pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0]


@both_exporters
@pytest.mark.parametrize("name", LAYERS)
def test_dynamic_sizes(name: str, dynamo: bool) -> None:
    """The newer exporter keeps the length of torch.nn's layers, and so of ours."""
    model = Model(twins(name, 3, 4, 2, batch_first=True)[1]).eval()
    x = torch.randn(7, 5 if dynamo else 9, 3)
    exported = export(model, (torch.randn(2, 5, 3),), dynamo, "batch" if dynamo else "batch steps")
    close(computed(exported, (x,)), [model(x)])


def test_refused_as_torchs_are() -> None:
    """proj_size, by the exporter that traces; packed sequences, by the newer one."""
    x = torch.randn(2, 5, 3)
    same_error(twins("LSTM", 3, 4, proj_size=2), lambda m: export(m, (x,), False))
    pair = [Model(m).eval() for m in twins("LSTM", 3, 4, batch_first=True)]
    same_error(pair, lambda m: export(m, (x, torch.tensor([5, 3])), True), message=False)


@pytest.mark.parametrize("name", LAYERS)
def test_packed(name: str) -> None:
    model = Model(twins(name, 3, 4, batch_first=True)[1]).eval()
    args = (torch.randn(2, 5, 3), torch.tensor([5, 3]))
    exported = export(model, args, False)
    assert operators(exported)[name] == 1
    close(computed(exported, args), [model(*args)])
