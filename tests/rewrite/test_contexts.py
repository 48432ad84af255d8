"""Contexts around a part of an attention's forward hold in the patched one."""

import pytest
import torch
import torch.nn.functional as F
from comparing import moved
from timm.layers import Attention
from torch import nn
from variants import build, images

import evopatch


class Noting(nn.Linear):
    def forward(self, x):
        out = super().forward(x)
        self.seen = out.dtype, torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()
        return out


class Stock(Attention):
    def __init__(self, dim, *args, **kwargs):
        super().__init__(dim, *args, **kwargs)
        self.qkv, self.proj = Noting(dim, 3 * dim), Noting(dim, dim)

    def heads(self, x):
        batch, tokens, _ = x.shape
        return self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)

    def joined(self, q, k, v, like):
        out = F.scaled_dot_product_attention(q.float(), k.float(), v.float()).transpose(1, 2)
        return self.proj(out.reshape(like.shape))

    def forward(self, x, **kwargs):
        q, k, v = self.heads(x)
        return self.joined(q, k, v, x)


class WithoutCasting(Stock):
    def forward(self, x, **kwargs):
        with torch.autocast("cpu", enabled=False):
            q, k, v = self.heads(x.float())
            return self.joined(q, k, v, x)


class Casting(Stock):
    """Around some calls alone, one in the other."""

    def forward(self, x, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            q, k, v = self.heads(x)
            with torch.autocast("cpu", enabled=False):
                return self.joined(q, k, v, x)


class WithoutGradients(Stock):
    def forward(self, x, **kwargs):
        with torch.no_grad():
            q, k, v = self.heads(x)
        return self.joined(q, k, v, x)


class NeverWithGradients(Stock):
    @torch.no_grad()
    def forward(self, x, **kwargs):
        return super().forward(x)


KINDS = [Stock, WithoutCasting, Casting, WithoutGradients, NeverWithGradients]


def seen(model):
    return [(block.attn.qkv.seen, block.attn.proj.seen) for block in model.blocks]


@pytest.mark.parametrize("under", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_an_attention_run_in_the_contexts_of_its_forward(kind, under):
    model, x = build("vit", attn_layer=kind), images()
    with torch.autocast("cpu", torch.bfloat16, enabled=under):
        original, expected = model(x), seen(model)
        with torch.no_grad():
            evopatch.apply(model, keep_ratio=0.5)
        found = model(x)
        assert seen(model) == expected
        assert moved(found, original) > 1e-4
    found.float().sum().backward()
    weight = model.blocks[5].attn.qkv.weight
    assert (weight.grad is None) == (kind in (WithoutGradients, NeverWithGradients))


@torch.no_grad()
def test_contexts_compile_as_one_graph():
    for kind in (WithoutCasting, Casting, WithoutGradients):
        model, x = build("vit", attn_layer=kind), images()
        for block in model.blocks:
            block.attn.qkv, block.attn.proj = nn.Linear(48, 144), nn.Linear(48, 48)
        evopatch.apply(model, keep_ratio=0.5)
        with torch.autocast("cpu", torch.bfloat16):
            expected = model(x)
            torch._dynamo.reset()
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            assert torch.equal(compiled(x), expected)


def test_nothing_is_left_of_noticing_contexts():
    before = torch.autocast.__enter__, torch.autocast.__exit__, torch.is_grad_enabled()
    evopatch.apply(build("vit", attn_layer=WithoutCasting))
    assert (torch.autocast.__enter__, torch.autocast.__exit__, torch.is_grad_enabled()) == before
