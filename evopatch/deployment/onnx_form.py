"""ONNX, run by ONNX Runtime."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from .conversion import INPUT, Conversion
from .form import Form, Run


def _write(conversion: Conversion, path: Path) -> None:
    axes = conversion.free_axes()
    program: Any = torch.onnx.export(
        conversion.model,
        (conversion.example,),
        dynamo=True,
        verbose=False,
        input_names=[INPUT],
        output_names=conversion.output_names,
        dynamic_shapes=(axes,) if axes else None,
    )
    if not conversion.int8:
        program.save(str(path))
        return
    from .onnx_int8 import quantise

    with tempfile.TemporaryDirectory() as folder:  # of a large model it is several files
        whole = Path(folder) / "float32.onnx"
        program.save(str(whole))
        quantise(whole, path, conversion.calibration_batches())


def _open(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that go on spinning after a run would take the cores from the other side of a comparison.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: tuple(torch.from_numpy(value) for value in session.run(None, {INPUT: images.numpy()}))


ONNX = Form(
    "onnx", ".onnx", ("onnx", "onnxscript", "onnxruntime"), _write, _open, quantised_by=(), beside=("{name}.data",)
)
