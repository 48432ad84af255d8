"""Blocks that make something else of merged tokens than of all of them are refused: one's own, and a library's."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.ops import Permute
from variants import build, call, images, images_for
from variants.own_models import HEADS, WIDTH, Attention, Block, OwnViT

import evopatch
from evopatch import UnsupportedModelError

DIFFERENT = "gives something else for tokens that are merged than for each of several equal ones"


class Split(Attention):
    def heads(self, x):
        return self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def joined(self, out):
        return self.proj(out.transpose(1, 2).flatten(2))


class KeysFirst(Split):
    def forward(self, x):
        q, k, v = self.heads(x)
        weights = (k @ q.transpose(-2, -1) * 0.25).softmax(-2)
        return self.joined(weights.transpose(-2, -1) @ v)


class Talking(Split):
    def __init__(self):
        super().__init__()
        self.talk = nn.Linear(HEADS, HEADS)

    def forward(self, x):
        q, k, v = self.heads(x)
        weights = (q @ k.transpose(-2, -1) * 0.25).softmax(-1)
        return self.joined(self.talk(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v)


class Counting(Split):
    def forward(self, x):
        q, k, v = self.heads(x)
        return self.joined(F.scaled_dot_product_attention(q * math.log(x.shape[1]), k, v))


class HeadsFirst(Split):
    def forward(self, x):
        q, k, v = self.heads(x)
        q, k, v = (each.transpose(0, 1).flatten(0, 1) for each in (q, k, v))
        weights = torch.bmm(q, k.transpose(1, 2)).softmax(-1)
        return self.joined(torch.bmm(weights, v).unflatten(0, (HEADS, -1)).transpose(0, 1))


class FiveAxes(Split):
    def forward(self, x):
        q, k, v = self.heads(x)
        q, k, v = (each.unsqueeze(0) for each in (q, k, v))
        return self.joined(((q @ k.transpose(-2, -1)).softmax(-1) @ v).squeeze(0))


class Squeezing(nn.Module):
    """Squeeze-and-excitation."""

    def __init__(self, in_features=WIDTH, hidden_features=None, **others):
        super().__init__()
        self.inner, self.gate = nn.Linear(in_features, in_features), nn.Linear(in_features, in_features)

    def forward(self, x):
        return self.inner(x) * self.gate(x.mean(1, keepdim=True)).sigmoid()


class Convolving(nn.Module):
    def __init__(self, in_features=WIDTH, hidden_features=None, **others):
        super().__init__()
        self.inner = nn.Conv1d(in_features, in_features, 3, padding=1)

    def forward(self, x):
        return self.inner(x.transpose(1, 2)).transpose(1, 2)


class OverTokens(Squeezing):
    def forward(self, x):
        return F.instance_norm(self.inner(x).transpose(1, 2)).transpose(1, 2)


class Plain(Squeezing):
    def forward(self, x):
        return F.gelu(self.inner(x)) * self.gate(x).sigmoid()


class SqueezingScaled(Squeezing):
    """One of its parameters has no axes."""

    def __init__(self, in_features=WIDTH, hidden_features=None, **others):
        super().__init__(in_features)
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return super().forward(x) * self.gain


class PlainScaled(SqueezingScaled):
    def forward(self, x):
        return F.gelu(self.inner(x)) * self.gain


class OnMap(nn.Module):
    """Locally enhanced: a convolution over the map that the patch tokens make, as wide as the square root of their
    number."""

    side = None

    def __init__(self, in_features=WIDTH, hidden_features=None, **others):
        super().__init__()
        self.depthwise = nn.Conv2d(in_features, in_features, 3, padding=1, groups=in_features)

    def forward(self, x):
        prefix = int(math.isqrt(x.shape[1]) ** 2 != x.shape[1])
        side = self.side or int((x.shape[1] - prefix) ** 0.5)
        maps = x[:, prefix:].transpose(1, 2).unflatten(2, (side, side))
        return torch.cat([x[:, :prefix], self.depthwise(maps).flatten(2).transpose(1, 2)], dim=1)


class OnMapOfOneSize(OnMap):
    side = 5


def own(attention=Attention, mlp=None):
    torch.manual_seed(0)
    model = OwnViT().eval()
    model.blocks = nn.ModuleList(Block(attention, 0.0) for _ in range(6))
    if mlp is not None:
        for block in model.blocks:
            block.mlp = mlp()
    return model.eval()


def told(model):
    return evopatch.apply(model, blocks="blocks", prefix_tokens=1)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (lambda: own(KeysFirst), r"blocks\.0.*the softmax 'softmax' is over axis -2; expected the last one"),
        (lambda: own(Talking), DIFFERENT),
        (lambda: own(Counting), DIFFERENT),
        (lambda: own(HeadsFirst), DIFFERENT),
        (lambda: own(FiveAxes), r"attention logits .* in blocks\.0: expected four axes"),
        (lambda: own(mlp=Squeezing), DIFFERENT),
        (lambda: own(mlp=OverTokens), DIFFERENT),
        (lambda: own(mlp=Convolving), "come in another order"),
    ],
)
def test_own_blocks(model, text):
    model, x = model(), images()
    expected = model(x)
    with pytest.raises(UnsupportedModelError, match=text):
        told(model)
    assert not evopatch.is_patched(model)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("mlp", [Plain, PlainScaled])
def test_own_blocks_that_treat_tokens_alone(mlp):
    model = own(mlp=mlp)
    assert evopatch.inspect(model).candidates[0].call
    assert evopatch.is_patched(told(model))


class InPlace(Block):
    """Adds to what it is given."""

    def forward(self, x):
        x += self.attn(self.norm1(x))
        x += self.mlp(self.norm2(x))
        return x


@torch.no_grad()
def test_own_blocks_that_change_what_they_are_given_in_place_are_served():
    model, written = own(), own()
    for block in written.blocks:
        block.__class__ = InPlace
    x = images()
    torch.testing.assert_close(told(written)(x), told(model)(x), atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_own_blocks_are_patched_under_autocast_as_without():
    with torch.autocast("cpu", torch.bfloat16):
        assert evopatch.is_patched(told(own()))
        with pytest.raises(UnsupportedModelError, match=DIFFERENT):
            told(own(mlp=Squeezing))


def library(mlp):
    torch.manual_seed(0)
    return VisionTransformer(img_size=40, patch_size=8, embed_dim=WIDTH, depth=6, num_heads=4, mlp_layer=mlp).eval()


@pytest.mark.parametrize("mlp", [Squeezing, SqueezingScaled, Convolving, OverTokens, OnMap])
def test_parts_of_ones_own_in_blocks_of_a_library(mlp):
    model, x = library(mlp), images()
    expected, seed = model(x), torch.get_rng_state()
    with pytest.raises(UnsupportedModelError, match=rf"blocks\.0 \(Block\) {DIFFERENT}"):
        evopatch.apply(model)
    assert not evopatch.is_patched(model)
    assert torch.equal(model(x), expected)
    assert torch.equal(torch.get_rng_state(), seed)


def test_a_part_that_takes_one_number_of_tokens_alone_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"blocks\.0\.mlp \(OnMapOfOneSize\) can't be run on random tokens"):
        evopatch.apply(library(OnMapOfOneSize))


def with_part(name, path, part):
    """A model in which one's own module comes behind another one in every block."""
    model = build(name)
    for inner_path, inner in list(model.named_modules()):
        if inner_path.endswith(path):
            width = next(m for m in reversed(list(inner.modules())) if hasattr(m, "out_features")).out_features
            model.set_submodule(inner_path, nn.Sequential(inner, part(width)))
    return model


