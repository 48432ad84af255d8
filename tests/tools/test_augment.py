"""Training transforms: timm's policies on this machine's Pillow."""

import pytest
import torch
from PIL import Image

from evopatch.errors import ConfigError
from evopatch.sources.augment import Augmentation, training_transform
from evopatch.sources.models import Preprocessing, open_classifier
from evopatch.training.randomness import seed_everything


@pytest.fixture(scope="module")
def classifier():
    return open_classifier("vit_tiny_patch16_224", preprocessing=Preprocessing(image_size=32), pretrained=False)


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "rand-m0", "rand-m9-mstd0.5-inc1", "original", "v0", "augmix-m10"])
def test_policies_at_any_strength(policy, classifier):
    transform = training_transform(classifier, Augmentation(auto_augment=policy))
    image = Image.effect_noise((48, 40), 64).convert("RGB")
    for seed in range(80):
        seed_everything(seed)
        out = transform(image)
        assert out.shape == (3, 32, 32)
        assert torch.isfinite(out).all()


def test_an_unknown_policy_is_refused(classifier):
    with pytest.raises(ConfigError, match="nonsense"):
        training_transform(classifier, Augmentation(auto_augment="nonsense"))
