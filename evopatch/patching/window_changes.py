"""The changes to a windowed block, the same in every library."""

from __future__ import annotations

from torch import nn

from ..forward.host_state import HostState
from ..forward.window_blocks import SlowFastWindowBlock, WindowedBlocks
from ..rewrite.classes import Steered
from .changes import Change


def window_block_changes(block: nn.Module, name: str, state: HostState, kind: WindowedBlocks) -> list[Change]:
    """
    Args:
        block: To be patched.
        name: Fully qualified.
        state: Its host's.
        kind: What is to know about it.
    """
    own = {"_evo_state": state, "_evo_name": name, "_evo_blocks": kind}
    attention = block.get_submodule(kind.attention)
    changes = [Change(block, SlowFastWindowBlock, own), Change(attention, Steered, {})]
    return changes + [Change(attention.get_submodule(path), Steered, {}) for path in kind.inside_attention]
