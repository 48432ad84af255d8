"""OpenVINO's IR."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .conversion import Conversion
from .form import Form, Run

_FLOAT32 = ("INFERENCE_PRECISION_HINT", "f32")


def _write(conversion: Conversion, path: Path) -> None:
    import openvino

    program = conversion.program()
    returned = program.graph_signature.user_outputs
    for name, value in zip(conversion.output_names, returned, strict=True):
        if returned.count(value) > 1 or value in program.graph_signature.user_inputs:
            raise ValueError(
                f"output '{name}' is another output as well, or the input: OpenVINO takes each tensor once"
            )
    model: Any = openvino.convert_model(program)
    # By itself it leaves every axis of the input free, and a program of one size gives garbage at others.
    model.reshape(conversion.sizes())
    if conversion.int8:
        from .openvino_int8 import quantised

        model = quantised(model, conversion.calibration_batches())
    openvino.save_model(model, str(path), compress_to_fp16=conversion.half)


def _open(path: Path) -> Run:
    import openvino

    # By itself it computes in bfloat16 where the processor can.
    settings = {_FLOAT32[0]: _FLOAT32[1], "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled: Any = openvino.compile_model(str(path), "CPU", settings)
    return lambda images: tuple(torch.from_numpy(value.copy()) for value in compiled(images.numpy()).values())


OPENVINO = Form(
    "openvino",
    ".xml",
    ("openvino",),
    _write,
    _open,
    any_size=False,  # its converter lacks what patched models do to sizes, and what unpatched ones do to positions
    quantised_by=("nncf",),
    beside=("{stem}.bin",),
    own_half=True,
    run_with=f"{_FLOAT32[0]}={_FLOAT32[1]}",
)
