"""Observers (watch, trace, gradient_flow) never change or end what they look at."""

import asyncio
import contextlib
import copy
import io
import logging
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import rnnkern
from rnnkern.inspect.recorder import OBSERVING
from rnnkern.ops.autograd import OBSERVER

T, B, I, H = 6, 4, 3, 5


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = rnnkern.LSTM(I, H, num_layers=2)
        self.decoder = rnnkern.GRU(H, H)

    def forward(self, x):
        return self.decoder(self.encoder(x)[0])[0].square().mean()


def gradients(model, x):
    model.zero_grad()
    model(x).backward()
    return [p.grad.clone() for p in model.parameters()]


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def in_threads(count, work):
    """Runs work(k) in so many threads at once; what they raise."""
    raised, start = [], threading.Barrier(count)

    def run(k):
        try:
            start.wait()
            work(k)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.fixture(autouse=True)
def _nothing_is_left():
    yield
    assert OBSERVER.get() is None
    assert OBSERVING.get() is False


# Where calls are made from


@pytest.mark.parametrize("every", [1, 3])
def test_threads_share_a_model(every):
    model, x, seen = Model(), torch.randn(T, B, I), []
    wanted = model(x)

    def work(_):
        for _ in range(30):
            loss = model(x)
            assert torch.equal(loss, wanted)
            torch.autograd.grad(loss, list(model.parameters()))
        assert OBSERVER.get() is None

    with rnnkern.watch(model, every=every, callback=seen.append):
        assert not in_threads(6, work)
    for name in ("encoder", "decoder"):
        steps = sorted(o.step for o in seen if o.name == name)
        assert steps == list(range(0, 180, every))


def test_tasks_share_a_model():
    model, seen = Model(), []

    async def train():
        for _ in range(5):
            loss = model(torch.randn(T, B, I))
            await asyncio.sleep(0)
            loss.backward()

    async def main():
        await asyncio.gather(*(train() for _ in range(4)))

    with rnnkern.watch(model, callback=seen.append):
        asyncio.run(main())
    assert sorted(o.step for o in seen if o.name == "encoder") == list(range(20))


def test_backward_in_another_thread():
    model, seen = Model(), []
    with rnnkern.watch(model, callback=seen.append):
        loss = model(torch.randn(T, B, I))
        assert not in_threads(1, lambda _: loss.backward())
    assert [o.name for o in seen] == ["decoder", "encoder"]


def test_two_backward_passes_are_reported_once():
    model, seen = Model(), []
    with rnnkern.watch(model, callback=seen.append):
        loss = model(torch.randn(T, B, I))
        loss.backward(retain_graph=True)
        loss.backward()
        again = model(torch.randn(T, B, I))
        work = [lambda: again.backward(retain_graph=True)] * 4
        assert not in_threads(4, lambda k: work[k]())
    found = sorted((o.step, o.name) for o in seen)
    assert found == [(step, name) for step in (0, 1) for name in ("decoder", "encoder")]


def test_replicas_of_data_parallel():
    model, x, seen = Model(), torch.randn(T, B, I), []
    with rnnkern.watch(model, callback=seen.append):
        replicas = [model.encoder._replicate_for_data_parallel() for _ in range(3)]
        for replica in replicas:
            replica._parameters = dict(model.encoder._parameters)
        assert not in_threads(3, lambda k: replicas[k](x)[0].sum().backward())
    assert sorted(o.step for o in seen) == [0, 1, 2]


