"""Resets inside a sequence, against torch.nn in float64.

In one direction torch.nn runs step by step, with torch.where on the state; in two, each episode
alone. A call that returns the ends runs by episodes, one that does not with the mask, if it can.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import CELLS, Case
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples
from reset_calls import (
    FORMS,
    Named,
    as_hx,
    as_list,
    assert_near,
    call,
    leaves_of,
    mask,
    named,
    reset_states,
)
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from twins import same_error

import rnnkern
import rnnkern.nn.resets
import rnnkern.numpy
from rnnkern.call_spec import CallSpec
from rnnkern.nn.resets import choose_way
from rnnkern.ops import autograd, library

F64, BF16 = torch.float64, torch.bfloat16


def at(state: Tensor, t: int) -> Tensor:
    """(L·D, B, ·) of a state after resets, time first, at one step."""
    return state[:, t] if state.dim() == 4 else state[:, None] if state.dim() == 2 else state


def episodes(resets: Tensor) -> list[tuple[int, int, int]]:
    """(row, first step, last step) of a mask (T, B)."""
    found = []
    for b, row in enumerate(resets.T.tolist()):
        begins = [t for t, reset in enumerate(row) if reset or t == 0]
        found += [(b, a, z - 1) for a, z in zip(begins, [*begins[1:], len(row)], strict=True)]
    return found


def step_by_step(
    layer: nn.RNNBase, x: Tensor, state: list[Tensor], resets: Tensor, fresh: list[Tensor]
) -> list[Tensor]:
    """Output, final states and ends of a time-major call in one direction."""
    outputs, states = [], []
    for t in range(len(x)):
        reset = resets[t, :, None]
        state = [torch.where(reset, at(f, t), s) for f, s in zip(fresh, state, strict=True)]
        y, hx = layer(x[t : t + 1], as_hx(state))
        state = as_list(hx)
        outputs.append(y)
        states.append(state)
    ends = [[s[:, b] for s in states[z]] for b, _, z in episodes(resets)]
    return [torch.cat(outputs), *state, *(torch.stack(s, 1) for s in zip(*ends, strict=True))]


def episode_by_episode(
    layer: nn.RNNBase, x: Tensor, state: list[Tensor], resets: Tensor, fresh: list[Tensor]
) -> list[Tensor]:
    """The same in any number of directions, each episode alone."""
    batch = x.shape[1]
    rows: list[list[Tensor]] = [[] for _ in range(batch)]
    final: list[list[Tensor]] = [[] for _ in range(batch)]
    ends = []
    for b, a, z in episodes(resets):
        start = [at(f, a).expand(-1, batch, -1) for f in fresh] if resets[a, b] else state
        y, hx = layer(x[a : z + 1, b], as_hx([s[:, b] for s in start]))
        rows[b].append(y)
        final[b] = as_list(hx)
        ends.append(final[b])
    output = torch.stack([torch.cat(row) for row in rows], 1)
    states = (torch.stack(s, 1) for found in (final, ends) for s in zip(*found, strict=True))
    return [output, *states]


def expected(case: Case, resets: Tensor, form: str, ends: bool) -> Named:
    """By torch.nn in float64; the loss depends on the ends if they are asked for."""
    layer = case.layer(torch.nn, F64)
    leaves = leaves_of(case, form, F64)
    x = leaves["x"]
    widths = (case.R, case.H) if case.has_c else (case.R,)
    zeros = [x.new_zeros(case.num_states, case.B, w) for w in widths]
    state, fresh = (
        [t for name, t in leaves.items() if name.startswith(kind)] or zeros
        for kind in ("hx", "fresh")
    )
    if case.batch_first:
        x, resets = x.transpose(0, 1), resets.T
        fresh = [f.transpose(1, 2) if f.dim() == 4 else f for f in fresh]
    layer.batch_first = False
    run = episode_by_episode if case.bidirectional else step_by_step
    outputs = run(layer, x, state, resets, fresh)
    if case.batch_first:
        outputs[0] = outputs[0].transpose(0, 1)
    return named(case, layer, outputs if ends else outputs[: 2 + case.has_c], leaves)


def found(case: Case, resets: Tensor, form: str, return_ends: bool) -> Named:
    layer = case.layer(rnnkern)
    outputs, leaves, ends_if_any = call(case, layer, resets, form, return_ends)
    if not return_ends:
        return named(case, layer, outputs, leaves)
    ends = ends_if_any[0]
    by_row = resets if case.batch_first else resets.T
    of_mask = episodes(by_row.T)
    assert ends.row.tolist() == [b for b, _, _ in of_mask]
    assert ends.step.tolist() == [z for _, _, z in of_mask]
    return named(case, layer, [*outputs, *as_list(ends.state)], leaves)


def check(case: Case, form: str = "none", resets: Tensor | None = None) -> None:
    resets = mask(case) if resets is None else resets
    for ends in (False, True):
        check_call(case, form, resets, ends)


def check_call(case: Case, form: str, resets: Tensor, ends: bool) -> None:
    ours, exact = found(case, resets, form, ends), expected(case, resets, form, ends)
    assert_near(case, ours, exact, f"{case}, {form}, {ends=}")


CASES = [
    case
    for cell in CELLS
    for case in (
        Case(cell, T=9, B=4),
        Case(cell, T=9, B=4, hx=True, dtype=F64),
        Case(cell, T=12, B=5, hx=True, L=2, batch_first=True),
        Case(cell, T=9, B=4, hx=True, bidirectional=True, bias=False),
        Case(cell, T=7, B=3, L=3, bidirectional=True, batch_first=True, dtype=F64),
        Case(cell, T=40, B=1, H=70, hx=True),
        Case(cell, T=2, B=33, H=17, hx=True),
        Case(cell, T=1, B=4, hx=True, bidirectional=True),
    )
] + [
    Case("LSTM", T=9, B=4, H=8, proj=3, hx=True, L=2, batch_first=True),
    Case("LSTM", T=9, B=4, H=8, proj=3, hx=True, bidirectional=True),
]


@pytest.mark.every_level
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_and_gradients(case: Case, form: str) -> None:
    check(case, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_no_reset_and_nothing_but_resets(density: float, form: str) -> None:
    case = Case("LSTM", T=6, B=4, hx=True, dtype=F64)
    check(case, form, mask(case, density))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("hx", [False, True])
def test_before_the_first_step_alone(hx: bool, form: str) -> None:
    """Such a call runs as it is, without episodes."""
    case = Case("GRU", T=6, B=4, hx=hx, batch_first=True, dtype=F64)
    resets = torch.zeros(4, 6, dtype=torch.bool)
    resets[1:3, 0] = True
    check(case, form, resets)


@given(
    cell=st.sampled_from(CELLS),
    sizes=st.tuples(*[st.integers(1, n) for n in (12, 6, 5, 20)]),
    layers=st.integers(1, 2),
    flags=st.tuples(*[st.booleans()] * 3),
    form=st.sampled_from(FORMS),
    density=st.floats(0, 1),
    seed=st.integers(0, 99),
)
@examples(60)
def test_random(cell, sizes, layers, flags, form, density, seed):
    names = ("bidirectional", "batch_first", "hx")
    case = Case(cell, *sizes, layers, **dict(zip(names, flags, strict=True)), dtype=F64)
    check(case, form, mask(case, density, seed))


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_are_those_of_each_episode_alone(threads: int) -> None:
    torch.set_num_threads(threads)
    case = Case("LSTM", T=30, B=9, I=20, H=40)
    layer, (x, _) = case.layer(rnnkern), case.inputs()
    resets = mask(case, 0.1)
    output, _, ends = layer(x, resets=resets, return_ends=True)
    for k, (b, a, z) in enumerate(episodes(resets)):
        alone, (h, c) = layer(x[a : z + 1, b])
        assert torch.equal(output[a : z + 1, b], alone)
        assert torch.equal(ends.state[0][:, k], h)
        assert torch.equal(ends.state[1][:, k], c)


BOTH_WAYS = [
    case
    for cell in CELLS
    for case in (
        Case(cell, T=12, B=5, I=3, H=20, hx=True, L=2, batch_first=True),
        Case(cell, T=6, B=70, I=30, H=33, hx=True),
        Case(cell, T=7, B=150, I=20, H=40),
        Case(cell, T=9, B=2, I=70, H=200, hx=True),
        Case(cell, T=9, B=30, I=16, H=64, hx=True, dtype=BF16),
        Case(cell, T=9, B=3, I=5, H=64, dtype=torch.float16),
    )
] + [Case("LSTM", T=9, B=9, H=40, proj=19, hx=True)]


@pytest.mark.every_level
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", BOTH_WAYS, ids=str)
def test_both_ways_have_the_same_bits(
    case: Case, form: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But where rows are summed: in the gradients of weights and of states that rows share."""
    torch.set_num_threads(threads)
    resets, results = mask(case, 0.2), []
    for way in ("mask", "episodes"):
        monkeypatch.setattr(library, "plan_resets", lambda *_, way=way: (way, ""))
        if way == "episodes":  # C++ does not ask Python
            monkeypatch.setattr(autograd, "NATIVE", None)
        assert rnnkern.plan(case.layer(rnnkern), case.inputs()[0], resets=resets)["resets"] == way
        results.append(found(case, resets, form, False))
    by_mask, by_episodes = results
    summed = {"layer": ("fresh",), "row": ("fresh",)}.get(form, ())
    eps = torch.finfo(case.dtype).eps
    for name, value in by_mask.items():
        if name.startswith(("weight", "bias", *summed)):
            bound = 20 * eps * value.abs().max().item()
            torch.testing.assert_close(value, by_episodes[name], rtol=0, atol=bound)
        else:
            assert torch.equal(value, by_episodes[name]), name


