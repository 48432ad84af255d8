"""Train a timm pyramid (LeViT, PiT, PVT, Swin) on CIFAR-10 from scratch: a reference to patch without weights.

The folder that it writes is one that timm's `local-dir:` and `evopatch evaluate --model` read. Killed, it goes on from
its last epoch when called again:

    python benchmarks/train_reference.py --model levit_128s --image-size 128 --epochs 22 --mixed-precision bf16 \
        --data ../shared/data/cifar10_train.parquet --eval-data ../shared/data/cifar10_test.parquet --output levit

On a CPU one process per core is faster than one with several threads, a Swin by 1.3 on two cores; each takes its share
of the batch: `OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/train_reference.py ...`.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import random_seed
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import PILToTensor

from evopatch.progress import progress_bar
from evopatch.sources.images import open_images

PADDING = 4


class Pixels(NamedTuple):
    images: Tensor
    """`(images, 3, 32, 32)` uint8; the network gets them resized."""
    labels: Tensor


def load(path: str) -> Pixels:
    """All images of a data set, decoded once."""
    data = open_images(path, PILToTensor())
    with progress_bar(f"decoding {Path(path).name}", len(data)) as advance:
        images = []
        for index in range(len(data)):
            images.append(data[index][0])
            advance()
    return Pixels(torch.stack(images), torch.tensor(data.labels))


def augmented(images: Tensor) -> Tensor:
    """Each image moved by up to `PADDING` pixels and mirrored or not."""
    size = images.shape[-1]
    padded = F.pad(images.float(), (PADDING,) * 4, mode="reflect")
    offsets = torch.randint(0, 2 * PADDING + 1, (2, len(images), 1))
    rows, columns = torch.arange(size) + offsets[0], torch.arange(size) + offsets[1]
    columns = torch.where(torch.rand(len(images), 1) < 0.5, columns.flip(1), columns)
    batch = torch.arange(len(images))[:, None, None]
    return padded.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def prepared(images: Tensor, size: int) -> Tensor:
    """Resized and normalised as timm does for the saved configuration."""
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    resized = F.interpolate(images.float(), size=(size, size), mode="bilinear").round()
    return (resized / 255 - mean) / std


@torch.no_grad()
def top1(model: nn.Module, data: Pixels, size: int) -> float:
    """Percent, in float32."""
    model.eval()
    right = 0
    for images, labels in zip(data.images.split(256), data.labels.split(256), strict=True):
        right += int((model(prepared(images, size)).argmax(1) == labels).sum())
    return 100 * right / len(data.labels)


def train(arguments: argparse.Namespace, model: Any, output: Path) -> list[dict[str, float]]:
    """Train, with a checkpoint after every epoch; returns what the log says of each."""
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = arguments.batch_size // processes
    data, test = load(arguments.data), load(arguments.eval_data)
    optimizer = create_optimizer_v2(model, arguments.optimizer, lr=arguments.learning_rate, weight_decay=0.05)
    steps = len(data.labels) // arguments.batch_size
    schedule = CosineLRScheduler(
        optimizer, t_initial=arguments.epochs * steps, lr_min=1e-6, warmup_t=2 * steps, t_in_epochs=False
    )
    mixes = 0.5 if arguments.mixup or arguments.cutmix else 0.0
    mix = Mixup(arguments.mixup, arguments.cutmix, prob=mixes, label_smoothing=0.1, num_classes=10)
    criterion = SoftTargetCrossEntropy()
    log: list[dict[str, float]] = []
    checkpoint = output / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        log = state["log"]
    network = DistributedDataParallel(model) if processes > 1 else model
    for epoch in range(len(log), arguments.epochs):
        random_seed(epoch)  # Mixup draws from numpy; a run that goes on draws what it would have
        begin, total = time.time(), torch.zeros(())
        model.train()
        order = torch.randperm(len(data.labels))
        if rank:
            random_seed(epoch, rank * arguments.epochs)
        with progress_bar(f"epoch {epoch + 1} of {arguments.epochs}", steps) as advance:
            for step in range(steps):
                schedule.step_update(epoch * steps + step)
                rows = order[step * arguments.batch_size :][rank * share : (rank + 1) * share]
                images, targets = mix(prepared(augmented(data.images[rows]), arguments.image_size), data.labels[rows])
                # On CPUs without matrix units the gradient of fused attention takes most of a step in bfloat16.
                with sdpa_kernel(SDPBackend.MATH):
                    with torch.autocast("cpu", torch.bfloat16, enabled=arguments.mixed_precision == "bf16"):
                        logits = network(images)
                    loss = criterion(logits.float(), targets)
                    loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                total += loss.detach()
                advance()
        row = {"epoch": epoch + 1, "loss": total.item() / steps, "seconds": time.time() - begin}
        log.append(row)
        if rank:
            continue
        if (epoch + 1) % arguments.evaluate_every == 0 or epoch + 1 == arguments.epochs:
            row["top1"] = top1(model, test, arguments.image_size)
        print(json.dumps(row), flush=True)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "log": log}
        torch.save(state, output / "checkpoint.tmp")
        os.replace(output / "checkpoint.tmp", checkpoint)
    return log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a timm name")
    parser.add_argument("--model-args", type=json.loads, default={}, help="JSON, changes to its architecture")
    parser.add_argument("--image-size", type=int, default=128, help="pixels that the images are resized to")
    parser.add_argument("--data", required=True, help="CIFAR-10's training images, as a parquet file")
    parser.add_argument("--eval-data", required=True, help="its test images")
    parser.add_argument("--epochs", type=int, default=22)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--optimizer", default="adamw", help="a timm name")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--mixup", type=float, default=0.0, help="alpha of Mixup, on half of the batches")
    parser.add_argument("--cutmix", type=float, default=0.0, help="alpha of CutMix, the same")
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--evaluate-every", type=int, default=2, help="epochs")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    model_args = {**arguments.model_args, "num_classes": 10}
    if timm.get_pretrained_cfg(arguments.model).fixed_input_size:
        model_args["img_size"] = arguments.image_size
    model = timm.create_model(arguments.model, **model_args)
    log = train(arguments, model, arguments.output)
    if dist.is_initialized():
        first = dist.get_rank() == 0
        dist.destroy_process_group()
        if not first:
            return
    size = (3, arguments.image_size, arguments.image_size)
    model.pretrained_cfg = {**model.pretrained_cfg, "num_classes": 10, "input_size": size, "interpolation": "bilinear"}
    model.pretrained_cfg |= {"crop_pct": 1.0, "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    timm.models.save_for_hf(model, arguments.output, model_args=model_args)
    print(f"{log[-1]['top1']:.2f} % top-1 after {sum(row['seconds'] for row in log) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
