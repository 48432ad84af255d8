"""What a block's attention core calls while the block runs on a slow-fast forward.

Generated code (`rewrite.graph`) hands its attention core to an `AttentionTap`: fused attention stays in use, the
class attention is computed beside it, position biases are averaged for the compact set, and groups weigh by size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..algorithm.bias import KeyBias, merge_bias
from ..algorithm.importance import default_scale
from ..algorithm.padding import added
from ..algorithm.partition import Partition, spread_attention, unspread_attention
from ..algorithm.rows import is_fixed
from ..errors import UnsupportedInputError
from .hooks import FullGrid, Shown
from .mask import Mask
from .multi_head import multi_head
from .observed import Observed


class AttentionTap:
    """One block's run in one forward pass.

    Args:
        prefix: `P`, the number of prefix tokens.
        readout: How many of the first prefix tokens the head reads; 0 where it averages the patch tokens.
        partition: Of the compact set that goes through the block, None if all tokens do.
        observe: Compute the class attention.
        received: With a `readout` of 0 and materialised attention weights, take the attention that a token receives
            instead of the mean query's.
        block: Fully qualified name, for errors.
        full_grid: What shows modules in the block all tokens, where somebody wants to see them.
        everything: `(B, M, C)`, where only the prefix tokens go through the block: what its attention module would be
            given if all did, to take keys and values from.
        mask: Of this forward pass.
        behind: How many of the prefix tokens stand behind the patch tokens, where all tokens go through the block.
        key_bias: Of the compact set; None where nothing is added.
        images: `B`; None: attention logits have an axis for images.
    """

    def __init__(
        self,
        prefix: int,
        readout: int,
        partition: Partition | None,
        observe: bool,
        received: bool = False,
        block: str = "a patched block",
        full_grid: FullGrid | None = None,
        everything: Tensor | None = None,
        mask: Mask | None = None,
        behind: int = 0,
        key_bias: KeyBias | None = None,
        images: int | None = None,
    ) -> None:
        self._images = images
        self.behind = behind
        # A compact set has no rows of tokens that are left out.
        self._mask = mask.whole if mask is not None and partition is None else None
        if partition is None and mask is not None and mask.left_out is not None:
            key_bias = KeyBias(added(~mask.left_out, torch.float32))
        self.key_bias = key_bias
        """What is added to the logits of attention to each token."""
        self.prefix = prefix
        self.readout = readout
        self.partition = partition
        self.observe = observe
        self.received = received
        self.block = block
        self.full_grid = full_grid
        self.everything = everything
        self.used = False
        """Whether an attention core called."""
        # A compact set begins with the prefix tokens.
        self._observed = Observed(prefix, readout, 0 if partition is not None else behind, key_bias)
        self._sizes_added = False

    def class_attention(self) -> Tensor:
        """`(B, M)` float32, the mean over the block's attention cores."""
        return self._observed.mean()

    def asking(self, query: Tensor) -> Tensor:
        """Of queries `(B, H, M, D)` those of the tokens that go through the block, where only the prefix tokens do."""
        return query[:, :, : self.prefix]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Stands where the block calls `scaled_dot_product_attention`; `attn_mask` is a position bias.

        Args:
            query: `(B, H, M, D)` or `(B * H, M, D)`, key and value likewise; `P` in place of `M` where only the prefix
                tokens go through.
        """
        if is_causal:
            raise UnsupportedInputError(f"causal attention in {self.block}: slow and fast tokens have no order")
        if query.dim() == 3 and self._images is not None:
            query, key, value = (each.unflatten(0, (self._images, -1)) for each in (query, key, value))
            if attn_mask is not None and attn_mask.dim() == 3 and attn_mask.shape[0] != 1:
                attn_mask = attn_mask.unflatten(0, (self._images, -1))
            return self.attend(query, key, value, attn_mask, dropout_p, is_causal, scale, **kwargs).flatten(0, 1)
        self._check_images(query.shape[0])
        bias = self.prepare(query, key, attn_mask, scale)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, dropout_p=dropout_p, scale=scale, **kwargs
        )

    def multi_head(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Stands where a block calls `multi_head_attention_forward`."""
        return multi_head(self.attend, self.block, *args, **kwargs)

    def prepare(
        self, query: Tensor, key: Tensor, bias: Tensor | None = None, scale: float | None = None
    ) -> Tensor | None:
        """Observe the class attention where it is wanted.

        Args:
            query: `(B, H, M, D)`, key likewise.
            bias: Position bias for all tokens, broadcastable to `(B, H, T, T)`.
            scale: Factor on the logits; None: `D ** -0.5`.

        Returns:
            What to add to the logits of the compact set, broadcastable to `(B, H, M, M)`, or None.
        """
        self.used = True
        if bias is not None and bias.dtype == torch.bool:
            raise UnsupportedInputError(
                f"a boolean attention mask inside {self.block}: slow and fast tokens are chosen among all tokens, so "
                "attention can't be masked. Use evopatch.set_keep_ratio(model, 1.0), or leave the model unpatched"
            )
        given = own = bias
        if bias is not None:
            own = bias[(None,) * (4 - bias.dim())]
        bias = self._asking_of(self._bias(own, query))
        if self.observe:
            seen = bias if self._mask is None else self._asking_of(self._without_left_out(own, query))
            self._observed.queries(query, key, default_scale(query) if scale is None else scale, seen)
        return given if bias is own else bias  # as many axes as it had choose torch's kernel

    def add_position_bias(self, logits: Tensor, bias: Tensor) -> Tensor:
        """Stands where a block adds a position bias to its logits before it calls `softmax`: adds log sizes, too.

        Args:
            logits: `(B, H, M, M)`.
            bias: For all tokens, `(H, T, T)`.

        Returns:
            `(B, H, M, M)`.
        """
        if self.partition is None:
            return logits + bias
        merged = self._bias(bias.unsqueeze(0), bias)
        assert merged is not None
        self._sizes_added = True
        return merged.add_(logits) if merged.dtype == logits.dtype else logits + merged

    def softmax(
        self,
        logits: Tensor,
        dim: int = -1,
        dtype: torch.dtype | None = None,
        _stacklevel: int = 3,
        module: nn.Module | Shown | None = None,
        by_token: bool = False,
    ) -> Tensor:
        """Stands where a block takes the softmax of its `(B, H, M, M)` or `(B * H, M, M)` attention logits, maybe by an
        `nn.Softmax`; or where it wants, `by_token`, the weight of one token of each group."""
        self.used = True
        if logits.dim() == 3 and self._images is not None and module is None:
            by_head = logits.unflatten(0, (self._images, -1))
            return self.softmax(by_head, dtype=dtype, by_token=by_token).flatten(0, 1)
        if logits.dim() != 4:
            raise UnsupportedInputError(
                f"attention logits {tuple(logits.shape)} in {self.block}: expected four axes (B, H, T, T), or three "
                "(B * H, T, T) and no nn.Softmax. Leave the model unpatched, or write the attention so"
            )
        self._check_images(logits.shape[0])
        observes_logits = self.observe and not self.readout and not self.received
        if observes_logits and self._mask is not None:
            self._observed.logits(self._without_left_out(logits.detach(), logits))
        bias = None if self._sizes_added else self._bias(None, logits)
        if bias is not None:
            logits = logits + bias
        if observes_logits and self._mask is None:
            self._observed.logits(logits.detach())
        own: nn.Module | None = module._evo_module if isinstance(module, Shown) else module
        if own is not None and self.partition is None:
            probabilities: Tensor = own(logits)
        else:
            probabilities = logits.softmax(dim, dtype=dtype)
        del logits  # may be the largest tensor of a block
        if self.observe and (self.readout or self.received):
            self._observed.probabilities(probabilities.detach())
        if by_token:
            sizes = self._sizes(probabilities)
            return probabilities if sizes is None else probabilities / sizes.unsqueeze(2)
        if own is None or self.partition is None or self.full_grid is None or not self.full_grid.wants(own):
            return probabilities
        # Logits of the attention between all tokens, but for a number per query.
        shown = self.partition.shown(self.behind)
        seen: Tensor = own(spread_attention(probabilities, shown).log())
        return unspread_attention(seen, shown)

    def counted(self, values: Tensor) -> Tensor:
        """`(B, H, M, D)` values, as often as their groups have tokens."""
        sizes = self._sizes(values)
        return values if sizes is None else values * sizes.unsqueeze(3)

    def _sizes(self, like: Tensor) -> Tensor | None:
        """`(B, 1, M)`, of the groups; None where every token is one."""
        if self.partition is None or self.key_bias is None:
            return None
        return self.key_bias.exact.exp().unsqueeze(1).to(like.dtype)

    def _bias(self, bias: Tensor | None, like: Tensor) -> Tensor | None:
        if bias is not None and self.partition is not None:
            bias = merge_bias(bias, self.partition).to(like.dtype)
        if self.key_bias is None:
            return bias
        if self._mask is not None:
            mask = added(self._mask, like.dtype)
            return mask if bias is None else bias + mask
        key_bias = self.key_bias.of(like)
        # In place: the merged bias is nobody else's, and may be the largest tensor of a block.
        return key_bias if bias is None else bias.add_(key_bias)

    def _without_left_out(self, values: Tensor | None, like: Tensor) -> Tensor:
        """Logits, or what is added to them, with the least for tokens that are left out, whoever asks.

        What a mask says to queries that are left out themselves, maybe minus infinity, would make of their share in the
        mean query, which is 0, no number at all.
        """
        assert self.key_bias is not None
        key_bias = self.key_bias.of(like)
        return key_bias if values is None else values + key_bias

    def _check_images(self, attending: int) -> None:
        if self._images is not None and is_fixed(attending) and is_fixed(self._images) and attending != self._images:
            raise UnsupportedInputError(
                f"attention over {attending} images in {self.block}, where {self._images} go through it, as of a drop "
                "path that leaves images of a batch out: expected all of them. Use a drop path that sets what a block "
                "adds to 0, as timm's DropPath, or none"
            )

    def _asking_of(self, bias: Tensor | None) -> Tensor | None:
        """Its rows for the queries there are, where only the prefix tokens go through."""
        if self.everything is None or bias is None or bias.shape[-2] == 1:
            return bias
        return bias[:, :, : self.prefix]
