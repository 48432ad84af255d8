"""torch models in int8, by torchao: linear layers, weights by output channel, activations by token as they come."""

from __future__ import annotations

from torch import nn


def quantise(model: nn.Module) -> None:
    """In place."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
