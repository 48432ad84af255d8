"""One forward pass of a patched host: what its blocks are told, by index, so that a recomputed block finds its own.

A patched host runs its *own* forward. Where a host passes keyword arguments on to its blocks, the pass travels in them.
Elsewhere the forward runs on a view of the host whose blocks are called with the pass (`walk.py`). Either way it lives
in a local variable: threads, nested forwards, and several forwards before one backward don't share any.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..algorithm.rows import exporting
from ..errors import UnsupportedInputError
from ..rewrite.classes import Steered
from .hooks import is_recomputed, wants_tokens
from .host_state import HostState

Value = TypeVar("Value")


class ForwardPass(ABC):
    """Common to tokens and windows.

    Args:
        state: The host's.
        compact: Whether the code between the blocks can do with the compact set.
    """

    def __init__(self, state: HostState, compact: bool = True) -> None:
        # Taken once: a checkpointed block is recomputed in backward, maybe after the settings changed.
        now = state.settings
        if torch.compiler.is_compiling() and not exporting():
            state.compiled = True  # done anew whenever compiled code runs
        self.name, self.spec, self.plans, self.active = state.name, state.spec, now.plans, now.active
        self._keep_ratios, self._begins = now.keep_ratios, now.begins
        self.given: dict[int, Tensor] = {}
        """By block what its first module works on, where the host adds that to what the module gives."""
        self.modules: list[nn.Module] = []
        """What the host will call, in order."""
        self.representative, self.importance = now.config.representative, now.config.importance
        self.look_ahead = now.config.look_ahead
        self.blocks, self.stage_of, self.index_of = state.blocks, state.stage_of, state.index_of
        self.around_blocks = state.around_blocks
        self.grid: tuple[int, int] | None = None
        """Rows and columns of the patch tokens that the images make, where that is known before the blocks run."""
        self.depth = 0
        """How many blocks there are; pruned models have fewer than were patched."""
        self.everything_seen = state.full_grid > 0
        """Every module in a block is called on all tokens."""
        self.hooks_see = self.everything_seen
        """Modules in a block that have hooks are called on all tokens."""
        self.compact = compact and not state.foreign and not self.everything_seen
        """Inside a run the compact set goes from block to block. False: each takes and returns the full grid."""
        self.reads_prefix = False
        """Nothing but the prefix tokens of what the last block returns is read."""
        if state.passes is not None:
            state.passes.append(self)

    def begin(self, blocks: Iterable[nn.Module], followers: Iterable[nn.Module] = ()) -> None:
        """Before the first block runs.

        Args:
            blocks: What the host will call; of blocks of several modules the first ones.
            followers: The other modules of such blocks.
        """
        self.modules = list(blocks)
        blocks = [*self.modules, *followers]
        if self.spec.adds and torch.compiler.is_compiling():
            self.compact = False  # see `walk.Added`
        # A wrapper around a block, such as torch's checkpoint_wrapper, may run the block again by itself.
        if any(not isinstance(block, Steered) or is_recomputed(block) for block in blocks):
            self.compact = False
        # Under torch.compile it would be done, and guarded, for every module.
        if self.active and not torch.compiler.is_compiling() and any(wants_tokens(block) for block in blocks):
            self.hooks_see = True
            self.compact = False
        if self.reads_prefix and self.modules and wants_tokens(self.modules[-1]):
            self.reads_prefix = False

    def keep_ratio(self, index: int) -> float:
        """Of a block's plan."""
        ratio = self._keep_ratios[index]
        return float(ratio) if isinstance(ratio, str) else ratio

    @abstractmethod
    def run(self, index: int, block: Any, *args: Any, **kwargs: Any) -> Any:
        """One block, instead of its own forward and inside its call.

        Args:
            index: Its place, from 0.
            block: The block itself.
            *args: What its host calls it with.
            **kwargs: The same.
        """

    def run_begin(self, index: int) -> int:
        """The block that selects the tokens that go through a block."""
        return self._begins[index]

    def before(self, index: int, values: Mapping[int, Value], begin: int = 0) -> Value | None:
        """What is there by the last block before one, not before `begin`; somebody's code may leave blocks out."""
        return next((values[i] for i in range(index - 1, begin - 1, -1) if i in values), None)

    def leave(self, index: int, x: Tensor) -> Tensor:
        """After a block and the modules that belong to it."""
        return x

    def refuse(self, name: str, index: int) -> None:
        """An input that masks tokens, and isn't the one that may.

        Raises:
            UnsupportedInputError: Unless every block runs as unpatched.
        """
        if self.active:
            raise UnsupportedInputError(
                f"{name} was passed to the patched model, at block {index} of '{self.name or 'model'}': slow "
                "and fast tokens are chosen among all tokens, so attention between them can't be masked"
                + (f" (a key padding mask in {self.spec.mask} is honoured)" if self.spec.mask else "")
                + ". Leave it out, or use "
                "evopatch.set_keep_ratio(model, 1.0) or evopatch.remove(model) for this call. (What has one entry per "
                "patch token, as a rotary table, is named in token_inputs where blocks= is.)"
            )
