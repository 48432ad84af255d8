"""The many ways to write the same attention: each gives what timm's own does, look-ahead included."""

import math

import einops
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comparing import moved
from timm.layers import Attention
from torch import einsum, nn
from variants import build, images
from variants.own_models import AssertingAttention

import evopatch
from evopatch import AttentionNotFoundError, UnsupportedModelError


class Written(Attention):
    """An attention whose logits a subclass makes."""

    def forward(self, x, attn_mask=None, is_causal=False):
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(self.weights(q, k), v)

    def weights(self, q, k):
        return self.logits(q, k).softmax(-1)

    def out(self, weights, v):
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class FactorFirst(Written):
    def logits(self, q, k):
        return self.scale * (q @ k.transpose(-2, -1))


class RootOfSize(Written):
    def logits(self, q, k):
        return q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])


class PowerOfSize(Written):
    def logits(self, q, k):
        return torch.mul(q, q.size(-1) ** -0.5) @ k.transpose(-2, -1)


class KeysDivided(Written):
    def logits(self, q, k):
        return q @ (k / k.size(-1) ** 0.5).transpose(-2, -1)


class Einsum(Written):
    def logits(self, q, k):
        return einsum("b h i d, b h j d -> b h i j", q, k) * self.scale


class EinsumOfList(Written):
    def logits(self, q, k):
        return torch.einsum("bhid,bhjd->bhij", [q, k]) * self.scale


class Methods(Written):
    def logits(self, q, k):
        return q.matmul(k.transpose(-2, -1)).mul(self.scale)


class Float(Written):
    def weights(self, q, k):
        return (q @ k.transpose(-2, -1) * self.scale).float().softmax(-1).to(q.dtype)


class SizeOfTokens(Written):
    def forward(self, x, attn_mask=None, is_causal=False):
        batch, tokens, channels = x.shape
        head = channels // self.num_heads
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, head).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out((q @ k.transpose(-2, -1) * head**-0.5).softmax(-1), v)


class Asserting(Written):
    def forward(self, x, attn_mask=None, is_causal=False):
        assert len(x.shape) == 3
        assert x.shape[2] == self.qkv.in_features, "other channels"
        assert (
            x.abs() < 1e3  # over several lines
        ).all()
        return super().forward(x)

    def logits(self, q, k):
        assert q.shape == k.shape
        return q @ k.transpose(-2, -1) * self.scale


class Counting(Written):
    def forward(self, x, attn_mask=None, is_causal=False):
        qkv = self.qkv(x).reshape(len(x), -1, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = (part for part in qkv.unbind(0))
        return self.out((q @ k.transpose(-2, -1) * self.scale).softmax(-1), v)


class HeadsBesideImages(Written):
    """Three axes, in torch's fused attention."""

    def forward(self, x, attn_mask=None, is_causal=False):
        batch, tokens, channels = x.shape
        parts = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k, v = (part.reshape(batch * self.num_heads, tokens, self.head_dim) for part in parts)
        out = F.scaled_dot_product_attention(q, k, v, scale=self.head_dim**-0.5)
        return self.proj(out.view(batch, self.num_heads, tokens, -1).transpose(1, 2).reshape(batch, tokens, channels))


class UnpackedShape(Written):
    def forward(self, x, attn_mask=None, is_causal=False):
        batch, tokens, _, heads = *x.shape, self.num_heads
        q, k, v = (part.view(*x.shape[:2], heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(dim=-1, chunks=3))
        weights = (q @ k.transpose(-2, -1) / math.sqrt(q.size(3))).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, -1))


class TwiceUnflattened(Written):
    def forward(self, x, attn_mask=None, is_causal=False):
        channels = self.num_heads * self.head_dim
        parts = self.qkv(x).unflatten(-1, (3, channels)).unflatten(-1, (self.num_heads, self.head_dim))
        q, k, v = parts.unbind(2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return self.out((q @ k.transpose(-2, -1) * self.scale).softmax(-1), v)


class Keywords(Written):
    def forward(self, x, attn_mask=None, is_causal=False):
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query=qkv[0], key=qkv[1], value=qkv[2])
        return self.proj(out.transpose(1, 2).flatten(2))


class NumberOfNumpy(Written):
    def logits(self, q, k):
        return q @ k.transpose(-2, -1) / np.sqrt(self.head_dim)


class Einops(Written):
    def logits(self, q, k):
        return einops.einsum(q, k, "b h i d, b h j d -> b h i j") * self.scale


