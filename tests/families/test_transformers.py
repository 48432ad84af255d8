"""What users of transformers do with a patched model beyond the contract matrix."""

import copy
import pickle

import accelerate
import pytest
import timm
import torch
import transformers
from evopatch_transformers import interface
from PIL import Image
from torch import nn
from transformers import (
    BeitConfig,
    BeitModel,
    CLIPConfig,
    CLIPModel,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
    DPTConfig,
    DPTForDepthEstimation,
    GPT2Config,
    Trainer,
    TrainingArguments,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers_weights import DINOV2_KEYS, VIT_KEYS, deit_tiny, rename
from variants import TRANSFORMERS_VARIANTS, build, call, images

import evopatch
from evopatch import EvoConfig

EVERY = pytest.mark.parametrize("name", sorted(TRANSFORMERS_VARIANTS))
SMALL = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96}
VISION = {**SMALL, "image_size": 40, "patch_size": 8}
TINY_GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 20, "add_cross_attention": True}
MODES = [
    EvoConfig(keep_ratio=[0.6, 0.3], stages=[2, 4], representative=r, selection=s)
    for r in ("matched", "single", "none")
    for s in ("stage", "layer")
]


def moved(a, b):
    return (a - b).abs().max().item()


# The same weights through timm and through transformers

FAMILIES = {
    "hf_vit": ("vit", VIT_KEYS, "vit.", {"head": "classifier"}, {}),
    "hf_deit_teacher": (
        "deit_distilled",
        VIT_KEYS,
        "deit.",
        {"head": "cls_classifier", "head_dist": "distillation_classifier"},
        {},
    ),
    "hf_dinov2_swiglu": ("dinov2", DINOV2_KEYS, "", {}, {"use_swiglu_ffn": False}),
}


@pytest.mark.parametrize("config", MODES, ids=lambda c: f"{c.representative}-{c.selection}")
@pytest.mark.parametrize("name", sorted(FAMILIES))
@torch.no_grad()
def test_same_weights_give_the_same_as_timm(name, config):
    twin, keys, prefix, heads, options = FAMILIES[name]
    theirs = build(twin, mlp_ratio=2)
    ours = build(name, layer_norm_eps=1e-6, **options)
    weights = rename(theirs.state_dict(), keys, prefix, heads)
    if name == "hf_dinov2_swiglu":
        weights = {k: v for k, v in weights.items() if not k.startswith("head")}
        weights["embeddings.mask_token"] = torch.zeros(1, 48)
    ours.load_state_dict(weights)
    x = images(3)

    def results():
        a = theirs(x) if heads else theirs.forward_features(x)
        return a, call(ours, x)

    torch.testing.assert_close(*results(), atol=1e-5, rtol=1e-5)
    before = call(ours, x)
    evopatch.apply(theirs, config=config)
    evopatch.apply(ours, config=config)
    torch.testing.assert_close(*results(), atol=1e-4, rtol=1e-4)
    assert torch.equal(evopatch.token_selection(theirs, x), evopatch.token_selection(ours, x))
    assert moved(call(ours, x), before) > 1e-3
    evopatch.set_keep_ratio(ours, [0.55, 0.3])
    assert moved(*results()) > 1e-4


@pytest.mark.parametrize(
    "config",
    [EvoConfig(), EvoConfig(selection="layer"), EvoConfig.paper(), EvoConfig(representative="none")],
    ids=["matched", "matched-layer", "paper", "none"],
)
@torch.no_grad()
def test_deit_tiny_gives_the_same_as_timm(real_data, config):
    from evopatch.sources.images import open_images
    from evopatch.sources.models import Preprocessing, open_classifier

    file = real_data / "deit_tiny" / "model.safetensors"
    theirs = open_classifier("deit_tiny_patch16_224", file, preprocessing=Preprocessing(crop_pct=1.0))
    ours = deit_tiny(file)
    dataset = open_images(real_data / "imagenet_val_1300.parquet", theirs.transform)
    x = torch.stack([dataset[i][0] for i in range(0, 160, 10)])
    evopatch.apply(theirs.model, config=config)
    evopatch.apply(ours, config=config)
    torch.testing.assert_close(ours(x).logits, theirs.model(x), atol=1e-4, rtol=1e-4)
    assert torch.equal(evopatch.token_selection(ours, x), evopatch.token_selection(theirs.model, x))
    unpatched = evopatch.remove(copy.deepcopy(ours))(x).logits
    assert moved(ours(x).logits, unpatched) > 0.05


