"""One feature per image, and one per patch, of models of timm and transformers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..patching.handle import Patched


class Features(NamedTuple):
    """Of a batch."""

    image: Tensor
    """`(B, C)`."""
    patches: Tensor | None
    """`(B, N, C)` in raster order; None where they aren't asked for."""


class FeatureExtractor:
    """Makes features of images.

    Of a timm model the image's feature is what its head would read, before any projection of the head. Of a
    transformers model it is the mean of the tokens that its head reads beside the patch tokens, the class token as a
    rule, or where there are none the mean of the patch tokens; after the last norm in both.

    Args:
        model: A patched model of timm or transformers, which is run in eval mode.
        patches: Whether features of patches are wanted too.

    Raises:
        UnsupportedModelError: If the model is neither, or holds several hosts.
    """

    def __init__(self, model: nn.Module, patches: bool) -> None:
        spec = Patched(model).host.state.spec
        self.prefix, self._readout, self._behind = spec.prefix, spec.readout, spec.behind
        self.patches = patches
        self.model: Any = model.eval()
        self._is_timm = hasattr(model, "forward_features") and hasattr(model, "forward_head")
        if not self._is_timm and not hasattr(model, "base_model"):
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
            UnsupportedModelError: If the model returns no tokens.
        """
        if self._is_timm:
            tokens = self.model.forward_features(images)
            image: Tensor = self.model.forward_head(tokens, pre_logits=True)
        else:
            tokens = getattr(self.model.base_model(images), "last_hidden_state", None)
        if not isinstance(tokens, Tensor) or tokens.dim() not in (3, 4):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} gives no tokens (B, T, C): expected a model of images alone, such as its "
                "vision tower"
            )
        tokens = tokens.flatten(1, 2) if tokens.dim() == 4 else tokens  # timm's Swin: (B, h, w, C)
        if self._behind:
            tokens = tokens.roll(self._behind, 1)
        if not self._is_timm:
            image = tokens[:, : self._readout].mean(1) if self._readout else tokens[:, self.prefix :].mean(1)
        return Features(image, tokens[:, self.prefix :] if self.patches else None)
