"""Hooks, reparametrisations, and the ways other libraries use the layers: sections 7 and 9."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from twins import CELLS, LAYERS, agree, close, flat, loss, pack, state, twins

import rnnkern


@pytest.mark.parametrize("name", LAYERS + CELLS)
def test_hooks(name: str) -> None:
    """Forward hooks with keywords, full backward hooks, global hooks: called as torch.nn calls."""
    calls: list[list[Any]] = [[], []]
    pair = twins(name, 3, 4)
    x = torch.ones(2, 3) if name in CELLS else torch.ones(5, 2, 3)
    for module, seen in zip(pair, calls, strict=True):
        shapes = lambda value: [tuple(t.shape) for t in flat(value) if t is not None]  # noqa: E731
        module.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(("pre", shapes(args), sorted(kwargs))),  # noqa: B023
            with_kwargs=True,
        )
        module.register_forward_hook(
            lambda m, args, kwargs, out: seen.append(("post", shapes(out), sorted(kwargs))),  # noqa: B023
            with_kwargs=True,
        )
        module.register_full_backward_pre_hook(lambda m, g: seen.append(("gpre", len(g))))  # noqa: B023
        module.register_full_backward_hook(lambda m, gi, go: seen.append(("g", len(gi), len(go))))  # noqa: B023
        out = module(x.clone().requires_grad_(), hx=None)
        flat(out)[0].sum().backward()
    assert calls[1] == calls[0]
    assert [c[0] for c in calls[1]] == ["pre", "post", "gpre", "g"]
    handle = nn.modules.module.register_module_forward_hook(lambda *_: calls[0].append("global"))
    pair[1](x)
    handle.remove()
    assert "global" in calls[0]


REPARAMETRISATIONS = {
    "weight_norm": lambda m: parametrizations.weight_norm(m, "weight_hh_l0"),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m, "weight_hh_l0"),
    "orthogonal": lambda m: parametrizations.orthogonal(m, "weight_hh_l0"),
    "stacked": lambda m: parametrizations.spectral_norm(
        parametrizations.weight_norm(m, "weight_ih_l0"), "weight_ih_l0"
    ),
    "old weight_norm": lambda m: nn.utils.weight_norm(m, "weight_hh_l0"),
    "old spectral_norm": lambda m: nn.utils.spectral_norm(m, "weight_hh_l0"),
    "prune": lambda m: prune.l1_unstructured(m, "weight_hh_l0", amount=0.5),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("how", REPARAMETRISATIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_reparametrised(name: str, how: str) -> None:
    pair = twins(name, 3, 4, dtype=torch.float64)
    for module in pair:
        torch.manual_seed(2)
        REPARAMETRISATIONS[how](module)
    x = torch.ones(5, 2, 3, dtype=torch.float64)
    assert list(pair[1].state_dict()) == list(pair[0].state_dict())
    for _ in range(2):
        agree(pair, lambda m: m(x))
        with torch.no_grad():
            for module in pair:
                for p in module.parameters():
                    p.mul_(1.1)
    assert rnnkern.explain(pair[1], x).name == "fused"
    if "norm" in how and "old" not in how:
        with parametrize.cached():
            agree(pair, lambda m: m(x))
        parametrize.remove_parametrizations(pair[1], "weight_hh_l0")
        assert type(pair[1]) is getattr(rnnkern, name)


@pytest.mark.parametrize("name", LAYERS)
def test_tensors_in_place_of_parameters(name: str) -> None:
    """WeightDrop's, fastai's, higher's and a hypernetwork's ways of putting weights in."""
    x = torch.ones(5, 2, 3)
    pair = twins(name, 3, 4)
    raw = nn.Parameter(torch.randn_like(pair[0].weight_hh_l0))

    def weight_drop(m: nn.Module) -> None:
        del m._parameters["weight_hh_l0"]
        m.weight_hh_l0 = raw * 0.5

    def fastai(m: nn.Module) -> None:
        m.__dict__.pop("weight_hh_l0", None)
        m._parameters["weight_hh_l0"] = raw * 0.7

    def higher(m: nn.Module) -> None:
        m._parameters["weight_hh_l0"] = raw * 0.9
        m._flat_weights = [m._parameters[n] for n in m._flat_weights_names]

    for put in (weight_drop, fastai, higher):
        results = []
        for module in pair:
            put(module)
            out = type(module).forward(module, x)
            results.append([*flat(out), *torch.autograd.grad(loss(out), raw)])
        close(results[1], results[0])


@pytest.mark.parametrize("name", LAYERS)
def test_prune_and_tied_weights(name: str) -> None:
    pair = twins(name, 4, 4, 2)
    for module in pair:
        module.weight_hh_l1 = module.weight_hh_l0
    agree(pair, lambda m: m(torch.ones(5, 2, 4)))
    for module in pair:
        prune.random_unstructured(module, "weight_ih_l0", amount=0.3)
        module.weight_ih_l0_mask.copy_(torch.eye(4).repeat(module.weight_ih_l0.shape[0] // 4, 1))
    agree(pair, lambda m: m(torch.ones(5, 2, 4)))


@pytest.mark.slow
@examples(25)
@given(data=st.data())
def test_opacus_swap(data: st.DataObject) -> None:
    """Opacus's sweep: state_dict carried over; outputs, states and all gradients compared."""
    draw = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    flag = lambda: data.draw(st.booleans())  # noqa: E731
    name = data.draw(st.sampled_from(LAYERS))
    batch, steps, size, hidden, layers = draw(1, 5), draw(1, 6), draw(5, 10), draw(3, 7), draw(1, 3)
    options = {"bidirectional": flag(), "bias": flag(), "batch_first": flag()}
    pair = twins(name, size, hidden, layers, **options)
    pair[1].load_state_dict(pair[0].state_dict())
    x = (
        torch.randn(batch, steps, size)
        if options["batch_first"]
        else torch.randn(steps, batch, size)
    )
    directions = 2 if options["bidirectional"] else 1
    hx = state(name, layers * directions, batch, hidden) if flag() else None
    lengths = [draw(1, steps) for _ in range(batch)]
    lengths[0] = steps
    value = pack(x, lengths, options["batch_first"]) if flag() else x
    agree(pair, lambda m: m(value, hx))


