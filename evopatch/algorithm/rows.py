"""Sums over the tokens of every row of a compact set, and sizes that stay variables in an exported program."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_SCALE = 10**9


def exporting() -> bool:
    """Whether the operators are recorded for another runtime: `torch.export`, `torch.jit.trace`, both ONNX exporters.

    Sums into repeated rows are wrong or unknown in several of those (TorchScript's ONNX exporter, OpenVINO, Core ML,
    TensorRT); a product with a matrix of ones and zeros is known to all. Eager mode keeps the sums, which take less
    time than the product.
    """
    return torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def members(group: Tensor, rows: int) -> Tensor:
    """`(..., T)` row numbers to `(..., rows, T)` bool: which tokens each row has."""
    return group.unsqueeze(-2) == torch.arange(rows, device=group.device).unsqueeze(-1)


def row_sums(values: Tensor, group: Tensor, rows: int) -> Tensor:
    """Sums of one number per token: `(B, T)` values and row numbers to `(B, rows)`."""
    if exporting():
        return (members(group, rows).to(values.dtype) * values.unsqueeze(-2)).sum(-1)
    return values.new_zeros(values.shape[0], rows).scatter_add(1, group, values)


def row_vector_sums(values: Tensor, group: Tensor, rows: int) -> Tensor:
    """Sums of one vector per token: `(B, T, C)` values and `(B, T)` row numbers to `(B, rows, C)`."""
    if exporting():
        return members(group, rows).to(values.dtype) @ values
    batch, _, channels = values.shape
    sums = values.new_zeros(batch * rows, channels)
    return sums.index_add(0, flat_rows(group, rows), values.reshape(-1, channels)).view(batch, rows, channels)


def top(values: Tensor, count: int, largest: bool = True) -> Tensor:
    """Places along the last axis of the `count` largest, or smallest, values, in no order."""
    # Core ML knows sorted ones only.
    return values.topk(count, dim=-1, largest=largest, sorted=exporting()).indices


def flat_rows(group: Tensor, rows: int) -> Tensor:
    """Row numbers into the compact sets of all images laid end to end: whole rows are copied, not single elements."""
    if is_fixed(group.shape[0]) and group.shape[0] == 1:
        return group.flatten()
    first = torch.arange(group.shape[0], device=group.device).unsqueeze(1) * rows
    return (group + first).flatten()


def rounded_share(number: int, ratio: float) -> int:
    """`number * ratio` to the nearest whole number, halves up, with `ratio` to nine decimal places.

    In whole numbers throughout, so that an exported program computes it anew for every image size, and says what eager
    mode says.
    """
    return (2 * number * int(ratio * _SCALE + 0.5) + _SCALE) // (2 * _SCALE)


def limited(number: int, low: int, high: int) -> int:
    """`number`, but at least `low` and at most `high`; any of them may be a size that an exported program computes."""
    sizes: tuple[Any, ...] = (number, low, high)
    if any(isinstance(size, Tensor) for size in sizes):  # sizes under torch.jit.trace
        traced: Any = torch.minimum(torch.maximum(*map(torch.as_tensor, (number, low))), torch.as_tensor(high))
        return traced  # type: ignore[no-any-return]
    bounded: Any = torch.sym_min(torch.sym_max(number, low), high)
    return bounded  # type: ignore[no-any-return]


def is_fixed(size: int) -> bool:
    """Whether a size is known while a program is recorded."""
    return isinstance(size, int)
