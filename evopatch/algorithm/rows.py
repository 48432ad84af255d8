"""Sums over the tokens of every row of a compact set, and sizes that stay variables in an exported program."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_STEPS = 2**18
"""So fine are shares as whole numbers. Square roots of `n` shares that add up to 1 are `n ** 0.5` together at most, of
4096 tokens less than `2 ** 24` steps."""


def exporting() -> bool:
    """Whether operators are recorded for another runtime: by `torch.export`, `torch.jit.trace`, an ONNX exporter."""
    # By its flag: torch.compile takes `torch.compiler.is_exporting()` for true before torch 2.13. torch 2.6 has none.
    flag: bool = getattr(torch.compiler, "_is_exporting_flag", False)
    return flag or torch.jit.is_tracing()  # type: ignore[attr-defined]


def in_forward_mode() -> bool:
    """Whether derivatives in forward mode are asked for, as by `torch.func.jvp`."""
    inside: bool = torch.autograd.forward_ad._current_level >= 0
    return inside


def by_product(values: Tensor) -> bool:
    """Whether sums into repeated rows are taken as a product with a matrix of ones and zeros.

    Recorded for another runtime, as several don't know such sums, or take them wrongly (TorchScript's ONNX exporter,
    OpenVINO, Core ML, TensorRT). On accelerators and compiled, as the sums are atomic additions there: slower, and not
    the same to the bit in two runs. In half precision, as the product sums in float32. In eager mode on the CPU the
    sums take less time.
    """
    recorded = exporting() or torch.compiler.is_compiling()
    return recorded or values.device.type != "cpu" or values.element_size() < 4


def on_accelerator(values: Tensor) -> bool:
    """Whether operators run now, and not on the CPU."""
    return values.device.type != "cpu" and not exporting()


def filled_up(values: Tensor, axis: int = -1) -> Tensor:
    """On accelerators as many zeros along an axis, counted from the last, as make it a multiple of eight.

    Attention with biases, and matrix units, take up to six times as long where rows begin at odd places.

    Args:
        values: Of any shape.
        axis: Below zero.
    """
    number = values.shape[axis]
    if not on_accelerator(values) or not is_fixed(number) or not number % 8:
        return values
    return F.pad(values, (0, 0) * (-1 - axis) + (0, -number % 8))


def aligned(values: Tensor) -> Tensor:
    """The same values, on accelerators in rows along the last axis that begin at multiples of eight."""
    wide = filled_up(values)
    return values if wide is values else wide[..., : values.shape[-1]]


def written(values: Tensor) -> Tensor:
    """The same values, contiguous. Compiled for accelerators they are in memory, too.

    TorchInductor reads a slice through wherever it is used, and no kernel that does has its fast way of adding over
    channels: two blocks on 256 images of 149 rows take 0.87 ms where a slice comes first, 0.73 after a copy of it.
    """
    compiling = torch.compiler.is_compiling()
    # Whether they are contiguous already depends on the number of rows, and compiled code would be for one answer.
    values = values.clone(memory_format=torch.contiguous_format) if compiling else values.contiguous()
    if compiling and on_accelerator(values) and not values.requires_grad:
        return values.as_strided(values.shape, values.stride())
    return values


def members(group: Tensor, rows: int) -> Tensor:
    """`(..., T)` row numbers to `(..., rows, T)` bool: which tokens each row has."""
    return group.unsqueeze(-2) == torch.arange(rows, device=group.device).unsqueeze(-1)


def _kept(values: Tensor, own: Tensor) -> Tensor:
    # Not `torch.where`, which Core ML knows of two tensors only, nor `masked_fill`, which doesn't broadcast there.
    return values * own.to(values.dtype)


def whole(shares: Tensor) -> Tensor:
    """Shares of at most 1 as whole numbers, at least 1.

    float32 holds their sums exactly, and accelerators add in another order in every run. A recorded program adds by a
    product instead, and may compute in half precision, which has no such numbers.
    """
    return shares if exporting() else (shares * _STEPS).round().clamp_min(1.0)


def row_sums(group: Tensor, rows: int, *values: Tensor) -> list[Tensor]:
    """Sums of one whole number per token: row numbers and values `(B, T)` to one `(B, rows)` for each of the values."""
    if exporting():
        own = members(group, rows)
        return [_kept(value.unsqueeze(-2), own).sum(-1) for value in values]
    empty = values[0].new_zeros(group.shape[0], rows)
    return [empty.scatter_add(1, group, value) for value in values]


def weighted_row_sums(values: Tensor, weight: Tensor, group: Tensor, rows: int) -> Tensor:
    """Weighted sums of one vector per token.

    Args:
        values: `(B, T, C)`.
        weight: `(B, T)`.
        group: `(B, T)` row numbers.
        rows: How many there are.

    Returns:
        `(B, rows, C)`.
    """
    batch, _, channels = values.shape
    weight = weight.to(values.dtype)
    if not by_product(values):
        row, flat = flat_rows(group, rows), values.reshape(-1, channels)
        if _differentiated_otherwise(values, weight):
            sums = values.new_zeros(batch * rows, channels).index_add(0, row, flat * weight.reshape(-1, 1))
        elif values.requires_grad and torch.is_grad_enabled():
            sums = _Bags.apply(flat, weight.flatten(), row, batch * rows)
        else:
            sums = _bags(flat, weight.flatten(), row, batch * rows)
        return sums.view(batch, rows, channels)
    device = values.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        if exporting():
            return _kept(weight.unsqueeze(1), members(group, rows)) @ values
        # In pieces that need less memory than a block's MLP, however many tokens there are.
        if not is_fixed(rows) or rows <= 2 * channels:
            return _product(values, weight, group, rows)
        pieces = []
        for first in range(0, rows, 2 * channels):
            number = min(2 * channels, rows - first)
            own = torch.where((group >= first) & (group < first + number), group - first, number)
            pieces.append(_product(values, weight, own, number + 1)[:, :number])
        return torch.cat(pieces, dim=1)


def _product(values: Tensor, weight: Tensor, group: Tensor, rows: int) -> Tensor:
    # Matrix units are at their best where the numbers side by side are a multiple of eight.
    shares = weight.new_zeros(*group.shape, rows + -rows % 8).scatter(2, group.unsqueeze(2), weight.unsqueeze(2))
    return (shares.transpose(1, 2) @ values)[:, :rows]


def _differentiated_otherwise(values: Tensor, weight: Tensor) -> bool:
    """Whether more is asked for than a gradient of the values: `torch.func`, forward mode, or one of the weights."""
    return in_forward_mode() or weight.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(values)


def _bags(values: Tensor, weight: Tensor, row: Tensor, rows: int) -> Tensor:
    """The same of vectors `(T, C)`: `(rows, C)`. In a third of the time of `index_add`, without a second `(T, C)`."""
    row, tokens = row.sort(stable=True)
    first = torch.searchsorted(row, torch.arange(rows, device=row.device))
    return F.embedding_bag(tokens, values, first, mode="sum", per_sample_weights=weight.index_select(0, tokens))


class _Bags(torch.autograd.Function):
    """`_bags` with a gradient of the values, which has one itself: that of `embedding_bag` has none."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, row: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(weight, row)
        return _bags(values, weight, row, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        weight, row = ctx.saved_tensors
        return gradients[0].index_select(0, row) * weight.unsqueeze(-1), None, None, None


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
    mode says. They stay small, as torch's exporter by TorchScript divides constants in single precision.
    """
    billionths = int(ratio * 10**9 + 0.5)
    # Not by `divmod`, which torch.compile has for no symbols.
    thousandths, rest = billionths // 10**6, billionths % 10**6
    share = number * thousandths
    if rest:  # as one divides by hand, three places at a time
        millionths, last = rest // 1000, rest % 1000
        share += (number * millionths + number * last // 1000) // 1000
    return (share + 500) // 1000


def limited(number: int, low: int, high: int) -> int:
    """`number`, but at least `low` and at most `high`; any of them may be a size that an exported program computes."""
    sizes: tuple[Any, ...] = (number, low, high)
    if any(isinstance(size, Tensor) for size in sizes):  # sizes under torch.jit.trace
        traced: Any = torch.minimum(torch.maximum(*map(torch.as_tensor, (number, low))), torch.as_tensor(high))
        return traced  # type: ignore[no-any-return]
    if all(is_fixed(size) for size in sizes):
        # torch.compile before torch 2.12 can't follow the functions below with numbers.
        return min(max(number, low), high)
    bounded: Any = torch.sym_min(torch.sym_max(number, low), high)
    return bounded  # type: ignore[no-any-return]


def is_fixed(size: int) -> bool:
    """Whether a size is known while a program is recorded."""
    return isinstance(size, int)
