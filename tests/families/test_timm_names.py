"""Every name of timm's ViT, DeiT and LeViT families."""

import pytest
import timm
import torch
from variants import calibrate

import evopatch

NAMES = sorted({*timm.list_models("vit_*"), *timm.list_models("deit*"), *timm.list_models("levit*")})
SMALL = 30_000_000


def test_the_families_are_as_large_as_expected():
    assert len(timm.list_models("vit_*")) >= 214
    assert len(timm.list_models("deit*")) >= 16
    assert len(timm.list_models("levit*")) >= 20


def create(name, device):
    model = timm.create_model(name, device=device).eval()
    return model, torch.empty(1, *model.pretrained_cfg["input_size"], device=device)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_name(name):
    model, x = create(name, "meta")
    shape = model(x).shape
    evopatch.apply(model, keep_ratio=0.5)
    assert evopatch.is_patched(model)
    assert model(x).shape == shape
    selection = evopatch.token_selection(model, x)
    blocks = model.blocks if hasattr(model, "blocks") else [block for stage in model.stages for block in stage.blocks]
    assert selection.shape[1] == len(blocks)
    if sum(p.numel() for p in model.parameters()) > SMALL:
        return
    torch.manual_seed(0)
    model, x = create(name, "cpu")
    # Fresh LayerScale weights are so small that no block would matter.
    for parameter_name, parameter in model.named_parameters():
        if "gamma" in parameter_name or ".norm" in parameter_name:
            parameter.fill_(0.5)
    x.normal_()
    if name.startswith("levit"):  # whose norms begin at 0
        calibrate(model, torch.randn(4, *x.shape[1:]))
    original = model.forward_features(x)
    evopatch.apply(model, keep_ratio=1.0)
    assert torch.equal(model.forward_features(x), original)
    evopatch.set_keep_ratio(model, 0.5)
    changed = model.forward_features(x)
    assert torch.isfinite(changed).all()
    assert (changed - original).abs().max() > 1e-5 * original.abs().max()
