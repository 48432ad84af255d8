"""Blocks that are lists of parts, which the model calls one by one: `x = attn(x) + x`, then `x = ff(x) + x`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..forward.spec import Block
from ..rewrite.classes import host_class
from ..rewrite.tracing import TraceSpec, attention_cores
from ..rewrite.walking import adds_parts


def parts(path: str, container: Any) -> Iterable[Block]:
    """The paths of every block's parts.

    Args:
        path: Of the container, in the host.
        container: Of lists of parts.
    """
    for name, block in container._modules.items():
        yield tuple(f"{path}.{name}.{part}" for part in block._modules)


def check_parts(host: nn.Module, path: str, blocks: Mapping[str, Any]) -> None:
    """
    Args:
        host: Whose code walks over the container.
        path: Of the container in it.
        blocks: What is in the container, by qualified name.

    Raises:
        UnsupportedModelError: Unless every block is a list of parts of which the first one alone attends, and the host
            adds up what they give.
    """
    for name, block in blocks.items():
        attends = [bool(attention_cores(part, TraceSpec())) for part in block] if len(block) else []
        if not isinstance(block, nn.ModuleList) or attends != [True] + [False] * (len(block) - 1) or len(block) < 2:
            raise UnsupportedModelError(
                f"{name} is a {type(block).__name__} of which the parts {[i for i, own in enumerate(attends) if own]} "
                "hold attention: expected a list of parts of which the first one does, and no other"
            )
    if not adds_parts(host_class(host), path.rpartition(".")[2]):
        raise UnsupportedModelError(
            f"{type(host).__name__} calls the parts of the blocks in {path!r} one by one, and not as `for attn, ff in "
            f"self.{path.rpartition('.')[2]}: x = attn(x) + x; x = ff(x) + x`, with the tokens as the only argument: "
            "what it does in between can't be run on chosen tokens. Put it into a module's forward, (B, T, C) to "
            "(B, T, C), with the same names inside so that checkpoints fit"
        )


class Summed(nn.Module):
    """A block's parts with what the host adds, to try it.

    Args:
        parts: Its own.
    """

    def __init__(self, parts: nn.ModuleList) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        """`(B, T, C)` to the same."""
        for part in self.parts:
            x = part(x) + x
        return x