@pytest.mark.parametrize("config", [EvoConfig(), EvoConfig.paper()], ids=["matched", "paper"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_wrapped_in_torchs_checkpoints_after_apply(config, reentrant):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

    def gradients(model):
        model.zero_grad()
        call(model, images().requires_grad_()).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    model = evopatch.apply(build("hf_vit").train(), config=config)
    expected = gradients(model)
    kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    for i, layer in enumerate(list(model.vit.layers)):
        model.vit.layers[i] = checkpoint_wrapper(layer, kind)
    for ours, theirs in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    evopatch.remove(model)
    assert moved(gradients(model)[0], expected[0]) > 1e-4


def test_layers_under_composable_checkpoints_after_apply():
    from torch.distributed._composable import checkpoint

    def gradients(model):
        call(model, images()).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients(evopatch.apply(build("hf_vit").train()))
    model = evopatch.apply(build("hf_vit").train())
    for layer in model.vit.layers:
        checkpoint(layer)
    for ours, theirs in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["hf_vit", "hf_dinov2", "hf_clip", "hf_dinov3"])
@torch.no_grad()
def test_causal_attention_is_refused(name):
    model, x = evopatch.apply(build(name)), images()
    with pytest.raises(evopatch.UnsupportedInputError, match="is_causal was passed"):
        model(x, is_causal=True)
    evopatch.set_keep_ratio(model, 1.0)
    assert torch.equal(call(model, x, is_causal=True), call(evopatch.remove(model), x, is_causal=True))


@pytest.mark.parametrize("index", [1, 5])
@torch.no_grad()
def test_attention_replaced_after_apply_is_refused(index):
    model, x = evopatch.apply(build("hf_vit")), images()
    model.vit.layers[index].attention = build("hf_vit").vit.layers[index].attention
    with pytest.raises(evopatch.BypassError, match=f"block {index} of 'vit' ran without its patched attention"):
        model(x)


def test_attention_with_a_forward_of_its_own_is_refused():
    model = build("hf_vit")
    attention = model.vit.layers[2].attention
    attention.forward = lambda *args, **kwargs: type(attention).forward(attention, *args, **kwargs)
    with pytest.raises(evopatch.UnsupportedModelError, match=r"vit\.layers\.2\.attention .* forward of its own"):
        evopatch.apply(model)


@torch.no_grad()
def test_hidden_states_asked_for_by_a_pre_hook():
    model, x = evopatch.apply(build("hf_vit_model")), images()
    model.register_forward_pre_hook(lambda m, a, k: (a, {**k, "output_hidden_states": True}), with_kwargs=True)
    assert {h.shape[1] for h in model(x).hidden_states} == {26}


# What transformers records between the layers


@EVERY
@torch.no_grad()
def test_no_models_class_is_changed(name):
    model = build(name)
    classes = {n: type(m) for n, m in model.named_modules() if isinstance(m, transformers.PreTrainedModel)}
    evopatch.apply(model)
    assert {n: type(m) for n, m in model.named_modules() if isinstance(m, transformers.PreTrainedModel)} == classes
    assert evopatch.is_patched(model)


@pytest.mark.parametrize("name", sorted(TRANSFORMERS_VARIANTS))
@pytest.mark.parametrize("representative", ["matched", "single", "none"])
@torch.no_grad()
def test_attentions_are_between_all_tokens(name, representative):
    model, x = build(name, attn_implementation="eager"), images()
    original = model(x, output_attentions=True, output_hidden_states=True)
    evopatch.apply(model, config=EvoConfig(representative=representative))
    plain = call(model, x)
    out = model(x, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(call(model, x, output_attentions=True), plain, atol=2e-5, rtol=2e-5)
    assert [a.shape for a in out.attentions] == [a.shape for a in original.attentions]
    assert len(out.attentions) == 6
    torch.testing.assert_close(out.attentions[1], original.attentions[1])
    for attention in out.attentions[2:]:
        total = attention.sum(-1)
        stands = total > 0.5
        torch.testing.assert_close(total[stands], torch.ones_like(total[stands]), atol=1e-4, rtol=1e-4)
        assert stands.all() == (representative != "none")
    assert moved(out.attentions[2], original.attentions[2]) > 1e-4
    # The same in a second forward: hooks that record stay installed.
    again = model(x, output_attentions=True)
    torch.testing.assert_close(again.attentions[5], out.attentions[5], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_attentions_of_a_matched_group_are_split_as_its_mean_is():
    model, x = build("hf_vit_eager"), images()
    evopatch.apply(model)
    seen = []
    spread = interface.spread_attention

    def recording(weights, partition):
        seen.append((weights, partition))
        return spread(weights, partition)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interface, "spread_attention", recording)
        attentions = model(x, output_attentions=True).attentions
        count = len(seen)
        model(x)
    assert count == 4
    assert len(seen) == 4  # not computed unless asked for
    weights, partition = seen[-1]
    image, head, reader, token = 1, 2, 0, 20
    row = partition.group[image, token]
    expected = weights[image, head, reader, row] * partition.weight[image, token]
    assert attentions[5][image, head, reader, token] == expected


@torch.no_grad()
def test_outputs_asked_for_by_the_models_config():
    model, x = evopatch.apply(build("hf_vit_eager")), images()
    asked = model(x, output_hidden_states=True, output_attentions=True)
    model.config.output_hidden_states = model.config.output_attentions = True
    out = model(x)
    assert len(out.hidden_states) == 7
    for ours, theirs in zip(
        (*out.hidden_states, *out.attentions), (*asked.hidden_states, *asked.attentions), strict=True
    ):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_some_hidden_states_and_tuples():
    model, x = evopatch.apply(build("hf_vit")), images()
    every = model(x, output_hidden_states=True).hidden_states
    some = model(x, output_hidden_states=[3, -1]).hidden_states
    assert [h is None for h in some] == [True, True, True, False, True, True, False]
    assert torch.equal(some[3], every[3])
    logits, states = model(x, output_hidden_states=True, return_dict=False)
    assert torch.equal(states[6], every[6])
    assert logits.shape == (2, 7)


@torch.no_grad()
def test_hooks_on_attention_modules_and_layers_run():
    model, x = build("hf_vit"), images()
    seen = []
    attention, layer = model.vit.layers[4].attention, model.vit.layers[3]
    attention.register_forward_hook(lambda m, args, out: seen.append("attention"))
    evopatch.apply(model)
    layer.register_forward_hook(lambda m, args, out: seen.append("layer"))
    expected = model(x).logits
    assert seen == ["layer", "attention"]
    layer.register_forward_hook(lambda m, args, out: out * 1.5)
    assert moved(model(x).logits, expected) > 1e-4


# Attention implementations


@torch.no_grad()
def test_the_attention_implementation_can_change_after_apply():
    model, x = evopatch.apply(build("hf_vit")), images()
    sdpa = model(x).logits
    assert model(x, output_attentions=True).attentions == ()
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(x).logits, sdpa, atol=2e-5, rtol=2e-5)
    assert len(model(x, output_attentions=True).attentions) == 6


class OwnAttention(transformers.models.vit.modeling_vit.ViTAttention):
    """What users do: a subclass, in a module of their own."""


@torch.no_grad()
def test_a_subclass_of_an_attention_class():
    model, x = build("hf_vit_eager"), images()
    expected = evopatch.apply(copy.deepcopy(model))(x).logits
    for layer in model.vit.layers:
        layer.attention.__class__ = OwnAttention
    evopatch.apply(model)
    assert torch.equal(model(x).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x).logits, expected)


