"""What shapes cost on a GPU: one call as its tensors come, and as it is done here: with rows filled up, or transposed.

Replayed from CUDA graphs, microseconds; those marked so are compiled. Channels and heads are those of a ViT-B, and in
windows of 49 places those of the first stage of a Swin-T.

    python benchmarks/gpu_shapes.py 256,197,149 32,1370,1027

Without a GPU, `--device cpu` calls each once, to show that the script works.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

CHANNELS, HEADS, QUERIES = 768, 12, 48


def filled(x: Tensor, axis: int) -> Tensor:
    """With zeros along an axis, counted from the last, to a multiple of eight."""
    return F.pad(x, (0, 0) * (-1 - axis) + (0, -x.shape[axis] % 8))


def ways(
    images: int, tokens: int, rows: int, device: str, dtype: torch.dtype
) -> dict[str, tuple[Callable[[], Tensor], ...]]:
    """By what is called: as it comes, and as it is done."""
    torch.manual_seed(0)
    shape = (images, HEADS, rows, CHANNELS // HEADS)
    query, key, value = (torch.randn(shape, device=device, dtype=dtype) for _ in range(3))
    bias = (2 * torch.rand(images, 1, 1, rows, device=device)).to(dtype)
    wide = filled(bias, -1)[..., :rows]
    x = torch.randn(images, tokens, CHANNELS, device=device, dtype=dtype)
    folded = torch.randn(images, QUERIES, CHANNELS, device=device, dtype=dtype)
    patches = x[:, 1:].contiguous()
    attend = F.scaled_dot_product_attention
    group = torch.randint(rows, (images, tokens), device=device)
    share = torch.rand(images, tokens, device=device).mul(2**18).round()
    windows = torch.randn(8 * images, 49, CHANNELS // 8, device=device, dtype=dtype)
    weight = torch.randn(CHANNELS, CHANNELS, device=device, dtype=dtype)
    merged = torch.randn(images, rows + -rows % 8, CHANNELS, device=device, dtype=dtype)
    one_by_one, sliced = torch.compile(_products, dynamic=False), torch.compile(_blocks, dynamic=False)
    return {
        f"attention with sizes, {rows} rows": (
            lambda: attend(query, key, value, bias),
            lambda: attend(query, key, value, wide),
            lambda: attend(query, key, value),
        ),
        f"a look at {tokens} tokens": (
            lambda: torch.bmm(folded, x.transpose(1, 2)),
            lambda: torch.bmm(x, folded.transpose(1, 2)),
        ),
        f"comparing {tokens - 1} tokens": (
            lambda: torch.bmm(patches, patches.transpose(1, 2)),
            lambda: torch.bmm(patches, filled(patches, -2).transpose(1, 2)),
        ),
        f"comparing {tokens - 1} tokens, compiled": (
            lambda: one_by_one(patches, False),
            lambda: one_by_one(patches, True),
        ),
        f"comparing in {8 * images} windows, compiled": (
            lambda: one_by_one(windows, False),
            lambda: one_by_one(windows, True),
        ),
        f"adding {tokens} tokens' shares": (
            lambda: _compared(group, share, rows),
            lambda: share.new_zeros(images, rows).scatter_add(1, group, share),
        ),
        f"linear layers and norms on {rows} merged rows, compiled": (
            lambda: sliced(merged, weight, rows, False),
            lambda: sliced(merged, weight, rows, True),
        ),
    }


def _products(x: Tensor, fill: bool) -> Tensor:
    """Each vector's largest product with another one of its image."""
    number, x = x.shape[1], x * 0.1
    wide = filled(x, -2) if fill else x
    return torch.bmm(wide, wide.transpose(1, 2))[:, :number, :number].amax(-1)


def _compared(group: Tensor, share: Tensor, rows: int) -> Tensor:
    """Sums over each row's tokens, in an order of their own."""
    member = group.unsqueeze(1) == torch.arange(rows, device=group.device).unsqueeze(1)
    return (share.unsqueeze(1) * member.to(share.dtype)).sum(-1)


def _blocks(merged: Tensor, weight: Tensor, rows: int, copied: bool) -> Tensor:
    """As long a chain of norms and linear layers as in two blocks, on a slice or a copy of it."""
    x = merged[:, :rows].contiguous()
    if copied:
        x = x.as_strided(x.shape, x.stride())
    for _ in range(4):
        x = x + F.linear(F.layer_norm(x, (CHANNELS,)), weight)
    return x


def microseconds(call: Callable[[], Tensor], device: str) -> str:
    """Median of replays."""
    if device == "cpu":
        call()
        return "ran"
    from triton.testing import do_bench_cudagraph

    return f"{1e3 * do_bench_cudagraph(call, rep=15):.0f}"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="+", help="images, tokens, and rows of the compact set: 256,197,149")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    asked = parser.parse_args()
    table = Table(title=f"{asked.device}, {asked.dtype}, torch {torch.__version__}, microseconds")
    for column in ("images", "call", "as it comes", "filled up, or transposed", "without a bias"):
        table.add_column(column)
    for shape in asked.shapes:
        sizes = map(int, shape.split(","))
        for name, calls in ways(*sizes, asked.device, getattr(torch, asked.dtype)).items():
            table.add_row(shape.partition(",")[0], name, *(microseconds(call, asked.device) for call in calls))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
