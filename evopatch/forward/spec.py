"""What an architecture says about one host module: where its blocks are, and which tokens are which."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..errors import UnsupportedModelError
from ..rewrite.tracing import TraceSpec


def qualified(*parts: str) -> str:
    """A fully qualified name; empty parts are left out, as that of a model itself is."""
    return ".".join([part for part in parts if part])


Block = tuple[str, ...]
"""Paths of the modules that make up one block, from the host: the first holds the attention core, the others run after
it, one on the output of the other."""


@dataclass(frozen=True)
class Pyramid:
    """What there is to know of a host whose stages have coarser and coarser grids."""

    grids: tuple[tuple[int, int], ...]
    """Rows and columns of patch tokens in each stage."""
    kernel: int
    """Accumulated class attention goes to the coarser grid, of every second token, as the mean over a square of so many
    tokens a side."""

    def check(self, name: str) -> None:
        """
        Args:
            name: The host's, fully qualified.

        Raises:
            UnsupportedModelError: Unless each grid is half as fine as the one before.
        """
        for finer, coarser in zip(self.grids, self.grids[1:], strict=False):
            expected = tuple(-(-side // 2) for side in finer)
            if coarser != expected:
                raise UnsupportedModelError(
                    f"{name} has stages with grids of {self.grids}: expected {expected} after {finer}, every second "
                    "token, to carry class attention from one to the next. Leave the model unpatched"
                )


@dataclass(frozen=True)
class HostSpec:
    """One host module: the module whose forward walks over the attention blocks."""

    blocks: str | tuple[tuple[Block, ...], ...]
    """Path of the container that holds the blocks, such as `"blocks"`; or the blocks of each stage of a pyramid."""
    prefix: int
    """`P`: how many prefix tokens (class, distillation, registers) precede the patch tokens."""
    readout: int
    """How many of the first prefix tokens the head reads; 0 where it averages the patch tokens."""
    head_reads: int = 0
    """The same if it reads nothing else of what the last block returns; 0 where it does, or others may. See
    `rewrite.reading.rows_read`."""
    behind: int = 0
    """How many of the prefix tokens stand behind the patch tokens in the host, such as YOLOS's detection tokens: the
    first ones by `prefix` and `readout`, in all that isn't the host's own code."""
    later: int = 0
    """So many prefix tokens come in behind the blocks, before all others, such as CaiT's class token; the head reads
    these."""
    coarser: int = 1
    """Behind the blocks the grid gets so many times coarser a side, as in PVT's last stage."""
    pooled: bool = False
    """What a model of transformers gives as `pooler_output` is what is read of an image: pooled or normed as its
    tokens aren't. False: there is none, or it is one of the tokens, or a layer for another task made it."""
    appended: int = 0
    """So many more tokens does a block put behind its own for its attention alone, such as X-CLIP's message."""
    joined: int = 1
    """Some blocks attend over so many windows together, which are images of their own to all else."""
    trace: TraceSpec = field(default_factory=TraceSpec)
    token_inputs: tuple[str, ...] = ()
    """Those of the block's inputs that have one entry per patch token, such as a rotary table: averaged per group."""
    tables_by_image: bool = False
    """Those are `(B, N, D)`, not `(N, D)` or `(H, N, D)`."""
    mask: str = ""
    """The input, if there is one, that says which tokens are left out of attention: a key padding mask, as
    `scaled_dot_product_attention` takes it. Those are neither slow nor stood in for, and stay as they are in a run."""
    pads: bool = False
    """Models make such a mask of the images' own sizes. False: one that comes while a program is exported is taken to
    mask nothing, and the program checks that."""
    received: bool = False
    """With a `readout` of 0 rank patch tokens by the attention that they receive, averaged over queries and heads:
    their share in the pooled output of the attention. False: by the mean query's, which needs no attention weights."""
    taper: float | None = None
    """Of a pyramid, how much less the last run of blocks keeps than the first, see `plan.plan_blocks`."""
    start: int | None = None
    """Of several stages, the first block that selects where nothing else is asked for, see `plan.plan_blocks`."""
    caches: tuple[str, ...] = ()
    """Attributes of modules in the host that hold a dict of what they computed from their weights, and keep it when the
    weights change: such as LeViT's position biases."""
    pyramid: Pyramid | None = None
    """None for a flat model."""
    windowed: bool = False
    """Blocks attend inside windows, or some of them do."""
    coarsens: bool = True
    """Of several stages without a `pyramid`: each has a grid half as fine as the one before. False: all have one."""
    adds: bool = False
    """The host adds what every module of a block gives to what it was given: `x = attn(x) + x`, `x = ff(x) + x`."""
    channels_first: bool = False
    """Blocks take `(B, C, h, w)` instead of `(B, T, C)`."""
    tokens_first: bool = False
    """Blocks take `(T, B, C)` instead of `(B, T, C)`."""
    patch_size: tuple[int, int] | None = None
    """Height and width in pixels of an image's patches, where no adapter's `grid` says how many there are."""

    @property
    def looks_ahead(self) -> bool:
        """Whether tokens are ranked by what later blocks will attend to, where their weights can tell: in flat models,
        and in pyramids by a class token."""
        one_stage = isinstance(self.blocks, str) or len(self.blocks) == 1
        return self.readout > 0 or (self.pyramid is None and one_stage)

    def stages(self, host: nn.Module) -> tuple[tuple[Block, ...], ...]:
        """The blocks of each stage; a flat model has one."""
        if not isinstance(self.blocks, str):
            return self.blocks
        container: Any = host.get_submodule(self.blocks)
        return (tuple((f"{self.blocks}.{name}",) for name in container._modules),)
