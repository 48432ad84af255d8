"""Where the time of one forward goes in ONNX Runtime, unpatched and patched, by its own profile.

Run it alone on the machine:

    python benchmarks/onnx_operators.py --model deit_small_patch16_224 --batch-size 1
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from pathlib import Path

import onnxruntime
import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import evopatch
from evopatch.deployment.conversion import INPUT


def operators(path: Path, images: Tensor, forwards: int) -> Counter[str]:
    """Milliseconds and calls of one forward by operator, the mean over several.

    Args:
        path: An ONNX file.
        images: `(B, 3, height, width)`.
        forwards: After three that don't count.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.enable_profiling, options.profile_file_prefix = True, str(path.with_suffix(""))
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for _ in range(3 + forwards):
        session.run(None, {INPUT: images.numpy()})
    events = json.loads(Path(session.end_profiling()).read_text())
    runs = sorted(event["ts"] for event in events if event["name"] == "model_run")
    total: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= runs[3]:
            for name in (event["args"]["op_name"], "all operators"):
                total[f"{name}, ms"] += event["dur"] / forwards / 1e3
                total[f"{name}, calls"] += 1 / forwards
    return total


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--keep-ratio", type=float, default=0.5)
    parser.add_argument("--forwards", type=int, default=40, help="the mean is taken over so many of each side")
    asked = parser.parse_args()
    torch.manual_seed(0)
    model = evopatch.apply(timm.create_model(asked.model).eval(), asked.keep_ratio)
    images = torch.randn(max(2, asked.batch_size), *model.pretrained_cfg["input_size"])
    totals = []
    with tempfile.TemporaryDirectory() as folder:
        for ratio in (1.0, asked.keep_ratio):  # at 1 the unpatched model
            evopatch.set_keep_ratio(model, ratio)
            path = Path(folder) / f"{ratio:g}.onnx"
            evopatch.export(model, path, "onnx", images=images, batch_size=asked.batch_size)
            totals.append(operators(path, images[: asked.batch_size], asked.forwards))
    table = Table(title=f"{asked.model}, batch {asked.batch_size}, ONNX Runtime, {torch.get_num_threads()} threads")
    for column in ("operator", "unpatched, ms", "calls", "patched, ms", "calls"):
        table.add_column(column)
    names = {key.rpartition(",")[0] for total in totals for key in total}
    for name in sorted(names, key=lambda name: -max(total[f"{name}, ms"] for total in totals)):
        row = [name]
        for total in totals:
            row += [f"{total[f'{name}, ms']:.2f}", f"{total[f'{name}, calls']:.0f}"]
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()
