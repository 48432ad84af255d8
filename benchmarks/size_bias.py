"""Attention between rows that stand for several tokens each: how the sizes can enter, and what that costs.

No bias is what an unpatched block has. The log sizes are a bias by key, with the kernels that take one; or they are
folded into eight more channels of queries and keys, and no bias is needed. One attention, microseconds:

    python benchmarks/size_bias.py --device cuda --dtype bfloat16 256,12,149 32,12,1045
    python benchmarks/size_bias.py 16,6,149
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from evopatch.alternating import alternate

CHANNELS = 64
PADDED = 8
"""Head sizes are multiples of it in the fastest kernels."""


def size_channels(query: Tensor, key: Tensor, log_size: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys `(B, H, M, D + 8)` whose products are the logits with the sizes: in two numbers, as one is
    coarse in half precision."""
    exact = log_size * query.shape[-1] ** 0.5
    coarse = exact.to(key.dtype)
    sizes = F.pad(torch.stack([coarse, (exact - coarse.float()).to(key.dtype)], dim=-1), (0, PADDED - 2))
    ones = F.pad(query.new_ones(2), (0, PADDED - 2)).expand(*query.shape[:3], PADDED)
    return torch.cat([query, ones], dim=-1), torch.cat([key, sizes.unsqueeze(1).expand_as(ones)], dim=-1)


def by_kernel(kernel: SDPBackend, call: Callable[[], Tensor]) -> Tensor:
    """With one kernel, or an error where it can't."""
    with sdpa_kernel(kernel):
        return call()


def measure(batch: int, heads: int, rows: int, device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, str]:
    """Median microseconds by way."""
    generator = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(batch, rows, 3, heads, CHANNELS, device=device, dtype=dtype, generator=generator)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    log_size = 2 * torch.rand(batch, rows, device=device, generator=generator)
    bias = log_size.to(dtype)[:, None, None]
    wide_query, wide_key = size_channels(query, key, log_size)
    attend, scale = F.scaled_dot_product_attention, CHANNELS**-0.5
    none, biased = partial(attend, query, key, value), partial(attend, query, key, value, bias)
    in_rows_of_eight = partial(attend, query, key, value, F.pad(bias, (0, -rows % 8))[..., :rows])
    wide = partial(attend, wide_query, wide_key, F.pad(value, (0, PADDED)), scale=scale)
    expected = attend(query.float(), key.float(), value.float(), log_size[:, None, None])
    torch.testing.assert_close(
        wide()[..., :CHANNELS].float(), expected, atol=2e-2 if dtype.itemsize < 4 else 1e-5, rtol=0
    )
    ways: dict[str, Callable[[], object]] = {"no bias": none, "bias": biased, "rows of 8": in_rows_of_eight}
    ways["channels"], ways["making channels"] = wide, partial(size_channels, query, key, log_size)
    if device.type == "cuda":
        for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            short = kernel.name.removesuffix("_ATTENTION").lower()
            ways |= {
                f"no bias, {short}": partial(by_kernel, kernel, none),
                f"bias, {short}": partial(by_kernel, kernel, biased),
            }
    found = {}
    for name, call in ways.items():
        try:
            seconds = alternate({name: lambda call=call: [call() for _ in range(20)]}, device, rounds, warm_up=3)[name]
            found[name] = f"{statistics.median(seconds) / 20 * 1e6:.0f}"
        except RuntimeError:
            found[name] = "can't"
    return found


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="+", help="images, heads and rows of the compact set: 256,12,149")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    table = Table(title=f"{device}, {arguments.dtype}, torch {torch.__version__}, microseconds")
    table.add_column("images, heads, rows")
    results = {
        shape: measure(*map(int, shape.split(",")), device, dtype, arguments.rounds) for shape in arguments.shapes
    }
    for name in next(iter(results.values())):
        table.add_column(name, justify="right")
    for shape, found in results.items():
        table.add_row(shape, *found.values())
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