def test_left_by_one_thread_while_another_calls():
    layer, x = rnnkern.LSTM(I, H), torch.randn(T, B, I)
    inside, left = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        assert left.wait(30)

    def work(_):
        layer(x)[0].sum().backward()
        assert OBSERVER.get() is None

    w = rnnkern.watch(layer)
    w.__enter__()
    layer.register_forward_pre_hook(wait)  # after the watch's
    raised = []
    thread = threading.Thread(target=lambda: raised.extend(in_threads(1, work)))
    thread.start()
    assert inside.wait(30)
    w.__exit__()
    left.set()
    thread.join()
    assert not raised


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_checkpoints_count_once(every, packed, use_reentrant):
    layer, seen = rnnkern.LSTM(I, H, num_layers=2, bidirectional=True), []
    x = torch.randn(T, B, I, requires_grad=True)

    def run(x):
        given = pack_padded_sequence(x, [6, 6, 3, 2]) if packed else x
        output = layer(given)[0]
        return output.data if packed else output

    wanted = torch.autograd.grad(run(x).square().sum(), [x, *layer.parameters()])
    with rnnkern.watch(layer, every=every, callback=seen.append):
        for _ in range(4):
            loss = checkpoint(run, x, use_reentrant=use_reentrant).square().sum()
            loss.backward()
            found = [x.grad, *(p.grad for p in layer.parameters())]
            assert same(found, wanted)
            x.grad = None
            layer.zero_grad()
    assert [o.step for o in seen] == list(range(0, 4, every))


def test_a_generator_and_an_exception_between():
    model = Model()

    def losses():
        with rnnkern.watch(model) as w:
            while True:
                yield model(torch.randn(T, B, I)), w

    steps = losses()
    for _ in range(3):
        loss, w = next(steps)
        loss.backward()
    steps.close()
    assert w.latest["encoder"].step == 2
    assert not model.encoder._forward_hooks
    model.decoder.register_forward_pre_hook(lambda *_: 1 / 0)
    with rnnkern.watch(model) as w:
        with pytest.raises(ZeroDivisionError):
            model(torch.randn(T, B, I))
        assert OBSERVER.get() is None
        model.encoder(torch.randn(T, B, I))[0].sum().backward()
    assert w.latest["encoder"].step == 1


def test_an_interrupt_in_the_middle_of_a_call():
    layer, interrupt = rnnkern.GRU(I, H), [True]

    def hook(*_):
        if interrupt:
            interrupt.clear()
            raise KeyboardInterrupt

    with rnnkern.watch(layer) as w:
        layer.register_forward_pre_hook(hook)
        with pytest.raises(KeyboardInterrupt):
            layer(torch.randn(T, B, I))
        layer(torch.randn(T, B, I))[0].sum().backward()
        assert w.latest["GRU"].step == 1
        interrupt.append(True)
        with pytest.raises(KeyboardInterrupt):
            layer(torch.randn(T, B, I))
    assert OBSERVER.get() is None


# Observers inside observers


@pytest.mark.parametrize(("first", "second"), [(1, 1), (2, 1), (1, 2), (2, 3)])
def test_a_watch_inside_a_watch(first, second):
    model, seen = Model(), ([], [])
    x = torch.randn(T, B, I)
    wanted = gradients(model, x)
    with (
        rnnkern.watch(model, every=first, callback=seen[0].append),
        rnnkern.watch(model, every=second, callback=seen[1].append),
    ):
        for _ in range(6):
            assert same(gradients(model, x), wanted)
    for found, every in zip(seen, (first, second), strict=True):
        steps = [o.step for o in found if o.name == "encoder"]
        assert steps == list(range(0, 6, every))
        for o in found:
            assert len(o.trace.steps) == (2 if o.name == "encoder" else 1)
            assert o.flow.hidden.any()


def test_one_watch_entered_twice():
    model, seen = Model(), []
    with rnnkern.watch(model, callback=seen.append) as w:
        with w:
            gradients(model, torch.randn(T, B, I))
        gradients(model, torch.randn(T, B, I))
    gradients(model, torch.randn(T, B, I))
    assert [o.step for o in seen if o.name == "encoder"] == [0, 1]


def test_trace_and_flow_inside_a_watch_are_no_steps():
    model, x, flows = Model(), torch.randn(T, B, I), []

    def look(observation):
        assert rnnkern.trace(model.encoder, x).hidden.shape == (T, B, H)
        flows.append(rnnkern.gradient_flow(model.decoder, torch.randn(T, B, H), torch.sum))
        with torch.enable_grad():
            model(x).backward()  # nor what else a callback computes
        seen.append(observation.step)

    seen = []
    with rnnkern.watch(model, callback=look):
        for _ in range(3):
            gradients(model, x)
            rnnkern.trace(model.encoder, x).output.sum().backward()
    assert seen == [0, 0, 1, 1, 2, 2]
    assert len(flows) == 6


