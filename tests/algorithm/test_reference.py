"""Whole patched models against a slow forward written with Python loops over images, tokens and heads."""

import math

import pytest
import torch
import torch.nn.functional as F
from comparing import moved
from loop_reference import coarser, matched_reference, top
from matrix import EACH_REPRESENTATIVE, EACH_SELECTION
from variants import between, build, images, images_for

import evopatch
from evopatch import EvoConfig
from evopatch.algorithm.selection import num_slow
from evopatch.plan import plan_blocks


def attention(attn, x, log_size):
    """One image through an attention module. x (T, C) to the output (T, C) and the weights (H, T, T)."""
    tokens, heads, width = len(x), attn.num_heads, attn.head_dim
    qkv = attn.qkv(x).reshape(tokens, 3, heads, width)
    out, weights = [], []
    for h in range(heads):
        q, k, v = (qkv[:, i, h] for i in range(3))
        row = (q @ k.T / math.sqrt(width) + log_size).softmax(-1)
        weights.append(row)
        out.append(row @ v)
    return attn.proj(torch.cat(out, dim=1)), torch.stack(weights), qkv


def block_forward(block, x, log_size):
    out, weights, qkv = attention(block.attn, block.norm1(x), log_size)
    x = x + out
    return x + block.mlp(block.norm2(x)), weights, qkv


def readout(prefix, readouts, block, weights, qkv, sizes, log_size):
    """Class attention over the tokens of one image: the readout tokens', or the mean query's."""
    if readouts:
        return weights[:, :readouts].mean(dim=(0, 1))
    rows = []
    for h in range(block.attn.num_heads):
        query = sum(s * q for s, q in zip(sizes, qkv[prefix:, 0, h], strict=True)) / sum(sizes)
        rows.append((qkv[:, 1, h] @ query / math.sqrt(block.attn.head_dim) + log_size).softmax(-1))
    return torch.stack(rows).mean(0)


def looked_ahead(prefix, readouts, blocks, x, g, look_ahead):
    """What tokens are ranked by: class attention so far, and that of later blocks on the tokens (T, C) as they are."""
    if not blocks:
        return g
    zeros, total = torch.zeros(len(x)), 0
    for block in blocks:
        _, weights, qkv = attention(block.attn, block.norm1(x), zeros)
        total = total + readout(prefix, readouts, block, weights, qkv, [1] * (len(x) - prefix), zeros)[prefix:]
    return (1 - look_ahead) * g + look_ahead * total / len(blocks)


def run_blocks(blocks, plans, x, g, prefix, readouts, config):
    """Blocks of one grid, for one image.

    Args:
        blocks: By index in the model.
        plans: By index, of those that run.
        x: (T, C).
        g: Accumulated class attention of the patch tokens, None before the first block.
        prefix: Number of prefix tokens.
        readouts: How many of them the head reads.
        config: As of `evopatch.apply`.

    Returns:
        Tokens (T, C) after every block, and `g` after the last.
    """
    groups, outputs = None, []
    for index, plan in plans.items():
        block, patches = blocks[index], x.shape[0] - prefix
        if plan.keep_ratio == 1.0:
            zeros = torch.zeros(len(x))
            x, weights, qkv = block_forward(block, x, zeros)
            a = readout(prefix, readouts, block, weights, qkv, [1] * patches, zeros)[prefix:]
            g = a if g is None else (1 - config.tradeoff) * g + config.tradeoff * a
            outputs.append(x)
            continue
        if plan.selects:
            keep = num_slow(patches, plan.keep_ratio)
            if config.representative == "matched":
                rank = looked_ahead(prefix, readouts, [blocks[i] for i in plan.looks_at], x, g, config.look_ahead)
                slow, leader = matched_reference(rank, F.layer_norm(x, x.shape[-1:])[prefix:], keep)
                groups = [[i for i in range(patches) if leader[i] == s] for s in sorted(slow)]
                shares = [[rank[i].sqrt() / sum(rank[j].sqrt() for j in m) for i in m] for m in groups]
            else:
                slow = top(g.tolist(), keep)
                groups, shares = [[i] for i in sorted(slow)], [[1.0]] * keep
                if config.representative == "single":
                    fast = [i for i in range(patches) if i not in slow]
                    total = sum(g[i] for i in fast)
                    groups, shares = [*groups, fast], [*shares, [g[i] / total for i in fast]]
        sizes = [len(m) if config.representative == "matched" else 1 for m in groups]
        log_size = torch.tensor([0.0] * prefix + [math.log(s) for s in sizes])
        rows = [sum(w * x[prefix + i] for i, w in zip(m, s, strict=True)) for m, s in zip(groups, shares, strict=True)]
        entry = torch.cat([x[:prefix], torch.stack(rows)])
        out, weights, qkv = block_forward(block, entry, log_size)
        a = readout(prefix, readouts, block, weights, qkv, sizes, log_size)
        x = torch.cat([out[:prefix], x[prefix:]])
        g = g.clone()
        for row, members in enumerate(groups, start=prefix):
            for i in members:
                x[prefix + i] = x[prefix + i] + out[row] - entry[row]
                if config.representative == "matched" or i in slow:
                    g[i] = (1 - config.tradeoff) * g[i] + config.tradeoff * a[row] / sizes[row - prefix]
        outputs.append(x)
    return outputs, g


