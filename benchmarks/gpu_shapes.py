"""What shapes cost on a GPU: one call as its tensors come, and with rows filled up or the product transposed.

Replayed from CUDA graphs, microseconds. Channels and heads are those of a ViT-B.

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
    }


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