class InPlace(Written):
    def logits(self, q, k):
        logits = q @ k.transpose(-2, -1)
        logits.mul_(self.scale)
        return logits


class InPlaceInTraining(Written):
    def logits(self, q, k):
        logits = q @ k.transpose(-2, -1)
        if self.training:
            logits.mul_(self.scale)
        else:
            logits = logits * self.scale
        return logits


class Alternatives(Written):
    def logits(self, q, k):
        assert self.scale > 0 or q.shape[0] == 7
        assert not q.shape[3] == 7  # noqa: SIM201
        return q @ k.transpose(-2, -1) * self.scale


SAME = [
    FactorFirst, RootOfSize, PowerOfSize, KeysDivided, Einsum, EinsumOfList, Methods, Float, SizeOfTokens, Asserting,
    Counting, HeadsBesideImages, InPlace, InPlaceInTraining, Keywords, NumberOfNumpy, Alternatives,
]  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layer", SAME)
@torch.no_grad()
def test_the_same_attention(layer, training):
    model, stock, x = build("vit", attn_layer=layer).train(training), build("vit").train(training), images()
    torch.testing.assert_close(model(x), stock(x), atol=2e-5, rtol=2e-5)
    expected = evopatch.apply(stock)(x)
    assert moved(expected, model(x)) > 1e-3
    torch.testing.assert_close(evopatch.apply(model)(x), expected, atol=2e-5, rtol=2e-5)
    found = model.blocks[0].attn._evo_code.projections
    assert found is not None
    assert (found.scale or 12**-0.5) == pytest.approx(12**-0.5)  # look-ahead knows it


class AssertingAndFused(Attention):
    def forward(self, x, attn_mask=None, is_causal=False):
        assert (x.abs() < 1e3).all()
        return super().forward(x)


# Those that no look-ahead knows rank tokens as others do without it.


class LargestDetached(Written):
    def logits(self, q, k):
        logits = q @ k.transpose(-2, -1) * self.scale
        return logits.sub_(logits.max(dim=-1, keepdim=True).values.detach())


class LargestFirst(Written):
    def logits(self, q, k):
        logits = q @ k.transpose(-2, -1) * self.scale
        return logits - logits.amax(dim=-1, keepdim=True)


class LargestValues(Written):
    def logits(self, q, k):
        logits = q @ k.transpose(-2, -1) * self.scale
        return logits - torch.max(logits, dim=-1, keepdim=True)[0]


class ThreeAxes(Written):
    def weights(self, q, k):
        q, k = q.flatten(0, 1), k.flatten(0, 1)
        return F.softmax(torch.bmm(q, k.mT) * self.scale, dim=2).unflatten(0, (-1, self.num_heads))


class Temperature(Written):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.temperature = nn.Parameter(torch.zeros(self.num_heads, 1, 1))

    def logits(self, q, k):
        return q @ k.transpose(-2, -1) * torch.clamp(self.temperature, max=math.log(100.0)).exp()


class NumberLearned(Temperature):
    def logits(self, q, k):
        return q @ k.transpose(-2, -1) * math.exp(self.temperature[0, 0, 0].item())


UNKNOWN = [
    LargestFirst, LargestValues, LargestDetached, ThreeAxes, Temperature, NumberLearned, Einops, TwiceUnflattened,
    UnpackedShape,
]  # fmt: skip


@pytest.mark.parametrize("layer", UNKNOWN)
@torch.no_grad()
def test_the_same_attention_without_look_ahead(layer):
    model, stock, x = build("vit", attn_layer=layer), build("vit"), images()
    for module in model.modules():
        if isinstance(module, Temperature):
            module.temperature.fill_(math.log(module.scale))
    stock.load_state_dict(model.state_dict(), strict=False)  # random numbers fall otherwise with one parameter more
    expected = evopatch.apply(stock, config=evopatch.EvoConfig(look_ahead=0.0))(x)
    torch.testing.assert_close(evopatch.apply(model)(x), expected, atol=2e-5, rtol=2e-5)
    assert model.blocks[0].attn._evo_code.projections is None


@pytest.mark.parametrize("layer", [Temperature, NumberLearned])
@torch.no_grad()
def test_a_learned_temperature_is_the_module_s_own(layer):
    model, x = evopatch.apply(build("vit", attn_layer=layer)), images()
    before = model(x)
    for block in model.blocks:
        block.attn.temperature.add_(1.0)
    assert moved(model(x), before) > 1e-3