def reference(model, image, config):
    """Tokens (T, C) after every block, for one image."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0]
    plans = dict(enumerate(plan_blocks(config, len(model.blocks))))
    readouts = 0 if model.global_pool != "token" else 2 if hasattr(model, "head_dist") else 1
    return torch.stack(run_blocks(model.blocks, plans, x, None, model.num_prefix_tokens, readouts, config)[0])


def pit_reference(model, image, config):
    """Class tokens (P, C) after the last block and tokens (T, C) after every stage, for one image."""
    x, prefix = model.pos_drop(model.patch_embed(image[None]) + model.pos_embed), model.cls_token[0]
    blocks = [block for stage in model.transformers for block in stage.blocks]
    plans, stages, g, begin = plan_blocks(config, *(len(stage.blocks) for stage in model.transformers)), [], None, 0
    for stage in model.transformers:
        if stage.pool is not None:
            g = None if g is None else coarser(g, x.shape[2:])
            x, prefix = stage.pool(x, prefix)
        end = begin + len(stage.blocks)
        own = {index: plans[index] for index in range(begin, end)}
        tokens = torch.cat([prefix, x.flatten(2)[0].T])
        outputs, g = run_blocks(blocks, own, tokens, g, len(prefix), len(prefix), config)
        stages.append(outputs[-1])
        prefix, patches = stages[-1].split([len(prefix), len(tokens) - len(prefix)])
        x, begin = patches.T.unflatten(1, x.shape[2:])[None], end
    return prefix, stages


@pytest.mark.parametrize("name", ["vit", "deit_distilled", "clip", "gap", "reg_gap"])
@EACH_SELECTION
@EACH_REPRESENTATIVE
@torch.no_grad()
def test_every_block_of_the_patched_model_equals_the_reference(name, selection, representative):
    model, x = build(name), images(3)
    config = EvoConfig(
        keep_ratio=[0.6, 0.3],
        stages=[2, 4],
        selection=selection,
        representative=representative,
        tradeoff=0.4,
        look_ahead=0.6,
    )
    expected = torch.stack([reference(model, image, config) for image in x], dim=1)
    evopatch.apply(model, config=config)
    result = torch.stack(between(name, model, x))
    torch.testing.assert_close(result, expected, atol=5e-5, rtol=5e-5)
    torch.testing.assert_close(model.forward_features(x), model.norm(expected[-1]), atol=5e-5, rtol=5e-5)
    torch.testing.assert_close(model(x), model.forward_head(model.norm(expected[-1])), atol=5e-5, rtol=5e-5)
    evopatch.set_config(
        model, EvoConfig(keep_ratio=[0.56, 0.3], stages=[2, 4], representative=representative, tradeoff=0.4)
    )
    assert moved(model.forward_features(x), model.norm(expected[-1])) > 1e-3


@pytest.mark.parametrize("name", ["pit", "pit_distilled"])
@EACH_SELECTION
@EACH_REPRESENTATIVE
@torch.no_grad()
def test_every_stage_of_a_patched_pit_equals_the_reference(name, selection, representative):
    model, x = build(name), images_for(name, 3)
    config = EvoConfig(
        keep_ratio=[0.6, 0.5, 0.5],
        stages=[1, 2, 5],
        selection=selection,
        representative=representative,
        tradeoff=0.4,
        look_ahead=0.6,
    )
    expected = [pit_reference(model, image, config) for image in x]
    evopatch.apply(model, config=config)
    for number, found in enumerate(model.forward_intermediates(x)[1]):
        tokens = torch.stack([stages[number] for _, stages in expected])[:, model.num_tokens :]
        torch.testing.assert_close(found.flatten(2).transpose(1, 2), tokens, atol=5e-5, rtol=5e-5)
    head = model.norm(torch.stack([prefix for prefix, _ in expected]))
    torch.testing.assert_close(model.forward_features(x), head, atol=5e-5, rtol=5e-5)
    torch.testing.assert_close(model(x), model.forward_head(head), atol=5e-5, rtol=5e-5)
    evopatch.set_config(model, EvoConfig(keep_ratio=[0.4, 0.5, 0.5], start=1, representative=representative))
    assert moved(model.forward_features(x), head) > 1e-3
