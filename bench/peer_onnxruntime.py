"""ONNX Runtime's CPU provider on what torch's exporter makes of torch.nn's layer."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable

import onnxruntime
import torch
from rows import Row
from torch import Tensor


class Peer:
    def __init__(self, row: Row, threads: int) -> None:
        x, hx = row.inputs()
        args = (x,) if hx is None else (x, hx)
        file = io.BytesIO()
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            # This exporter, unlike its successor, keeps an RNN as one operator. It is deprecated,
            # and tells that it keeps the sizes of this call, as it should.
            warnings.simplefilter("ignore")
            torch.onnx.export(row.module(torch.nn), args, file, dynamo=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            file.getvalue(), options, providers=["CPUExecutionProvider"]
        )
        tensors = [x] if hx is None else [x, *hx] if isinstance(hx, tuple) else [x, hx]
        names = [i.name for i in self.session.get_inputs()]
        self.feed = {n: t.numpy() for n, t in zip(names, tensors, strict=True)}

    @property
    def call(self) -> Callable[[], object]:
        return lambda: self.session.run(None, self.feed)

    def results(self) -> dict[str, Tensor]:
        names = ("output", "h_n", "c_n")
        return {n: torch.from_numpy(y) for n, y in zip(names, self.call(), strict=False)}
