"""Where the time of one forward goes, unpatched and patched: self time and calls of the operators, by torch.profiler.

Run it alone on the machine:

    python benchmarks/operators.py --model deit_small_patch16_224 --batch-size 1
"""

from __future__ import annotations

import argparse
import copy
from collections import Counter

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import evopatch

KINDS = {
    "linear layers": ("aten::addmm", "aten::mkldnn_convolution"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu",),
    "GELU": ("aten::gelu",),
    "copies": ("aten::copy_", "aten::cat", "aten::clone"),
    "layer norms": ("aten::native_layer_norm",),
    "batched products": ("aten::bmm", "aten::baddbmm"),
}
"""What an operator counts as; the patch embedding is a linear layer, too."""


def operators(model: nn.Module, images: Tensor) -> Counter[str]:
    """Self time in us, and calls, of one forward by kind, and of all operators together."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        model(images)
    total: Counter[str] = Counter()
    for event in profiler.key_averages():
        if event.key.startswith("aten::"):
            for kind in [*(kind for kind, keys in KINDS.items() if event.key in keys), "all operators"]:
                total[f"{kind}, us"] += event.self_cpu_time_total
                total[f"{kind}, calls"] += event.count
    return total


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--keep-ratio", type=float, default=0.5)
    parser.add_argument("--forwards", type=int, default=40, help="the mean is taken over so many of each side")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = timm.create_model(arguments.model).eval()
    images = torch.randn(arguments.batch_size, *model.pretrained_cfg["input_size"])
    sides = (model, evopatch.apply(copy.deepcopy(model), arguments.keep_ratio))
    totals: tuple[Counter[str], Counter[str]] = (Counter(), Counter())
    for side in sides:
        for _ in range(3):
            side(images)
    for _ in range(arguments.forwards):
        for side, total in zip(sides, totals, strict=True):
            total.update(operators(side, images))
    table = Table(title=f"{arguments.model}, batch {arguments.batch_size}, {torch.get_num_threads()} threads")
    for column in ("operator", "unpatched, ms", "calls", "patched, ms", "calls"):
        table.add_column(column)
    for kind in (*KINDS, "all operators"):
        row = [kind]
        for total in totals:
            row.append(f"{total[f'{kind}, us'] / arguments.forwards / 1e3:.1f}")
            row.append(f"{total[f'{kind}, calls'] / arguments.forwards:.0f}")
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
