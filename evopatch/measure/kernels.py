"""Which attention kernels a forward uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_KERNELS = {"flash": "flash", "efficient": "memory-efficient", "cudnn": "cuDNN", "fused_attention": "fused"}
"""What is in the names of torch's operators, and what torch's documentation calls them."""
_MATERIALISED = "materialised"
"""A softmax of all logits: torch's "math" kernel, and models that write their attention out."""


@torch.no_grad()
def attention_kernels(call: Callable[[], object]) -> str:
    """The kernels of a call, without gradients, in order of their first use and joined by `+`."""
    seen = _Seen()
    with seen:
        call()
    return " + ".join(seen.found) or "none"


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "scaled_dot_product" in name:
            kernel = next((known for part, known in _KERNELS.items() if part in name), name)
            self._add(kernel)
        elif name in ("_softmax", "_safe_softmax") and _is_square(args[0]):
            self._add(_MATERIALISED)
        return func(*args, **(kwargs or {}))

    def _add(self, kernel: str) -> None:
        if kernel not in self.found:
            self.found.append(kernel)


def _is_square(logits: torch.Tensor) -> bool:
    """Attention between all tokens, not that of a class token."""
    return logits.dim() >= 3 and logits.shape[-1] == logits.shape[-2] > 1