@torch.no_grad()
def test_other_implementations_never_get_a_bias():
    """As flash attention and flex attention would: they run where a block takes all tokens."""
    calls = []

    def other(module, query, key, value, attention_mask, **kwargs):
        assert attention_mask is None
        calls.append(query.shape[2])
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, **kwargs)

    transformers.AttentionInterface.register("other", other)
    transformers.AttentionMaskInterface.register("other", lambda *args, **kwargs: None)
    model, x = build("hf_vit"), images()
    expected = evopatch.apply(copy.deepcopy(model))(x).logits
    model.set_attn_implementation("other")
    evopatch.apply(model)
    torch.testing.assert_close(model(x).logits, expected, atol=2e-5, rtol=2e-5)
    assert calls == [26, 26]
    evopatch.set_config(model, EvoConfig.paper())
    calls.clear()
    model(x)
    assert calls == [26, 26, 15, 15, 15, 15]


@torch.no_grad()
def test_flex_attention_checks_the_mask_that_transformers_makes_for_it():
    model, x = build("hf_vit", attn_implementation="flex_attention"), images()
    original = call(model, x)
    evopatch.apply(model)
    torch.testing.assert_close(call(model, x), call(evopatch.apply(build("hf_vit")), x), atol=2e-5, rtol=2e-5)
    keep = torch.ones(2, 26, dtype=torch.long)
    keep[1, -2:] = 0
    with pytest.raises(RuntimeError, match="attention mask that masks tokens"):
        model(x, attention_mask=keep)
    evopatch.set_keep_ratio(model, 1.0)
    assert torch.equal(call(model, x), original)