MADE_FOR_ONE_NUMBER = [("beit", ".mlp"), ("relpos", "0.mlp"), ("levit", "blocks.0.mlp")]
OTHERS = [("pit", "blocks.0.mlp"), ("hf_yolos", ".intermediate"), ("hf_blip2", ".mlp")]


@pytest.mark.parametrize(("name", "path"), MADE_FOR_ONE_NUMBER + OTHERS)
@torch.no_grad()
def test_parts_behind_an_attention_that_is_made_for_one_number_of_tokens_or_takes_a_mask(name, path):
    for part in (SqueezingScaled, OnMap):
        model = with_part(name, path, part)
        with pytest.raises(UnsupportedModelError, match=rf"{DIFFERENT}|can't be run on random tokens"):
            evopatch.apply(model)
        assert not evopatch.is_patched(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", evopatch.SpeedWarning)
        model = evopatch.apply(with_part(name, path, PlainScaled))
    assert evopatch.is_patched(model)
    call(model, images_for(name))


@pytest.mark.parametrize("mlp", [Plain, PlainScaled, Mlp])
@torch.no_grad()
def test_parts_that_treat_tokens_alone(mlp):
    model = library(mlp)
    model.pos_embed.zero_()
    # Merging equal tokens loses nothing.
    patches = torch.randn(4, 3, 8, 8, dtype=torch.float64)[torch.randint(0, 4, (1, 5, 5))]
    x = patches.permute(0, 3, 1, 4, 2, 5).reshape(1, 3, 40, 40)
    x = x + 1e-4 * torch.randn(x.shape, dtype=torch.float64)
    expected = model.double()(x)
    assert (evopatch.apply(model)(x) - expected).abs().max() < 1e-5


class Leaving(nn.Module):
    """Walks over its blocks in ways that may leave some out."""

    def __init__(self, way):
        super().__init__()
        self.model, self.way = own(), way
        self.blocks, self.left_out = self.model.blocks, ()

    def forward(self, x):
        return getattr(self, self.way)(self.model.embed(x)).mean(1)

    def under_condition(self, x):
        for number, block in enumerate(self.blocks):
            if number not in self.left_out:
                x = block(x)
        return x

    def continuing(self, x):
        for number, block in enumerate(self.blocks):
            if number in self.left_out:
                continue
            x = block(x)
        return x

    def breaking(self, x):
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number + 1 in self.left_out:
                break
        return x

    def by_name(self, x):
        for block in self.blocks:
            x = block(x=x)
        return x


@pytest.mark.parametrize("left_out", [(), (3,), (4,), (5,)])
@pytest.mark.parametrize("way", ["under_condition", "continuing", "breaking", "by_name"])
@torch.no_grad()
def test_walks_that_leave_blocks_out(way, left_out):
    model, x = Leaving(way), images()
    told(model)
    model.left_out = left_out
    found = model(x)
    with evopatch.full_grid(model):
        torch.testing.assert_close(model(x), found, atol=2e-5, rtol=2e-5)


def test_modules_of_a_library_that_mix_are_refused():
    model = build("vit")
    width = model.embed_dim
    convolution = nn.Conv1d(width, width, 3, padding=1)
    block = model.blocks[4]
    block.mlp = nn.Sequential(block.mlp, Permute([0, 2, 1]), convolution, Permute([0, 2, 1]))
    with pytest.raises(UnsupportedModelError, match=rf"blocks\.4 .*{DIFFERENT}"):
        evopatch.apply(model)
    block.mlp[2] = nn.Conv1d(width, width, 1)  # each token for itself
    assert evopatch.is_patched(evopatch.apply(model))
