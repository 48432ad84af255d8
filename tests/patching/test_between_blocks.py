"""Hosts that do something with the tokens between the blocks: tokens are slow or fast by what they are then."""

import pytest
import torch
from comparing import moved
from torch import nn
from torch.utils.checkpoint import checkpoint
from variants.own_models import WIDTH, Attention, Block

import evopatch
from evopatch.forward import ranking

PATCH, SIDE = 8, 5


class Plain(nn.Module):
    """Without position embeddings: equal patches stay equal tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.class_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.blocks = nn.ModuleList([Block(Attention, 0.0) for _ in range(6)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 7)

    def tokens(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        return torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)

    def forward(self, x):
        x = self.tokens(x)
        for index, block in enumerate(self.blocks):
            x = self.between(block(x), index)
        return self.head(self.norm(x)[:, 0])

    def between(self, x, index):
        return x


class Rolling(Plain):
    def between(self, x, index):
        return torch.cat([x[:, :1], x[:, 1:].roll(3, 1)], 1)


class Sorting(Plain):
    def between(self, x, index):
        order = x[:, 1:].mean(-1).argsort(1)[..., None].expand(-1, -1, x.shape[2])
        return torch.cat([x[:, :1], x[:, 1:].gather(1, order)], 1)


class Pruning(Plain):
    def between(self, x, index):
        return torch.cat([x[:, :1], x[:, 1::2]], 1) if index == 4 else x


class TwoStreams(Plain):
    def forward(self, x):
        x, y = self.tokens(x), self.tokens(x.flip(-1).roll(1, 0))
        for block in self.blocks:
            x = block(x)
            y = block(y)
        return self.head(self.norm(torch.cat([x[:, 0], y[:, 0]])))


def palette():
    """Images of three patches, nearly: with half of the tokens slow, fast ones are like theirs."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(3, 3, PATCH, PATCH, generator=generator)
    which = torch.randint(0, 3, (2, SIDE, SIDE), generator=generator)
    x = patches[which].permute(0, 3, 1, 4, 2, 5).reshape(2, 3, SIDE * PATCH, SIDE * PATCH)
    return x + 1e-4 * torch.randn(x.shape, generator=generator)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("cls", [Plain, Rolling, Sorting, Pruning, TwoStreams])
@torch.no_grad()
def test_fast_tokens_are_like_their_slow_ones(cls, compiled):
    model, x = cls().eval(), palette()
    expected = model(x)
    evopatch.apply(model, blocks="blocks", prefix_tokens=1)
    found = (torch.compile(model, backend="eager") if compiled else model)(x)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    assert moved(model(torch.randn(x.shape)), expected) > 1e-2


@pytest.mark.parametrize("cls", [Plain, Rolling])
@torch.no_grad()
def test_tokens_are_chosen_again_only_where_they_are_others(cls, monkeypatch):
    model, chosen, select = cls().eval(), [], ranking.select_matched
    evopatch.apply(model, blocks="blocks", prefix_tokens=1, config=evopatch.EvoConfig(keep_ratio=[0.5], stages=(3,)))
    monkeypatch.setattr(ranking, "select_matched", lambda *args: chosen.append(args) or select(*args))
    model(palette())
    assert len(chosen) == {Plain: 1, Rolling: 3}[cls]


class Checkpointed(Rolling):
    def forward(self, x):
        x = self.tokens(x)
        for index, block in enumerate(self.blocks):
            x = self.between(checkpoint(block, x, use_reentrant=False), index)
        return self.head(self.norm(x)[:, 0])


def test_blocks_that_are_computed_anew_choose_as_they_did():
    """What comes to them may lie elsewhere in memory then."""
    gradients = []
    for cls in (Rolling, Checkpointed):
        model = evopatch.apply(cls(), blocks="blocks", prefix_tokens=1)
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
            model(palette()).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)
