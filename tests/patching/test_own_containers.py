"""Containers with a forward, or ways to their items, of their own: these run as they are written."""

import copy
import types

import pytest
import torch
from comparing import moved
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from variants import build, images
from variants.own_models import WIDTH, Attention, OwnViT

import evopatch
from evopatch import BypassError, UnsupportedModelError


class Prompted(nn.Sequential):
    def __init__(self, *blocks):
        super().__init__(*blocks)
        self.register_buffer("prompt", torch.linspace(-1, 1, WIDTH))

    def forward(self, x):
        for block in self:
            x = block(x) + self.prompt
        return x


class Collecting(nn.ModuleList):
    def forward(self, x):
        found = []
        for index in range(len(self)):
            x = self[index](x)
            found.append(x)
        return torch.stack(found).mean(0)


class Around(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x) * 0.3


class Halves(nn.Sequential):
    def forward(self, x):
        half = len(self) // 2
        for block in self[:half]:
            x = block(x)
        for block in self[half:]:
            x = block(x * 0.9)
        return x


class Backwards(nn.ModuleList):
    def __iter__(self):
        return iter(list(self._modules.values())[::-1])

    def forward(self, x):
        for block in self:
            x = block(x)
        return x


CONTAINERS = [Prompted, Collecting, Around, Halves, Backwards]


def held(cls, blocks):
    return cls(*blocks) if issubclass(cls, nn.Sequential) else cls(blocks)


def shaken(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


class Walking(OwnViT):
    """Iterates over its blocks, or calls them."""

    def __init__(self, cls, calls):
        super().__init__()
        self.blocks, self.calls = held(cls, self.blocks), calls

    def forward(self, x):
        x = self.embed(x)
        if self.calls:
            x = self.blocks(x)
        else:
            for block in self.blocks:
                x = block(x)
        return self.norm(x)[:, 0]


def timms(cls):
    model = VisionTransformer(img_size=40, patch_size=8, embed_dim=WIDTH, depth=6, num_heads=4, num_classes=7)
    model.blocks = held(cls, model.blocks)
    return shaken(model), {}


def own(cls, calls=True):
    return shaken(Walking(cls, calls)), {"blocks": "blocks", "prefix_tokens": 1}


@torch.no_grad()
def assert_runs_as_written(model, said):
    x = images()
    original, edited = model(x), copy.deepcopy(model)
    evopatch.apply(model, keep_ratio=1.0, **said)
    assert torch.equal(model(x), original)
    evopatch.set_config(model, evopatch.EvoConfig.exact())
    torch.testing.assert_close(model(x), original, atol=1e-5, rtol=1e-5)
    evopatch.set_keep_ratio(model, 0.5)
    half = model(x)
    assert moved(half, original) > 1e-5
    with evopatch.full_grid(model):
        torch.testing.assert_close(model(x), half, atol=1e-5, rtol=1e-5)
    assert torch.equal(evopatch.remove(model)(x), original)
    assert [type(m) for m in model.modules()] == [type(m) for m in edited.modules()]


@pytest.mark.parametrize("cls", CONTAINERS)
def test_a_container_of_ones_own_in_timms_model_runs_as_it_is_written(cls):
    assert_runs_as_written(*timms(cls))


@pytest.mark.parametrize("cls", CONTAINERS)
def test_a_container_of_ones_own_in_ones_own_model_runs_as_it_is_written(cls):
    assert_runs_as_written(*own(cls))


def test_a_host_reaches_the_items_in_the_order_that_the_container_gives_them():
    assert_runs_as_written(*own(Backwards, calls=False))


def test_code_between_the_items_sees_all_tokens():
    class Counting(nn.Sequential):
        def forward(self, x):
            self.seen = []
            for block in self:
                x = block(x)
                self.seen.append(x.shape[1])
            return x

    for model, said in (timms(Counting), own(Counting)):
        evopatch.apply(model, **said)(images())
        assert model.blocks.seen == [26] * 6


def test_a_container_that_only_hands_on_passes_the_compact_set():
    class Plain(nn.Sequential):
        def forward(self, x):
            """In order."""
            for block in self:
                x = block(x)
            return x

    for cls, compact in ((Plain, True), (nn.Sequential, True), (Prompted, False)):
        model, _ = timms(cls)
        evopatch.apply(model)
        rows, forward = [], type(model.blocks[5]).forward
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():

            def recording(self, x, *args, rows=rows, forward=forward, **kwargs):
                rows.append(x.shape[1])
                return forward(self, x, *args, **kwargs)

            patch.setattr(type(model.blocks[5]), "forward", recording)
            model(images())
        assert (min(rows) < 26) is compact


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class ResidualList(nn.ModuleList):
    def forward(self, x):
        for module in self[1:]:
            return x + module(self[0](x))


class Block(nn.Module):
    def __init__(self, cls):
        super().__init__()
        self.attend = held(cls, [nn.LayerNorm(WIDTH), Attention()])
        self.feed = held(cls, [nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)])

    def forward(self, x):
        return self.feed(self.attend(x))


