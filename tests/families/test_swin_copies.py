"""Copies of Swin and Swin V2 inside other models of transformers: detectors, listeners, what enlarges images."""

import copy
import functools

import pytest
import torch
import transformers
from comparing import moved
from internals import keep_all_in_windows
from matrix import cases
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.maskformer.modeling_maskformer_swin import MaskFormerSwinBackbone, MaskFormerSwinModel

import evopatch
from evopatch import EvoConfig, UnsupportedInputError
from evopatch.patching.handle import Patched

SMALL = {"window_size": 4, "embed_dim": 24, "depths": [2, 2, 2], "num_heads": [2, 4, 4], "drop_path_rate": 0.0}
IMAGES = (2, 3, 52, 76)


def maskformer(cls, **others):
    return cls(transformers.MaskFormerSwinConfig(**SMALL, image_size=64, patch_size=4, **others))


def segmenting():
    backbone = transformers.MaskFormerSwinConfig(
        **SMALL | {"depths": [2, 2, 2, 2], "num_heads": [2, 4, 4, 4]},
        image_size=64,
        patch_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    decoder = transformers.DetrConfig(d_model=24, decoder_layers=1, encoder_layers=1, decoder_attention_heads=2)
    config = transformers.MaskFormerConfig(
        backbone_config=backbone, decoder_config=decoder, fpn_feature_size=32, mask_feature_size=24, num_labels=5
    )
    return transformers.MaskFormerForInstanceSegmentation(config)


def listening():
    config = transformers.ClapAudioConfig(
        window_size=4, depths=[2, 2, 2], num_attention_heads=[2, 4, 4], patch_embeds_hidden_size=24, hidden_size=96,
        num_mel_bins=16, spec_size=64, patch_size=4, patch_stride=[4, 4], projection_dim=24,
    )  # fmt: skip
    return transformers.ClapAudioModelWithProjection(config)


def enlarging():
    return transformers.Swin2SRForImageSuperResolution(transformers.Swin2SRConfig(**SMALL, image_size=16))


MODELS = {
    "maskformer": (lambda: maskformer(MaskFormerSwinModel), IMAGES),
    "maskformer_backbone": (lambda: maskformer(MaskFormerSwinBackbone, out_features=["stage1", "stage3"]), IMAGES),
    "maskformer_segmentation": (segmenting, (2, 3, 64, 64)),
    "clap": (listening, (2, 1, 250, 16)),
    "swin2sr": (enlarging, (2, 3, 16, 24)),
}
EVERY = cases("name", sorted(MODELS), fast=["swin2sr"])
KEYS = ("class_queries_logits", "reconstruction", "audio_embeds", "last_hidden_state", "feature_maps")


def made(name):
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model, torch.randn(shape)


def result(model, x, **options):
    out = model(x, **options)
    found = next(out[key] for key in KEYS if out.get(key) is not None)
    return found if isinstance(found, torch.Tensor) else torch.cat([each.flatten() for each in found])


@EVERY
@pytest.mark.parametrize("representative", ["matched", "single"])
@torch.no_grad()
def test_a_copy(name, representative):
    model, x = made(name)
    original = result(model, x)
    evopatch.apply(model, config=EvoConfig(keep_ratio=1.0, representative=representative))
    assert torch.equal(result(model, x), original)
    evopatch.set_keep_ratio(model, 0.5)
    found = result(model, x)
    assert moved(found, original) > 1e-3
    assert torch.equal(result(copy.deepcopy(model), x), found)
    states = model(x, output_hidden_states=True)
    assert torch.equal(result(model, x, output_hidden_states=True), found)
    alone = [result(model, each) for each in x.split(1)]
    if name != "maskformer_backbone":
        torch.testing.assert_close(torch.cat(alone), found, atol=2e-5, rtol=2e-5)
    assert torch.equal(result(evopatch.remove(model), x), original)
    if name == "swin2sr":
        expected = model.swin2sr(x, output_hidden_states=True).hidden_states
        assert [each.shape for each in states.hidden_states] == [each.shape for each in expected]


@EVERY
@pytest.mark.parametrize("representative", ["matched", "none"])
@torch.no_grad()
def test_with_every_window_or_token_slow_the_views_equal_the_blocks(name, representative, monkeypatch):
    model, x = made(name)
    if representative == "matched":  # all padding of a window is one row, with the mean of its biases
        for parameter_name, parameter in model.named_parameters():
            if "bias_table" in parameter_name or "bias_mlp.2" in parameter_name:
                parameter.zero_()
    original = result(model, x)
    evopatch.apply(model, config=EvoConfig(keep_ratio=0.5, representative=representative, schedule="constant"))
    assert moved(result(model, x), original) > 1e-4
    entered = keep_all_in_windows(monkeypatch, representative == "matched")
    torch.testing.assert_close(result(model, x), original, atol=5e-5, rtol=5e-5)
    assert len(entered) > 2


@EVERY
def test_a_copy_is_trained_and_compiled(name):
    model, x = made(name)
    evopatch.apply(model)

    def gradients():
        model.zero_grad()
        torch.manual_seed(0)
        result(model, x).square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    assert all(torch.isfinite(gradient).all() for gradient in plain.values())
    if name != "maskformer_segmentation":
        model.train()
        plain = gradients()
        for module in model.modules():  # CLAP's own switch refuses to be switched
            if isinstance(module, GradientCheckpointingLayer):
                module.gradient_checkpointing = True
                module._gradient_checkpointing_func = functools.partial(
                    torch.utils.checkpoint.checkpoint, use_reentrant=False
                )
        for parameter, gradient in gradients().items():
            torch.testing.assert_close(gradient, plain[parameter], atol=1e-4, rtol=1e-3)
        model.eval()
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad():
            expected = result(model, x)
            torch.testing.assert_close(result(compiled, x), expected, atol=2e-5, rtol=2e-5)
            evopatch.set_keep_ratio(model, 1.0)
            assert moved(result(model, x), expected) > 1e-4


@EVERY
@torch.no_grad()
def test_attentions_between_windows_are_refused(name):
    model, x = made(name)
    model.set_attn_implementation("eager")
    evopatch.apply(model)
    part = model.model.pixel_level_module.encoder if name == "maskformer_segmentation" else model
    with pytest.raises(UnsupportedInputError, match="output_attentions was asked of"):
        part(x, output_attentions=True)
    block = model.get_submodule(Patched(model).host.blocks()[0][0])
    with pytest.raises(evopatch.BypassError, match="called from outside"):
        block(torch.randn(2, 16, 24), (4, 4))


@torch.no_grad()
def test_patches_of_sound_are_no_grid():
    model, x = made("clap")
    with pytest.raises(UnsupportedInputError, match="ClapAudioEncoder takes sound"):
        Patched(evopatch.apply(model)).host.grids((40, 40))
    assert torch.isfinite(result(model, x)).all()


@torch.no_grad()
def test_stages_of_one_grid_hand_on_what_windows_are_ranked_by():
    model, x = made("swin2sr")
    evopatch.apply(model, config=EvoConfig(representative="single", importance=4.0))
    selection = evopatch.token_selection(model, x)
    assert selection.shape == (2, 6, 16, 24)
    assert (~selection[:, -1]).sum() == 2 * 16 * 12
    evopatch.set_config(model, EvoConfig(representative="single", importance=4.0, tradeoff=0.0))
    # Without what later blocks say, the first one's ranking lasts through all stages.
    assert moved(evopatch.token_selection(model, x).float(), selection.float()) > 0
