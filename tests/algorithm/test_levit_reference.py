"""Whole patched LeViT models against a slow forward written with Python loops over images, tokens and heads."""

import pytest
import torch
from comparing import moved
from loop_reference import coarser, matched_reference, top
from matrix import EACH_REPRESENTATIVE, EACH_SELECTION
from variants import build, images_for

import evopatch
from evopatch import EvoConfig
from evopatch.algorithm.selection import num_slow
from evopatch.plan import plan_blocks

GRIDS = [(5, 5), (3, 3), (2, 2)]


def attention(attn, x, bias):
    """One image through an attention module: x (T, C) and bias (H, T, T) to output (T, C) and weights (H, T, T)."""
    qkv = attn.qkv(x[None])[0].reshape(len(x), attn.num_heads, -1)
    out, weights = [], []
    for h in range(attn.num_heads):
        q, k, v = qkv[:, h].split([attn.key_dim, attn.key_dim, attn.val_dim], dim=1)
        row = (q @ k.T * attn.scale + bias[h]).softmax(-1)
        weights.append(row)
        out.append(row @ v)
    return attn.proj(torch.stack(out, dim=1).flatten(1)[None])[0], torch.stack(weights)


def chosen(g, x, keep, representative):
    """Members and their shares of every row of the compact set, and the slow tokens."""
    if representative == "matched":
        slow, leader = matched_reference(g, x, keep)
        groups = [[i for i in range(len(x)) if leader[i] == s] for s in sorted(slow)]
        shares = [[g[i].sqrt() / sum(g[j].sqrt() for j in members) for i in members] for members in groups]
        return groups, shares, slow
    slow = top(g.tolist(), keep)
    groups, shares = [[i] for i in sorted(slow)], [[1.0]] * keep
    if representative == "single":
        fast = [i for i in range(len(x)) if i not in slow]
        total = sum(g[i] for i in fast)
        groups, shares = [*groups, fast], [*shares, [g[i] / total for i in fast]]
    return groups, shares, slow


def merged_bias(bias, groups, shares, slow, representative):
    """(H, T, T) to (H, M, M): a matched group's is its slow token's, the single representative's the members' mean."""
    if representative == "matched":
        places = [[(i, 1.0) for i in members if i in slow] for members in groups]
    else:
        places = [list(zip(members, share, strict=True)) for members, share in zip(groups, shares, strict=True)]
    rows = torch.zeros(len(bias), len(groups), len(groups))
    for m, first in enumerate(places):
        for n, second in enumerate(places):
            rows[:, m, n] = sum(w * v * bias[:, i, j] for i, w in first for j, v in second)
    return rows


def reference(model, image, config):
    """Tokens (T, C) after every stage, for one image."""
    x = model.stem(image[None]).flatten(2).transpose(1, 2)[0]
    g, groups, outputs, index = None, None, [], 0
    plans = plan_blocks(config, *(len(stage.blocks) for stage in model.stages))
    for number, stage in enumerate(model.stages):
        if number:
            x, g = stage.downsample(x[None])[0], coarser(g, GRIDS[number - 1])
        for block in stage.blocks:
            plan, index = plans[index], index + 1
            bias = block.attn.attention_biases[:, block.attn.attention_bias_idxs]
            if plan.keep_ratio == 1.0:
                groups, shares, slow = [[i] for i in range(len(x))], [[1.0]] * len(x), set(range(len(x)))
            elif plan.selects:
                groups, shares, slow = chosen(g, x, num_slow(len(x), plan.keep_ratio), config.representative)
            sizes = torch.tensor([float(len(m)) if config.representative == "matched" else 1.0 for m in groups])
            entry = torch.stack(
                [sum(w * x[i] for i, w in zip(m, s, strict=True)) for m, s in zip(groups, shares, strict=True)]
            )
            merged = merged_bias(bias, groups, shares, slow, config.representative) + sizes.log()
            out, weights = attention(block.attn, entry, merged)
            hidden = entry + out
            out = hidden + block.mlp(hidden[None])[0]
            received = sum(sizes[m] * weights[:, m] for m in range(len(groups))).mean(0) / sizes.sum()
            before, x = g, x.clone()
            g = torch.zeros(len(x)) if g is None else g.clone()
            for row, members in enumerate(groups):
                for i in members:
                    x[i] = x[i] + out[row] - entry[row]
                    if config.representative == "matched" or i in slow:
                        own = received[row] / sizes[row]
                        g[i] = own if before is None else (1 - config.tradeoff) * g[i] + config.tradeoff * own
        outputs.append(x)
    return outputs


@pytest.mark.parametrize("name", ["levit", "levit_conv", "levit_distilled"])
@EACH_SELECTION
@EACH_REPRESENTATIVE
@torch.no_grad()
def test_every_stage_equals_the_reference(name, selection, representative):
    model, x = build(name), images_for(name, 3)
    config = EvoConfig(keep_ratio=[0.6, 0.5, 0.5], selection=selection, representative=representative, tradeoff=0.4)
    linear = model
    if name == "levit_conv":  # the same weights, as matrices
        linear = build("levit")
        linear.load_state_dict({k: v.reshape(linear.state_dict()[k].shape) for k, v in model.state_dict().items()})
    expected = [reference(linear, image, config) for image in x]
    evopatch.apply(model, config=config)
    final, stages = model.forward_intermediates(x)
    for number, (grid, result) in enumerate(zip(GRIDS, stages, strict=True)):
        assert result.shape[-2:] == grid
        whole = torch.stack([tokens[number] for tokens in expected])
        torch.testing.assert_close(result.flatten(2).transpose(1, 2), whole, atol=2e-4, rtol=2e-4)
    assert torch.equal(model.forward_features(x), final)
    evopatch.set_config(model, EvoConfig(keep_ratio=[0.4, 0.5, 0.5], representative=representative, tradeoff=0.4))
    assert moved(model.forward_features(x), final) > 1e-3
