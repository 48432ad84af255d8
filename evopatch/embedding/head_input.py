"""What a model makes of images on the way to its head: its tokens, and the feature that the head is given."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..patching.handle import Host

_HEADS = ("classifier", "cls_classifier", "distillation_classifier", "classifier_distill")
"""What transformers calls layers that are given one feature of an image."""


class Read(NamedTuple):
    """Of a batch."""

    tokens: Any
    """`(B, T, C)` or a map, as the model gives it; or what isn't known."""
    given: Tensor | None
    """`(B, C)`, what the head is given; None where that isn't known."""


def read_timm(model: Any, images: Tensor) -> Read:
    """
    Args:
        model: With `forward_features` and `forward_head`.
        images: `(B, 3, height, width)`.
    """
    tokens = model.forward_features(images)
    try:
        given = model.forward_head(tokens, pre_logits=True)
    except NotImplementedError:  # encoders of language models
        return Read(tokens, None)
    # Without global pooling it is all of the tokens.
    return Read(tokens, given if isinstance(given, Tensor) and given.dim() == 2 else None)


def read_transformers(model: Any, host: Host, images: Tensor) -> Read:
    """
    Args:
        model: With `base_model`.
        host: The one in it.
        images: `(B, 3, height, width)`.

    Raises:
        UnsupportedModelError: If it gives no tokens.
    """
    heads = [head for name in _HEADS if isinstance(head := getattr(model, name, None), nn.Module)]
    if heads and host.name:
        output, given = _seen(model, model.get_submodule(host.name.partition(".")[0]), heads, images)
    else:
        # DINOv3's base model is its encoder, without what makes tokens of images.
        output, given = (model if hasattr(model, "embeddings") else model.base_model)(images), []
    tokens = getattr(output, "last_hidden_state", None)
    if not isinstance(tokens, Tensor):
        raise UnsupportedModelError(
            f"{type(model).__name__} gives no tokens (B, T, C): expected a model of images alone, such as its "
            "vision tower"
        )
    if host.state.spec.pooled:
        given += [output.pooler_output] if not given and output.pooler_output is not None else []
    width = tokens.shape[1 if tokens.dim() == 4 else -1]
    # DINOv2's is given two features, one beside the other.
    fits = bool(given) and all(value.dim() == 2 and value.shape[1] == width for value in given)
    return Read(tokens, torch.stack(given).mean(0) if fits else None)


def _seen(model: nn.Module, body: nn.Module, heads: list[nn.Module], images: Tensor) -> tuple[Any, list[Tensor]]:
    """What the part of a model that makes tokens returns, and what each head is given, in one forward."""
    outputs: list[Any] = []
    given: list[Tensor] = []
    handles = [body.register_forward_hook(lambda module, args, output: outputs.append(output))]
    handles += [head.register_forward_pre_hook(lambda module, args: given.append(args[0])) for head in heads]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return outputs[0], given
