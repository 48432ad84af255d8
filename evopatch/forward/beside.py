"""What a block gives beside the tokens, in a tuple with them: attention weights, or nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..algorithm.partition import Partition, spread_attention
from ..errors import UnsupportedInputError


class Beside:
    """Of one call of a block.

    Args:
        block: Fully qualified name, for errors.
        behind: How many of the prefix tokens stand behind the patch tokens.
    """

    def __init__(self, block: str, behind: int = 0) -> None:
        self._block, self._behind = block, behind
        self._kind: type | None = None
        self._others: tuple[Any, ...] = ()

    def tokens_of(self, out: Any) -> Tensor:
        """The tokens alone, of what the block gave."""
        if not isinstance(out, (tuple, list)):
            tokens: Tensor = out
            return tokens
        self._kind, (tokens, *others) = type(out), out
        self._others = tuple(others)
        return tokens

    def again(self, tokens: Tensor, partition: Partition | None) -> Any:
        """As the block gives it.

        Args:
            tokens: What takes the place of the block's.
            partition: Of the compact set that went through the block; None if all tokens did.

        Raises:
            UnsupportedInputError: If there is anything else in it than attention weights.
        """
        if self._kind is None:
            return tokens
        others = self._others if partition is None else tuple(self._spread(o, partition) for o in self._others)
        return self._kind((tokens, *others))

    def _spread(self, given: Any, partition: Partition) -> Tensor | None:
        if given is None:
            return None
        if isinstance(given, Tensor) and given.dim() == 4 and given.shape[2:] == (partition.rows,) * 2:
            return spread_attention(given, partition.shown(self._behind))
        found = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise UnsupportedInputError(
            f"{self._block} gave {found} beside its tokens: expected nothing, None, or attention weights (B, H, T, T), "
            "since anything else can't be given for all tokens where only some went through the block. Leave it out, "
            "or use evopatch.set_keep_ratio(model, 1.0)"
        )
