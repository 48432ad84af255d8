"""The same under torch.compile, which follows no copies of modules."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from variants import build, images

import evopatch

LOOKED_AT = (2, 3, 4)
"""Blocks that one before them looks at, in a model of six."""


class Observing(nn.Linear):
    """As layers of quantisation-aware training: in training it takes note of the range of what it has seen."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features)
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("range", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.range.lerp_(x.detach().abs().mean(), 0.5)
        return super().forward(x)


class LowRank(nn.Module):
    """As LoRA with dropout (arXiv 2106.09685, section 4.1)."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.layer = layer.in_features, layer
        self.down, self.up = nn.Linear(layer.in_features, 4), nn.Linear(4, layer.out_features)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(self.dropout(x)))


def changed(change):
    torch.manual_seed(1)
    model = build("vit")
    for index in LOOKED_AT:
        model.blocks[index].attn.qkv = change(model.blocks[index].attn.qkv)
    return evopatch.apply(model).train()


@pytest.mark.parametrize("change", [Observing, LowRank, parametrizations.spectral_norm])
def test_training_is_as_without_it(change):
    """Layers that are looked at aren't run on other than tokens: no random numbers, and nothing is remembered."""
    model, x = changed(change), images()
    compiled = copy.deepcopy(model)
    step = torch.compile(compiled, backend="eager", fullgraph=True)
    for seed in range(2):
        torch.manual_seed(seed)
        expected, after = model(x), torch.rand(1)
        torch.manual_seed(seed)
        torch.testing.assert_close(step(x), expected, atol=1e-6, rtol=1e-5)
        assert torch.equal(torch.rand(1), after)
    buffers = dict(compiled.named_buffers())
    assert len(buffers) == {Observing: 3, LowRank: 0}.get(change, 6)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffers[name], buffer)
    assert all(module.training for module in compiled.modules())
