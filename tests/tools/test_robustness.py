"""Corrupted images, and what is reported of them."""

import pytest
import robustness
import torch
from timm.models.vision_transformer import VisionTransformer

from evopatch.sources.models import Classifier

CLEAN, *SPOILT = robustness.CORRUPTIONS


@pytest.fixture(scope="module")
def image():
    ramp = torch.linspace(0.1, 0.9, 64)
    fine = 0.1 * torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    return (ramp * ramp[:, None]).expand(3, 64, 64) + fine


@pytest.mark.parametrize("corruption", robustness.CORRUPTIONS, ids=lambda corruption: corruption.name)
def test_corruptions_are_the_same_in_every_run(image, corruption):
    first = robustness.corrupt(image, corruption, 3)
    torch.rand(1)
    state = torch.get_rng_state()
    assert torch.equal(robustness.corrupt(image, corruption, 3), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.shape == image.shape
    assert first.dtype == image.dtype
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(first, image) == (corruption is CLEAN)
    other = robustness.corrupt(image, corruption, 4)
    assert torch.equal(other, first) != corruption.name.startswith("noise")


def test_stronger_is_further_from_the_clean_image(image):
    distances = [(robustness.corrupt(image, corruption, 0) - image).norm().item() for corruption in SPOILT]
    assert len(distances) == 6
    for weaker, stronger in zip(distances[::2], distances[1::2], strict=True):
        assert 0 < weaker < 0.9 * stronger


def test_rows_of_a_tiny_model(image):
    torch.manual_seed(0)
    model = VisionTransformer(img_size=64, patch_size=8, num_classes=7, embed_dim=48, depth=6, num_heads=4).eval()
    sides = robustness.sides_of(Classifier(model, None, (3, 64, 64), (0.5,) * 3, (0.5,) * 3, "bicubic"))
    assert [side.name.split(",")[0] for side in sides] == ["unpatched", "evopatch", "token merging"]
    assert sides[2].flops <= sides[1].flops < sides[0].flops
    pairs = [(image.roll(shift, dims=2), shift % 7) for shift in range(4)]
    seen = []

    def batches(corruption):
        items = robustness.Corrupted(pairs, corruption, lambda pixels: 2 * pixels - 1)
        images = torch.stack([items[i][0] for i in range(len(items))])
        seen.append(images)
        yield images, torch.tensor([items[i][1] for i in range(len(items))])

    rows = robustness.table_rows(sides, batches)
    assert [row[0] for row in rows] == [corruption.name for corruption in robustness.CORRUPTIONS]
    labels = torch.tensor([label for _, label in pairs])
    for row, images in zip(rows, seen, strict=True):
        with torch.no_grad():
            whole, patched, merging = (side.model(images) for side in sides)
        top1 = [f"{100 * (logits.argmax(1) == labels).double().mean():.2f}" for logits in (whole, patched, merging)]
        assert [row[1], row[2], row[5]] == top1
        assert row[3] == f"{100 * (whole.argmax(1) == patched.argmax(1)).double().mean():.2f}"
        kl = [
            (whole.softmax(1) * (whole.log_softmax(1) - logits.log_softmax(1))).sum(1).mean().item()
            for logits in (patched, merging)
        ]
        assert [float(row[4]), float(row[6])] == pytest.approx(kl, abs=6e-5)
    assert torch.equal(seen[0][0], 2 * image - 1)
