"""Blocks written anew from their graphs: shared code, unfused attention, replaced layers, unknown attention cores."""

import copy
import importlib
import linecache
from collections import deque

import pytest
import torch
from comparing import Snapshot, moved
from internals import forward_code, generated_functions, states
from matrix import every
from timm.layers import Attention, set_fused_attn
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from variants import FLAT, TIMM, build, call, images, images_for

import evopatch
from evopatch.rewrite import graph


@every(TIMM & FLAT - {"relpos", "relpos_class", "relpos_shared", "beit", "beit_shared"})
@torch.no_grad()
def test_unfused_attention_gives_the_same(name):
    fused, x = evopatch.apply(build(name)), images()
    set_fused_attn(False)
    try:
        unfused = evopatch.apply(build(name))
    finally:
        set_fused_attn(True)
    code = forward_code(unfused.blocks[3]).__code__.co_names
    assert "softmax" in code
    assert "attend" not in code
    torch.testing.assert_close(unfused(x), fused(x), atol=3e-5, rtol=3e-5)
    assert torch.equal(evopatch.token_selection(unfused, x), evopatch.token_selection(fused, x))
    evopatch.set_keep_ratio(unfused, 0.3)
    assert moved(unfused(x), fused(x)) > 1e-5


def test_blocks_of_one_structure_share_their_code():
    model = evopatch.apply(build("vit"))
    assert len({forward_code(block) for block in model.blocks}) == 1
    before = generated_functions()
    evopatch.apply(build("vit"))
    assert generated_functions() == before


def test_deepcopy_does_not_trace_again():
    model = evopatch.apply(build("vit"))
    twin = copy.deepcopy(model)
    assert forward_code(twin.blocks[0]) is forward_code(model.blocks[0])
    own, of_block = states(model, model.blocks[0])
    twins, of_twins_block = states(twin, twin.blocks[0])
    assert of_block is own
    assert of_twins_block is twins
    assert twins is not own


@torch.no_grad()
def test_a_linear_layer_replaced_after_apply_is_used():
    """As LoRA and quantisation do."""
    # Look-ahead makes a plain layer's keys otherwise than another's: that they agree is a test of its own.
    model, x = evopatch.apply(build("vit"), config=evopatch.EvoConfig(look_ahead=0.0)), images()
    before = model(x)
    old = model.blocks[4].attn.qkv
    model.blocks[4].attn.qkv = nn.Sequential(old, nn.Dropout(0.0))
    assert torch.equal(model(x), before)
    model.blocks[4].attn.qkv = nn.Linear(48, 144)
    assert not torch.equal(model(x), before)


class FunctionalSoftmax(Attention):
    def forward(self, x, attn_mask=None, is_causal=False):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        weights = nn.functional.softmax(q @ k.transpose(-2, -1) * self.scale, dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


@torch.no_grad()
def test_an_attention_module_that_calls_functional_softmax():
    model, stock, x = build("vit", attn_layer=FunctionalSoftmax), build("vit"), images()
    torch.testing.assert_close(evopatch.apply(model)(x), evopatch.apply(stock)(x), atol=2e-5, rtol=2e-5)


class NoAttention(nn.Module):
    def __init__(self, dim, **kwargs):
        super().__init__()
        self.mix = nn.Linear(dim, dim)

    def forward(self, x, attn_mask=None, is_causal=False):
        return x + self.mix(x)


class ShapeDependent(NoAttention):
    def forward(self, x, attn_mask=None, is_causal=False):
        return x + self.mix(x) if x.sum() > 0 else x


class MaskedSoftmax(NoAttention):
    def forward(self, x, attn_mask=None, is_causal=False):
        y = self.mix(x)
        logits = (y @ y.transpose(1, 2)).tril()
        return x + logits.softmax(dim=-1) @ y


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (NoAttention, r"blocks\.0 \(NoAttention\): found no .*scaled_dot_product_attention.*graph.*ends at 'add'"),
        (ShapeDependent, r"blocks\.0 \(ShapeDependent\) can't be traced .*past the graph node 'gt'"),
        (MaskedSoftmax, r"blocks\.0 \(MaskedSoftmax\): the graph node 'tril' \(call_method tril\) stands between"),
    ],
)
def test_blocks_without_a_known_attention_core(block, message):
    model = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=3, num_heads=2, block_fn=block)
    before = Snapshot(model)
    with pytest.raises(evopatch.AttentionNotFoundError, match=message):
        evopatch.apply(model)
    before.assert_untouched(model)


@pytest.mark.parametrize("name", ["relpos", "relpos_shared"])
def test_position_biases_without_fused_attention_are_refused(name):
    set_fused_attn(False)
    try:
        model = build(name)
    finally:
        set_fused_attn(True)
    with pytest.raises(evopatch.AttentionNotFoundError, match="is created with fused attention"):
        evopatch.apply(model)
    assert not evopatch.supported(model)


class Keeping(Attention):
    """Keeps its attention map for whoever wants to look at it."""

    def forward(self, x, **kwargs):
        batch, tokens, channels = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        self.attention_map = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((self.attention_map @ v).transpose(1, 2).reshape(batch, tokens, channels))