@pytest.mark.parametrize(
    ("device", "changes", "way"),
    [
        ("cuda", {}, "mask"),
        ("cuda", {"bidirectional": True}, "episodes"),
        ("mps", {}, "episodes"),
    ],
)
def test_way_by_device(
    device: str, changes: dict[str, Any], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody looks into a mask on a GPU, unless the kernels cannot take it."""
    looks = []
    monkeypatch.setattr(library, "DEVICES", {"cpu", "cuda"})
    monkeypatch.setattr(rnnkern.nn.resets, "later_resets", lambda *_: looks.append(0) or 1)
    layer = rnnkern.LSTM(3, 4, **changes)
    x = SimpleNamespace(device=torch.device(device), is_cuda=device == "cuda")
    resets = torch.ones(5, 2, dtype=torch.bool)
    assert choose_way(layer, x, resets, False)[0] == way
    assert len(looks) == (way == "episodes")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", BOTH_WAYS, ids=str)
def test_bits_do_not_depend_on_threads(case: Case, form: str) -> None:
    resets, results = mask(case, 0.2), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(found(case, resets, form, False))
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
        assert torch.equal(value, results[2][name]), name


def test_unbatched() -> None:
    case = Case("LSTM", T=8, B=1, hx=True, L=2)
    layer, (x, (h, c)) = case.layer(rnnkern), case.inputs()
    resets = mask(case)
    for form in FORMS:
        fresh = reset_states(case, form)
        wanted = layer(x, (h, c), resets, as_hx(fresh), return_ends=True)
        fresh = [f.squeeze(2 if f.dim() == 4 else 1) if f.dim() > 2 else f for f in fresh]
        own = layer(x[:, 0], (h[:, 0], c[:, 0]), resets[:, 0], as_hx(fresh), return_ends=True)
        assert torch.equal(own[0], wanted[0][:, 0])
        assert all(torch.equal(s, w[:, 0]) for s, w in zip(own[1], wanted[1], strict=True))
        assert all(torch.equal(s, w) for s, w in zip(own[2].state, wanted[2].state, strict=True))
        assert own[2].step.tolist() == wanted[2].step.tolist()


def test_converted() -> None:
    """A torch.nn layer takes resets once it is converted; so does a user's subclass of it."""

    class Mine(nn.GRU):
        pass

    case = Case("GRU", T=9, B=4)
    x, resets = case.inputs()[0], mask(case)
    wanted, _ = case.layer(rnnkern)(x, resets=resets)
    for kind in (nn.GRU, Mine):
        layer = kind(case.I, case.H)
        layer.load_state_dict(case.layer(nn).state_dict())
        assert torch.equal(rnnkern.convert(layer)(x, resets=resets)[0], wanted)


@pytest.mark.parametrize("hx", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_frozen(cell: str, hx: bool) -> None:
    case = Case(cell, T=9, B=4, hx=hx, L=2)
    layer, (x, states), resets = case.layer(rnnkern), case.inputs(), mask(case)
    fresh = as_hx(reset_states(case, "row"))
    frozen = rnnkern.freeze(layer)
    for of_call in (resets, resets & False):
        wanted = layer(x, as_hx(states), of_call, fresh, return_ends=True)
        found = frozen(x, as_hx(states), of_call, fresh, return_ends=True)
        assert all(map(torch.equal, leaves(found), leaves(wanted)))
    with pytest.raises(RuntimeError, match="gradient"):
        frozen(x.clone().requires_grad_(), resets=resets)


def refusals() -> list[Any]:
    x, m = torch.randn(5, 3, 4), torch.zeros(5, 3, dtype=torch.bool)
    h = torch.zeros(1, 3, 6)
    packed = pack_padded_sequence(x, [5, 4, 2])
    return [
        (TypeError, "must be a tensor, got list", (x, None, m.tolist())),
        (RuntimeError, r"shape \(5, 3\), got \(3, 5\)", (x, None, m.T)),
        (RuntimeError, r"shape \(5, 3\), got \(5, 3, 1\)", (x, None, m[..., None])),
        (RuntimeError, r"shape \(5,\), got \(5, 3\)", (x[:, 0], None, m)),
        (ValueError, "must be torch.bool, got torch.float32", (x, None, m.float())),
        (RuntimeError, "not at the same device", (x, None, m.to("meta"))),
        (ValueError, "each episode as a sequence of its own", (packed, None, m)),
        (ValueError, "belong to a call with resets", (x, None, None, h)),
        (ValueError, "belong to a call with resets", (x, None, None, None, True)),
        (TypeError, "must be a tensor", (x, None, m, (h, h))),
        (TypeError, "must be a tensor", (x, None, m, 0.0)),
        (RuntimeError, r"h of reset_state must have the shape \(1, 6\) or", (x, None, m, h[0, 0])),
        (RuntimeError, r"or \(1, 3, 6\) or \(1, 5, 3, 6\), got", (x, None, m, h[:, :2])),
        (RuntimeError, "must be torch.float32 on cpu", (x, h, m, h.double())),
    ]


@pytest.mark.parametrize(("error", "message", "args"), refusals())
def test_refusals(error: type[Exception], message: str, args: tuple[Any, ...]) -> None:
    with pytest.raises(error, match=message):
        rnnkern.GRU(4, 6)(*args)


def test_refusals_of_a_pair() -> None:
    lstm, x, resets = rnnkern.LSTM(4, 6), torch.randn(5, 3, 4), torch.zeros(5, 3, dtype=torch.bool)
    h = torch.zeros(1, 3, 6)
    with pytest.raises(TypeError, match=r"a pair of tensors \(h, c\)"):
        lstm(x, None, resets, h)
    with pytest.raises(RuntimeError, match=r"c of reset_state must have the shape \(1, 6\)"):
        lstm(x, None, resets, (h, h[..., :5]))


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("padded data in one direction", {"x": (15, 4), "sizes": torch.tensor([3] * 5)}),
        ("padded data in one direction", {"directions": 2}),
        ("resets must have the sizes 5 3, got 3 5", {"mask": torch.ones(3, 5, dtype=torch.bool)}),
        ("resets must be torch.bool", {"mask": torch.ones(5, 3)}),
        ("reset_h must have the sizes 1 3 6, got 1 1 6", {"h": torch.zeros(1, 1, 6)}),
        ("reset_h must have the sizes 1 5 3 6, got 1 3 5 6", {"h": torch.zeros(1, 3, 5, 6)}),
        ("reset_h and input differ in dtype", {"h": torch.zeros(1, 3, 6, dtype=F64)}),
        ("expected 1 states after resets, got 2", {"c": torch.zeros(1, 3, 6)}),
        ("expected a mask", {"mask": None}),
    ],
)
def test_refusals_of_the_operator(message: str, changes: dict[str, Any]) -> None:
    spec = CallSpec(1, changes.get("directions", 1))
    x = torch.randn(changes.get("x", (5, 3, 4)))
    weights = [torch.randn(s) for s in ((18, 4), (18, 6), (18,), (18,))] * spec.directions
    mask = changes.get("mask", torch.ones(5, 3, dtype=torch.bool))
    fresh = changes.get("h", torch.zeros(1, 3, 6)), changes.get("c")
    sizes = changes.get("sizes")
    with pytest.raises(RuntimeError, match=message):
        library.forward(x, sizes, None, None, weights, *spec, False, mask, *fresh)


