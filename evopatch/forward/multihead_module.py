"""`nn.MultiheadAttention` as the attention module of a block."""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedInputError
from .block import TappedAttention
from .tap import AttentionTap

_IGNORED = {"need_weights", "average_attn_weights"}
"""What a patched module doesn't honour: it gives no attention weights."""


class TappedMultihead(TappedAttention):
    """Mixin of a patched `nn.MultiheadAttention`. Called with `need_weights`, it gives None in their place."""

    batch_first: bool

    def _evo_run(self, tap: AttentionTap, *args: Any, **kwargs: Any) -> Any:
        named = dict(zip(self._evo_code.parameters, args, strict=False)) | kwargs
        query = named.pop("query")
        for name in ("key", "value"):
            if named.pop(name, query) is not query:
                raise UnsupportedInputError(
                    f"{self._evo_name} was called with a {name} that is another tensor than the query: expected "
                    "self-attention, as tokens are chosen to ask and to answer. Leave the model unpatched"
                )
        given = {name: value for name, value in named.items() if name not in _IGNORED}
        if self.batch_first:
            return super()._evo_run(tap, query, **given)
        out, weights = super()._evo_run(tap, query.transpose(0, 1), **given)
        return out.transpose(0, 1), weights