def test_trace_inside_a_trace_and_layers_that_hooks_call():
    layer, other = rnnkern.LSTM(I, H), rnnkern.LSTM(I, H)
    x, inner = torch.randn(T, B, I), []
    wanted, wanted_inner = rnnkern.trace(layer, x), rnnkern.trace(other, x)
    layer.register_forward_pre_hook(lambda *_: inner.append(rnnkern.trace(other, x)))
    layer.register_forward_pre_hook(lambda *_: (other(x), None)[1])
    layer.register_forward_hook(lambda *_: (other(x), None)[1])
    found = rnnkern.trace(layer, x)
    assert len(found.steps) == 1
    assert torch.equal(found.gates["forget"], wanted.gates["forget"])
    assert torch.equal(inner[0].gates["forget"], wanted_inner.gates["forget"])


def test_a_watched_layer_inside_the_hooks_of_another():
    model = nn.ModuleDict({"a": rnnkern.LSTM(I, H), "b": rnnkern.LSTM(I, H)})
    a, b, x, kept = model["a"], model["b"], torch.randn(T, B, I), []

    def call_b(*_):
        kept.append(b(x)[0].sum())

    wanted = {name: rnnkern.trace(model[name], x).hidden for name in "ab"}
    before = a.register_forward_pre_hook(call_b)
    a.register_forward_hook(call_b)
    with rnnkern.watch(model) as w:
        a.register_forward_pre_hook(call_b)
        a.register_forward_hook(call_b, prepend=True)
        (a(x)[0].sum() + sum(kept)).backward()
        assert (w.latest["a"].step, len(kept)) == (0, 4)
    before.remove()
    for name in "ab":
        assert len(w.latest[name].trace.steps) == 1
        assert torch.equal(w.latest[name].trace.hidden, wanted[name])


def test_a_layer_that_calls_itself():
    layer, x, depth, kept, seen = rnnkern.GRU(I, H), torch.randn(T, B, I), [0], [], []

    def again(*_):
        if depth[0] < 2:
            depth[0] += 1
            kept.append(layer(x * depth[0])[0].sum())

    with (
        rnnkern.watch(layer, callback=seen.append),
        rnnkern.watch(layer, callback=lambda o: None) as w,
    ):
        layer.register_forward_pre_hook(again)
        (layer(x)[0].sum() + sum(kept)).backward()
    assert sorted(o.step for o in seen) == [0, 1, 2]
    assert all(len(o.trace.steps) == 1 for o in seen)
    layer._forward_pre_hooks.clear()
    first = next(o for o in seen if o.step == 0)
    assert torch.equal(first.trace.hidden, layer(x)[0])
    assert w.latest


# Errors of the observer's own side


class Failing:
    """A writer or a callback that raises."""

    def __init__(self):
        self.calls = 0

    def __call__(self, *_):
        self.calls += 1
        raise OSError("disk full")

    add_scalar = add_histogram = __call__


@pytest.mark.parametrize("sink", ["writer", "callback"])
def test_what_fails_is_said_once_and_the_training_goes_on(sink, caplog):
    model, x, failing, seen = Model(), torch.randn(T, B, I), Failing(), []
    wanted = gradients(model, x)
    sinks = {"callback": seen.append, sink: failing}
    with rnnkern.watch(model, **sinks) as w, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            assert same(gradients(model, x), wanted)
    (warning,) = said
    assert f"{sink} of rnnkern.watch raised OSError: disk full" in str(warning.message)
    assert failing.calls == 1
    assert w.latest["encoder"].step == 2
    assert len(seen) == (6 if sink == "writer" else 0)
    (record,) = [r for r in caplog.records if r.name == "rnnkern"]
    assert record.levelno == logging.WARNING
    assert record.exc_info[1].args == ("disk full",)


def test_failing_threads_warn_once_and_warnings_as_errors_end_nothing(caplog):
    model, x = Model(), torch.randn(T, B, I)  # warnings are errors in this suite
    with rnnkern.watch(model, callback=Failing()):
        assert not in_threads(4, lambda _: model(x).backward())
    texts = [r.getMessage() for r in caplog.records if r.exc_info]
    assert len(texts) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("packed", [False, True])
