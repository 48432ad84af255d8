"""Blocks that write to what they are given, as by `x += ...`."""

import copy

import pytest
import torch
from comparing import moved
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block
from torch import nn
from variants import build, images_for

import evopatch
from evopatch.forward.lent import Lent


class InPlace(Block):
    def forward(self, x, attn_mask=None):
        x += self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        x += self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x


class WindowedInPlace(SwinTransformerBlock):
    def forward(self, x):
        shape = x.shape
        x += self.drop_path1(self._attn(self.norm1(x)))
        x = x.reshape(shape[0], -1, shape[-1])
        x += self.drop_path2(self.mlp(self.norm2(x)))
        return x.reshape(shape)


MODES = {
    "eager": lambda model, x: model(x),
    "inference mode": torch.inference_mode()(lambda model, x: model(x)),
    "compiled": lambda model, x: torch.compile(model, backend="aot_eager", fullgraph=True)(x),
    "exported": lambda model, x: torch.export.export(model, (x,)).module()(x),
}


def both(name):
    """A model whose blocks write to their input, and its like."""
    original = build(name)
    written = copy.deepcopy(original)
    for module in list(written.modules()):
        for cls, other in ((Block, InPlace), (SwinTransformerBlock, WindowedInPlace)):
            if type(module) is cls:
                module.__class__ = other
    return written, original


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("name", ["vit", "swin"])
@torch.no_grad()
def test_give_what_others_do(name, mode):
    (written, original), x = both(name), images_for(name)
    unpatched = original(x)
    expected = evopatch.apply(original)(x)
    found = MODES[mode](evopatch.apply(written), x)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    assert moved(expected, unpatched) > 1e-4


@pytest.mark.parametrize("inference", [False, True])
def test_a_lent_tensor_is_made_again_only_where_it_was_written_to(inference):
    made = []
    with torch.inference_mode(inference):
        lent = Lent(lambda: made.append(torch.ones(3)) or made[-1])
        assert lent.unchanged() is lent.tensor
        nn.functional.relu(lent.tensor)
        assert lent.unchanged() is lent.tensor
        lent.tensor[1:].mul_(2)
        assert torch.equal(lent.unchanged(), torch.ones(3))
    assert len(made) == 2
