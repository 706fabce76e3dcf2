"""OpenVINO's CPU plugin, oneDNN called with weights that it has laid out before, on the same ONNX
model as ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable

import openvino
import torch
from onnx_export import OUTPUTS, exported
from rows import Row
from torch import Tensor


class Peer:
    def __init__(self, row: Row, threads: int) -> None:
        model, self.feed = exported(row)
        core = openvino.Core()
        # Of float32, processors with matrix registers would otherwise make bfloat16.
        options = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        compiled = core.compile_model(core.read_model(model), "CPU", options)
        self.request = compiled.create_infer_request()

    @property
    def call(self) -> Callable[[], object]:
        return lambda: self.request.infer(self.feed, share_inputs=True)

    def results(self) -> dict[str, Tensor]:
        found = self.request.infer(self.feed).values()
        return {n: torch.from_numpy(y.copy()) for n, y in zip(OUTPUTS, found, strict=False)}
