"""Top-1 and KL against FLOPs, for the three representatives: the picture and the tables of docs/accuracy.md.

On the last 650 images, which no setting was chosen on.
Evaluates with `evopatch.measure.accuracy`, keeps one JSON file
per model in --results (a finished one is not run again), and draws docs/accuracy.png from them:

    python benchmarks/accuracy_curve.py --data ../shared/data --results results

With settings of one's own as JSON it prints their table alone, and keeps and draws nothing:

    python benchmarks/accuracy_curve.py --data ../shared/data --rows :650 --config '{"look_ahead": 0.5}'

With --images the first so many images are what foresight is fitted on.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.utils.data import DataLoader, Subset

import evopatch
from evopatch import EvoConfig
from evopatch.cli.options import parse_rows
from evopatch.measure.accuracy import evaluate
from evopatch.progress import progress_bar
from evopatch.sources.images import open_images
from evopatch.sources.models import Preprocessing, open_classifier

RATIOS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.336, 0.25)
HALF = (0.5, 0.5, 0.5)
MODELS = {
    "deit_tiny": ("deit_tiny_patch16_224", {}),
    "vit_tiny": ("vit_tiny_patch16_224", {"mean": HALF, "std": HALF}),
}
BASES = {
    "matched": EvoConfig(),
    "single": EvoConfig.paper(),
    "none": dataclasses.replace(EvoConfig.paper(), representative="none"),
}
COLOURS = {"matched": "tab:green", "single": "tab:orange", "none": "tab:grey"}


def run(folder: Path, weights: str, configs: list[EvoConfig], rows: str, device: str, images: int = 0) -> list[dict]:
    name, preprocessing = MODELS[weights]
    options = Preprocessing(crop_pct=1.0, **preprocessing)
    classifier = open_classifier(name, folder / weights / "model.safetensors", preprocessing=options)
    whole = open_images(folder / "imagenet_val_1300.parquet", classifier.transform)
    fitted = torch.stack([whole[i][0] for i in range(images)]).to(device) if images else None
    model = evopatch.apply(classifier.model.to(device), images=fitted)
    chosen = Subset(whole, parse_rows(rows, len(whole)))
    with progress_bar(f"{name}, {len(configs)} settings", len(chosen)) as advance:
        results = evaluate(model, DataLoader(chosen, batch_size=50), configs, (3, 224, 224), on_batch=advance)
    return [result.to_dict() for result in results]


def draw(results: dict[str, list[dict]], path: Path) -> None:
    figure = Figure(figsize=(5.2 * len(results), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (weights, rows) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        axis.axhline(rows[0]["top1"], color="black", linewidth=0.8, linestyle=":", label="unpatched")
        for kind, colour in COLOURS.items():
            points = [
                (r["flops"], r["top1"])
                for r in rows[1:]
                if r["config"]["representative"] == kind and r["config"]["keep_ratio"] < 1
            ]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, color=colour, label=kind)
        axis.set_title(f"{MODELS[weights][0]}, no training")
        axis.set_xlabel("FLOPs of the whole model, relative to unpatched")
        axis.set_ylabel(f"top-1 % on {rows[0]['images']} ImageNet validation images")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)


def table(rows: list[dict]) -> str:
    lines = ["| representative | keep ratio | FLOPs | FLOPs of blocks | top-1 | top-5 | agree | KL |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for i, r in enumerate(rows):
        names = ("unpatched", "") if i == 0 else (r["config"]["representative"], r["config"]["keep_ratio"])
        names = ("`EvoConfig.exact()`", "") if names[1] == 1.0 else names
        lines.append(
            f"| {names[0]} | {names[1]} | {r['flops']:.3f} | {r['blocks_flops']:.3f} | {r['top1']:.2f} | "
            f"{r['top5']:.2f} | {r['agreement']:.2f} | {r['kl']:.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the weights and images")
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--rows", default="650:", help="which images, as in 650: or 0:200")
    parser.add_argument("--config", action="append", help="an EvoConfig as JSON, in place of the page's settings")
    parser.add_argument("--images", type=int, default=0, help="how many to fit foresight on; needs --config")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.config:
        configs = [EvoConfig.from_json(text) for text in args.config]
        for key in MODELS:
            found = run(args.data, key, configs, args.rows, args.device, args.images)
            print(f"\n{MODELS[key][0]}\n\n{table(found)}")
        return
    if args.images:
        parser.error("--images needs --config")
    configs = [EvoConfig.exact()]
    configs += [dataclasses.replace(base, keep_ratio=ratio) for base in BASES.values() for ratio in RATIOS]
    args.results.mkdir(exist_ok=True)
    collected = {}
    for key in MODELS:
        file = args.results / f"accuracy-{key}.json"
        if not file.exists():
            torch.manual_seed(0)
            file.write_text(json.dumps(run(args.data, key, configs, args.rows, args.device), indent=2))
        collected[key] = json.loads(file.read_text())
        print(f"\n{MODELS[key][0]}\n\n{table(collected[key])}")
    draw(collected, Path(__file__).parents[1] / "docs" / "accuracy.png")


if __name__ == "__main__":
    main()
