"""Figures of docs/accuracy.md on real weights and the images that no setting was chosen on, without training."""

import pytest
import torch
import transformers_weights
from torch.utils.data import DataLoader, Subset

import evopatch
from evopatch import EvoConfig
from evopatch.measure.accuracy import evaluate
from evopatch.sources.images import open_images
from evopatch.sources.models import Preprocessing, open_classifier

HALF = (0.5, 0.5, 0.5)
# For few FLOPs it pays to start earlier.
LOW = EvoConfig(keep_ratio=(0.58, 0.4, 0.22), stages=(3, 5, 8))


REPORTED = range(650, 1300)


def run(folder, classifier, configs, rows=REPORTED):
    images = Subset(open_images(folder / "imagenet_val_1300.parquet", classifier.transform), rows)
    with evopatch.patched(classifier.model):
        return evaluate(classifier.model, DataLoader(images, batch_size=50), configs, classifier.input_size)


def open_timm(folder, name, weights, **preprocessing):
    options = Preprocessing(crop_pct=1.0, **preprocessing)
    return open_classifier(name, folder / weights / "model.safetensors", preprocessing=options)


@pytest.mark.slow
def test_deit(real_data, tmp_path):
    configs = [EvoConfig(), EvoConfig.paper(), LOW]
    model = open_timm(real_data, "deit_tiny_patch16_224", "deit_tiny")
    unpatched, default, paper, low = run(real_data, model, configs)
    assert unpatched.top1 == pytest.approx(80.31, abs=0.1)
    assert unpatched.top5 == pytest.approx(94.77, abs=0.1)
    assert unpatched.kl == 0.0
    assert default.flops <= 0.65
    assert default.top1 >= 79.8
    assert default.kl <= 0.0110
    assert paper.top1 == pytest.approx(76.2, abs=0.6)
    assert paper.blocks_flops <= 0.65
    assert low.flops <= 0.53
    assert low.kl <= 0.055
    # The same figures through transformers.
    transformers_weights.main(real_data / "deit_tiny" / "model.safetensors", tmp_path)
    some = range(0, 1300, 13)
    through_timm, through_transformers = (
        run(real_data, each, configs[:2], some) for each in (model, open_classifier(str(tmp_path)))
    )
    for ours, theirs in zip(through_transformers, through_timm, strict=True):
        assert ours.top1 == pytest.approx(theirs.top1, abs=0.1)
        assert ours.flops == pytest.approx(theirs.flops, abs=0.001)
        assert ours.kl == pytest.approx(theirs.kl, abs=0.001)


@pytest.mark.slow
def test_vit(real_data):
    configs = [EvoConfig(), LOW]
    model = open_timm(real_data, "vit_tiny_patch16_224", "vit_tiny", mean=HALF, std=HALF)
    unpatched, default, low = run(real_data, model, configs)
    assert unpatched.top1 == pytest.approx(83.54, abs=0.1)
    assert unpatched.kl == 0.0
    assert default.flops <= 0.65
    assert default.top1 >= 82.3
    assert default.kl <= 0.0195
    assert low.flops <= 0.53
    assert low.kl <= 0.085


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "weights", "preprocessing", "most"),
    [
        ("deit_tiny_patch16_224", "deit_tiny", {}, 0.0090),
        ("vit_tiny_patch16_224", "vit_tiny", {"mean": HALF, "std": HALF}, 0.016),
    ],
)
def test_foresight_of_sixteen_images(name, weights, preprocessing, most, real_data):
    classifier = open_timm(real_data, name, weights, **preprocessing)
    images = open_images(real_data / "imagenet_val_1300.parquet", classifier.transform)
    evopatch.apply(classifier.model, images=torch.stack([images[i][0] for i in range(16)]))
    others = DataLoader(Subset(images, REPORTED), batch_size=50)
    _, found = evaluate(classifier.model, others, [EvoConfig()], classifier.input_size)
    assert found.flops <= 0.65
    assert found.kl <= most