@pytest.mark.parametrize("name", ["hf_vit", "hf_vit_eager", "hf_dinov2", "hf_clip", "hf_dinov3"])
@torch.no_grad()
def test_attention_masks_are_refused(name):
    model, x = build(name), images()
    tokens = next(iter(model(x, output_hidden_states=True).hidden_states)).shape[1]
    layer = next(m for m in model.modules() if type(m).__name__.endswith(("Layer", "EncoderLayer")))
    mask = torch.zeros(2, 1, tokens, tokens)
    evopatch.apply(model)
    with pytest.raises(evopatch.UnsupportedInputError, match="attention_mask was passed .* at block 0"):
        layer(torch.randn(2, tokens, 48), mask, evo_pass=_stream(model))
    if name in ("hf_vit", "hf_vit_eager", "hf_dinov2"):
        keep = torch.ones(2, tokens, dtype=torch.long)
        torch.testing.assert_close(call(model, x, attention_mask=keep), call(model, x))
        keep[:, -3:] = 0
        with pytest.raises(evopatch.UnsupportedInputError, match=r"set_keep_ratio\(model, 1.0\)"):
            model(x, attention_mask=keep)
        evopatch.set_keep_ratio(model, 1.0)
        masked = call(model, x, attention_mask=keep)
        assert torch.equal(masked, call(evopatch.remove(model), x, attention_mask=keep))


def _stream(model):
    from evopatch.forward.tokens import TokenPass

    patch = next(m._evo_state for m in model.modules() if hasattr(m, "_evo_state"))
    return TokenPass(patch, patch.depth, compact=True)


@torch.no_grad()
def test_an_exported_model_checks_its_attention_mask():
    model, x = evopatch.apply(build("hf_vit")), images()
    keep = torch.ones(2, 26, dtype=torch.long)
    exported = torch.export.export(model, (x,), {"attention_mask": keep}).module()
    torch.testing.assert_close(exported(x, attention_mask=keep).logits, model(x).logits, atol=2e-5, rtol=2e-5)
    keep[1, 3] = 0
    with pytest.raises(RuntimeError, match="attention mask that masks tokens"):
        exported(x, attention_mask=keep)


# Image sizes, precision, devices


