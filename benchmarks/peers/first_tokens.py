r"""The first tokens go on, the others are dropped: what is left of the FLOPs' promise where selecting costs nothing.

No way to classify images. Given to the benchmark command as

    PYTHONPATH=benchmarks evopatch benchmark --model deit_small_patch16_224 --batch-size 1 \
        --peer benchmarks/peers/first_tokens.py
"""

from __future__ import annotations

from typing import Any

from peers.token_merging import Merging, mildest
from torch import Tensor, nn

from evopatch import EvoConfig
from evopatch.algorithm.selection import num_slow
from evopatch.patching.handle import shared_copy
from evopatch.plan import plan_blocks

NAME = "first tokens"


class FirstTokens(Merging):
    """A vision transformer whose blocks take as many tokens as those of evopatch do.

    Args:
        model: timm's `VisionTransformer`; its weights are shared.
        ratio: Keep ratio in percent.
    """

    def __init__(self, model: Any, ratio: int) -> None:
        super().__init__(model)
        self.plans = plan_blocks(EvoConfig(keep_ratio=ratio / 100), len(model.blocks))

    def _block(self, index: int, block: Any, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor | None]:
        keep, prefix = self.plans[index].keep_ratio, self.model.num_prefix_tokens
        if keep < 1.0:
            x = x[:, : prefix + num_slow(self.model.patch_embed.num_patches, keep)]
        return block(x), size


def at_flops(model: nn.Module, image: Tensor, flops: int) -> nn.Module:
    """The most tokens that need no more FLOPs than given; arguments and errors as for `mildest`."""
    own = shared_copy(model)
    return mildest(lambda dropped: FirstTokens(own, 100 - dropped), range(1, 100), image, flops)
