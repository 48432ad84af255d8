"""A number that an attention reads from something else that it holds may change after `apply`."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from comparing import moved
from timm.layers import Attention
from torch import nn
from variants import build, images

import evopatch


@dataclass
class Settings:
    temperature: float = 0.25
    inner: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(temperature=0.25))


class Holder(nn.Module):
    temperature = 7.0  # the class's own isn't watched

    def __init__(self):
        super().__init__()
        self.temperature = 0.25


class Reading(Attention):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.settings, self.holder, self.options = Settings(), Holder(), {"temperature": 0.25}

    def forward(self, x, attn_mask=None, is_causal=False):
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(((self.logits(q @ k.transpose(-2, -1))).softmax(-1) @ v).transpose(1, 2).flatten(2))


class FromModule(Reading):
    def logits(self, products):
        return products * self.holder.temperature

    def set(self, value):
        self.holder.temperature = value


class FromDataclass(Reading):
    def logits(self, products):
        settings = self.settings
        return products * settings.temperature

    def set(self, value):
        self.settings.temperature = value


class FromDict(Reading):
    def logits(self, products):
        return products * self.options["temperature"]

    def set(self, value):
        self.options["temperature"] = value


class FromWithin(Reading):
    def logits(self, products):
        return products * self.settings.inner.temperature

    def set(self, value):
        self.settings.inner.temperature = value


KINDS = pytest.mark.parametrize("attention", [FromModule, FromDataclass, FromDict, FromWithin])


def both(attention):
    """A patched model whose number was changed after `apply`, and one before."""
    after, before = (build("vit", attn_layer=attention) for _ in range(2))
    evopatch.apply(after)
    for model in (after, before):
        for block in model.blocks:
            block.attn.set(4.0)
    return after, evopatch.apply(before)


@KINDS
@torch.no_grad()
def test_a_value_that_changes_counts(attention):
    x, (after, before) = images(), both(attention)
    unchanged = evopatch.apply(build("vit", attn_layer=attention))
    assert moved(before(x), unchanged(x)) > 1e-3
    assert torch.equal(after(x), before(x))


@torch.no_grad()
def test_code_stays_while_nothing_changes():
    model, x = evopatch.apply(build("vit", attn_layer=FromModule)), images()
    code = model.blocks[4].attn._evo_code
    model.train()(x)
    model.eval()(x)
    model.blocks[4].attn.attn_drop.p = 0.5  # which is read whenever the code runs
    model(x)
    assert model.blocks[4].attn._evo_code is code
    model.blocks[4].attn.set(4.0)
    model(x)
    assert model.blocks[4].attn._evo_code is not code


@torch.no_grad()
def test_compiled_code_says_so():
    model, x = evopatch.apply(build("vit", attn_layer=FromModule)), images()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled(x)
    model.blocks[4].attn.set(4.0)
    with pytest.raises(Exception, match=r"self.holder.temperature was 0.25 when its forward was traced"):
        compiled(x)
    torch.testing.assert_close(model(x), compiled(x))
