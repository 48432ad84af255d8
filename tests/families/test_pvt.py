"""PVT and PVT v2 of both libraries: refused by name, and no reason to refuse others beside them."""

import pytest
import timm
import torch
from comparing import Snapshot
from torch import nn
from transformers import PvtConfig, PvtForImageClassification, PvtV2Backbone, PvtV2Config
from variants import build

import evopatch

SMALL = {"depths": [1, 1], "hidden_sizes": [8, 16], "num_attention_heads": [1, 2], "sr_ratios": [2, 1]}
SMALL |= {"patch_sizes": [4, 2], "strides": [4, 2], "mlp_ratios": [2, 2], "num_encoder_blocks": 2}
REFUSED = {
    "timm": (lambda: timm.models.pvt_v2.PyramidVisionTransformerV2(depths=(1,), embed_dims=(8,)), r": Pyramid"),
    "hf_pvt": (lambda: PvtForImageClassification(PvtConfig(image_size=32, **SMALL)), r"pvt\.encoder: PvtEncoder"),
    "hf_pvt_v2": (lambda: PvtV2Backbone(PvtV2Config(image_size=32, **SMALL)), r"encoder: PvtV2Encoder"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name_with_the_reason(name):
    make, said = REFUSED[name]
    model = make()
    before = Snapshot(model)
    with pytest.raises(evopatch.UnsupportedModelError, match=rf"{said}.* makes keys and values.* by conv"):
        evopatch.apply(model)
    before.assert_untouched(model)
    assert not evopatch.supported(model)
    (candidate,) = evopatch.inspect(model).candidates
    assert not candidate.call
    assert "keys and values" in candidate.reason


@torch.no_grad()
def test_what_is_served_beside_one_is_patched():
    model = nn.ModuleList([REFUSED["timm"][0](), build("vit")])
    evopatch.apply(model)
    assert evopatch.is_patched(model[1])
    assert not evopatch.is_patched(model[0])
    with pytest.raises(evopatch.UnsupportedModelError, match="found nothing to patch") as error:
        evopatch.apply(nn.Linear(2, 2))
    assert "VisionTransformer" in str(error.value)
    assert "PyramidVisionTransformerV2" not in str(error.value)
