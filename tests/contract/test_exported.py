"""torch.export of one size gives what the model itself gives, which still runs eagerly after."""

import pytest
import torch
from comparing import moved
from matrix import SAME_GRAPH, by_representative, cases, shallow_config
from variants import FLAT, PYRAMIDS, build, call, images_for, shallow

import evopatch

WINDOWED = {"swin", "swinv2", "swinv2_cr", "torchvision_swin", "torchvision_swinv2"}
WINDOWED |= {"hf_swin", "hf_swinv2", "hf_swin_backbone", "hf_donut", "sam", "hf_sam", "hf_vitdet"}
ROWS = [*by_representative((FLAT | PYRAMIDS | WINDOWED) - SAME_GRAPH, ()), ("swin", "single"), ("hf_swin", "none")]


@cases(("name", "representative"), ROWS, fast=["vit", "hf_vit", "levit", "swin", ("hf_swin", "matched")])
def test_exports_and_runs_eagerly_after(name, representative):
    model, x = build(name, **shallow(name)), images_for(name)
    with torch.no_grad():
        original = call(model, x)
        evopatch.apply(model, config=shallow_config(name, representative))
        expected = call(model, x)
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(call(exported, x), expected, atol=2e-5, rtol=2e-5)
        assert torch.equal(call(model, x), expected)
        assert moved(call(exported, x), original) > 1e-4


@pytest.mark.parametrize("name", ["vit", "hf_vit", "levit", "swin", "hf_swinv2"])
def test_exports_with_gradients_enabled(name):
    model, x = evopatch.apply(build(name)), images_for(name)
    expected = call(model, x)
    assert expected.requires_grad
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(call(exported, x), expected, atol=2e-5, rtol=2e-5)
    evopatch.set_keep_ratio(model, 1.0)
    assert moved(call(exported, x), call(model, x)) > 1e-4