def test_values_that_are_not_finite(value, packed):
    layer, histograms, scalars = rnnkern.LSTM(I, H), {}, {}

    class Writer:
        def add_histogram(self, tag, values, step):
            assert values.numel()
            assert values.isfinite().all()  # TensorBoard raises for others
            histograms[tag] = values

        def add_scalar(self, tag, value, step):
            scalars[tag] = value

    x = torch.randn(T, B, I)
    x[3:, 0] = value
    given = pack_padded_sequence(x, [6, 4, 4, 4]) if packed else x
    valid = 6 + 3 * 4 if packed else T * B
    with rnnkern.watch(layer, writer=Writer()):
        output = layer(given)[0]
        (output.data if packed else output).sum().backward()
    lost = scalars["LSTM/layer 0/states/cell, not finite"]
    assert lost >= 3 * H if value != value else lost
    assert histograms["LSTM/layer 0/states/cell"].numel() == valid * H - lost
    assert "LSTM/layer 0/gradient/hidden, first step" in scalars
    with torch.no_grad():
        layer.weight_ih_l0.fill_(float("nan"))
    histograms.clear()
    with rnnkern.watch(layer, writer=Writer()):
        layer(torch.randn(T, B, I))[0].sum().backward()
    assert not histograms
    assert scalars["LSTM/layer 0/gates/forget, not finite"] == T * B * H


def test_a_subclass_with_results_and_arguments_of_its_own(caplog):
    class Encoder(rnnkern.LSTM):
        def forward(self, sequence, scale=1.0):
            return super().forward(sequence * scale)[0]

    class Scaled(rnnkern.LSTM):
        def forward(self, sequence, scale=1.0):
            return super().forward(sequence * scale)

    model = nn.ModuleDict({"encoder": Encoder(I, H), "scaled": Scaled(I, H)})
    x = torch.randn(2, B, I)
    with rnnkern.watch(model) as w:
        model["encoder"](x, scale=2.0).sum().backward()
        model["scaled"](sequence=x)[0].sum().backward()
    assert "encoder cannot be watched" in caplog.text
    assert w.latest["scaled"].trace.hidden.shape == (2, B, H)


def test_no_default_device_or_half_precision_stops_it():
    layer, tags = rnnkern.LSTM(I, H, dtype=torch.bfloat16), []

    class Writer:
        def add_histogram(self, tag, values, step):
            tags.append(tag)

        add_scalar = add_histogram

    x = torch.randn(T, B, I, dtype=torch.bfloat16)
    packed = pack_padded_sequence(x, [2, 6, 3, 1], enforce_sorted=False)
    with torch.device("meta"), rnnkern.watch(layer, writer=Writer()) as w:
        layer(packed)[0].data.sum().backward()
    assert tags
    assert w.latest["LSTM"].trace.lengths.tolist() == [2, 6, 3, 1]


# The model itself


def test_copies_and_pickles_of_a_watched_model_are_not_watched():
    model, x, seen = Model(), torch.randn(T, B, I), []
    lock = threading.Lock()  # as a SummaryWriter has: it can be neither copied nor pickled

    def callback(observation):
        with lock:
            seen.append(observation)

    wanted = gradients(model, x)
    with rnnkern.watch(model, callback=callback):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copies.append(torch.load(buffer, weights_only=False))
        for other in copies:
            assert same(gradients(other, x), wanted)
    assert not seen


@pytest.mark.compiler
def test_transforms_and_compilers_see_nothing_of_it():
    model, x = Model(), torch.randn(T, B, I)
    params = dict(model.named_parameters())
    plain = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)))(params)
    with rnnkern.watch(model):
        found = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)))(params)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(model, x, check_trace=False)
        program = torch.export.export(model, (x,), strict=False).module()
    assert same(found.values(), plain.values())
    torch.testing.assert_close(traced(x), model(x))
    torch.testing.assert_close(program(x), model(x))


