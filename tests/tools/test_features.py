"""Features of images are what the model's own head is given, and those of patches its last tokens, in their places."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from matrix import cases
from variants import FLAT, build, images, images_for

import evopatch
from evopatch import UnsupportedInputError, UnsupportedModelError
from evopatch.embedding.features import FeatureExtractor

SMALL = {"hidden_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 96}
SMALL |= {"image_size": 40, "patch_size": 8, "num_labels": 7}
STAGES = {"image_size": 64, "patch_size": 4, "window_size": 4, "embed_dim": 24, "depths": [2, 2, 2]}
STAGES |= {"num_heads": [2, 4, 4], "num_labels": 7}


def of_config(name, kind="ForImageClassification", **settings):
    config = getattr(transformers, f"{name}Config")(**SMALL | settings)
    return getattr(transformers, f"{name}{kind}")(config)


def of_vision(name):
    """A dual encoder's classifier."""
    config = getattr(transformers, f"{name}Config")(vision_config=SMALL, num_labels=7)
    return getattr(transformers, f"{name}ForImageClassification")(config)


def donut():
    return transformers.DonutSwinForImageClassification(transformers.DonutSwinConfig(**STAGES))


CLASSIFIERS = {
    "beit": lambda: of_config("Beit"),
    "beit_class": lambda: of_config("Beit", use_mean_pooling=False),
    "data2vec": lambda: of_config("Data2VecVision", drop_path_rate=0.0),
    "data2vec_class": lambda: of_config("Data2VecVision", drop_path_rate=0.0, use_mean_pooling=False),
    "clip": lambda: of_vision("CLIP"),
    "metaclip": lambda: of_vision("MetaClip2"),
    "siglip": lambda: of_vision("Siglip"),
    "donut": donut,
}
VARIANTS = ["hf_vit", "hf_deit", "hf_deit_teacher", "hf_dinov2", "hf_registers", "hf_msn", "hf_ijepa", "hf_levit"]
VARIANTS += ["hf_levit_teacher", "hf_pvt", "hf_pvt_v2", "hf_segformer", "hf_swin", "hf_swinv2"]


def made(name):
    """A model whose weights and norms do something, and images for it."""
    if name not in CLASSIFIERS:
        return build(name), images_for(name)
    torch.manual_seed(0)
    model = CLASSIFIERS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    return model, images(size=64 if name == "donut" else 40)


def given(model, x):
    """What each of the model's layers that make logits is given."""
    found = []
    heads = [module for name, module in model.named_children() if "classifier" in name]
    hooks = [head.register_forward_pre_hook(lambda module, args: found.append(*args)) for head in heads]
    model(x)
    for hook in hooks:
        hook.remove()
    assert found
    return found


def hooks_of(model):
    return [(*module._forward_hooks, *module._forward_pre_hooks) for module in model.modules()]


