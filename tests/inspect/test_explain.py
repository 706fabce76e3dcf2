"""rnnkern.explain against what a call really does, and rnnkern.plan's errors."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkern
from rnnkern.nn import cells, layers
from rnnkern.ops import autograd, decomposition

T, B, I, H = 3, 2, 4, 5
LAYERS, CELLS = ("LSTM", "GRU", "RNN"), ("LSTMCell", "GRUCell", "RNNCell")


class Sub(torch.Tensor):
    pass


@pytest.fixture
def taken(monkeypatch):
    """The paths that the calls of a test take: "fused", "decomposition" or "torch"."""
    seen = []

    def spy(owner, name, path):
        original = getattr(owner, name)

        def wrapper(*args, **kwargs):
            seen.append(path)
            result = original(*args, **kwargs)
            if result is None:  # plain_layer and plain_cell: it takes another path
                seen.pop()
            return result

        monkeypatch.setattr(owner, name, wrapper)

    for module, names in ((layers, ("layer_call",)), (cells, ("step_call",))):
        for name in (*names, "operator_call"):
            spy(module, name, "fused")
    for name in ("plain_layer", "plain_cell") if autograd.NATIVE is not None else ():
        spy(autograd.NATIVE, name, "fused")
    spy(decomposition, "layer", "decomposition")
    for name in (*LAYERS, *CELLS):
        spy(getattr(nn, name), "forward", "torch")
    return seen


def complex_x():
    return torch.randn(T, B, I, dtype=torch.complex64)


INPUTS = {
    "dense": lambda x: x,
    "parameter": nn.Parameter,
    "subclass": lambda x: x.as_subclass(Sub),
    "strides": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda x: x[:1].expand_as(x),
    "sparse": lambda x: x.to_sparse(),
    "csr": lambda x: x.to_sparse_csr(),
    "csc": lambda x: (x if x.dim() == 2 else x[0]).to_sparse_csc(),
    "bsr": lambda x: (x if x.dim() == 2 else x[0]).to_sparse_bsr((1, 2)),
    "mkldnn": lambda x: x.to_mkldnn(),
    "jagged": lambda x: torch.nested.nested_tensor([x[:1], x], layout=torch.jagged),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "complex": lambda x: x.to(torch.complex64),
    "negative bit": lambda x: torch.complex(x, -x).conj().imag,
    "zero tensor": lambda x: torch._efficientzerotensor(x.shape),
    "integers": lambda x: x.long(),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "list": lambda x: x.tolist(),
    "array": lambda x: x.numpy(),
    "none": lambda x: None,
}


@pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR) tensor support")
@pytest.mark.filterwarnings("ignore:.*deprecated:UserWarning")  # quantized tensors
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
@pytest.mark.parametrize("name", INPUTS)
def test_it_says_what_the_call_does(name, kind, taken):
    layer, theirs = getattr(rnnkern, kind)(I, H), getattr(nn, kind)(I, H)
    theirs.load_state_dict(layer.state_dict())
    x = torch.randn(T, B, I) if kind in LAYERS else torch.randn(B, I)
    try:
        given = INPUTS[name](x)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"torch has no such tensor here: {error}")
    path = rnnkern.explain(layer, given)
    raised = []
    results = []
    for module in (layer, theirs):
        taken.clear()
        try:
            results.append(module(given))
        except Exception as error:
            raised.append(error)
        if module is layer:
            assert taken[0] == path.name
    assert len(raised) in (0, 2), raised  # both take it or neither
    assert path.name == "torch" or not raised, path
    if not raised and name != "zero tensor":  # which torch.nn.LSTM reads wrongly
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("kind", CELLS)
def test_cells_that_torch_takes_over(kind, taken):
    cell, x = getattr(rnnkern, kind)(I, H), torch.randn(B, I)
    state = torch.zeros(B, H)
    wrong = (state.double(), state.double()) if kind == "LSTMCell" else torch.zeros(B, H + 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in rnnkern.explain(cell, x).reason
        cell(x)
    assert taken == ["torch"]
    if kind != "LSTMCell":
        assert rnnkern.explain(cell, x, wrong).name == "torch"
    assert rnnkern.explain(cell, x[None]).name == "torch"
    assert rnnkern.explain(cell, pack_padded_sequence(x[:, None], [2])).name == "torch"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_explain_raises_for_no_shape():
    layer = rnnkern.LSTM(I, H)
    nested = torch.nested.nested_tensor([torch.randn(T, I), torch.randn(T - 1, I)])
    for x in (torch.tensor(1.0), torch.randn(I), torch.randn(1, T, B, I)):
        assert rnnkern.explain(layer, x).name == "fused"  # as far as it looks
    assert str(rnnkern.explain(layer, nested)) == "torch: nested tensor"
    with pytest.raises(RuntimeError, match="nested tensor"):
        rnnkern.plan(layer, nested)


@pytest.mark.parametrize("kind", CELLS)
def test_plan_of_a_cell_is_that_of_one_step(kind):
    cell, layer = getattr(rnnkern, kind)(8, 16), getattr(rnnkern, kind.removesuffix("Cell"))(8, 16)
    for training in (False, True):
        wanted = rnnkern.plan(layer, torch.randn(1, 6, 8), training)
        assert rnnkern.plan(cell, torch.randn(6, 8), training) == wanted
        wanted = rnnkern.plan(layer, torch.randn(1, 1, 8), training)
        assert rnnkern.plan(cell, torch.randn(8), training) == wanted


@pytest.mark.parametrize(
    ("layer", "x", "error", "message"),
    [
        (nn.LSTM(I, H), torch.randn(T, B, I), TypeError, r"rnnkern, got LSTM; rnnkern\.convert"),
        (nn.Linear(I, H), torch.randn(T, B, I), TypeError, "got Linear"),
        (rnnkern.LSTM(I, H), (torch.randn(T, B, I), None), TypeError, "LSTM takes, got tuple"),
        (rnnkern.LSTM(I, H), None, TypeError, "got NoneType"),
        (
            rnnkern.GRUCell(I, H),
            pack_padded_sequence(torch.randn(T, B, I), [3, 2]),
            TypeError,
            "GRUCell takes, got PackedSequence",
        ),
        (rnnkern.LSTM(I, H), torch.randn(I), ValueError, r"2-D or 3-D.* shape \(4,\)"),
        (rnnkern.LSTM(I, H), torch.randn(1, T, B, I), ValueError, r"2-D or 3-D.*\(1, 3, 2, 4\)"),
        (rnnkern.LSTM(I, H), torch.randn(T, B, 3), ValueError, "4 features"),
        (rnnkern.LSTM(I, H), torch.randn(0, B, I), ValueError, "not empty"),
        (rnnkern.GRUCell(I, H), torch.randn(T, B, I), ValueError, "1-D or 2-D"),
        (rnnkern.GRU(I, H), torch.randn(T, B, I).to_sparse(), RuntimeError, "layout torch.sparse"),
        (rnnkern.GRU(I, H), torch.ones(T, B, I).long(), RuntimeError, r"not run fused .*int64"),
    ],
)
def test_plan_says_what_it_cannot_plan(layer, x, error, message):
    with pytest.raises(error, match=message):
        rnnkern.plan(layer, x)


def test_resets():
    layer, x = rnnkern.LSTM(3, 4), torch.randn(5, 2, 3)
    resets = torch.zeros(5, 2, dtype=torch.bool)
    resets[0] = True
    assert rnnkern.explain(layer, x, None, resets) == rnnkern.explain(layer, x)
    resets[3, 1] = True
    assert str(rnnkern.explain(layer, x, None, resets)) == (
        "fused: rnnkern's kernels, with the mask of resets (few episodes)"
    )
    plan = rnnkern.plan(layer, x, resets=resets)
    assert plan["resets"] == "mask"
    assert plan["rule"]["resets"] == "few episodes"
    assert plan["row_block"] == rnnkern.plan(layer, x)["row_block"]


def test_resets_by_episodes():
    layer, x = rnnkern.LSTM(3, 4, bidirectional=True), torch.randn(5, 2, 3)
    resets = torch.zeros(5, 2, dtype=torch.bool)
    resets[3, 1] = True
    assert str(rnnkern.explain(layer, x, None, resets)) == (
        "fused: rnnkern's kernels, rows packed by 3 episodes (two directions)"
    )
    packed = pack_padded_sequence(torch.randn(5, 3, 3), [5, 3, 2])
    plan = rnnkern.plan(layer, x, resets=resets)
    assert plan.pop("resets") == "episodes"
    assert plan["rule"].pop("resets") == "two directions"
    assert plan == rnnkern.plan(layer, packed)


@pytest.mark.parametrize(
    ("steps", "batch", "hidden", "way"),
    [
        (1000, 1, 70, "episodes"),
        (1000, 1, 60, "mask"),
        (1000, 4, 70, "mask"),
        (50, 4, 512, "episodes"),
    ],
)
def test_way_of_resets(steps, batch, hidden, way):
    layer, x = rnnkern.GRU(3, hidden), torch.randn(steps, batch, 3)
    resets = (torch.arange(steps) % 10 == 0)[:, None].expand(-1, batch)
    assert rnnkern.plan(layer, x, resets=resets)["resets"] == way
