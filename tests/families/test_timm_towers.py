"""Vision towers of language models in timm: flat, without prefix tokens, places told by a rotary table."""

import copy
import functools

import pytest
import torch
from comparing import moved
from matrix import REPRESENTATIVES, cases, config
from timm.models.deepseek_vit import DeepseekVitClassifier, DeepseekVitEncoder
from timm.models.qwen3_vit import Qwen3VitClassifier, Qwen3VitEncoder

import evopatch

gemma4_vit = pytest.importorskip("timm.models.gemma4_vit", reason="not in every version of timm")
SMALL = {"img_size": 48, "patch_size": 8, "embed_dim": 48, "depth": 6, "num_heads": 4}
TOWERS = {
    "deepseek": functools.partial(DeepseekVitEncoder, **SMALL, out_features=32),
    "gemma4": functools.partial(
        gemma4_vit.Gemma4VitEncoder, **SMALL, head_dim=12, intermediate_size=96, pooling_kernel_size=2
    ),
    "qwen3": functools.partial(Qwen3VitEncoder, **SMALL),
    "deepseek_classifier": functools.partial(DeepseekVitClassifier, **SMALL, num_classes=7),
    "qwen3_classifier": functools.partial(Qwen3VitClassifier, **SMALL, num_classes=7),
}


def made(name):
    torch.manual_seed(0)
    model = TOWERS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    return model, torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("representative", REPRESENTATIVES)
@pytest.mark.parametrize("name", sorted(TOWERS))
@torch.no_grad()
def test_a_tower(name, representative):
    model, x = made(name)
    original = model(x)
    evopatch.apply(model, keep_ratio=1.0)
    assert torch.equal(model(x), original)
    evopatch.set_config(model, config(representative))
    found = model(x)
    assert found.shape == original.shape
    assert moved(found, original) > 1e-4
    torch.testing.assert_close(torch.cat([model(each) for each in x.split(1)]), found, atol=2e-5, rtol=2e-5)
    assert torch.equal(copy.deepcopy(model)(x), found)
    with evopatch.full_grid(model):
        torch.testing.assert_close(model(x), found, atol=2e-5, rtol=2e-5)
    assert evopatch.token_selection(model, x).shape == (2, 6, 6, 6)
    assert torch.equal(evopatch.remove(model)(x), original)


@cases("name", ["deepseek", "qwen3", "gemma4"], fast=["gemma4"])
@torch.no_grad()
def test_features_and_compiled(name):
    model, x = made(name)
    evopatch.apply(model)
    final = model.forward_features(x)
    _, maps = model.forward_intermediates(x, norm=name == "deepseek")  # the others have no last norm
    assert [m.shape for m in maps] == [(2, 48, 6, 6)] * 6
    torch.testing.assert_close(maps[-1].flatten(2).transpose(1, 2), final.reshape(2, 36, 48), atol=2e-5, rtol=2e-5)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x), atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_masked_patches_of_gemma_change_nothing():
    model, x = made("gemma4")
    model.global_pool = "none"
    patches = x.view(2, 3, 6, 8, 6, 8).permute(0, 2, 4, 3, 5, 1).reshape(2, 36, -1)
    there = torch.ones(2, 36, dtype=torch.bool)
    there[1, 24:] = False
    places = torch.cartesian_prod(torch.arange(6), torch.arange(6)).expand(2, 36, 2)
    coordinates = torch.where(there.unsqueeze(-1), places, torch.full_like(places, -1))
    torch.testing.assert_close(model(patches, places, torch.ones_like(there)), model(x), atol=2e-5, rtol=2e-5)
    evopatch.apply(model)
    found = model(patches, coordinates, there)[there]
    other = torch.where(there.unsqueeze(-1), patches, torch.randn_like(patches))
    assert torch.equal(model(other, coordinates, there)[there], found)
    assert moved(model(x)[there], found) > 1e-3


@pytest.mark.parametrize("name", ["deepseek", "qwen3", "gemma4"])
def test_gradients_under_checkpointing(name):
    model, x = made(name)
    evopatch.apply(model)
    plain = torch.autograd.grad(model(x).square().sum(), list(model.blocks.parameters()))
    model.set_grad_checkpointing()
    saving = torch.autograd.grad(model(x).square().sum(), list(model.blocks.parameters()))
    for found, expected in zip(saving, plain, strict=True):
        size = expected.abs().max()
        torch.testing.assert_close(found / size, expected / size, atol=1e-4, rtol=1e-3)
