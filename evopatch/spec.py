"""What an architecture says about one host module: where its blocks are, and which tokens are which."""

from __future__ import annotations

from dataclasses import dataclass, field

from .graph import TraceSpec


@dataclass(frozen=True)
class HostSpec:
    """One host module: the module whose forward walks over a run of attention blocks."""

    blocks: str
    """Path of the container that holds the blocks, such as `"blocks"` or `"encoder.layers"`."""
    prefix: int
    """`P`: how many prefix tokens (class, distillation, registers) precede the patch tokens."""
    readout: int
    """How many of the first prefix tokens the head reads; 0 where it averages the patch tokens."""
    trace: TraceSpec = field(default_factory=TraceSpec)
    token_inputs: tuple[str, ...] = ()
    """Those of the block's inputs that have one entry per patch token, such as a rotary table: averaged per group."""