@torch.no_grad()
def test_logits_that_are_capped(monkeypatch):
    class Capped(Written):
        cap = 2.0

        def logits(self, q, k):
            return self.cap * torch.tanh(q @ k.transpose(-2, -1) * self.scale / self.cap)

    model, x = build("vit", attn_layer=Capped), images()
    original = model(x)
    evopatch.apply(model)
    found = model(x)
    assert moved(found, original) > 1e-3
    # With a cap that nothing reaches it is the attention without one.
    monkeypatch.setattr(Capped, "cap", 1e4)
    uncapped = evopatch.apply(build("vit", attn_layer=Capped))(x)
    expected = evopatch.apply(build("vit"), config=evopatch.EvoConfig(look_ahead=0.0))(x)
    torch.testing.assert_close(uncapped, expected, atol=1e-4, rtol=1e-4)
    assert moved(uncapped, found) > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("layer", [Asserting, AssertingAndFused])
def test_what_is_asserted_is_asserted_at_every_forward(layer):
    model, x = evopatch.apply(build("vit", attn_layer=layer)), images()
    model(x)
    for block in (model.blocks[3], model.blocks[-1]):
        before = block.norm1.weight.clone()
        block.norm1.weight.mul_(1e6)
        with pytest.raises(AssertionError, match=r"x.abs\(\) < 1000.0"):
            model(x)
        block.norm1.weight.copy_(before)
    model(x)


@torch.no_grad()
def test_asserts_in_compiled_code():
    model, x = evopatch.apply(build("vit", attn_layer=AssertingAttention)), images()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


# Refused


class ByPlace(Written):
    def logits(self, q, k):
        return q @ k.transpose(-2, -1) * torch.arange(1, k.shape[2] + 1)


class ByNumber(Written):
    def logits(self, q, k):
        return q @ k.transpose(-2, -1) * (self.scale * math.log(k.shape[-2]))


class ByNumberOfTransposed(Written):
    def logits(self, q, k):
        k = k.transpose(-2, -1)
        return q @ k / k.shape[-1]


class ByToken(Written):
    def logits(self, q, k):
        return q @ k.transpose(-2, -1) * q.norm(dim=-1, keepdim=True)


class Biased(Written):
    def logits(self, q, k):
        return q @ k.transpose(-2, -1) * self.scale + self.scale * (q @ k.transpose(-2, -1)).cumsum(-1)


class LargestOfKey(Written):
    def logits(self, q, k):
        logits = q @ k.transpose(-2, -1) * self.scale
        return logits - logits.amax(dim=-2, keepdim=True)


class LearnedByPlace(Written):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.table = nn.Parameter(torch.rand(1, 1, 26))

    def logits(self, q, k):
        return q @ k.transpose(-2, -1) * self.table


class Branching(Written):
    def logits(self, q, k):
        if q.shape[2] == 26:
            q = q * self.scale
        return q @ k.transpose(-2, -1)


class TokensAsHead(Written):
    def logits(self, q, k):
        k = k.mT
        return q @ k * (self.scale * k.shape[-1] / 26)


class ChangedByAnotherName(Written):
    def logits(self, q, k):
        k.transpose(-2, -1).mul_(self.scale)
        return q @ k.transpose(-2, -1)


class OneOrTheOther(Written):
    def logits(self, q, k):
        assert q.shape[0] < 100 or q.shape[0] % 2 == 0
        return q @ k.transpose(-2, -1) * self.scale


REFUSED = [
    ByPlace,
    ByNumber,
    ByNumberOfTransposed,
    ByToken,
    Biased,
    LargestOfKey,
    LearnedByPlace,
    Branching,
    TokensAsHead,
    ChangedByAnotherName,
    OneOrTheOther,
]


@pytest.mark.parametrize("layer", REFUSED)
@torch.no_grad()
def test_what_depends_on_places_or_numbers_of_tokens(layer):
    model, x = build("vit", attn_layer=layer), images()
    original = model(x)
    with pytest.raises((AttentionNotFoundError, UnsupportedModelError)):
        evopatch.apply(model)
    assert torch.equal(model(x), original)


@pytest.mark.parametrize("layer", [ByNumber, ByToken, LearnedByPlace])
def test_a_refusal_says_what_stands_there(layer):
    message = r"the graph node 'mul\w*' .*same for all tokens.*position bias"
    with pytest.raises(AttentionNotFoundError, match=message):
        evopatch.apply(build("vit", attn_layer=layer))
