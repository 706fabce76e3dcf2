"""ONNX Runtime's CPU provider."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnxruntime
import torch
from onnx_model import OUTPUTS, exported
from rows import Row
from torch import Tensor


class Peer:
    def __init__(self, row: Row, threads: int) -> None:
        model, self.feed = exported(row)
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
