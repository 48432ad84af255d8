"""OpenVINO models in int8, by NNCF: layers with constant weights, and nothing that ranks tokens."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor


def quantised(model: Any, batches: list[Tensor]) -> Any:
    """A quantised copy.

    Args:
        model: Of OpenVINO.
        batches: Images `(B, C, height, width)` each, float32, as the file takes them.
    """
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)  # or it lists every operation that is left alone
    data = nncf.Dataset([batch.numpy() for batch in batches])
    ranking = nncf.IgnoredScope(names=[node.get_friendly_name() for node in model.get_ops() if not _is_layer(node)])
    return nncf.quantize(
        model, data, subset_size=len(batches), model_type=nncf.ModelType.TRANSFORMER, ignored_scope=ranking
    )


def _is_layer(node: Any) -> bool:
    """Whether it multiplies by constant weights; what ranks and compares tokens doesn't, and doesn't bear int8."""
    if node.get_type_name() in ("Constant", "Parameter", "Result"):
        return True
    return node.get_type_name() in ("MatMul", "Convolution") and _is_constant(node.input_value(1).get_node())


def _is_constant(node: Any) -> bool:
    return node.get_type_name() == "Constant" or (
        node.get_input_size() > 0 and all(_is_constant(value.get_node()) for value in node.input_values())
    )
