"""What torch's exporter makes of torch.nn's layer, for the peers that run ONNX models."""

from __future__ import annotations

import io
import logging
import warnings
from typing import Any, cast

import numpy as np
import onnx
import torch
from rows import Row

OUTPUTS = ("output", "h_n", "c_n")  # of any such model, the last for an LSTM only


def exported(row: Row) -> tuple[bytes, dict[str, np.ndarray]]:
    """The model of one row, and its inputs by name."""
    x, states = row.inputs()
    args = tuple(given for given in row.arguments(x, states) if given is not None)
    file = io.BytesIO()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # This exporter, unlike its successor, keeps an RNN as one operator. It is deprecated,
        # and tells that it keeps the sizes of this call, as it should.
        warnings.simplefilter("ignore")
        torch.onnx.export(row.layer(torch.nn), args, cast(Any, file), dynamo=False)
    model = file.getvalue()
    names = [i.name for i in onnx.load_model_from_string(model).graph.input]
    return model, {n: t.numpy() for n, t in zip(names, [x, *states], strict=True)}
