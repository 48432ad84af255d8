"""The class attention of one block's run, by what its attention cores compute."""

from __future__ import annotations

import torch
from torch import Tensor

from ..algorithm.bias import KeyBias
from ..algorithm.importance import class_attention


class Observed:
    """Of all attention cores of a block.

    Args:
        prefix: `P`, the number of prefix tokens.
        readout: How many of the first prefix tokens the head reads; 0 where it averages the patch tokens.
        behind: How many of the prefix tokens stand behind the patch tokens.
        key_bias: What is added to the logits of attention to each token; None where nothing is.
    """

    def __init__(self, prefix: int, readout: int, behind: int, key_bias: KeyBias | None) -> None:
        self._prefix, self._readout, self._behind, self._key_bias = prefix, readout, behind, key_bias
        self._cores: list[Tensor] = []

    def mean(self) -> Tensor:
        """`(B, M)` float32."""
        first, *others = self._cores
        return sum(others, start=first) / len(self._cores) if others else first

    def probabilities(self, probabilities: Tensor) -> None:
        """Attention `(B, H, M, M)` of the tokens that the head reads, or what each token receives."""
        probabilities = self._prefix_first(probabilities)
        if self._readout:
            observed = probabilities[:, :, : self._readout].float()
        else:
            observed = self._mean_query(probabilities).float()
        self._cores.append(observed.mean((1, 2)))

    def logits(self, logits: Tensor) -> None:
        """Attention of the mean query of `(B, H, M, M)`, as `queries` takes it: logits are linear in the query."""
        observed = self._mean_query(self._prefix_first(logits)).softmax(-1, dtype=torch.float32)
        self._cores.append(observed.mean((1, 2)))

    def queries(self, query: Tensor, key: Tensor, scale: float, bias: Tensor | None) -> None:
        """Of `(B, H, M, D)`, with what is added to the logits, broadcastable to `(B, H, M, M)`."""
        if self._behind:
            query, key = query.roll(self._behind, 2), key.roll(self._behind, 2)
        rows: slice
        share: Tensor | None
        if self._readout:
            rows, share = slice(self._readout), None
        else:
            rows, share = slice(self._prefix, None), self._share(query[:, 0]).squeeze(1)
        if bias is not None and bias.shape[-2] > 1:
            bias = bias[:, :, rows]
        self._cores.append(class_attention(query[:, :, rows], key, scale, bias, share))

    def _prefix_first(self, pairs: Tensor) -> Tensor:
        """`(B, H, M, M)`, with the prefix tokens before all others."""
        return pairs.roll((self._behind,) * 2, (2, 3)) if self._behind else pairs

    def _mean_query(self, pairs: Tensor) -> Tensor:
        """`(B, H, M, M)` to `(B, H, 1, M)`: the mean over the queries of patch tokens, by their share in the output."""
        share = self._share(pairs[:, 0]).unsqueeze(1).to(pairs.dtype)
        return share @ pairs[:, :, self._prefix :]

    def _share(self, like: Tensor) -> Tensor:
        """`(B, 1, M - P)`: each patch row's share in the pooled output, by its size."""
        if self._key_bias is None:
            rows = like.shape[1] - self._prefix
            return like.new_zeros(like.shape[0], 1, rows).softmax(-1)
        return self._key_bias.exact[:, None, self._prefix :].softmax(-1)
