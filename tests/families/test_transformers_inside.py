"""Models of transformers around a patched encoder, and on several devices."""

import copy

import accelerate
import pytest
import timm
import torch
import transformers
from comparing import moved
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTConfig,
    DPTForDepthEstimation,
    GPT2Config,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEModel,
)
from variants import build, images

import evopatch
from evopatch import EvoConfig

SMALL = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}
VISION = {**SMALL, "image_size": 40, "patch_size": 8}
TINY_GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 20, "add_cross_attention": True}


@torch.no_grad()
def test_from_pretrained_with_dtype_and_device_map(tmp_path):
    build("hf_vit").save_pretrained(tmp_path)
    x = images()
    model = evopatch.apply(ViTForImageClassification.from_pretrained(tmp_path))
    expected = model(x).logits
    model = ViTForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map={"": "cpu"})
    evopatch.apply(model)
    result = model(x).logits
    assert result.dtype == torch.bfloat16
    assert moved(result.float(), expected) < 0.5 * expected.abs().max()


@pytest.mark.parametrize("apply_first", [True, False])
@torch.no_grad()
def test_models_dispatched_by_accelerate(apply_first, tmp_path):
    """Hooks that replace each layer's forward on the instance, here to bring weights from disk."""
    model, x = build("hf_vit"), images()
    original, expected = model(x).logits, evopatch.apply(copy.deepcopy(model))(x).logits
    parts = {"vit.embeddings": "cpu", "vit.layernorm": "cpu", "classifier": "cpu"}
    parts |= {f"vit.layers.{i}": "cpu" if i < 3 else "disk" for i in range(6)}

    def dispatch():
        accelerate.dispatch_model(model, parts, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)

    if apply_first:
        evopatch.apply(model)
        dispatch()
    else:
        dispatch()
        evopatch.apply(model)
    assert "forward" in model.vit.layers[4].__dict__
    torch.testing.assert_close(model(x).logits, expected, atol=1e-6, rtol=1e-6)
    evopatch.set_keep_ratio(model, 1.0)
    assert torch.equal(model(x).logits, original)
    evopatch.remove(model)
    assert torch.equal(model(x).logits, original)


@torch.no_grad()
def test_an_image_tower_in_an_encoder_decoder():
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**VISION), GPT2Config(**TINY_GPT2))
    model, x = VisionEncoderDecoderModel(config).eval(), images()
    ids = torch.tensor([[1, 2, 3]] * 2)
    original = model(pixel_values=x, decoder_input_ids=ids).logits
    evopatch.apply(model)
    assert evopatch.is_patched(model.encoder)
    assert not evopatch.is_patched(model.decoder)
    assert moved(model(pixel_values=x, decoder_input_ids=ids).logits, original) > 1e-6
    options = {"max_new_tokens": 4, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": None}
    assert model.generate(x, **options).shape == (2, 5)
    assert evopatch.token_selection(model.encoder, x).shape == (2, 4, 5, 5)
    evopatch.remove(model)
    assert torch.equal(model(pixel_values=x, decoder_input_ids=ids).logits, original)


@torch.no_grad()
def test_an_image_tower_beside_a_text_tower():
    text = transformers.BertConfig(**SMALL, vocab_size=50)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(ViTConfig(**VISION), text, projection_dim=16)
    model, x, ids = VisionTextDualEncoderModel(config).eval(), images(), torch.tensor([[1, 2, 3]])
    before = model(pixel_values=x, input_ids=ids)
    evopatch.apply(model)
    after = model(pixel_values=x, input_ids=ids)
    assert torch.equal(after.text_embeds, before.text_embeds)
    assert moved(after.image_embeds, before.image_embeds) > 1e-6


@torch.no_grad()
def test_clips_text_tower_is_left_alone():
    text = {**SMALL, "vocab_size": 50, "max_position_embeddings": 12, "eos_token_id": 49, "bos_token_id": 48}
    model = CLIPModel(CLIPConfig(vision_config=VISION, text_config=text, projection_dim=16)).eval()
    x, ids = images(), torch.tensor([[48, 2, 3, 49]])
    before = model(pixel_values=x, input_ids=ids)
    evopatch.apply(model)
    after = model(pixel_values=x, input_ids=ids)
    assert torch.equal(after.text_embeds, before.text_embeds)
    assert moved(after.image_embeds, before.image_embeds) > 1e-6


@pytest.mark.parametrize("kind", ["dpt", "depth_anything"])
@torch.no_grad()
def test_depth_estimation_on_a_dinov2_backbone(kind):
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = Dinov2Config(
        **{k: v for k, v in VISION.items() if k != "intermediate_size"},
        out_features=stages,
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    options = {"backbone_config": backbone, "neck_hidden_sizes": [8, 16, 24, 32], "fusion_hidden_size": 16}
    if kind == "dpt":
        model = DPTForDepthEstimation(DPTConfig(**options, reassemble_factors=[4, 2, 1, 0.5], readout_type="ignore"))
    else:
        config = DepthAnythingConfig(**options, reassemble_hidden_size=48, patch_size=8, head_hidden_size=8)
        model = DepthAnythingForDepthEstimation(config)
    model.eval()
    x = images(size=(80, 48))
    before = model(x).predicted_depth
    evopatch.apply(model, config=EvoConfig.dense(keep_ratio=0.5))
    after = model(x).predicted_depth
    assert after.shape == before.shape
    assert moved(after, before) > 0
    evopatch.remove(model)
    assert torch.equal(model(x).predicted_depth, before)


@torch.no_grad()
def test_masked_autoencoders():
    model, x = ViTMAEModel(ViTMAEConfig(**VISION, mask_ratio=0.5)).eval(), images()
    noise = torch.rand(2, 25)
    before = model(x, noise=noise).last_hidden_state
    evopatch.apply(model, keep_ratio=1.0)
    assert torch.equal(model(x, noise=noise).last_hidden_state, before)
    evopatch.set_keep_ratio(model, 0.5)
    after = model(x, noise=noise).last_hidden_state
    assert after.shape == before.shape
    assert moved(after, before) > 1e-5
    with pytest.raises(evopatch.UnsupportedInputError, match="shuffles its patch tokens"):
        evopatch.token_selection(model, x)


@torch.no_grad()
def test_two_hosts_need_the_one_meant():
    both = nn.ModuleDict({"a": build("hf_vit"), "b": timm.create_model("deit_tiny_patch16_224", img_size=32)})
    evopatch.apply(both)
    with pytest.raises(evopatch.UnsupportedModelError, match=r"2 patched hosts, 'a\.vit', 'b': expected one"):
        evopatch.profile(both, (3, 40, 40))
    assert evopatch.profile(both["a"], (3, 40, 40)).ratio < 0.9
