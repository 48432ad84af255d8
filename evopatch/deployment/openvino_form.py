"""OpenVINO's IR."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .conversion import Conversion
from .form import Form, Run


def _write(conversion: Conversion, path: Path) -> None:
    import openvino

    model: Any = openvino.convert_model(conversion.program())
    # By itself it leaves every axis of the input free, and a program of one size gives garbage at others.
    model.reshape(conversion.sizes())
    if conversion.int8:
        from .openvino_int8 import quantised

        model = quantised(model, conversion.calibration_batches())
    openvino.save_model(model, str(path), compress_to_fp16=conversion.half)


def _open(path: Path) -> Run:
    import openvino

    # By itself it computes in bfloat16 where the processor can.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled: Any = openvino.compile_model(str(path), "CPU", settings)
    return lambda images: tuple(torch.from_numpy(value.copy()) for value in compiled(images.numpy()).values())


OPENVINO = Form(
    "openvino", ".xml", ("openvino",), _write, _open, quantised_by=("nncf",), beside=("{stem}.bin",), own_half=True
)