@torch.no_grad()
def test_an_attention_that_keeps_its_map_is_refused_and_left_as_it_was():
    """It would be that of the compact set, or an old one."""
    model, x = build("vit"), images()
    for block in model.blocks:
        block.attn.__class__ = Keeping
    expected = model(x)
    before = Snapshot(model)
    maps = [block.attn.attention_map for block in model.blocks]
    with pytest.raises(evopatch.AttentionNotFoundError, match=r"blocks\.0.*sets attn\.attention_map on itself"):
        evopatch.apply(model)
    before.assert_untouched(model)
    assert all(block.attn.attention_map is kept for block, kept in zip(model.blocks, maps, strict=True))
    assert torch.equal(model(x), expected)


@torch.no_grad()
def test_nor_can_it_become_one_after_apply(monkeypatch):
    model, x = evopatch.apply(build("vit")), images()
    model(x)
    monkeypatch.setattr(Attention, "forward", Keeping.forward)
    with pytest.raises(evopatch.AttentionNotFoundError, match="sets attention_map on itself"):
        model(x)
    monkeypatch.undo()
    model(x)


class Filling(Attention):
    """Keeps something on itself without setting an attribute."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.maps, self.by_name, self.seen, self.calls = [], {"last": deque()}, set(), {"number": 0}
        self.register_buffer("number", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("parts", torch.zeros(2))

    def forward(self, x, **kwargs):
        batch, tokens, channels = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1)
        self.keep(weights)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, channels))

    def keep(self, weights):
        pass


WAYS = {
    "maps": lambda self, weights: self.maps.append(weights),
    "by_name": lambda self, weights: self.by_name["last"].append((1, weights)),
    "seen": lambda self, weights: self.seen.add(weights),
    "calls": lambda self, weights: self.calls.update(number=self.calls["number"] + 1),
    "number": lambda self, weights: self.number.add_(1),
    "mean": lambda self, weights: self.mean.mul_(0.9).add_(weights.mean()),
    "parts": lambda self, weights: self.parts.__setitem__(0, weights.mean()),
}


def filling(way):
    kind = type("Filling", (Filling,), {} if way is None else {"keep": WAYS[way]})
    return build("vit", attn_layer=kind)


def kept(model):
    return [[repr(getattr(block.attn, name)) for name in WAYS] for block in model.blocks]


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_an_attention_that_fills_what_it_has_is_refused_and_left_as_it_was(way):
    model = filling(way)
    held = [block.attn.maps for block in model.blocks]
    with pytest.raises(evopatch.AttentionNotFoundError, match=rf"blocks\.0.*sets (attn\.)?{way} on itself"):
        evopatch.apply(model)
    assert kept(model) == kept(filling(None))
    assert all(block.attn.maps is each for block, each in zip(model.blocks, held, strict=True))
    with pytest.raises(evopatch.AttentionNotFoundError):
        evopatch.apply(model)


@torch.no_grad()
def test_an_attention_that_has_lists_and_leaves_them_is_patched():
    assert evopatch.is_patched(evopatch.apply(filling(None)))


class Counting(Block):
    calls = 0

    def forward(self, x, **kwargs):
        self.calls += 1
        return super().forward(x, **kwargs)


@torch.no_grad()
def test_a_block_that_counts_its_calls_counts_them_and_is_traced_once(monkeypatch):
    model, x = build("vit"), images()
    for block in model.blocks:
        block.__class__ = Counting
    evopatch.apply(model)
    assert [block.calls for block in model.blocks] == [0] * 6
    made = []
    monkeypatch.setattr(type(model.blocks[0]), "_evo_generate", lambda self: made.append(self))
    model(x)
    model(x)
    assert [block.calls for block in model.blocks] == [2] * 6
    assert not made
    model.blocks[0].anything_else = 3
    assert made == [model.blocks[0]]


@pytest.mark.parametrize("name", ["vit", "beit", "eva", "cait", "torchvision", "swin", "hf_vit"])
@torch.no_grad()
def test_copies_get_their_tensors_one_by_one(name, monkeypatch):
    """As torch's `replicate` makes copies of a model for `nn.DataParallel`: at no time has one all of them."""
    model, x = evopatch.apply(build(name)), images_for(name)
    replicate = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", lambda tensors, *_, **__: [tensors, tensors])
    for copied in replicate.replicate(model, [0, 1]):
        assert copied is not model
        assert torch.equal(call(copied, x), call(model, x))


def test_code_of_former_settings_is_forgotten(monkeypatch):
    monkeypatch.setattr(graph, "_KEPT", 20)
    model, x = evopatch.apply(build("hf_vit")), images()
    for step in range(6):
        for layer in model.vit.layers:
            layer.attention.scaling = 0.2 + step / 100
        model(x)
    files = [name for name in linecache.cache if name.startswith("<evopatch block")]
    assert len(files) == len(graph._functions) == 20
    expected = evopatch.apply(build("hf_vit"))
    for layer in expected.vit.layers:
        layer.attention.scaling = 0.25
    assert torch.equal(model(x).logits, expected(x).logits)
