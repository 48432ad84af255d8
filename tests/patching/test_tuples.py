"""Blocks that give a tuple: the tokens, and attention weights with them."""

import pytest
import torch
from torch import nn
from variants import build, images
from variants.own_models import OwnViT, TupleBlock, Weighing

import evopatch
from evopatch import UnsupportedInputError

TOKENS = 1 + 25


def patched(model, **settings):
    return evopatch.apply(model, blocks="blocks", prefix_tokens=1, **settings)


@torch.no_grad()
def test_weights_are_those_of_all_tokens():
    x, model = images(), build("own_softmax")
    unpatched = model.attentions(x)
    patched(model, keep_ratio=1.0)
    assert all(torch.equal(a, b) for a, b in zip(model.attentions(x), unpatched, strict=True))
    evopatch.set_keep_ratio(model, 0.5)
    found = model.attentions(x)
    assert {weights.shape for weights in found} == {unpatched[0].shape} == {(2, 4, TOKENS, TOKENS)}
    assert all(torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5) for weights in found)
    assert not torch.allclose(found[-1], unpatched[-1], atol=1e-3)
    # A fast token asks as its group does.
    group = evopatch.token_groups(model, x)[0, -1].flatten()
    members = (group == group.mode().values).nonzero().flatten() + 1
    assert len(members) > 1
    assert all(torch.equal(found[-1][0, :, token], found[-1][0, :, members[0]]) for token in members)


class Keeping(TupleBlock):
    """Gives its tokens a second time."""

    def forward(self, x):
        tokens, _ = super().forward(x)
        return tokens, None, tokens.norm(dim=-1)


@torch.no_grad()
def test_anything_else_beside_the_tokens_is_refused():
    model, x = build("own_softmax"), images()
    model.blocks = nn.ModuleList([Keeping(Weighing, 0.0) for _ in range(6)])
    expected = model(x)
    patched(model)
    with pytest.raises(UnsupportedInputError, match=r"blocks\.\d gave \(2, \d+\) beside its tokens"):
        model(x)
    evopatch.set_keep_ratio(model, 1.0)
    assert torch.equal(model(x), expected)


class Named(OwnViT):
    """A walk that says what it takes of a tuple."""

    def block(self):
        return TupleBlock(Weighing, self.dropout)

    def encode(self, x):
        x = self.embed(x)
        for block in self.blocks:
            outputs = block(x)
            x = outputs[0]
        return self.norm(x)


@torch.no_grad()
def test_any_walk_gives_the_same():
    torch.manual_seed(0)
    one, other = build("own_softmax"), build("own_softmax")
    other.__class__ = Named
    x = images(4)
    a, b = patched(one)(x), patched(other)(x)
    assert torch.allclose(a, b, atol=1e-5)
