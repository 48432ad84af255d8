"""What the generated code of a windowed block's attention calls, where its position bias depends on the queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..algorithm.relative_positions import Places, relative_bias, table_of
from ..algorithm.rows import aligned


class RotatedTap:
    """One block's run in one forward pass, where the block rotates by its tables.

    Args:
        log_size: `(G, R)` float32, of the rows of the compact set.
    """

    everything = None
    full_grid = None
    partition = None  # attention weights are those between the rows of the compact set

    def __init__(self, log_size: Tensor) -> None:
        self._log_size = log_size

    def prepare(self, query: Tensor, *others: Any) -> Tensor:
        """What is added to the logits, `(G, 1, 1, R)`.

        Args:
            query: `(G, H, R, D)`.
            *others: Key, position bias (there is none) and scale.
        """
        return aligned(self._log_size.to(query.dtype))[:, None, None]


class WindowTap:
    """One block's run in one forward pass.

    Args:
        places: Of the compact set.
        between: Of a length and a module's table, what stands between two of so many rows or columns, `(L, L, D)`.
    """

    everything = None
    full_grid = None

    def __init__(self, places: Places, between: Callable[[int, Tensor], Tensor]) -> None:
        self._places, self._between = places, between
        self._sizes_added = False

    def relative_bias(self, query: Tensor, rows: Tensor, columns: Tensor, *sizes: Any) -> Tensor:
        """Stands where a module makes a position bias of its queries, for the compact set.

        Args:
            query: `(G * H, R, D)`.
            rows: `(L, D)`, the module's table of what lies between two rows.
            columns: `(L, D)`.
            *sizes: Those of the map that the module takes the compact set for.

        Returns:
            `(G * H, R, R)`, log sizes included.
        """
        places = self._places
        lengths = zip(places.size, (rows, columns), strict=True)
        down, across = (table_of(self._between(length, table)) for length, table in lengths)
        self._sizes_added = True
        return relative_bias(query.unflatten(0, (places.row.shape[0], -1)), (down, across), places).flatten(0, 1)

    def add_relative_bias(self, logits: Tensor, query: Tensor, rows: Tensor, columns: Tensor, *sizes: Any) -> Tensor:
        """The same where the module adds it to its logits `(G * H, R, R)` at once."""
        return logits + self.relative_bias(query, rows, columns, *sizes)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Stands where the module calls `scaled_dot_product_attention`.

        Args:
            query: `(G * H, R, D)` or `(G, H, R, D)`, key and value likewise.
            attn_mask: The position bias.
            **kwargs: As it takes them.
        """
        bias = self._log_sizes(query) if attn_mask is None else attn_mask
        if query.dim() == 4:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, **kwargs)
        # torch has no fast kernels for three axes.
        query, key, value, bias = (x.unflatten(0, (self._places.row.shape[0], -1)) for x in (query, key, value, bias))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, **kwargs).flatten(0, 1)

    def softmax(self, logits: Tensor, dim: int = -1, dtype: torch.dtype | None = None, _stacklevel: int = 3) -> Tensor:
        """Stands where the module takes the softmax of its logits `(G * H, R, R)`."""
        if not self._sizes_added:
            logits = logits + self._log_sizes(logits)
        return logits.softmax(dim, dtype=dtype)

    def _log_sizes(self, like: Tensor) -> Tensor:
        log_size = self._places.log_size.to(like.dtype)
        if like.dim() == 4:
            return aligned(log_size)[:, None, None]
        return log_size.repeat_interleave(like.shape[0] // log_size.shape[0], dim=0).unsqueeze(1)