@pytest.mark.compiler
def test_a_compiled_model_is_left_alone():
    model, x = Model(), torch.randn(T, B, I)
    wanted = gradients(model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with rnnkern.watch(model) as w:
        compiled(x).backward()
    found = [p.grad / 2 for p in model.parameters()]  # both passes
    torch.testing.assert_close(found, wanted)
    assert not w.latest


def test_autocast_and_anomaly_mode():
    model, x = Model(), torch.randn(T, B, I)
    with rnnkern.watch(model) as w:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x)
        loss.backward()
        assert w.latest["encoder"].trace.hidden.dtype == torch.bfloat16
        with contextlib.ExitStack() as stack, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that it is slow
            stack.enter_context(torch.autograd.detect_anomaly())
            model(x).backward()
    assert w.latest["encoder"].step == 1


# gradient_flow


@pytest.mark.parametrize(
    "loss",
    [
        lambda output: torch.ones((), requires_grad=True) * 2,
        lambda output: torch.tensor(1.0),
        lambda output: output.detach().sum(),
        lambda output: output.argmax(),
    ],
    ids=["another leaf", "a constant", "detached", "argmax"],
)
def test_a_loss_that_does_not_depend_on_the_layer(loss):
    with pytest.raises(ValueError, match="does not depend on the layer's output"):
        rnnkern.gradient_flow(rnnkern.LSTM(I, H), torch.randn(T, B, I), loss)


def test_a_loss_whose_gradient_is_zero_has_a_flow_of_zeros():
    flow = rnnkern.gradient_flow(
        rnnkern.LSTM(I, H), torch.randn(T, B, I), lambda output: (0 * output).sum()
    )
    assert not flow.hidden.any()
    assert flow.hidden.shape == (T, B)


def test_flow_in_inference_mode():
    layer, x = rnnkern.LSTM(I, H), torch.randn(T, B, I)
    wanted = rnnkern.gradient_flow(layer, x, torch.sum).hidden
    with torch.inference_mode():
        hx = (torch.zeros(1, B, H), torch.zeros(1, B, H))
        packed = pack_padded_sequence(x.clone(), [T] * B)
        found = rnnkern.gradient_flow(layer, x.clone(), torch.sum, hx).hidden
        by_row = rnnkern.gradient_flow(layer, packed, lambda output: output.data.sum()).hidden
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(by_row, wanted)


def test_what_is_no_tensor_is_named():
    layer = rnnkern.LSTM(I, H)
    for function in (rnnkern.trace, lambda *args: rnnkern.gradient_flow(*args, torch.sum)):
        with pytest.raises(TypeError, match="PackedSequence, got ndarray"):
            function(layer, torch.randn(T, B, I).numpy())

    class Sub(torch.Tensor):
        pass

    with pytest.raises(RuntimeError, match="tensor subclass"):
        rnnkern.trace(layer, torch.randn(T, B, I).as_subclass(Sub))


def test_parts_that_are_not_there():
    layer = rnnkern.LSTM(I, H, num_layers=2)
    for found in (
        rnnkern.trace(layer, torch.randn(T, B, I)),
        rnnkern.gradient_flow(layer, torch.randn(T, B, I), torch.sum),
    ):
        assert found[-2, -1] is found[0, 0]
        for wrong in ((2, 0), (0, 1), (-3, 0)):
            with pytest.raises(IndexError, match=r"no layer -?\d, direction \d in 2 layer"):
                found[wrong]
        with pytest.raises(TypeError, match=r"\[layer, direction\], got \[0\]"):
            found[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": [rnnkern.LSTM(I, H)]}, "a module, got list"),
        ({"every": "2"}, "whole number, got '2'"),
        ({"every": 1.5}, "whole number, got 1.5"),
        ({"callback": 5}, "a function, got int"),
        ({"writer": "runs"}, "add_scalar and add_histogram, got str"),
    ],
)
def test_wrong_arguments_of_watch(options, message):
    with pytest.raises(TypeError, match=message):
        rnnkern.watch(**{"model": rnnkern.LSTM(I, H)} | options)
    with pytest.raises(ValueError, match="cells cannot be watched"):
        rnnkern.watch(rnnkern.LSTMCell(I, H))
    with pytest.raises(TypeError, match="cells have no record"):
        rnnkern.trace(rnnkern.LSTMCell(I, H), torch.randn(B, I))