@cases("name", [*CLASSIFIERS, *VARIANTS], fast=["beit", "clip", "hf_vit", "hf_deit", "hf_pvt", "hf_segformer"])
@pytest.mark.parametrize("keep_ratio", [1.0, 0.5])
@torch.no_grad()
def test_the_feature_is_what_the_classifier_is_given(name, keep_ratio):
    model, x = made(name)
    evopatch.apply(model, keep_ratio=keep_ratio)
    expected = given(model, x)
    hooks = hooks_of(model)
    found = FeatureExtractor(model, patches=True)(x)
    assert hooks_of(model) == hooks
    if name in ("hf_dinov2", "hf_registers"):  # two features side by side
        expected = [expected[0][:, :48]]
    expected = sum(expected) / len(expected)
    torch.testing.assert_close(found.image, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(FeatureExtractor(model, patches=False)(x).image, found.image)
    assert (found.image[0] - found.image[1]).abs().max() > 1e-3
    grid = {"hf_levit": 4, "hf_levit_teacher": 4, "hf_pvt": 4}.get(name, 25 if name in FLAT | {*CLASSIFIERS} else 16)
    assert found.patches.shape == (2, 16 if name == "donut" else grid, found.image.shape[1])


def test_every_classifier_that_is_served_is_among_these():
    page = (Path(__file__).parents[2] / "docs" / "supported-models.md").read_text()
    patched = page.partition("## transformers")[2].partition("### Patched\n")[2].partition("\n### ")[0]
    served = set(re.findall(r"`(\w+ForImageClassification\w*)`", patched))
    with torch.device("meta"):
        own = {type(make()).__name__ for make in CLASSIFIERS.values()}
    assert own | {type(build(name)).__name__ for name in VARIANTS} == served
    assert len(served) > 15


# What the model's last tokens are in the test's own words.
MAPS = dict.fromkeys(["swin", "swinv2"], "last") | dict.fromkeys(
    ["swinv2_cr", "sam", "pvt_v2", "levit_conv", "hf_segformer", "hf_pvt_v2", "hf_sam", "hf_vitdet"], "first"
)
TOKENS = {"vit": 1, "deit_distilled": 2, "registers": 4, "cait": 1, "levit": 0, "hf_pvt": 1, "hf_deit": 2}
TOKENS |= {"hf_dinov3": 4, "hf_swin_model": 0, "hf_sam3": 0}


@cases("name", [*MAPS, *TOKENS], fast=["swin", "swinv2_cr", "hf_segformer", "cait", "hf_pvt", "hf_dinov3"])
@torch.no_grad()
def test_patches_are_the_last_tokens_in_raster_order(name):
    model, x = build(name), images_for(name)
    body = model if name in ("hf_dinov3", "hf_sam3") or not hasattr(model, "base_model") else model.base_model
    evopatch.apply(model, keep_ratio=0.5)
    tokens = body.forward_features(x) if hasattr(body, "forward_features") else body(x).last_hidden_state
    assert tokens.dim() == (4 if name in MAPS else 3)
    if name in MAPS:
        tokens = tokens.flatten(1, 2) if MAPS[name] == "last" else tokens.flatten(2).transpose(1, 2)
    found = FeatureExtractor(model, patches=True)(x)
    assert torch.equal(found.patches, tokens[:, TOKENS.get(name, 0) :])
    assert found.image.shape == (2, tokens.shape[2])


def vision(name, **settings):
    return of_config(name, "Model", **settings)


POOLED = {
    "clip": lambda: vision("CLIPVision"),
    "altclip": lambda: vision("AltCLIPVision"),
    "chinese_clip": lambda: vision("ChineseCLIPVision"),
    "metaclip": lambda: vision("MetaClip2Vision"),
    "clipseg": lambda: vision("CLIPSegVision"),
    "owlvit": lambda: vision("OwlViTVision"),
    "owlv2": lambda: vision("Owlv2Vision"),
    "mlcd": lambda: vision("MLCDVision", num_key_value_groups=1),
    "siglip": lambda: vision("SiglipVision"),
    "aimv2": lambda: vision("Aimv2Vision"),
    "beit": lambda: vision("Beit"),
    "data2vec": lambda: transformers.Data2VecVisionModel(
        transformers.Data2VecVisionConfig(**SMALL, drop_path_rate=0.0), add_pooling_layer=True
    ),
}
"""Models whose `pooler_output` is what a head reads."""
ITS_TOKEN = {
    "vit": lambda: vision("ViT"),
    "blip": lambda: vision("BlipVision"),
    "blip2": lambda: vision("Blip2Vision"),
    "dinov2": lambda: vision("Dinov2"),
    "dinov3": lambda: vision("DINOv3ViT"),
    "sapiens2": lambda: vision("Sapiens2", num_key_value_heads=4),
}
"""Models whose class token is read as `last_hidden_state` has it."""


def vision_model(make):
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    return evopatch.apply(model, keep_ratio=0.5)


def output_and_features(make):
    model, x = vision_model(make), images()
    return model(x), FeatureExtractor(model, patches=True)(x)


@cases("name", POOLED, fast=["clip", "beit"])
@torch.no_grad()
def test_pooled_outputs_that_a_head_reads(name):
    output, found = output_and_features(POOLED[name])
    assert torch.equal(found.image, output.pooler_output)
    for other in (output.last_hidden_state[:, 0], output.last_hidden_state[:, 1:].mean(1)):
        assert (found.image - other).abs().max() > 1e-2
    assert found.patches.shape == (2, 25, 48)


@cases("name", ITS_TOKEN, fast=["vit", "dinov3"])
@torch.no_grad()
def test_poolers_for_another_task_are_left_alone(name):
    output, found = output_and_features(ITS_TOKEN[name])
    assert torch.equal(found.image, output.last_hidden_state[:, 0])
    assert found.patches.shape == (2, 25, 48)


@torch.no_grad()
def test_an_encoder_with_a_projection():
    model, x = build("hf_clip"), images_for("hf_clip")
    evopatch.apply(model, keep_ratio=0.5)
    projected = model.visual_projection(FeatureExtractor(model, patches=False)(x).image)
    torch.testing.assert_close(projected, model(x).image_embeds, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_segments_have_a_mean_and_no_patches():
    config = transformers.GroupViTVisionConfig(
        hidden_size=48, intermediate_size=96, depths=[4, 2, 2], num_group_tokens=[8, 4, 0], num_output_groups=[8, 4, 0],
        num_attention_heads=4, image_size=40, patch_size=8,
    )  # fmt: skip
    model = vision_model(lambda: transformers.GroupViTVisionModel(config))
    x = images()
    assert torch.equal(FeatureExtractor(model, patches=False)(x).image, model(x).pooler_output)
    with pytest.raises(UnsupportedModelError, match=r"gives \(2, \d, 48\) as its last .* Leave the features of"):
        FeatureExtractor(model, patches=True)(x)


@cases("name", ["vit", "gap", "deit_distilled", "swin", "pvt_v2"], fast=["vit", "swin"])
@torch.no_grad()
def test_timm_without_global_pooling(name):
    """What a model made with `global_pool=""` reads: its class token, or the mean of its patch tokens."""
    settings = {"class_token": False} if name == "gap" else {}
    pooling = {"global_pool": "token"} if name == "deit_distilled" else {"global_pool": ""}
    model, x = build(name, num_classes=0, **settings, **pooling), images_for(name)
    if name == "deit_distilled":
        model.global_pool = ""
    evopatch.apply(model, keep_ratio=0.5)
    found = FeatureExtractor(model, patches=True)(x)
    tokens = model.forward_features(x)
    if tokens.dim() == 4:
        tokens = tokens.flatten(2).transpose(1, 2) if name == "pvt_v2" else tokens.flatten(1, 2)
    expected = tokens[:, 0] if name == "vit" else tokens[:, :2].mean(1) if name == "deit_distilled" else tokens.mean(1)
    torch.testing.assert_close(found.image, expected, atol=1e-6, rtol=1e-5)
    assert found.patches.shape[::2] == (2, tokens.shape[2])


@pytest.mark.parametrize("kind", ["TimmWrapperForImageClassification", "TimmWrapperModel"])
@torch.no_grad()
def test_timm_in_transformers_wrapper(kind):
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", num_labels=7, model_args={"img_size": 64}
    )
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config).eval()
    evopatch.apply(model, keep_ratio=0.5)
    x = images(size=64)
    found = FeatureExtractor(model, patches=True)(x)
    alone = FeatureExtractor(model.timm_model, patches=True)(x)
    assert torch.equal(found.image, alone.image)
    assert torch.equal(found.patches, alone.patches)
    assert found.image.shape == (2, 192)


