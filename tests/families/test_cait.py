"""CaiT: layers that mix heads before and after the softmax."""

import pytest
import torch
from comparing import moved
from variants import build

import evopatch
from evopatch import EvoConfig
from evopatch.forward.tap import AttentionTap


def equal_patches():
    """An image of 5 by 5 patches, of four kinds; nearly, so that which are slow is no tie."""
    torch.manual_seed(0)
    patches = torch.randn(4, 3, 8, 8, dtype=torch.float64)[torch.randint(0, 4, (1, 5, 5))]
    x = patches.permute(0, 3, 1, 4, 2, 5).reshape(1, 3, 40, 40)
    return x + 1e-5 * torch.randn(x.shape, dtype=torch.float64)


def merged_and_whole():
    model, x = build("cait").double(), equal_patches()
    model.pos_embed.data.zero_()
    for block in model.blocks:
        block.attn.proj_w.bias.data.fill_(0.3)  # what isn't the same for a group as for its tokens
    whole = model(x)
    # By novelty alone, so that every kind has a slow token.
    return evopatch.apply(model, config=EvoConfig(importance=0.0))(x), whole


@torch.no_grad()
def test_merging_equal_tokens_loses_nothing():
    merged, whole = merged_and_whole()
    torch.testing.assert_close(merged, whole, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_values_count_by_their_groups(monkeypatch):
    monkeypatch.setattr(AttentionTap, "counted", lambda self, values: values)
    merged, whole = merged_and_whole()
    assert moved(merged, whole) > 1e-3


@pytest.mark.parametrize("part", ["attn.proj_l", "attn.proj_w", "attn.attn_drop"])
@torch.no_grad()
def test_hooks_see_weights_of_single_tokens(part):
    model, x = build("cait"), torch.randn(2, 3, 40, 40)
    evopatch.apply(model)
    seen = []
    for block in model.blocks:
        block.get_submodule(part).register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    model(x)
    shape = (2, 4, 25, 25) if part == "attn.attn_drop" else (2, 25, 25, 4)
    assert [tuple(t.shape) for given in seen for t in given] == [shape] * 12
    if part == "attn.proj_w":  # attention, before it is mixed
        torch.testing.assert_close(seen[-1][0].sum(2), torch.ones(2, 25, 4))
