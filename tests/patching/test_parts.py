"""Blocks that are lists of parts, which the model calls one by one and adds up, as vit-pytorch does."""

import copy

import pytest
import torch
import vit_pytorch
from comparing import moved
from torch import nn
from variants import images
from variants.own_models import WIDTH, NormedAttention, OwnParts, mlp

import evopatch
from evopatch import BypassError, UnsupportedModelError

SAID = {"blocks": "blocks", "prefix_tokens": 1}


def made(cls, *args):
    torch.manual_seed(0)
    model = cls(*args).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    return model


@pytest.mark.parametrize(
    ("build", "prefix"),
    [
        (lambda **k: vit_pytorch.ViT(**k, pool="cls"), 1),
        (lambda **k: vit_pytorch.ViT(**k, pool="mean"), 0),
        (vit_pytorch.SimpleViT, 0),
    ],
)
@torch.no_grad()
def test_vit_pytorch(build, prefix):
    x, sizes = images(), {"image_size": 40, "patch_size": 8, "dim": 48, "heads": 4, "dim_head": 12, "mlp_dim": 96}
    model = made(lambda: build(**sizes, depth=6, num_classes=7))
    original = model(x)
    called = f"evopatch.apply(model, blocks='transformer.layers', prefix_tokens={prefix})"
    found = {candidate.path: candidate.call for candidate in evopatch.inspect(model).candidates}
    assert found["transformer.layers"] in (called, called.replace(f"={prefix})", "=PREFIX_TOKENS)"))
    evopatch.apply(model, blocks="transformer.layers", prefix_tokens=prefix, keep_ratio=1.0)
    assert torch.equal(model(x), original)
    evopatch.set_keep_ratio(model, 0.5)
    patched = model(x)
    assert moved(patched, original) > 1e-3
    with evopatch.full_grid(model):
        torch.testing.assert_close(model(x), patched, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(torch.cat([model(each) for each in x.split(1)]), patched, atol=2e-5, rtol=2e-5)
    assert evopatch.token_selection(model, x).shape == (2, 6, 5, 5)
    assert evopatch.profile(model, (3, 40, 40)).flops < 0.75 * evopatch.profile(model, (3, 40, 40)).flops_unpatched


class Other(OwnParts):
    """One more thing that is done in the loop."""

    def encode(self, x):
        x = self.embed(x)
        for attn, ff in self.blocks:
            x = self.norm(attn(x)) + x
            x = ff(x) + x
        return self.norm(x)


class InBetween(OwnParts):
    def encode(self, x):
        x, seen = self.embed(x), []
        for attn, ff in self.blocks:
            x = attn(x) + x
            seen.append(x)
            x = ff(x) + x
        return self.norm(x)


class OtherOrder(OwnParts):
    def encode(self, x):
        x = self.embed(x)
        for attn, ff in self.blocks:
            x = ff(x) + x
            x = attn(x) + x
        return self.norm(x)


class WithoutSum(OwnParts):
    def encode(self, x):
        x = self.embed(x)
        for attn, ff in self.blocks:
            x = attn(x)
            x = ff(x) + x
        return self.norm(x)


class CallsAgain(OwnParts):
    def encode(self, x):
        x, self.seen = self.embed(x), []
        for attn, ff in self.blocks:
            x = attn(x) + x
            x = ff(x) + x
            self.seen.append(attn(x))
        return self.norm(x)


class Kept(OwnParts):
    def encode(self, x):
        x = start = self.embed(x)
        for attn, ff in self.blocks:
            x = attn(x) + start
            x = ff(x) + x
        return self.norm(x)


@pytest.mark.parametrize("cls", [Other, InBetween, OtherOrder, WithoutSum, CallsAgain, Kept])
def test_what_else_is_done_with_the_parts_is_refused(cls):
    model = made(cls)
    with pytest.raises(UnsupportedModelError, match=r"the parts of the blocks in 'blocks' one by one, and not as"):
        evopatch.apply(model, **SAID)
    assert not evopatch.is_patched(model)


class Collects(OwnParts):
    def encode(self, x):
        x, self.seen = self.embed(x), []
        for index, (attn, ff) in enumerate(self.blocks):
            self.seen.append(x)
            x = x + attn(x)
            x = x + ff(x)
            if index > 3:
                self.seen.append(x)
        return self.norm(x)


@torch.no_grad()
def test_who_looks_between_blocks_sees_all_tokens():
    x, model, plain = images(), made(Collects), evopatch.apply(made(OwnParts), **SAID)
    evopatch.apply(model, **SAID)
    torch.testing.assert_close(model(x), plain(x), atol=2e-5, rtol=2e-5)
    assert {tokens.shape for tokens in model.seen} == {(2, 26, 48)}
    for found, expected in zip(model.seen[1:6], plain.features(x), strict=False):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_hooks_on_parts_see_what_the_parts_give():
    x, model = images(), evopatch.apply(made(OwnParts), **SAID)
    expected, seen = model(x), {}
    for name in ("blocks.5.0", "blocks.5.1", "blocks.5.1.1"):
        model.get_submodule(name).register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
    before = model.features(x)[4]
    torch.testing.assert_close(model(x), expected, atol=2e-5, rtol=2e-5)
    assert {out.shape for out in seen.values()} == {(2, 26, 48)}
    assert torch.equal(seen["blocks.5.1"], seen["blocks.5.1.1"])
    after = model.features(x)[5]
    torch.testing.assert_close(before + seen["blocks.5.0"] + seen["blocks.5.1"], after, atol=2e-5, rtol=2e-5)


def test_gradients_are_those_of_a_block_that_is_called():
    """The same as one module with the same weights."""

    class Whole(nn.Module):
        def __init__(self, parts):
            super().__init__()
            self.attn, self.ff = parts

        def forward(self, x):
            x = self.attn(x) + x
            return self.ff(x) + x

    class Called(OwnParts):
        def encode(self, x):
            x = self.embed(x)
            for block in self.blocks:
                x = block(x)
            return self.norm(x)

    x, model = images(), made(OwnParts)
    twin = copy.deepcopy(model)
    twin.__class__, twin.blocks = Called, nn.ModuleList(Whole(parts) for parts in twin.blocks)
    results = []
    for each in (model, twin):
        out = evopatch.apply(each, **SAID)(x)
        out.square().sum().backward()
        results.append((out, [parameter.grad for parameter in each.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0], atol=2e-5, rtol=2e-5)
    for found, expected in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


class Wrong(OwnParts):
    def block(self):
        return nn.ModuleList([mlp(0.0), NormedAttention()])


class Single(OwnParts):
    def block(self):
        return nn.ModuleList([NormedAttention(), NormedAttention()])


@pytest.mark.parametrize(("cls", "places"), [(Wrong, r"\[1\]"), (Single, r"\[0, 1\]")])
def test_the_first_part_alone_attends(cls, places):
    with pytest.raises(UnsupportedModelError, match=f"parts {places} hold attention: expected a list of parts"):
        evopatch.apply(made(cls), **SAID)


class Mixes(OwnParts):
    """The second part mixes tokens."""

    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

        def forward(self, x):
            return self.conv(x.transpose(1, 2)).transpose(1, 2)

    def block(self):
        return nn.ModuleList([NormedAttention(), self.Mixing()])


def test_a_second_part_that_mixes_tokens_is_refused():
    with pytest.raises(UnsupportedModelError, match="gives other results when its patch tokens come in another order"):
        evopatch.apply(made(Mixes), **SAID)


class Changed(OwnParts):
    """Of its own, as its method is changed below."""

    def encode(self, x):
        return OwnParts.encode(self, x)


def test_a_source_that_isnt_what_runs():
    model, x = evopatch.apply(made(Changed), **SAID), images()

    def encode(self, x):
        x = self.embed(x)
        for attn, ff in self.blocks:
            x = attn(x) + 2 * x
            x = ff(x) + x
        return self.norm(x)

    type(model)._evo_host_class.encode = encode
    with pytest.raises(BypassError, match="added to something else than what the part was given"):
        model(x)
