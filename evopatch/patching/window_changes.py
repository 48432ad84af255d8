"""The changes to a windowed block, the same in every library."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import UnsupportedModelError
from ..forward.block import TappedAttention
from ..forward.host_state import HostState
from ..forward.spec import qualified
from ..forward.window_blocks import SlowFastWindowBlock, WindowedBlocks
from ..rewrite.alike import fingerprint
from ..rewrite.classes import Steered
from ..rewrite.graph import generate_core
from .changes import Change
from .merge_probe import is_foreign, is_unknown
from .window_probe import check_windows


def window_block_changes(block: nn.Module, name: str, state: HostState, kind: WindowedBlocks) -> list[Change]:
    """
    Args:
        block: To be patched.
        name: Fully qualified.
        state: Its host's.
        kind: What is to know about it.

    Raises:
        UnsupportedModelError: If its attention can't be traced, or it has modules of one's own and mixes tokens outside
            of its attention (see `window_probe`), or can't be tried with them.
    """
    if kind.home:
        _check_home(block, name, kind)
    elif is_unknown(block) and (judged := ("windows", fingerprint(block))) not in state.generated:
        check_windows(block, name, kind)
        state.generated[judged] = None
    own = {"_evo_state": state, "_evo_name": name, "_evo_blocks": kind}
    attention = block.get_submodule(kind.attention)
    changes = [Change(block, SlowFastWindowBlock, own)]
    changes += [Change(block.get_submodule(path), Steered, {}) for path in kind.others]
    if kind.traced is not None:
        return [*changes, _traced(attention, f"{name}.{kind.attention}", state, kind.traced)]
    changes.append(Change(attention, Steered, {}))
    return changes + [Change(attention.get_submodule(path), Steered, {}) for path in kind.inside_attention]


def _check_home(block: nn.Module, name: str, kind: WindowedBlocks) -> None:
    for path in ("", kind.attention, *kind.others):
        part = block.get_submodule(path)
        if type(part).__module__ != kind.home:
            raise UnsupportedModelError(
                f"{qualified(name, path)} is a {type(part).__module__}.{type(part).__qualname__}: expected a class of "
                f"{kind.home}, as merged tokens go through parts of its forward. Leave the model unpatched"
            )
    unknown = [(path, module) for path, module in block.named_modules() if any(map(is_foreign, module.modules()))]
    if unknown:
        path, module = unknown[-1]  # the innermost of the last one
        raise UnsupportedModelError(
            f"{qualified(name, path)} is a {type(module).__module__}.{type(module).__qualname__}, a module of your "
            f"own: expected those of a known library in a block of {kind.home}, where nothing tells whether it "
            "mixes tokens. Leave the model unpatched"
        )


def _traced(attention: nn.Module, name: str, state: HostState, mixin: type[TappedAttention]) -> Change:
    key, trace = ("attention", fingerprint(attention)), state.spec.trace
    if key not in state.generated:
        state.generated[key] = generate_core(mixin._evo_traceable(attention), name, trace)
    return Change(attention, mixin, {"_evo_name": name, "_evo_trace": trace, "_evo_code": state.generated[key]})


def common_window(blocks: Iterable[nn.Module], grid: tuple[int, int]) -> int:
    """The side of the windows in which tokens are matched where a block attends over the whole map: those of the blocks
    that have windows, so that a run of both has one choice.

    Of blocks without any: that of windows that fill the map, of at most `_LARGEST` by as many tokens, or what SAM has.

    Args:
        blocks: Their `window_size` is 0 where they attend over the whole map.
        grid: Rows and columns of the map, for images of the model's own size.
    """
    sizes: list[Any] = [block.window_size for block in blocks if block.window_size]
    filling = (side for side in range(_LARGEST, 3, -1) if grid[0] % side == 0 and grid[1] % side == 0)
    return int(sizes[0]) if sizes else next(filling, _OF_SAM)


_LARGEST = 16
_OF_SAM = 14
