"""Silero VAD: a published detector with a frozen LSTM

The package silero-vad ships a detector of voice activity as a TorchScript model: a spectrum and
four convolutions reduce 32 ms of sound to 128 numbers, an LSTM cell of 128 units takes one step,
and its h gives the probability of speech. Here its convolutions stay as they are, and its cell runs
as shipped, as torch.nn's, as rnnkern's, frozen and as streams, over the sound of the example
voice_activity.

What to see: at the top, the sound, with the true utterances shaded. Below, the probability that the
model gives, and its decisions.
"""

import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Result, main, save, typical
from sound import RATE, Sound, by_chunk, scenes
from stepping import Step, alternately, by_cell, forms
from torch import nn
from voice_activity import Chunk, picture, probabilities, step_times, table

SAMPLES, CONTEXT, HIDDEN = 512, 64, 128  # of a chunk, of the chunk before, of the LSTM


def shipped() -> Any:
    """The package's TorchScript model; the package itself is not imported."""
    package = importlib.util.find_spec("silero_vad")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("this example needs the package silero-vad")
    return torch.jit.load(Path(package.origin).parent / "data" / "silero_vad.jit").eval()  # type: ignore[no-untyped-call]


def cell_of(model: Any) -> nn.LSTMCell:
    """A cell with the weights of the model's."""
    cell = nn.LSTMCell(HIDDEN, HIDDEN)
    cell.load_state_dict(model._model.decoder.rnn.state_dict())
    return cell


def listen_whole(model: Any, sound: Sound) -> Iterator[Chunk]:
    """The model as it is shipped, one TorchScript program."""
    model.reset_states()
    for chunk in torch.from_numpy(sound).view(-1, SAMPLES):
        start = time.perf_counter()
        p = model(chunk, RATE).item()
        yield Chunk(p, float("nan"), time.perf_counter() - start)


def listen(model: Any, step: Step, sound: Sound) -> Iterator[Chunk]:
    """The model's parts, with `step` in the place of its cell."""
    parts = model._model
    context = torch.zeros(1, CONTEXT)
    for chunk in torch.from_numpy(sound).view(-1, SAMPLES):
        start = time.perf_counter()
        heard = torch.cat((context, chunk.unsqueeze(0)), 1)
        context = heard[:, -CONTEXT:]
        x = parts.encoder(parts.run_extractors(heard)).view(1, HIDDEN)
        before = time.perf_counter()
        h = step(x)
        after = time.perf_counter()
        p = parts.decoder.decoder(h.view(1, HIDDEN, 1)).item()
        yield Chunk(p, after - before, time.perf_counter() - start)


def run(out: Path, count: int = 4) -> Result:
    model = shipped()
    sound, truth = scenes(seed=1, count=count, seconds=16)
    truth = by_chunk(truth, SAMPLES)
    steps = {"shipped": by_cell(model._model.decoder.rnn)} | forms(cell_of(model))
    heard = alternately(
        {"whole": listen_whole(model, sound)}
        | {form: listen(model, step, sound) for form, step in steps.items()}
    )
    whole = heard.pop("whole")
    p = probabilities(heard)
    difference = np.abs(p["stream"] - [chunk.p for chunk in whole]).max()
    if not difference < 1e-5:
        raise RuntimeError(f"probabilities differ from the shipped model's by {difference:.0e}")

    took = typical([chunk.of_all for chunk in whole])
    rows = table(heard, truth, SAMPLES / RATE)
    rows += [
        ("whole chunk, one program", f"{took * 1e6:.0f} µs", ""),
        ("probabilities differ from it by", f"{difference:.0e}", ""),
    ]
    path = save(picture(sound, truth, p["stream"]), out, "silero")
    return Result(__doc__.splitlines()[0], rows, "one step", step_times(heard), [path])


if __name__ == "__main__":
    main(run)
