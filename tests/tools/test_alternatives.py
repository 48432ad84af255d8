"""What evopatch is compared with on the accuracy page."""

import alternatives
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

SMALL = {"patch_size": 8, "num_classes": 7, "embed_dim": 48, "depth": 6, "num_heads": 4, "dynamic_img_size": True}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return VisionTransformer(img_size=64, **SMALL).eval()


@torch.no_grad()
def test_sides_are_compared_with_the_first(model):
    torch.manual_seed(1)
    batches = [({64: torch.randn(3, 3, 64, 64), 48: torch.randn(3, 3, 48, 48)}, torch.tensor([0, 1, 2])) for _ in "ab"]
    sides = [alternatives.side("whole", model, 64), alternatives.side("small", model, 48)]
    assert sides[1].flops < 0.7 * sides[0].flops
    whole, small = alternatives.compare(sides, batches)
    assert (whole.agreement, whole.kl) == (100, 0)
    first, second = (torch.cat([model(images[size]) for images, _ in batches]) for size in (64, 48))
    labels = torch.tensor([0, 1, 2] * 2)
    assert small.top1 == pytest.approx(100 * (second.argmax(1) == labels).double().mean().item())
    kl = F.kl_div(second.log_softmax(1), first.log_softmax(1), reduction="batchmean", log_target=True)
    assert small.kl == pytest.approx(kl.item(), rel=1e-4)
    assert small.kl > 0


def test_token_merging_stands_on_both_sides_of_evopatch(model):
    class Opened:
        input_size = (3, 64, 64)

    Opened.model = model
    sides = alternatives.sides_of(lambda size: Opened, [0.5], [48])
    assert [side.name.split(",")[0] for side in sides] == [
        "unpatched",
        "evopatch",
        *["token merging"] * 2,
        "unpatched at 48 px",
    ]
    whole, patched, more, less, _ = (side.flops for side in sides)
    assert less <= patched < more < whole
