"""One feature per image, and one per patch, of models of timm and transformers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..measure.maps import channels_first
from ..patching.handle import Patched
from .head_input import Read, read_timm, read_transformers


class Features(NamedTuple):
    """Of a batch."""

    image: Tensor
    """`(B, C)`."""
    patches: Tensor | None
    """`(B, N, C)` in raster order; None where they aren't asked for."""


class FeatureExtractor:
    """Makes features of images.

    The image's feature is what the model's head is given, before any projection: that of timm's `forward_head`, the
    input of a classifier of transformers, or the mean of both where there are two. Without such a head it is the
    `pooler_output` of transformers models that pool or norm there what a head reads (CLIP, SigLIP, BEiT and their
    like). Else, also of DINOv2, whose classifier is given two features, and of timm models without pooling, it is
    the class token, the mean of the tokens that a head reads where it reads several, or without any the mean of the
    patch tokens; as in the model's last tokens.

    Features of patches are the model's last tokens, `forward_features` of timm and `last_hidden_state` of transformers:
    after the last norm, unless the model norms pooled tokens alone (CLIP and BEiT of transformers, mean-pooled timm).

    Args:
        model: A patched model of timm or transformers; it stays as it is, a copy on its weights is run in eval mode.
        patches: Whether features of patches are wanted too.

    Raises:
        UnsupportedModelError: If the model is neither, or holds several hosts.
    """

    def __init__(self, model: nn.Module, patches: bool) -> None:
        given = Patched(model)
        patched = Patched(given.copy().eval())
        for own, shared in zip(patched.model.parameters(), given.model.parameters(), strict=True):
            own.requires_grad_(shared.requires_grad)  # some kernels are chosen by it, and round otherwise
        self._host = patched.host
        self.patches = patches
        self.model: Any = patched.model
        inner = getattr(self.model, "timm_model", self.model)  # in transformers' wrapper
        self._timm = inner if hasattr(inner, "forward_features") and hasattr(inner, "forward_head") else None
        if self._timm is None and not hasattr(self.model, "base_model"):
            raise UnsupportedModelError(
                f"{type(model).__name__} is neither a model of timm (forward_features and forward_head) nor of "
                "transformers (base_model): no feature of an image is known of it"
            )

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """
        Args:
            images: `(B, 3, height, width)`, on the model's device and in its type.

        Raises:
            UnsupportedModelError: If the model returns no tokens, or others than those of the image's patches.
            UnsupportedInputError: If the model's patch tokens aren't a grid of one image.
        """
        if self._timm is not None:
            found = read_timm(self._timm, images)
        else:
            found = read_transformers(self.model, self._host, images)
        if found.given is not None and not self.patches:
            return Features(found.given, None)
        spec = self._host.state.spec
        tokens, prefix = self._tokens(found, images), spec.later + spec.prefix
        image = found.given
        if image is None:
            readout = spec.later or spec.readout
            image = tokens[:, :readout].mean(1) if readout else tokens[:, prefix:].mean(1)
        return Features(image, tokens[:, prefix:] if self.patches else None)

    def _tokens(self, found: Read, images: Tensor) -> Tensor:
        """`(B, P + N, C)`, prefix tokens first."""
        spec = self._host.state.spec
        prefix = spec.later + spec.prefix
        rows, columns = self._host.last_grid((images.shape[-2], images.shape[-1]))
        tokens = found.tokens
        if isinstance(tokens, Tensor) and tokens.dim() == 4:
            tokens = channels_first(tokens, self.model if self._timm is None else self._timm)
            if tokens.shape[2:] == (rows, columns):
                tokens = tokens.flatten(2).transpose(1, 2)
        if not isinstance(tokens, Tensor) or tokens.dim() != 3 or tokens.shape[1] != prefix + rows * columns:
            what = tuple(found.tokens.shape) if isinstance(found.tokens, Tensor) else type(found.tokens).__name__
            raise UnsupportedModelError(
                f"{type(self.model).__name__} gives {what} as its last tokens: expected (B, T, C) with T = {prefix} + "
                f"{rows} * {columns}, prefix tokens and a grid of patches, or a map of that grid. "
                + ("Leave the features of patches out" if found.given is not None else "Give another part of the model")
            )
        return tokens.roll(spec.behind, 1) if spec.behind else tokens
