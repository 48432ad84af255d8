"""What windows of a Swin are ranked by: what evopatch does against alternatives and controls, without training.

Prints top-1, agreement with and KL to the unpatched model, and FLOPs, for windows that are chosen by importance times
novelty (evopatch's), by one of the two, by the norm of their features and at random; with one representative window,
with none, and with every fast window following the slow window most similar to it; and for tokens matched in windows
(evopatch's default):

    python benchmarks/window_selection.py --model FOLDER --data ../shared/data/cifar10_test.parquet --rows 2000:
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

import evopatch
from evopatch import EvoConfig
from evopatch.algorithm.partition import Partition
from evopatch.algorithm.selection import num_slow
from evopatch.algorithm.window_selection import WindowPartition, select_windows, window_novelty
from evopatch.algorithm.windows import in_windows, window_means
from evopatch.cli.options import parse_rows
from evopatch.forward.windowed import Cut, WindowedPass
from evopatch.measure.accuracy import evaluate
from evopatch.sources.images import open_evaluation
from evopatch.sources.models import Preprocessing, open_classifier

Score = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of `(B, V)` importance and novelty, and `(B, V)` mean norms of the tokens."""
SCORES: dict[str, Score] = {
    "importance ** 0.7 * novelty": lambda importance, novelty, norm: importance.pow(0.7) * novelty,
    "importance": lambda importance, novelty, norm: importance,
    "novelty": lambda importance, novelty, norm: novelty,
    "feature norm": lambda importance, novelty, norm: norm,
    "random": lambda importance, novelty, norm: torch.rand_like(norm),
}


def chooser(score: Score, matched: bool) -> Callable[..., WindowPartition]:
    """What takes the place of `WindowedPass._choose`."""

    def choose(self: Any, index: int, first: int, block: Any, tokens: Tensor, cut: Cut) -> WindowPartition:
        places = cut.windows.places(tokens.device)
        order = cut.windows.tokens(places)
        seen = block._evo_blocks.seen(block, tokens)
        importance = window_means(self._accumulated(first, tokens), places, cut.windows)
        novelty = window_novelty(seen, order, cut.windows)
        norm = window_means(tokens.norm(dim=-1), places, cut.windows)
        keep = num_slow(cut.windows.number, self.plans[index].keep_ratio)
        single = self.representative == "single" and not matched
        chosen = select_windows(score(importance, novelty, norm), importance, keep, places, cut.windows, single)
        return follow(chosen, seen, places, order, cut) if matched else chosen

    return choose


def follow(chosen: WindowPartition, seen: Tensor, places: Tensor, order: Tensor, cut: Cut) -> WindowPartition:
    """Every fast window joins the slow window most similar to it that has the same shift mask."""
    assert chosen.window is not None
    batch, keep = chosen.window.shape
    area, number = cut.windows.area, cut.windows.number
    unit = torch.nn.functional.normalize(in_windows(seen, order, cut.windows).flatten(2), dim=-1)
    similarity = unit @ unit.transpose(1, 2)
    if cut.mask is not None:
        same = (cut.mask.unsqueeze(0) == cut.mask.unsqueeze(1)).flatten(2).all(-1)
        similarity = similarity.masked_fill(~same, -2.0)
    leader = similarity.gather(2, chosen.window.unsqueeze(1).expand(batch, number, keep)).argmax(-1)
    leader = leader.scatter(1, chosen.window, torch.arange(keep).expand(batch, keep))
    group = leader[:, places // area] * area + places % area
    size = torch.zeros(batch, keep * area).scatter_add(1, group, torch.ones(group.shape))
    partition = Partition(group, 1 / size.gather(1, group), chosen.partition.slow, None, keep * area)
    return chosen._replace(partition=partition)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder that timm reads")
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", default="0:", help="only these images, as in 2000: or 0:2000")
    parser.add_argument("--keep-ratio", type=float, action="append")
    arguments = parser.parse_args()
    classifier = open_classifier(arguments.model, None, None, Preprocessing(None, None, None, None))
    model = evopatch.apply(classifier.model)
    data = open_evaluation(arguments.data, classifier.transform)
    loader = DataLoader(Subset(data, parse_rows(arguments.rows, len(data))), batch_size=100)
    size = (3, *model.patch_embed.img_size)
    ratios = arguments.keep_ratio or [0.7, 0.5]

    def show(label: str, representative: str) -> None:
        configs = [EvoConfig(keep_ratio=r, representative=representative, schedule="constant") for r in ratios]
        for result in evaluate(model, loader, configs, size)[1:]:
            print(
                f"{label:55s} keep {result.config.keep_ratio:.2f}  FLOPs {result.flops:.3f}  top-1 {result.top1:.2f}  "
                f"agreement {result.agreement:.2f}  KL {result.kl:.4f}",
                flush=True,
            )

    show("tokens matched inside windows", "matched")
    for name, score in SCORES.items():
        for kind in ("single", "none", "matched"):
            torch.manual_seed(0)
            with mock.patch.object(WindowedPass, "_choose", chooser(score, kind == "matched")):
                label = "matched windows" if kind == "matched" else f"{kind} window{'s' * (kind == 'none')}"
                show(f"{label} by {name}", "none" if kind == "none" else "single")


if __name__ == "__main__":
    main()
