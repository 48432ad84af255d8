"""Windowed blocks with parts of one's own: those that mix windows, or make something else of merged tokens, are
refused."""

import pytest
import timm.models.swin_transformer as timm_swin
import torch
import torchvision.models.swin_transformer as torchvision_swin
from timm.layers import GlobalResponseNormMlp
from torch import nn
from torchvision.ops import Permute
from variants import build, call, images_for

import evopatch
from evopatch import UnsupportedModelError

APART = "mixes tokens of different windows"
MERGED = "gives something else for tokens that are merged"


class Around(nn.Module):
    """What some put around a feed-forward part: the rest of its work is as it was."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner


class Plain(Around):
    def forward(self, x):
        return self.inner(x) * 2


class Squeezing(Around):
    def forward(self, x):
        out, mean = self.inner(x), x.mean(list(range(1, x.dim() - 1)), keepdim=True)
        return out + mean.square().mean(-1, keepdim=True) * out.flip(-1)


class Convolving(Around):
    """Locally enhanced: neighbours by place."""

    def forward(self, x):
        out = self.inner(x)
        maps = out if out.dim() == 4 else out.unflatten(1, (int(out.shape[1] ** 0.5), -1))
        return (maps + maps.roll(1, 1)).reshape(out.shape)


class OfOneMap(Around):
    def forward(self, x):
        raise RuntimeError("expected a map of 7 by 7")


class Attending(timm_swin.WindowAttention):
    def weighted(self, x, mask, mixed, scale=1.0):
        windows, area, channels = x.shape
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        logits = q * self.scale @ k.transpose(-2, -1) + self._get_rel_pos_bias()
        if mask is not None:
            logits = (logits.unflatten(0, (-1, mask.shape[0])) + mask[:, None]).flatten(0, 1)
        weights = (logits * scale).softmax(-1)
        if mixed:
            weights = weights + 0.1
        return self.proj((weights @ v).transpose(1, 2).reshape(windows, area, channels))


class Same(Attending):
    def forward(self, x, mask=None):
        return self.weighted(x, mask, mixed=False)


class Shifting(Attending):
    """Adds to weights after the softmax."""

    def forward(self, x, mask=None):
        return self.weighted(x, mask, mixed=True)


class Sharpening(Attending):
    """Multiplies what it is given to add, too."""

    def forward(self, x, mask=None):
        return self.weighted(x, mask, mixed=False, scale=2.0)


PARTS = {
    "swin": ("layers.1.blocks.1", "mlp"),
    "swinv2": ("layers.1.blocks.1", "mlp"),
    "swinv2_cr": ("stages.1.blocks.1", "mlp"),
    "torchvision_swin": ("features.3.1", "mlp"),
    "torchvision_swinv2": ("features.3.1", "mlp"),
    "hf_swin": ("swin.encoder.layers.1.blocks.1", "mlp"),
    "hf_swinv2": ("swinv2.encoder.layers.1.blocks.1", "intermediate"),
    "hf_donut": ("encoder.layers.1.blocks.1", "intermediate"),
    "sam": ("blocks.1", "mlp"),
    "hf_sam": ("vision_encoder.layers.1", "mlp"),
    "hf_vitdet": ("encoder.layer.1", "mlp"),
    "hf_sam3": ("layers.1", "mlp"),
}
"""A block, and its part after the attention."""


def refused(name, model, text):
    x = images_for(name)
    with torch.no_grad():
        expected = call(model, x)
        with pytest.raises(UnsupportedModelError, match=text):
            evopatch.apply(model)
        assert not evopatch.is_patched(model)
        assert torch.equal(call(model, x), expected)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("part", [Squeezing, Convolving])
def test_parts_that_mix_windows(name, part):
    model, (path, attribute) = build(name), PARTS[name]
    block = model.get_submodule(path)
    setattr(block, attribute, part(getattr(block, attribute)))
    refused(name, model, rf"{path}.*{APART}")


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("swin", "layers.2.blocks.1"),
        ("swinv2", "layers.2.blocks.1"),
        ("torchvision_swin", "features.5.1"),
        ("hf_swin", "swin.encoder.layers.2.blocks.1"),
        ("hf_donut", "encoder.layers.2.blocks.1"),
    ],
)
def test_the_same_where_the_models_own_map_is_one_window(name, path):
    model, (_, attribute) = build(name), PARTS[name]
    block = model.get_submodule(path)
    setattr(block, attribute, Convolving(getattr(block, attribute)))
    refused(name, model, rf"{path}.*{APART}")


def test_parts_that_cant_be_tried():
    model, (path, attribute) = build("swin"), PARTS["swin"]
    block = model.get_submodule(path)
    setattr(block, attribute, OfOneMap(getattr(block, attribute)))
    with pytest.raises(UnsupportedModelError, match=rf"{path} .*can't be run on random tokens.*a map of 7 by 7"):
        evopatch.apply(model)
    assert not evopatch.is_patched(model)


@pytest.mark.parametrize("name", PARTS)
def test_parts_that_treat_tokens_alone(name):
    model, (path, attribute) = build(name), PARTS[name]
    block = model.get_submodule(path)
    setattr(block, attribute, Plain(getattr(block, attribute)))
    assert evopatch.is_patched(evopatch.apply(model))


def attending(cls):
    model = build("swin")
    for block in model.layers[1].blocks:
        block.attn.__class__ = cls
    return model


@pytest.mark.parametrize("cls", [Shifting, Sharpening])
def test_attentions_that_make_something_else_of_merged_tokens(cls):
    refused("swin", attending(cls), rf"layers\.1\.blocks\.0\.attn.*{MERGED}")


@pytest.mark.parametrize("name", ["hf_donut", "hf_swinv2"])
def test_attentions_that_make_something_else_where_a_module_in_them_attends(name):
    model = build(name)
    path = PARTS[name][0]
    attention = model.get_submodule(path).attention

    class Averaging(type(attention.self)):
        def forward(self, hidden_states, *args, **kwargs):
            out, *others = super().forward(hidden_states, *args, **kwargs)
            return (out + hidden_states.mean(1, keepdim=True), *others)

    attention.self.__class__ = Averaging
    refused(name, model, rf"{path}\.attention.*{MERGED}")


def test_attentions_of_ones_own_that_merge():
    assert evopatch.is_patched(evopatch.apply(attending(Same)))


def test_torchvision_blocks_of_a_subclass():
    class Own(torchvision_swin.SwinTransformerBlock):
        def forward(self, x):
            return super().forward(x) + x.mean((1, 2), keepdim=True)

    model = build("torchvision_swin")
    model.features[3][1].__class__ = Own
    refused("torchvision_swin", model, rf"features\.3\.1 \(Own\) {APART}")


ALONE = "doesn't treat tokens one by one outside of its attention"


class ByPlace(nn.Module):
    def forward(self, x):
        return x * torch.linspace(1, 2, x.shape[1], device=x.device).view(1, -1, *[1] * (x.dim() - 2))


class BySize(nn.Module):
    def forward(self, x):
        return x * (64 / x[0, ..., 0].numel())


def behind(model, path, attribute, part):
    block = model.get_submodule(path)
    setattr(block, attribute, nn.Sequential(getattr(block, attribute), part))
    return model


@pytest.mark.parametrize("name", ["swin", "torchvision_swin", "hf_swin", "sam"])
@pytest.mark.parametrize("part", [ByPlace, BySize])
def test_parts_that_know_places_or_numbers(name, part):
    path, attribute = PARTS[name]
    refused(name, behind(build(name), path, attribute, part()), rf"{path}.*{ALONE}")


def test_what_mixes_where_attention_is_over_the_whole_map():
    model = build("sam")
    path = next(f"blocks.{i}" for i, block in enumerate(model.blocks) if not block.window_size)
    block = model.get_submodule(path)
    block.mlp = Convolving(block.mlp)
    refused("sam", model, rf"{path}.*{ALONE}")


def test_what_mixes_beside_norms_of_another_kind():
    model, (path, attribute) = build("swin", norm_layer=nn.RMSNorm), PARTS["swin"]
    assert evopatch.supported(behind(build("swin", norm_layer=nn.RMSNorm), path, attribute, Plain(nn.Identity())))
    refused("swin", behind(model, path, attribute, Convolving(nn.Identity())), rf"{path}.*{APART}")


def test_parts_of_a_library_that_mix():
    model, (path, attribute) = build("torchvision_swin"), PARTS["torchvision_swin"]
    width = model.get_submodule(path).norm2.weight.shape[0]
    convolution = nn.Conv2d(width, width, 3, padding=1)
    mixing = nn.Sequential(Permute([0, 3, 1, 2]), convolution, Permute([0, 2, 3, 1]))
    refused("torchvision_swin", behind(model, path, attribute, mixing), rf"{path}.*{APART}")
    model = behind(build("torchvision_swin"), path, attribute, GlobalResponseNormMlp(width))
    refused("torchvision_swin", model, rf"{path}.*{APART}")
    same = nn.Sequential(Permute([0, 3, 1, 2]), nn.Conv2d(width, width, 1), Permute([0, 2, 3, 1]))
    assert evopatch.supported(behind(build("torchvision_swin"), path, attribute, same))


@pytest.mark.parametrize(("name", "path"), [("swinv2", "cpb_mlp"), ("hf_swinv2", "continuous_position_bias_mlp")])
@torch.no_grad()
def test_modules_that_make_position_biases_run_once(name, path):
    model, x, calls = build(name), images_for(name), []
    evopatch.apply(model)
    for module in model.modules():
        if hasattr(module, path):
            getattr(module, path).register_forward_hook(lambda module, args, out: calls.append(module))
    call(model, x)
    assert calls
    assert len(calls) == len(set(calls))