@pytest.mark.parametrize("name", ["input", "the state h_0", "resets", "reset_state"])
def test_tensor_without_memory(name: str) -> None:
    case = Case("GRU", hx=True)
    x, (h,) = case.inputs()
    args = [x, h, mask(case), *reset_states(case, "layer")]
    lost = ("input", "the state h_0", "resets", "reset_state").index(name)
    args[lost] = args[lost].clone()
    args[lost].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=f"the memory of {name} is not there"):
        case.layer(rnnkern)(*args)


@pytest.mark.parametrize(
    "args",
    [
        (torch.randn(5, 3, 7),),
        (torch.randn(5, 3, 4), torch.zeros(1, 2, 6)),
        (torch.randn(5, 3, 4), torch.zeros(1, 6)),
        (torch.randn(5, 3, 4).double(),),
        (torch.randn(0, 3, 4),),
    ],
    ids=["features", "batch of hx", "rank of hx", "dtype", "no steps"],
)
def test_other_errors_are_those_without_resets(args: tuple[Any, ...]) -> None:
    layer = rnnkern.GRU(4, 6)
    resets = torch.ones(args[0].shape[:2], dtype=torch.bool)

    def call(resets: Tensor | None) -> Any:
        return layer(*args, **({} if resets is None else {"resets": resets}))

    same_error((None, resets), call)


