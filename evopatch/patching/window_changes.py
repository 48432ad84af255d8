"""The changes to a windowed block, the same in every library."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..errors import UnsupportedModelError
from ..forward.block import TappedAttention
from ..forward.host_state import HostState
from ..forward.window_blocks import SlowFastWindowBlock, WindowedBlocks
from ..rewrite.alike import fingerprint
from ..rewrite.classes import Steered
from ..rewrite.graph import generate_core
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
    changes = [Change(block, SlowFastWindowBlock, own)]
    if kind.traced:
        return [*changes, _traced(attention, f"{name}.{kind.attention}", state)]
    changes.append(Change(attention, Steered, {}))
    return changes + [Change(attention.get_submodule(path), Steered, {}) for path in kind.inside_attention]


def _traced(attention: nn.Module, name: str, state: HostState) -> Change:
    key, trace = ("attention", fingerprint(attention)), state.spec.trace
    if key not in state.generated:
        state.generated[key] = generate_core(attention, name, trace)
    return Change(
        attention, TappedAttention, {"_evo_name": name, "_evo_trace": trace, "_evo_code": state.generated[key]}
    )


def common_window(blocks: Sequence[tuple[str, nn.Module]], grid: tuple[int, int]) -> int:
    """The side of the windows that all blocks with a `window_size` have.

    Of blocks that all attend over the whole map: that of windows that fill it, of at most `_LARGEST` by as many tokens,
    since it only says which tokens may share a group; or what SAM has.

    Args:
        blocks: With their fully qualified names; their `window_size` is 0 where they attend over the whole map.
        grid: Rows and columns of the map, for images of the model's own size.

    Raises:
        UnsupportedModelError: If they have windows of several sizes.
    """
    sizes: dict[int, str] = {}
    for name, block in blocks:
        sizes.setdefault(int(block.window_size), name)  # type: ignore[arg-type]
    sizes.pop(0, None)
    if len(sizes) > 1:
        raise UnsupportedModelError(
            "windows of several sizes, "
            + " and ".join(f"{size} in {name}" for size, name in sizes.items())
            + ": expected one, as a run of blocks has tokens matched inside the same windows. Leave the model unpatched"
        )
    if sizes:
        return next(iter(sizes))
    filling = (side for side in range(_LARGEST, 3, -1) if grid[0] % side == 0 and grid[1] % side == 0)
    return next(filling, _OF_SAM)


_LARGEST = 16
_OF_SAM = 14