@pytest.mark.parametrize(
    "name", ["hf_vit", "hf_deit", "hf_dinov2", "hf_registers", "hf_dinov3", "hf_clip", "hf_siglip"]
)
@torch.no_grad()
def test_other_image_sizes(name):
    model = build(name)
    options = {} if "dino" in name or "registers" in name else {"interpolate_pos_encoding": True}
    for size in ((56, 24), (64, 80)):
        x = images(size=size)
        original = call(model, x, **options)
        evopatch.apply(model)
        result = call(model, x, **options)
        states = model(x, output_hidden_states=True, **options).hidden_states
        patches = (size[0] // 8) * (size[1] // 8)
        assert {s.shape[1] - patches for s in states} <= {0, 1, 2, 4, 5}
        assert len({s.shape for s in states}) == 1
        selection = evopatch.token_selection(model, x, **options)
        assert selection.shape == (2, 6, size[0] // 8, size[1] // 8)
        assert selection[:, -1].sum() == 2 * int(patches * 0.37 + 0.5)
        assert moved(result, original) > 1e-4
        evopatch.remove(model)


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


# Models that hold an encoder


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
    evopatch.apply(model, config=EvoConfig.dense())
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


# Training and pipelines


class Labelled(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        label = index % 7
        return {"pixel_values": images(1, seed=index)[0] * 0.1 + label, "labels": label}


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_trainer(tmp_path, reentrant):
    model = evopatch.apply(build("hf_vit"))
    before = copy.deepcopy(model.state_dict())
    arguments = TrainingArguments(
        str(tmp_path),
        num_train_epochs=8,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        logging_strategy="epoch",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="epoch",
        save_total_limit=1,
        gradient_checkpointing=reentrant is not None,
        gradient_checkpointing_kwargs=None if reentrant is None else {"use_reentrant": reentrant},
    )
    trainer = Trainer(model, arguments, train_dataset=Labelled(), eval_dataset=Labelled())
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.7 * first
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert len(changed) == len(before)
    # A checkpoint of the trainer is a stock one.
    saved = next(tmp_path.glob("checkpoint-*"))
    stock = ViTForImageClassification.from_pretrained(saved).eval()
    x = images()
    model.eval()
    assert not evopatch.is_patched(stock)
    torch.testing.assert_close(evopatch.apply(stock)(x).logits, model(x).logits, atol=1e-5, rtol=1e-5)


def test_image_classification_pipeline(tmp_path):
    model = evopatch.apply(build("hf_vit"))
    processor = ViTImageProcessor(size={"height": 40, "width": 40})
    classify = transformers.pipeline("image-classification", model=model, image_processor=processor)
    image = Image.effect_noise((64, 48), 60).convert("RGB")
    answers = classify(image, top_k=7)
    with torch.no_grad():
        logits = model(**processor(images=image, return_tensors="pt")).logits
    assert answers[0]["score"] == pytest.approx(logits.softmax(-1).max().item(), abs=1e-5)
    evopatch.set_keep_ratio(model, 1.0)
    assert classify(image, top_k=7) != answers


# Refusals


@torch.no_grad()
def test_a_layer_called_from_outside_is_refused():
    model, x = evopatch.apply(build("hf_vit")), images()
    with pytest.raises(evopatch.BypassError, match=r"vit\.layers\.0 was called from outside"):
        model.vit.layers[0](torch.randn(2, 26, 48))
    with pytest.raises(evopatch.BypassError, match=r"vit\.layers\.0"):
        model.vit.forward(x)
    evopatch.set_keep_ratio(model, 1.0)
    model.vit.forward(x)


@torch.no_grad()
def test_layers_changed_after_apply_are_refused():
    model, x = evopatch.apply(build("hf_vit")), images()
    model.vit.layers = nn.ModuleList(list(model.vit.layers)[:4])
    with pytest.raises(evopatch.BypassError, match="other layers in 'layers' than the 6"):
        model(x)
    evopatch.remove(model)
    evopatch.apply(model)
    assert model(x).logits.shape == (2, 7)


def test_unknown_models_are_refused_with_what_is_served():
    model = BeitModel(BeitConfig(**VISION))
    with pytest.raises(evopatch.UnsupportedModelError, match=r"nothing to patch in BeitModel .*DeiTModel.*ViTModel"):
        evopatch.apply(model)


@torch.no_grad()
def test_two_hosts_need_the_one_meant():
    both = nn.ModuleDict({"a": build("hf_vit"), "b": timm.create_model("deit_tiny_patch16_224", img_size=32)})
    evopatch.apply(both)
    with pytest.raises(evopatch.UnsupportedModelError, match=r"2 patched hosts, 'a\.vit', 'b': expected one"):
        evopatch.profile(both, (3, 40, 40))
    assert evopatch.profile(both["a"], (3, 40, 40)).ratio < 0.9


@torch.no_grad()
def test_profile_counts_the_real_forward():
    from torch.utils.flop_counter import FlopCounterMode

    model, x = build("hf_dinov2", attn_implementation="eager"), images(1)  # whose FLOPs every torch counts

    def count():
        with FlopCounterMode(display=False) as counter:
            model(x)
        return counter.get_total_flops()

    unpatched = count()
    evopatch.apply(model)
    profile = evopatch.profile(model, (3, 40, 40))
    assert profile.flops_unpatched == unpatched
    assert profile.flops == count()
    assert [block.tokens for block in profile.blocks] == [25, 25, 16, 16, 9, 9]
    assert sum(block.flops for block in profile.blocks) < profile.flops < unpatched
