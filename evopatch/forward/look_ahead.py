"""What later blocks would attend to, by their own weights, on the tokens as they are now."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..algorithm.importance import default_scale, detached, fold, folded_attention
from ..rewrite.linear_map import along, at_hand, comes_here, given, is_here
from ..rewrite.projections import Projections
from ..rewrite.quiet import at_rest
from .block import SlowFastBlock, attention_of, layer_norm_of, seen_tokens, unwrapped

Queries: TypeAlias = dict[float, list[Tensor]]
"""Folded queries `(H, B R, C)`, one per block, by the scale of their logits; `R` rows are read of every image."""


def can_look_ahead(blocks: Iterable[nn.Module]) -> bool:
    """Whether `Look.ahead` will find something, whatever the tokens."""
    return any(_can_be_read(*each) for each in _readable(blocks))


def _can_be_read(block: Any, attention: nn.Module, projections: Projections) -> bool:
    norm, way = layer_norm_of(block), list(_read(block, attention, projections))
    there = norm is None or comes_here((norm.weight, norm.bias), way)
    return there and projections.can_be_had(attention, way)


def _readable(blocks: Iterable[nn.Module]) -> Iterator[tuple[Any, Any, Projections]]:
    """Those with one attention module whose queries and keys are linear in the tokens: both, and how they are made."""
    for wrapped in blocks:
        block = unwrapped(wrapped, SlowFastBlock)
        attention = None if block is None else attention_of(block)
        if attention is not None and attention._evo_code.projections is not None:
            yield block, attention, attention._evo_code.projections


def _read(block: Any, attention: nn.Module, projections: Projections) -> Iterator[nn.Module]:
    """The modules that hold what is read of a block, and those they are in, outermost first."""
    yield from along(block, block._evo_cores[0])
    yield from along(attention, projections.query.path)
    yield from along(attention, projections.key.path)
    if block._evo_metric.norm is not None:
        yield from along(block, block._evo_metric.norm)


class Look:
    """At all tokens, before a block that selects.

    Args:
        x: `(B, T, C)`.
        inputs: What the block gets beside them.
        prefix: `P`.
        readout: How many of the first prefix tokens the head reads; 0 where it averages the patch tokens.
        left_out: `(B, T)` bool, tokens that no other attends to.
    """

    def __init__(
        self, x: Tensor, inputs: dict[str, Any], prefix: int, readout: int, left_out: Tensor | None = None
    ) -> None:
        self._left_out = left_out
        self._x, self._inputs, self._prefix, self._readout = detached(x), inputs, prefix, readout
        self._channels = int(x.shape[-1])  # a number also under torch.jit.trace
        self._asking = self._rows_read(self._x)
        # Normed tokens, and the folded queries that meet them.
        self._met: list[tuple[Tensor, Queries]] = []
        # Those that layer norms of the same epsilon share, which differ in their weights alone.
        self._shared: dict[float, tuple[Tensor, Queries]] = {}

    def features(self, block: nn.Module) -> Tensor:
        """`(B, N, C)` of length 1: the patch tokens as a block's layer norm leaves them, but for its weights."""
        norm = layer_norm_of(block)
        tokens, _ = self._normed(1e-6 if norm is None else norm.eps)
        return tokens[:, self._prefix :] * (1.0 / math.sqrt(self._channels))

    def ahead(self, blocks: Iterable[nn.Module], running: nn.Module) -> Tensor | None:
        """Mean class attention of blocks that haven't run yet.

        Args:
            blocks: Patched ones, of equally many heads.
            running: The block that selects now; may be one of them.

        Returns:
            `(B, N)` float32, or None if of no block queries and keys are linear in the tokens.
        """
        for block, attention, projections in _readable(blocks):
            if torch.compiler.is_compiling():
                self._at(block, attention, projections)
                continue
            # What the running block holds itself is here, and has to stay.
            with at_hand(module for module in _read(block, attention, projections) if module is not running):
                self._at(block, attention, projections)
        return self._attention()

    def _at(self, block: Any, attention: nn.Module, projections: Projections) -> None:
        norm = layer_norm_of(block)
        norm = None if norm is None else at_rest(norm)
        if norm is not None and not is_here((norm.weight, norm.bias)):
            return
        tokens, queries = self._meeting(block, norm)
        weights = projections.weights(attention, tokens)
        if weights is None:
            return
        asked, bias, answering = weights
        query = F.linear(self._rows(norm, tokens), asked, bias)
        query = query.view(query.shape[0], projections.heads, query.shape[1] // projections.heads)
        folded = fold(query, answering.view(projections.heads, -1, answering.shape[-1]))
        scale = default_scale(query) if projections.scale is None else projections.scale
        # The norm's bias adds the same to every token's logit.
        queries.setdefault(scale, []).append(folded if norm is None else folded * given(norm.weight, folded))

    def _rows(self, norm: nn.LayerNorm | None, tokens: Tensor) -> Tensor:
        """What the readout's queries are made of, `(B R, C)`."""
        if norm is None and self._readout:
            return self._rows_read(tokens)
        if norm is not None and self._readout:
            weight, bias = given(norm.weight, tokens), given(norm.bias, tokens)
            return F.layer_norm(self._asking, norm.normalized_shape, weight, bias, norm.eps)
        # Queries are linear in the tokens: their mean is the mean token's.
        rows = self._mean(tokens[:, self._prefix :])
        # Without torch.addcmul, which not every converter knows.
        return rows if norm is None else rows * given(norm.weight, rows) + given(norm.bias, rows)

    def _rows_read(self, tokens: Tensor) -> Tensor:
        """Those that the head reads, `(B R, C)`."""
        return tokens[:, : self._readout].reshape(-1, self._channels)

    def _mean(self, patches: Tensor) -> Tensor:
        """`(B, C)`, over those that aren't left out."""
        if self._left_out is None:
            return patches.mean(1)
        there = (~self._left_out[:, None, self._prefix :]).to(patches.dtype)
        return (there @ patches).squeeze(1) / there.sum(2).clamp_min(1.0)

    def _meeting(self, block: Any, norm: nn.LayerNorm | None) -> tuple[Tensor, Queries]:
        if norm is not None:
            return self._normed(norm.eps)
        self._met.append((seen_tokens(block, self._x, self._inputs), {}))
        return self._met[-1]

    def _normed(self, eps: float) -> tuple[Tensor, Queries]:
        if eps not in self._shared:
            self._shared[eps] = (F.layer_norm(self._x, (self._channels,), eps=eps), {})
            self._met.append(self._shared[eps])
        return self._shared[eps]

    def _attention(self) -> Tensor | None:
        """Over the patch tokens, the mean of all blocks that could be looked at."""
        looked = [(self._by_image(queries), tokens) for tokens, queries in self._met if queries]
        if not looked:
            return None
        means = [folded_attention(folded, tokens, self._left_out) for folded, tokens in looked]
        total: Any = means[0]
        if len(means) > 1:
            shares = [int(folded.shape[1]) for folded, _ in looked]
            total = sum(mean * (share / sum(shares)) for mean, share in zip(means, shares, strict=True))
        patches: Tensor = total[:, self._prefix :]
        return patches

    def _by_image(self, queries: Queries) -> Tensor:
        """`(B, Q, C)`, scaled, of those `(H, B R, C)` of all blocks."""
        scaled = [torch.cat(folded) * scale for scale, folded in queries.items()]
        rows = scaled[0] if len(scaled) == 1 else torch.cat(scaled)
        if self._readout < 2:
            return rows.transpose(0, 1)
        by_image: Tensor = rows.unflatten(1, (-1, self._readout))
        return by_image.transpose(0, 1).flatten(1, 2)
