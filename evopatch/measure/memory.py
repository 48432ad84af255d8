"""How much memory a forward needs: at its peak, and kept for the backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes in use at any moment of a call, without what was in use before it, such as weights and input.

    On an accelerator by its allocator. On the CPU, whose allocator keeps no such figure, by the sizes of the tensors
    that operators return, for as long as they live: scratch memory inside an operator isn't seen there.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = int(torch.cuda.memory_allocated(device))
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    live = _LiveTensors()
    with live:
        call()
    return live.peak


class _LiveTensors(TorchDispatchMode):
    """Sums the storages of all tensors made while it is on, until each is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._bytes = 0
        self._seen: dict[int, object] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        # What is there before the first operator that uses it isn't made by the call.
        known = {id(storage) for storage in _storages((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            key = id(storage)
            if key not in known and key not in self._seen:
                size = storage.nbytes()
                self._seen[key] = weakref.finalize(storage, self._free, key, size)
                self._bytes += size
        self.peak = max(self.peak, self._bytes)
        return out

    def _free(self, key: int, size: int) -> None:
        self._bytes -= size
        del self._seen[key]


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_iter(values) if isinstance(value, Tensor)]


def saved_for_backward(model: nn.Module, image: Tensor, blocks: Sequence[str]) -> tuple[int, list[int]]:
    """Bytes that a forward keeps for the backward pass, weights and input left out: in all, and by block.

    What several operators keep is counted once, for the first of them.

    Args:
        model: Whose parameters take gradients.
        image: `(B, 3, height, width)`.
        blocks: Paths of modules in the model.
    """
    counted = {tensor.untyped_storage().data_ptr() for tensor in [image, *model.parameters(), *model.buffers()]}
    kept: list[Tensor] = []  # as long as they live, no other tensor gets their storage
    sums = dict.fromkeys(["", *blocks], 0)
    inside = [""]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            kept.append(tensor)
            sums[inside[-1]] += storage.nbytes()
        return tensor

    def leave() -> None:
        inside.pop()

    handles = []
    for name in blocks:
        block = model.get_submodule(name)
        handles.append(block.register_forward_pre_hook(lambda *_, name=name: inside.append(name)))
        handles.append(block.register_forward_hook(lambda *_: leave()))
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    return sum(sums.values()), [sums[name] for name in blocks]