@pytest.mark.parametrize("name", LAYERS)
def test_reinforcement_learning_loop(name: str) -> None:
    """One step at a time, finished rows reset in place, a state made of non-contiguous chunks."""
    pair = twins(name, 3, 4)

    def episode(m: nn.Module) -> list[Tensor]:
        both = torch.zeros(1, 5, 8)
        hx: Any = tuple(both.chunk(2, -1)) if name == "LSTM" else both[..., :4]
        outputs = []
        for step in range(6):
            y, hx = m(torch.full((1, 5, 3), 0.1 * step), hx)
            outputs.append(y)
            keep = (torch.arange(5) != step).float().view(1, 5, 1)
            hx = tuple(h * keep for h in hx) if name == "LSTM" else hx * keep
        return outputs

    agree(pair, episode)


def test_common_inspections() -> None:
    lstm = rnnkern.LSTM(3, 4, 2, bidirectional=True)
    assert isinstance(lstm, nn.LSTM)
    assert issubclass(type(lstm), nn.RNNBase)
    assert lstm.input_size == 3
    _, (h, _) = lstm(torch.randn(5, 2, 3))
    assert h.view(2, 2, 2, 4).shape == (2, 2, 2, 4)
    for key, parameter in lstm.named_parameters():  # as RL libraries and NeMo initialise
        if "weight" in key:
            nn.init.orthogonal_(parameter)
        else:
            parameter.data[4:8].fill_(1)
    assert bool((lstm.bias_ih_l1_reverse[4:8] == 1).all())
    seen: list[nn.Module] = []
    nn.Sequential(lstm).apply(seen.append)
    assert lstm in seen
    clone = rnnkern.LSTM(3, 4, 2, bidirectional=True)
    clone.__dict__.update(copy.copy(lstm.__dict__))
    x = torch.randn(5, 2, 3)
    close(flat(clone(x)), flat(lstm(x)), 0)


@pytest.mark.parametrize("name", LAYERS)
def test_encodec_permutations(name: str) -> None:
    pair = twins(name, 4, 4, 2)
    audio = torch.randn(2, 4, 9)

    def block(m: nn.Module) -> Tensor:
        x = audio.permute(2, 0, 1)
        return (m(x)[0] + x).permute(1, 2, 0)

    agree(pair, block)


@pytest.mark.parametrize("name", LAYERS)
def test_maml(name: str) -> None:
    """An inner step of gradient descent, differentiated through."""
    grads = []
    for module in twins(name, 3, 4, dtype=torch.float64):
        x = torch.ones(5, 2, 3, dtype=torch.float64)
        values = dict(module.named_parameters())
        inner = torch.autograd.grad(loss(module(x)), list(values.values()), create_graph=True)
        moved = {k: v - 0.01 * g for (k, v), g in zip(values.items(), inner, strict=True)}
        outer = loss(torch.func.functional_call(module, moved, (x,)))
        grads.append(torch.autograd.grad(outer, list(values.values())))
    close(grads[1], grads[0], 1e-9)
