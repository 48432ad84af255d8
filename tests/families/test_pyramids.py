"""Pyramids of flat blocks, LeViT and PiT: keep ratios and tokens by stage."""

import pytest
import torch
from matrix import every
from variants import PYRAMIDS, build, call, images_for

import evopatch
from evopatch import ConfigError, EvoConfig
from evopatch.patching.handle import Patched

EVERY_STAGE = EvoConfig(start=1)
"""One run in each of the three stages."""


@every(PYRAMIDS)
@torch.no_grad()
def test_selection_on_the_finest_grid(name):
    model, x = evopatch.apply(build(name), [0.6, 0.34, 0.5], EVERY_STAGE), images_for(name)
    selection, groups = evopatch.token_selection(model, x), evopatch.token_groups(model, x)
    assert selection.shape == groups.shape == (2, 7, 5, 5)
    assert selection[:, 0].all()
    assert selection[:, 1].sum(dim=(1, 2)).tolist() == [15, 15]
    place = torch.arange(5) * 2 // 5
    coarse = groups[:, 6][:, [0, 3]][:, :, [0, 3]]
    assert torch.equal(groups[:, 6], coarse[:, place][:, :, place])
    assert [len(g.unique()) for g in coarse] == [2, 2]


@every(PYRAMIDS)
def test_profile(name):
    size = 80 if "hf" in name else 40
    model = evopatch.apply(build(name), [0.6, 0.5, 0.5], EVERY_STAGE)
    profile = evopatch.profile(model, (3, size, size))
    assert [b.tokens_unpatched for b in profile.blocks] == [25, 25, 9, 9, 9, 4, 4]
    assert [b.tokens for b in profile.blocks] == [25, 15, 5, 5, 5, 2, 2]
    assert profile.blocks_ratio < profile.ratio < 1
    prefix = Patched(model).host.state.spec.prefix
    assert profile.blocks[3].flops < max(0.6, (5 + prefix) / (9 + prefix)) * profile.blocks[3].flops_unpatched
    assert profile.blocks[3].activations < profile.blocks[3].activations_unpatched


@every(PYRAMIDS)
@torch.no_grad()
def test_a_keep_ratio_that_leaves_no_slow_token_is_refused(name):
    model, x = build(name), images_for(name)
    original = call(model, x)
    with pytest.raises(ConfigError, match=r"0.1 leaves no slow token .* 4 of stage 3 \(2x2\): expected at least 0.125"):
        evopatch.apply(model, [0.5, 0.5, 0.1], EVERY_STAGE)
    assert not evopatch.is_patched(model)
    evopatch.apply(model, config=EVERY_STAGE)
    patched = call(model, x)
    with pytest.raises(ConfigError, match="leaves no slow token"):
        evopatch.set_keep_ratio(model, [0.5, 0.01, 0.5])
    assert torch.equal(call(model, x), patched)
    evopatch.set_keep_ratio(model, 1.0)
    assert torch.equal(call(model, x), original)
