"""The figures of benchmarks/accuracy.md on real weights and images, without training."""

import pytest
import transformers_weights
from torch.utils.data import DataLoader

import evopatch
from evopatch import EvoConfig
from evopatch.data import open_images
from evopatch.evaluate import evaluate
from evopatch.models import Preprocessing, open_classifier

# Both models are evaluated once, so their tests share a process.
pytestmark = pytest.mark.xdist_group("real weights")

HALF = (0.5, 0.5, 0.5)
# For few FLOPs it pays to start earlier.
LOW = EvoConfig(keep_ratio=(0.58, 0.4, 0.22), stages=(3, 5, 8))


def run(folder, classifier, configs):
    images = open_images(folder / "imagenet_val_1300.parquet", classifier.transform)
    return evaluate(evopatch.apply(classifier.model), DataLoader(images, batch_size=50), configs, classifier.input_size)


def run_timm(folder, name, weights, configs, **preprocessing):
    options = Preprocessing(crop_pct=1.0, **preprocessing)
    return run(folder, open_classifier(name, folder / weights / "model.safetensors", preprocessing=options), configs)


@pytest.fixture(scope="module")
def deit(real_data):
    configs = [EvoConfig(), EvoConfig.paper(), LOW]
    return run_timm(real_data, "deit_tiny_patch16_224", "deit_tiny", configs)


@pytest.fixture(scope="module")
def vit(real_data):
    return run_timm(real_data, "vit_tiny_patch16_224", "vit_tiny", [EvoConfig(), LOW], mean=HALF, std=HALF)


def test_unpatched(deit, vit):
    assert deit[0].top1 == pytest.approx(80.15, abs=0.1)
    assert deit[0].top5 == pytest.approx(94.62, abs=0.1)
    assert vit[0].top1 == pytest.approx(82.46, abs=0.1)
    assert deit[0].kl == vit[0].kl == 0.0


def test_deit_default(deit):
    assert deit[1].flops <= 0.65
    assert deit[1].top1 >= 79.7
    assert deit[1].kl <= 0.025


def test_vit_default(vit):
    assert vit[1].flops <= 0.65
    assert vit[1].top1 >= 80.8
    assert vit[1].kl <= 0.046


def test_deit_paper(deit):
    assert deit[2].top1 == pytest.approx(76.3, abs=0.6)
    assert deit[2].blocks_flops <= 0.65


def test_deit_through_transformers_gives_the_same_figures(deit, real_data, tmp_path):
    transformers_weights.main(real_data / "deit_tiny" / "model.safetensors", tmp_path)
    results = run(real_data, open_classifier(str(tmp_path)), [result.config for result in deit[1:3]])
    for ours, theirs in zip(results, deit[:3], strict=True):
        assert ours.top1 == pytest.approx(theirs.top1, abs=0.1)
        assert ours.flops == pytest.approx(theirs.flops, abs=0.001)
        assert ours.kl == pytest.approx(theirs.kl, abs=0.001)


def test_low_flops(deit, vit):
    assert deit[3].flops <= 0.53
    assert deit[3].kl <= 0.085
    assert vit[2].flops <= 0.53
    assert vit[2].kl <= 0.13