@pytest.fixture
def small() -> tuple[nn.RNNBase, list[Tensor], Tensor]:
    """A GRU in float64, (x, hx, reset_state) with gradients, and a mask."""
    case = Case("GRU", T=5, B=2, I=3, H=4, hx=True, dtype=F64)
    x, (h,) = case.inputs()
    tensors = [t.requires_grad_() for t in (x, h, *reset_states(case, "layer"))]
    resets = mask(case)
    assert resets[1:].any()
    return case.layer(rnnkern), tensors, resets


@pytest.mark.slow
def test_second_derivatives_and_forward_mode(small: Any) -> None:
    gru, tensors, resets = small

    def call(x: Tensor, h: Tensor, fresh: Tensor) -> Any:
        return gru(x, h, resets, fresh)

    assert gradcheck(call, tensors, check_forward_ad=True)
    assert gradgradcheck(call, tensors)


def test_transforms(small: Any) -> None:
    gru, (x, h, fresh), resets = small
    wanted = torch.autograd.grad(gru(x, h, resets, fresh)[0].square().sum(), x)[0]
    found = grad(lambda x, resets: gru(x, h, resets, fresh)[0].square().sum())(x, resets)
    torch.testing.assert_close(found, wanted)

    weights = {name: p.detach() for name, p in gru.named_parameters()}
    row = resets[:, 1]
    of_each = vmap(
        grad(lambda w, x: functional_call(gru, w, (x, None, row))[0].square().sum()), (None, 1)
    )(weights, x.detach())
    for b in range(x.shape[1]):
        own = torch.autograd.grad(gru(x[:, b], None, row)[0].square().sum(), gru.weight_hh_l0)[0]
        torch.testing.assert_close(of_each["weight_hh_l0"][b], own)

    masks = torch.stack([resets, ~resets])
    of_both = vmap(lambda resets: gru(x, h, resets)[0])(masks)
    torch.testing.assert_close(of_both[1], gru(x, h, ~resets)[0])
    with pytest.raises(RuntimeError, match="the same for all that vmap maps over"):
        vmap(lambda resets: gru(x, h, resets, return_ends=True)[0])(masks)


