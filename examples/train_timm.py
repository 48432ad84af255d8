"""A training script in the manner of timm's train.py. It knows nothing of evopatch:

    python examples/train_timm.py --model vit_tiny_patch16_224 --img-size 32
    evopatch run --keep-ratio 0.5 examples/train_timm.py --model vit_tiny_patch16_224 --img-size 32

Data: a folder as timm's `create_dataset` takes it, or scikit-learn's handwritten digits, which need no network.
"""

import argparse
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from timm import create_model
from timm.data import Mixup, create_dataset, create_transform, resolve_data_config
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, CheckpointSaver, ModelEmaV3, accuracy
from torch.utils.data import DataLoader, Dataset


class Digits(Dataset):
    """scikit-learn's 1797 digits as PIL images; every fourth is for validation."""

    def __init__(self, train, transform):
        from PIL import Image
        from sklearn.datasets import load_digits

        digits = load_digits()
        rows = [i for i in range(len(digits.target)) if (i % 4 != 0) == train]
        pixels = (digits.images[rows] * (255 / 16)).astype(np.uint8)
        self.images = [Image.fromarray(image).convert("RGB") for image in pixels]
        self.labels = digits.target[rows].tolist()
        self.transform = transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.transform(self.images[index]), self.labels[index]


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="a folder with the subfolders train and val (default: the digits)")
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--img-size", type=int, default=None)
    parser.add_argument("--num-classes", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=None, help="at most so many per epoch")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--opt", default="adamw")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--sched", default="cosine")
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--mixup", type=float, default=0.0)
    parser.add_argument("--model-ema", action="store_true")
    parser.add_argument("--torchcompile", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("output"))
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


def open_data(args, config, train):
    # Digits aren't mirrored.
    transform = create_transform(
        config["input_size"], is_training=train, mean=config["mean"], std=config["std"], scale=(0.6, 1.0), hflip=0.0
    )
    if args.data_dir:
        dataset = create_dataset("", root=args.data_dir, split="train" if train else "val", transform=transform)
    else:
        dataset = Digits(train, transform)
    return DataLoader(dataset, args.batch_size, shuffle=train, drop_last=train)


@torch.no_grad()
def validate(model, loader, device):
    model.eval()
    top1 = AverageMeter()
    for images, labels in loader:
        (correct,) = accuracy(model(images.to(device)), labels.to(device))
        top1.update(correct.item(), len(images))
    return top1.avg


def main():
    args = parse()
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = {} if args.img_size is None else {"img_size": args.img_size}
    model = create_model(args.model, pretrained=args.pretrained, num_classes=args.num_classes, **size).to(device)
    config = resolve_data_config({} if args.img_size is None else {"img_size": args.img_size}, model=model)
    train_loader, val_loader = open_data(args, config, True), open_data(args, config, False)
    optimizer = create_optimizer_v2(model, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay)
    scheduler, epochs = create_scheduler_v2(optimizer, sched=args.sched, num_epochs=args.epochs, warmup_epochs=0)
    ema = ModelEmaV3(model, decay=0.99) if args.model_ema else None
    mixup = Mixup(args.mixup, num_classes=args.num_classes) if args.mixup else None
    loss_fn = SoftTargetCrossEntropy() if mixup else LabelSmoothingCrossEntropy(args.smoothing)
    args.output.mkdir(parents=True, exist_ok=True)
    saver = CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=str(args.output), max_history=2)
    task = torch.compile(model) if args.torchcompile else model
    for epoch in range(epochs):
        model.train()
        losses, images_seen, begin = AverageMeter(), 0, time.time()
        for images, labels in islice(train_loader, args.steps):
            images, labels = images.to(device), labels.to(device)
            if mixup:
                images, labels = mixup(images, labels)
            loss = loss_fn(task(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if ema:
                ema.update(model)
            losses.update(loss.item(), len(images))
            images_seen += len(images)
        speed = images_seen / (time.time() - begin)
        scheduler.step(epoch + 1)
        top1 = validate(ema.module if ema else model, val_loader, device)
        print(f"epoch {epoch}: loss {losses.avg:.3f}, top-1 {top1:.2f} %, {speed:.1f} images/s", flush=True)
        saver.save_checkpoint(epoch, metric=top1)


if __name__ == "__main__":
    main()
