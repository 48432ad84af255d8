"""ONNX files in int8, by ONNX Runtime: layers with constant weights, and nothing that ranks tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from .conversion import INPUT


def quantise(source: Path, target: Path, batches: list[Tensor]) -> None:
    """Statically: weights by output channel, activations by the range of their values on some images.

    Args:
        source: A float32 file.
        target: Where the other one goes.
        batches: Images `(B, C, height, width)` each, float32, as the file takes them.
    """
    import onnx
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._left, None)
            return None if batch is None else {INPUT: batch.numpy()}

    graph: Any = onnx.load(str(source), load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer if len(tensor.dims) > 1}
    linear = [node.name for node in graph.node if node.op_type in _LAYERS and node.input[1] in constants]
    quantization.quantize_static(
        str(source),
        str(target),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        nodes_to_quantize=linear,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )


_LAYERS = ("MatMul", "Gemm", "Conv")
