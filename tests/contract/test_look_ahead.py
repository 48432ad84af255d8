"""Look-ahead class attention: which models get it, and that weights of later blocks are found wherever they are."""

import copy

import pytest
import torch
from comparing import moved
from matrix import every, patched
from torch import nn
from variants import FLAT, IN_WINDOWS, PIT, PYRAMIDS, call, images_for

import evopatch
from evopatch import EvoConfig

# Queries or keys normalised or rotated, biased by place, of a fused layer that isn't called, or of several cores; heads
# that are mixed.
PLAIN_NOT = {
    "qk_norm",
    "naflex_rope",
    "rope",
    "rope_mixed",
    "rope_dinov3",
    "hf_dinov3",
    "relpos",
    "relpos_class",
    "relpos_shared",
}
PLAIN_NOT |= {
    "eva",
    "parallel",
    "parallel_things",
    "diff",
    "diff_parallel",
    "own_rotary",
    "own_function",
    "own_softmax",
    "own_parts",
    "beit",
    "beit_shared",
    "cait",
}
LOOK_AHEAD = (FLAT - PLAIN_NOT) | PIT


@every((FLAT - IN_WINDOWS) | PYRAMIDS)
@torch.no_grad()
def test_which_models_look_ahead(name):
    x, model = images_for(name, 8), patched(name, EvoConfig())
    with_it = evopatch.token_groups(model, x)
    evopatch.set_config(model, EvoConfig(look_ahead=0.0))
    without = evopatch.token_groups(model, x)
    assert torch.equal(with_it, without) == (name not in LOOK_AHEAD)


@pytest.mark.parametrize("name", ["vit", "gap", "hf_vit"])
@torch.no_grad()
def test_later_weights_count_as_they_are_at_a_forward(name):
    model, x = patched(name, EvoConfig()), images_for(name, 8)
    before = evopatch.token_groups(model, x)
    later = model.blocks[4].attn.qkv if name != "hf_vit" else model.vit.layers[4].attention.k_proj
    later.weight.copy_(torch.randn_like(later.weight))
    changed = evopatch.token_groups(model, x)
    assert not torch.equal(changed, before)
    fresh = evopatch.apply(evopatch.remove(copy.deepcopy(model)))
    assert torch.equal(evopatch.token_groups(fresh, x), changed)


class LowRank(nn.Module):
    """As LoRA layers are."""

    def __init__(self, base, scale):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        nn.init.normal_(self.up.weight, std=scale)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@torch.no_grad()
def test_layers_that_are_no_plain_linear_ones_are_looked_at_by_what_they_do():
    model, x = patched("vit", EvoConfig()), images_for("vit")
    before = call(model, x)
    torch.manual_seed(1)
    for block in model.blocks:
        block.attn.qkv = LowRank(block.attn.qkv, scale=0.0)
    torch.testing.assert_close(call(model, x), before, atol=1e-5, rtol=1e-5)
    merged = copy.deepcopy(model)
    for own, block in zip(model.blocks, merged.blocks, strict=True):
        nn.init.normal_(own.attn.qkv.up.weight, std=0.3)
        own_qkv, base = own.attn.qkv, block.attn.qkv.base
        base.weight.add_(own_qkv.up.weight @ own_qkv.down.weight)
        block.attn.qkv = base
    torch.testing.assert_close(call(model, x), call(merged, x), atol=1e-4, rtol=1e-4)
    assert moved(call(model, x), before) > 1e-3


def test_it_takes_no_part_in_gradients():
    """Norms of later blocks would get gradients from a selection otherwise, and checkpointed blocks other ones."""
    model, x = patched("vit", EvoConfig(keep_ratio=[0.5], stages=[2])).train(), images_for("vit")
    seen = []
    for block in model.blocks[3:]:
        block.norm1.weight.register_hook(lambda gradient: seen.append(gradient))
    tokens = model.forward_intermediates(x, indices=[2], stop_early=True, intermediates_only=True)[0]
    tokens.square().sum().backward()
    assert not seen
    assert model.blocks[2].norm1.weight.grad.abs().max() > 0