@pytest.mark.parametrize("cls", [Residual, ResidualList])
def test_a_residual_around_a_blocks_attention_stays(cls):
    model = OwnViT()
    model.blocks = nn.ModuleList(Block(cls) for _ in range(6))
    assert_runs_as_written(shaken(model), {"blocks": "blocks", "prefix_tokens": 1})


@torch.no_grad()
def test_hooks_on_a_container_of_ones_own_are_called():
    seen = []
    model, said = own(Prompted)
    model.blocks.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    evopatch.apply(model, **said)(images())
    assert seen == [(2, 26, WIDTH)]


def test_torch_compile_follows_a_container_of_ones_own():
    model, said = own(Prompted)
    evopatch.apply(model, **said)
    with torch.no_grad():
        expected = model(images())
        torch.testing.assert_close(torch.compile(model, backend="eager")(images()), expected, atol=1e-5, rtol=1e-5)


def test_a_container_of_ones_own_that_comes_after_apply_is_an_error():
    model, said = own(nn.Sequential)
    evopatch.apply(model, **said)
    model.blocks = Prompted(*model.blocks)
    with pytest.raises(BypassError, match=r"blocks is a .*Prompted now.*evopatch\.apply after"):
        model(images())


# What is refused


class Called(nn.Sequential):
    def __call__(self, x):
        return super().__call__(x) * 2


@pytest.mark.parametrize("make", [timms, own])
def test_a_call_of_ones_own_is_refused(make):
    model, said = make(Called)
    with pytest.raises(UnsupportedModelError, match=r"blocks \(Called\).*__call__: expected them in its forward"):
        evopatch.apply(model, **said)
    assert not evopatch.is_patched(model)


@pytest.mark.parametrize("make", [timms, own])
def test_a_forward_set_on_a_container_is_refused(make):
    model, said = make(nn.Sequential)
    model.blocks.forward = types.MethodType(lambda self, x: x, model.blocks)
    with pytest.raises(UnsupportedModelError, match=r"blocks \(Sequential\) has a forward of its own"):
        evopatch.apply(model, **said)
    assert not evopatch.is_patched(model)


def test_a_forward_set_on_ones_own_model_is_refused():
    model, said = own(nn.Sequential)
    model.forward = model.embed
    with pytest.raises(UnsupportedModelError, match=r"the model \(Walking\) has a forward of its own"):
        evopatch.apply(model, **said)
    assert not evopatch.is_patched(model)


def test_code_between_the_modules_of_one_block_is_refused():
    model = build("hf_levit")
    stage = model.levit.encoder.stages[0]
    stage.layers = Collecting(stage.layers)
    with pytest.raises(
        UnsupportedModelError, match=r"stages\.0\.layers \(Collecting\).*expected a plain nn\.ModuleList"
    ):
        evopatch.apply(model)
    assert not evopatch.is_patched(model)
