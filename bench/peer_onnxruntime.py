"""ONNX Runtime's CPU provider."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import onnxruntime
import torch
from onnx_export import OUTPUTS, exported
from onnxruntime.quantization import QuantType, quantize_dynamic
from rows import Row
from torch import Tensor


def quantized_to_int8(model: bytes) -> bytes:
    """The model with int8 weights and, in each call, int8 inputs and states."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "quantized.onnx"
        logging.getLogger().setLevel(logging.ERROR)  # it advises what a single layer does not need
        quantize_dynamic(onnx.load_model_from_string(model), path, weight_type=QuantType.QInt8)
        return path.read_bytes()


class Peer:
    def __init__(self, row: Row, threads: int, quantized: bool = False) -> None:
        model, self.feed = exported(row)
        if quantized:
            model = quantized_to_int8(model)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(
            model, options, providers=["CPUExecutionProvider"]
        )

    @property
    def call(self) -> Callable[[], list[Any]]:
        return lambda: self.session.run(None, self.feed)

    def results(self) -> dict[str, Tensor]:
        return {n: torch.from_numpy(y) for n, y in zip(OUTPUTS, self.call(), strict=False)}
