"""Constructors, parameters, copies and state: sections 1 and 2 of the contract."""

import copy
import io
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from twins import CELLS, LAYERS, agree, close, flat, same_error, twins

import rnnkern

PACKAGES = (nn, rnnkern)


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_is_torchs_class(name: str) -> None:
    kind = getattr(rnnkern, name)
    assert issubclass(kind, getattr(nn, name))
    assert kind.__name__ == name


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("LSTM", (3, 4, 2, False, True, 0.25, True, 2), {}),
        ("LSTM", (3, 4), {"proj_size": 2, "num_layers": 2, "bidirectional": True}),
        ("LSTM", (), {"input_size": 3, "hidden_size": 4, "dtype": torch.float64}),
        ("GRU", (3, 4, 2, False, True, 0.25, True), {}),
        ("RNN", (3, 4, 2, "relu", False, True, 0.25, True), {}),
        ("RNN", (3, 4), {"nonlinearity": "relu"}),
        ("LSTM", (True, 4), {"bidirectional": 1}),
        ("GRU", (3, 4, 2), {"dropout": 1}),
        ("LSTMCell", (3, 4, False), {}),
        ("RNNCell", (3, 4, True, "relu"), {}),
        ("RNNCell", (3, 4), {"nonlinearity": "foo"}),
        ("GRUCell", (0, 4), {}),
        ("LSTMCell", (3, 0), {}),
    ],
)
def test_same_module(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Same draws from the generator, names, order, attributes, repr and state_dict."""
    made, states = [], []
    for package in PACKAGES:
        torch.manual_seed(3)
        made.append(getattr(package, name)(*args, **kwargs))
        states.append(torch.get_rng_state())
    torchs, ours = made
    assert torch.equal(*states)
    assert repr(ours) == repr(torchs)
    expected = dict(torchs.named_parameters())
    got = dict(ours.named_parameters())
    assert list(got) == list(expected)
    for key, value in expected.items():
        assert torch.equal(got[key], value)
        assert got[key].dtype == value.dtype
        assert type(got[key]) is nn.Parameter
        assert got[key].is_contiguous()
    assert list(ours.state_dict()) == list(torchs.state_dict())
    assert ours.state_dict()._metadata == torchs.state_dict()._metadata
    public = {k: v for k, v in vars(torchs).items() if not k.startswith("_")}
    assert {k: v for k, v in vars(ours).items() if not k.startswith("_")} == public
    assert list(ours._parameters) == list(torchs._parameters)


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        ("LSTM", (3, 4), {"dropout": "a"}),
        ("LSTM", (3, 4), {"dropout": None}),
        ("LSTM", (3, 4), {"dropout": 1.5}),
        ("GRU", (3, 4), {"dropout": True}),
        ("GRU", (3, 4), {"dropout": "0.5"}),
        ("RNN", (3, 4), {"dropout": float("nan")}),
        ("LSTM", (3, 4), {"bias": 1}),
        ("LSTM", (3, 4), {"batch_first": 1}),
        ("LSTM", (3.0, 4), {}),
        ("GRU", (np.int64(3), 4), {}),
        ("LSTM", (0, 4), {}),
        ("LSTM", (3, 4.0), {}),
        ("RNN", (3, 0), {}),
        ("LSTM", (3, 4, 0), {}),
        ("LSTM", (3, 4), {"proj_size": -1}),
        ("LSTM", (3, 4), {"proj_size": 4}),
        ("GRU", (3, 4), {"proj_size": 0}),
        ("RNN", (3, 4), {"proj_size": 2}),
        ("RNN", (3, 4, 1, True), {}),
        ("LSTM", (3, 4), {"dtype": torch.int64}),
        ("LSTMCell", (3, -1), {}),
    ],
)
def test_same_refusal(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    def construct(package: Any) -> None:
        getattr(package, name)(*args, **kwargs)

    try:
        construct(nn)
    except Exception:
        same_error(PACKAGES, construct)
    else:  # older versions of torch refuse less
        construct(rnnkern)


def test_dropout_warning() -> None:
    with pytest.warns(UserWarning, match="non-zero dropout expects num_layers greater than 1"):
        rnnkern.LSTM(3, 4, dropout=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rnnkern.LSTM(3, 4, 2, dropout=0.5)(torch.randn(5, 2, 3))[0].sum().backward()


def test_device_and_dtype() -> None:
    assert all(p.is_meta for p in rnnkern.LSTM(3, 4, device="meta").parameters())
    with torch.device("meta"):
        assert rnnkern.GRU(3, 4).weight_hh_l0.is_meta
    torch.set_default_dtype(torch.float64)
    try:
        assert rnnkern.RNN(3, 4).weight_hh_l0.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ["LSTM", *CELLS])
def test_skip_init(name: str) -> None:
    module = nn.utils.skip_init(getattr(rnnkern, name), 3, 4)
    assert [p.shape for p in module.parameters()] == [
        p.shape for p in getattr(nn, name)(3, 4).parameters()
    ]


def test_cells_without_bias() -> None:
    cell = rnnkern.GRUCell(3, 4, bias=False)
    assert cell.bias_ih is None
    assert "bias_ih" in cell._parameters
    assert not hasattr(rnnkern.GRU(3, 4, bias=False), "bias_ih_l0")


def test_reset_parameters_is_called_once() -> None:
    class Mine(rnnkern.LSTM):
        def reset_parameters(self) -> None:
            for p in self.parameters():
                nn.init.constant_(p, 0.5)

    assert all(bool((p == 0.5).all()) for p in Mine(3, 4).parameters())


def test_flat_weights() -> None:
    lstm = rnnkern.LSTM(3, 4, 2, bidirectional=True)
    for module in (lstm, lstm.double(), copy.deepcopy(lstm), pickle.loads(pickle.dumps(lstm))):
        names = [n for group in module._all_weights for n in group]
        assert names == module._flat_weights_names
        assert all(
            a is getattr(module, n) for a, n in zip(module._flat_weights, names, strict=True)
        )
        assert [w for group in module.all_weights for w in group] == module._flat_weights
    before = list(lstm.parameters())
    assert lstm.flatten_parameters() is None
    assert all(a is b for a, b in zip(before, lstm.parameters(), strict=True))
    lstm.flatten_parameters = lambda *_: None  # as AWD-LSTM does
    lstm(torch.randn(5, 2, 3, dtype=torch.float64))


@pytest.mark.parametrize("name", LAYERS)
def test_changed_weights_are_seen(name: str) -> None:
    pair = twins(name, 3, 4)
    x = torch.randn(5, 2, 3)
    agree(pair, lambda m: m(x))
    new = torch.randn_like(pair[0].weight_hh_l0)

    def replace(m: nn.Module) -> None:
        m.weight_hh_l0 = nn.Parameter(new.clone())

    def set_data(m: nn.Module) -> None:
        m.weight_hh_l0.data = new.clone() + 1

    def copy_into(m: nn.Module) -> None:
        with torch.no_grad():
            m.weight_hh_l0.copy_(new + 2)

    for change in (replace, set_data, copy_into):
        for module in pair:
            change(module)
        agree(pair, lambda m: m(x))
    same_error(pair, lambda m: setattr(m, "weight_hh_l0", new))


@pytest.mark.parametrize("name", LAYERS)
def test_wrong_weights_are_refused(name: str) -> None:
    """torch.nn may read past such weights; the kernels look first."""
    layer = getattr(rnnkern, name)(3, 4)
    layer.weight_ih_l0 = nn.Parameter(torch.randn(4, 7))
    with pytest.raises(RuntimeError, match="weight_ih must have the sizes"):
        layer(torch.randn(5, 2, 3))
    layer = getattr(rnnkern, name)(3, 4)
    layer.bias_hh_l0.data = layer.bias_hh_l0.data.double()
    with pytest.raises(RuntimeError, match="differ in dtype"):
        layer(torch.randn(5, 2, 3))


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_state_dict_both_ways(name: str) -> None:
    torchs, _ = twins(name, 3, 4)
    ours = getattr(rnnkern, name)(3, 4)
    ours.load_state_dict(torchs.state_dict())
    x = torch.randn(2, 3) if name in CELLS else torch.randn(5, 2, 3)
    close(flat(ours(x)), flat(torchs(x)))
    torchs.load_state_dict(ours.state_dict())
    meta = getattr(rnnkern, name)(3, 4, device="meta")
    meta.load_state_dict(ours.state_dict(), assign=True)
    close(flat(meta(x)), flat(torchs(x)))
    pair = (getattr(nn, name)(4, 4), getattr(rnnkern, name)(4, 4))
    same_error(pair, lambda m: m.load_state_dict(torchs.state_dict()))
    same_error(pair, lambda m: m.load_state_dict({"odd": torch.zeros(1)}))


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_copies(name: str) -> None:
    module = getattr(rnnkern, name)(3, 4)
    x = torch.randn(2, 3) if name in CELLS else torch.randn(5, 2, 3)
    expected = flat(module(x))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(buffer, weights_only=False),
    ):
        close(flat(other(x)), expected, 0)
        with torch.no_grad():
            next(other.parameters()).add_(1)
        assert not torch.equal(flat(other(x))[0], expected[0])
    assert copy.copy(module)._parameters is not None
    close(flat(copy.copy(module)(x)), expected, 0)


def test_old_pickles() -> None:
    """States from before proj_size, and those whose _all_weights held tensors."""
    lstm = rnnkern.LSTM(3, 4, bidirectional=True)
    x = torch.randn(5, 2, 3)
    state = lstm.__getstate__()
    assert "_flat_weight_refs" not in state
    del state["proj_size"]
    state["_all_weights"] = lstm.all_weights
    old = rnnkern.LSTM.__new__(rnnkern.LSTM)
    old.__setstate__(copy.copy(state))
    close(flat(old(x)), flat(lstm(x)), 0)


@pytest.mark.parametrize("name", LAYERS)
def test_moves(name: str) -> None:
    layer = getattr(rnnkern, name)(3, 4, 2, bidirectional=True)
    x = torch.randn(5, 2, 3)
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float32):
        assert layer.to(dtype)(x.to(dtype))[0].dtype == dtype
    layer.share_memory()
    layer.requires_grad_(False)
    assert not layer(x)[0].requires_grad
    layer.to_empty(device="cpu").reset_parameters()
    assert flat(layer(x))[0].isfinite().all()
    replica = layer._replicate_for_data_parallel()
    assert replica._flat_weights is not layer._flat_weights
    close(flat(replica(x)), flat(layer(x)), 0)


def test_conversion_flags() -> None:
    """Module.to by new parameters, and by swapping the tensors inside the old ones."""
    for name in ("overwrite_module_params_on_conversion", "swap_module_params_on_conversion"):
        layer, x = rnnkern.GRU(3, 4, 2), torch.randn(5, 2, 3)
        with torch.no_grad():
            expected = flat(layer(x))
        getattr(torch.__future__, f"set_{name}")(True)
        try:
            layer.double()
        finally:
            getattr(torch.__future__, f"set_{name}")(False)
        close([t.detach() for t in flat(layer(x.double()))], [t.double() for t in expected])


def test_state_dict_details() -> None:
    lstm = rnnkern.LSTM(3, 4)
    assert all(v.requires_grad for v in lstm.state_dict(keep_vars=True).values())
    assert not list(lstm.buffers())
    assert len(list(lstm.modules())) == 1
    seen: list[str] = []
    lstm.register_state_dict_pre_hook(lambda *_: seen.append("save"))
    lstm.register_load_state_dict_post_hook(lambda *_: seen.append("load"))
    lstm.load_state_dict(lstm.state_dict())
    assert seen == ["save", "load"]