@torch.no_grad()
def test_tokens_that_are_no_grid_of_patches_are_refused():
    model, x = build("pit"), images_for("pit")
    evopatch.apply(model, keep_ratio=0.5)
    assert torch.equal(FeatureExtractor(model, patches=False)(x).image, model.forward_features(x)[:, 0])
    with pytest.raises(UnsupportedModelError, match=r"gives \(2, 1, 96\) .* T = 1 \+ 2 \* 2, .* Leave the features of"):
        FeatureExtractor(model, patches=True)(x)
    model = build("hf_eomt")
    evopatch.apply(model, keep_ratio=0.5)
    with pytest.raises(UnsupportedModelError, match="as its last tokens: .* Give another part of the model"):
        FeatureExtractor(model, patches=False)(x)
    model = build("hf_segformer")
    evopatch.apply(model, keep_ratio=0.5)
    model.output_fmt = model.segformer.output_fmt = "NHWC"  # what isn't timm's isn't asked
    FeatureExtractor(model, patches=True)(images_for("hf_segformer"))
    model = build("swin")
    evopatch.apply(model, keep_ratio=0.5)
    model.output_fmt = "NCHW"  # a layout that doesn't fit the grid
    with pytest.raises(UnsupportedModelError, match=r"gives \(2, 4, 4, 96\)"):
        FeatureExtractor(model, patches=True)(images_for("swin"))


@torch.no_grad()
def test_tokens_without_a_place_are_refused():
    config = transformers.ViTMAEConfig(**SMALL)
    model = vision_model(lambda: transformers.ViTMAEModel(config))
    with pytest.raises(UnsupportedInputError, match="shuffles its patch tokens"):
        FeatureExtractor(model, patches=False)(images())
