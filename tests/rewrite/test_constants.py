"""Tensors that an attention makes in its forward."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from comparing import moved
from timm.layers import Attention
from variants import build, images

import evopatch


class Stock(Attention):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("doubled", torch.tensor(2.0))

    def forward(self, x, **kwargs):
        batch, tokens, channels = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        out = F.scaled_dot_product_attention(self.turned(q), k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, channels))

    def turned(self, q):
        return q * (0.5 + 0.1)


class Number(Stock):
    def turned(self, q):
        return q * (torch.tensor(0.5) + 0.1)


class Numbers(Stock):
    def turned(self, q):
        return q * (torch.full((self.head_dim,), 0.5) + torch.ones(self.head_dim) * 0.1)


class OfABuffer(Stock):
    def turned(self, q):
        return q * (self.doubled * 0.3)


SOMEWHERE = torch.tensor(0.6)


class FromOutside(Stock):
    def turned(self, q):
        return q * SOMEWHERE


@pytest.mark.parametrize("kind", [Number, Numbers])
@torch.no_grad()
def test_constants_of_numbers_are_kept(kind):
    model, stock, x = build("vit", attn_layer=kind), build("vit", attn_layer=Stock), images()
    stock.load_state_dict(model.state_dict())
    original = model(x)
    evopatch.apply(model)
    evopatch.apply(stock)
    expected = stock(x)
    assert moved(expected, original) > 1e-4
    torch.testing.assert_close(model(x), expected, atol=2e-5, rtol=2e-5)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_constants_of_numbers_follow_the_model():
    model = evopatch.apply(build("vit", attn_layer=Numbers))
    assert model.to("meta")(images().to("meta")).device.type == "meta"


@pytest.mark.parametrize("kind", [OfABuffer, FromOutside])
def test_other_tensors_would_grow_old_and_are_refused(kind):
    model = build("vit", attn_layer=kind)
    with pytest.raises(
        evopatch.AttentionNotFoundError, match=r"blocks\.0.*\(\) that is neither a parameter or a buffer"
    ):
        evopatch.apply(model)
    assert not evopatch.is_patched(model)
