"""FLOPs, tokens and memory of a patched model against the unpatched one, measured on real forwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import EvoConfig
from ..errors import ConfigError
from ..patching.handle import Patched, shared_copy
from ..patching.inspect import block_maps
from .memory import peak_memory, saved_for_backward

UNPATCHED = EvoConfig(keep_ratio=1.0)
"""At which a patched model runs as it would unpatched, to the bit."""


@dataclass(frozen=True)
class BlockProfile:
    """One block, for one image: FLOPs (two per multiply-add), the patch tokens that went through one by one, and the
    bytes that its forward keeps for the backward pass."""

    flops: int
    flops_unpatched: int
    tokens: int
    tokens_unpatched: int
    activations: int
    activations_unpatched: int


@dataclass(frozen=True)
class Profile:
    """One image through a patched model and through the same model unpatched; FLOPs, two per multiply-add."""

    blocks: tuple[BlockProfile, ...]
    flops: int
    """Whole model, selection included."""
    flops_unpatched: int
    activations: int
    """Bytes that the whole model's forward keeps for the backward pass."""
    activations_unpatched: int
    memory: int
    """Peak bytes of a forward without gradients, beyond weights and input; see `measure.memory.peak_memory`."""
    memory_unpatched: int

    @property
    def ratio(self) -> float:
        """FLOPs of the whole model relative to unpatched."""
        return self.flops / self.flops_unpatched

    @property
    def blocks_ratio(self) -> float:
        """FLOPs of the blocks, selection included, relative to unpatched: all but embedding and head."""
        unpatched = sum(block.flops_unpatched for block in self.blocks)
        return (self.flops - self.flops_unpatched + unpatched) / unpatched

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self) | {"ratio": self.ratio, "blocks_ratio": self.blocks_ratio}

    def __str__(self) -> str:
        rows = [f"{'block':>5}{'tokens':>8}{'of':>6}{'GFLOPs':>9}{'of':>9}"]
        for index, block in enumerate(self.blocks):
            flops = f"{block.flops / 1e9:9.3f}{block.flops_unpatched / 1e9:9.3f}"
            rows.append(f"{index:5}{block.tokens:8}{block.tokens_unpatched:6}{flops}")
        rows.append(f"{'model':>5}{'':14}{self.flops / 1e9:9.3f}{self.flops_unpatched / 1e9:9.3f}, {self.ratio:.3f}")
        kept = f"kept for backward {self.activations / 1e6:.2f} of {self.activations_unpatched / 1e6:.2f} MB"
        return "\n".join((*rows, f"{kept}, peak {self.memory / 1e6:.2f} of {self.memory_unpatched / 1e6:.2f} MB"))


@torch.inference_mode(False)  # tensors made in it keep nothing for a backward pass
def profile(model: nn.Module, input_size: tuple[int, int, int]) -> Profile:
    """Measure one image, patched and unpatched, in eval mode.

    Args:
        model: A model that takes images and holds one patched host, or is one.
        input_size: `(channels, height, width)` in pixels.

    Raises:
        ConfigError: If `input_size` is anything else.
        NotPatchedError: If nothing in the model is patched.
        UnsupportedModelError: If several hosts in it are patched.
        DataError: If the model doesn't run on images of that size.
    """
    sizes: Any = input_size
    if not isinstance(sizes, Sequence) or len(sizes) != 3 or not all(isinstance(n, int) and n > 0 for n in sizes):
        raise ConfigError(
            f"input_size={input_size!r}: expected (channels, height, width) in pixels, as in (3, 224, 224)"
        )
    handle = Patched(model)
    model = handle.model
    parameter = next(model.parameters())
    image = torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype)
    maps = block_maps(model, image)
    names = handle.host.blocks()
    patched = _measure(handle.at(handle.config), image, names)
    unpatched = _measure(handle.at(UNPATCHED), image, names)
    profiles = [
        BlockProfile(
            flops=patched.block_flops[index],
            flops_unpatched=unpatched.block_flops[index],
            tokens=int(slow.sum()),
            tokens_unpatched=slow.numel(),
            activations=patched.block_activations[index],
            activations_unpatched=unpatched.block_activations[index],
        )
        for index, (slow, _) in enumerate(maps)
    ]
    return Profile(
        blocks=tuple(profiles),
        flops=patched.flops,
        flops_unpatched=unpatched.flops,
        activations=patched.activations,
        activations_unpatched=unpatched.activations,
        memory=patched.memory,
        memory_unpatched=unpatched.memory,
    )


def count_flops(call: Callable[[], object], parts: Mapping[str, nn.Module] | None = None) -> tuple[int, dict[str, int]]:
    """FLOPs of a call, two per multiply-add: in all, and those inside the forward of each of some modules, by name."""
    # Imports triton, a quarter of a second.
    from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

    aten: Any = torch.ops.aten
    on_cpu: dict[Any, Callable[..., int]] = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    # torch before 2.15 doesn't count them.
    missing = {operator: formula for operator, formula in on_cpu.items() if operator not in flop_registry}
    counter: Any = FlopCounterMode(display=False, custom_mapping=missing)
    counter.mod_tracker = _Inside(parts or {})
    with _no_fast_path(), counter:
        call()
    counts = counter.get_flop_counts()
    return counter.get_total_flops(), {name: sum(counts.get(name, {}).values()) for name in parts or {}}


@contextmanager
def _no_fast_path() -> Iterator[None]:
    """The fast path of `nn.MultiheadAttention` is one operator, whose FLOPs aren't counted."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


class _Inside:
    """Which of some modules runs. In place of torch's own tracker, whose hooks are on all modules of the process, so
    that another thread's forward would be taken for this one's."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        self._parts = parts
        self._handles: list[Any] = []
        self.parents = {"Global"}

    def __enter__(self) -> None:
        for name, module in self._parts.items():
            self._handles.append(module.register_forward_pre_hook(lambda *_, name=name: self.parents.add(name)))
            self._handles.append(module.register_forward_hook(lambda *_, name=name: self.parents.discard(name)))

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


@dataclass(frozen=True)
class _Measured:
    flops: int
    block_flops: list[int]
    activations: int
    block_activations: list[int]
    memory: int


def _measure(model: nn.Module, image: Tensor, blocks: list[list[str]]) -> _Measured:
    paths = [path for block in blocks for path in block]
    with torch.no_grad():
        flops, inside = count_flops(lambda: model(image), {path: model.get_submodule(path) for path in paths})
        memory = peak_memory(lambda: model(image), image.device)
    # All weights take gradients: a frozen layer would keep nothing.
    activations, kept = saved_for_backward(shared_copy(model, requires_grad=True), image, paths)
    kept_by = dict(zip(paths, kept, strict=True))
    return _Measured(
        flops,
        [sum(inside[path] for path in block) for block in blocks],
        activations,
        [sum(kept_by[path] for path in block) for block in blocks],
        memory,
    )