def test_checkpoint(small: Any) -> None:
    gru, (x, h, fresh), resets = small
    wanted = torch.autograd.grad(gru(x, h, resets, fresh)[0].square().sum(), (x, h, fresh))
    output = checkpoint(lambda x: gru(x, h, resets, fresh)[0], x, use_reentrant=False)
    found = torch.autograd.grad(output.square().sum(), (x, h, fresh))
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("hx", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_autocast(cell: str, hx: bool) -> None:
    """Types are those of a call without resets, whatever the mask holds."""
    case = Case(cell, T=9, B=4, hx=hx)
    layer, (x, states) = case.layer(rnnkern), case.inputs()
    resets = mask(case)
    exact, _ = layer(x, as_hx(states), resets)
    with torch.autocast("cpu", BF16):
        plain, like = layer(x, as_hx(states))
        for given in (resets, resets & False):
            output, state = layer(x, as_hx(states), given)
            assert output.dtype == plain.dtype
            assert [s.dtype for s in as_list(state)] == [s.dtype for s in as_list(like)]
        output, _ = layer(x, as_hx(states), resets)
    torch.testing.assert_close(output.float(), exact, rtol=0, atol=0.05)


@pytest.mark.parametrize("cell", CELLS)
def test_bfloat16(cell: str) -> None:
    case = Case(cell, T=9, B=4, hx=True, dtype=BF16)
    x, states = case.inputs()
    resets = mask(case)
    output, _ = case.layer(rnnkern)(x, as_hx(states), resets)
    exact, _ = case.layer(rnnkern, F64)(x.double(), as_hx([s.double() for s in states]), resets)
    assert output.dtype is BF16
    torch.testing.assert_close(output.double(), exact, rtol=0, atol=0.03)


def test_other_paths() -> None:
    """torch.nn's own code (complex), tensors without data, torch.fx; no records of one mask."""
    case = Case("RNN_TANH", T=9, B=4)
    layer, (x, _), resets = case.layer(rnnkern), case.inputs(), mask(case)
    wanted, _ = layer(x, None, resets)
    complex_layer = rnnkern.RNN(case.I, case.H, dtype=torch.complex64)
    complex_layer.load_state_dict(layer.state_dict())
    output, _ = complex_layer(x + 0j, None, resets)
    torch.testing.assert_close(output.real, wanted)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, resets: Tensor) -> Tensor:
            return self.layer(x, resets=resets)[0]

    assert torch.equal(torch.fx.symbolic_trace(Model())(x, resets), wanted)
    with pytest.raises(RuntimeError, match="cannot be recorded"):
        torch.jit.trace(Model(), (x, resets))
    meta = {"input": x.to("meta"), "resets": resets.to("meta")}
    assert layer.to("meta")(**meta)[0].shape == wanted.shape
    with pytest.raises(RuntimeError, match="the number of ends is in the data"):
        layer(**meta, return_ends=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_numpy(case: Case, form: str) -> None:
    """The bits of torch's layer, of a call and of its single rows."""
    layer, (x, states) = case.layer(rnnkern), case.inputs()
    arrays = {name: p.detach().numpy() for name, p in layer.state_dict().items()}
    own = rnnkern.numpy.Layer(
        arrays, batch_first=case.batch_first, nonlinearity=getattr(layer, "nonlinearity", "tanh")
    )
    resets, fresh = mask(case), reset_states(case, form)
    with torch.no_grad():
        wanted = layer(x, as_hx(states), resets, as_hx(fresh), return_ends=True)
    given = [as_hx([t.numpy() for t in ts]) for ts in (states, fresh)]
    found = own(x.numpy(), given[0], None, resets.numpy(), given[1], True)
    for ours, torchs in zip(leaves(found), leaves(wanted), strict=True):
        assert torch.equal(torch.from_numpy(ours), torchs)

    x, resets = (t.movedim(1, 0) if case.batch_first else t for t in (x, resets))
    hx, fresh = (as_hx([one_row(s, case) for s in ts]) for ts in (states, fresh))
    output, _ = own(x[:, 0].numpy(), hx, resets=resets[:, 0].numpy(), reset_state=fresh)
    wanted_row = wanted[0].movedim(1, 0)[:, 0] if case.batch_first else wanted[0][:, 0]
    assert torch.equal(torch.from_numpy(output), wanted_row)


def leaves(tree: Any) -> list[Any]:
    return [leaf for t in tree for leaf in leaves(t)] if isinstance(tree, tuple) else [tree]


def one_row(state: Tensor, case: Case) -> Any:
    """The first row's part of a state or a state after resets, as an array."""
    if state.dim() == 4:
        state = state[:, 0] if case.batch_first else state[:, :, 0]
    elif state.dim() == 3:
        state = state[:, 0]
    return state.numpy()


def test_numpy_refusals() -> None:
    own = rnnkern.numpy.Layer(
        {name: p.detach().numpy() for name, p in rnnkern.GRU(4, 6).state_dict().items()}
    )
    x, resets = torch.randn(5, 3, 4).numpy(), torch.zeros(5, 3, dtype=torch.bool).numpy()
    h = torch.zeros(1, 3, 6).numpy()
    for message, args in (
        ("shape of an input", (x, None, None, resets.T)),
        ("must be bool", (x, None, None, resets.astype(float))),
        ("each episode as a sequence", (x[0], None, [2, 1], resets)),
        ("belong to a call with resets", (x, None, None, None, h)),
        ("cannot have the shape", (x, None, None, resets, h[..., 1:])),
        ("cannot have the shape", (x, None, None, resets, h[:, 1:])),
        ("float64, but the weights", (x, None, None, resets, h.astype(float))),
        ("must be h", (x, None, None, resets, (h, h))),
    ):
        with pytest.raises(ValueError, match=message):
            own(*args)
