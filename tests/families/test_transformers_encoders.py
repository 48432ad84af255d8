"""Encoders that larger models of transformers see or hear with: the rows of the table that no variant stands for."""

import copy
import importlib

import pytest
import torch
import transformers
from comparing import moved
from evopatch_transformers import own_attention, refusals
from matrix import cases
from transformers.models.git.configuration_git import GitVisionConfig
from transformers.models.git.modeling_git import GitVisionModel
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionTransformer
from transformers.models.kosmos2.configuration_kosmos2 import Kosmos2VisionConfig
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2VisionModel
from transformers.models.qianfan_ocr.configuration_qianfan_ocr import QianfanOCRVisionConfig
from transformers.models.qianfan_ocr.modeling_qianfan_ocr import QianfanOCRVisionModel
from transformers.models.rf_detr.configuration_rf_detr import RfDetrDinov2Config
from transformers.models.rf_detr.modeling_rf_detr import RfDetrDinov2Backbone
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionTransformer

import evopatch
from evopatch import EvoConfig, UnsupportedInputError, UnsupportedModelError
from evopatch.algorithm.partition import spread_attention
from evopatch.calibration.judge import Judge
from evopatch.embedding.features import FeatureExtractor
from evopatch.patching.handle import Patched

SMALL = {"hidden_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 96}
IMAGES, VIDEOS, SOUNDS = (2, 3, 40, 40), (2, 4, 3, 40, 40), (2, 64, 32)


def named(name, **others):
    """A vision model of a family by the family's name."""
    config = getattr(transformers, f"{name}VisionConfig")(**SMALL, image_size=40, patch_size=8, **others)
    return getattr(transformers, f"{name}VisionModel")(config)


def pose():
    backbone = transformers.VitPoseBackboneConfig(
        image_size=[64, 48], patch_size=[16, 16], out_features=["stage6"], **SMALL
    )
    return transformers.VitPoseForPoseEstimation(transformers.VitPoseConfig(backbone_config=backbone, num_labels=3))


def of_video(name, **others):
    config = getattr(transformers, f"{name}Config")(**SMALL, image_size=40, patch_size=8, num_frames=4, **others)
    return getattr(transformers, f"{name}ForVideoClassification")(config)


def listening():
    return transformers.ASTForAudioClassification(transformers.ASTConfig(**SMALL, max_length=64, num_mel_bins=32))


def beit(**others):
    config = transformers.BeitConfig(**SMALL, image_size=40, patch_size=8, num_labels=7, **others)
    return transformers.BeitForImageClassification(config)


def data2vec(**others):
    config = transformers.Data2VecVisionConfig(
        **SMALL, image_size=40, patch_size=8, num_labels=7, drop_path_rate=0.0, **others
    )
    return transformers.Data2VecVisionForImageClassification(config)


def depth():
    config = transformers.DPTConfig(
        **SMALL, image_size=40, patch_size=8, backbone_out_indices=[2, 3, 4, 5], neck_hidden_sizes=[8, 8, 8, 8]
    )
    return transformers.DPTForDepthEstimation(config)


def of_config(name, **others):
    return getattr(transformers, f"{name}Model")(
        getattr(transformers, f"{name}Config")(**SMALL, image_size=40, patch_size=8, **others)
    )


def sapiens(key_heads):
    """Fewer heads of keys than of queries in all but the first layers and the last."""
    fewer = {"num_key_value_attention_heads": key_heads, "num_first_full_attention_layers": 1}
    return of_config("Sapiens2", num_register_tokens=2, num_last_full_attention_layers=1, **fewer)


def predicting():
    config = transformers.VJEPA2Config(
        patch_size=8,
        crop_size=40,
        frames_per_clip=4,
        tubelet_size=2,
        hidden_size=48,
        num_hidden_layers=6,
        mlp_ratio=2,
        num_attention_heads=4,
        num_pooler_layers=1,
        num_labels=7,
    )
    return transformers.VJEPA2ForVideoClassification(config)


def detecting(**others):
    config = transformers.YolosConfig(
        **SMALL, image_size=[40, 40], patch_size=8, num_detection_tokens=7, num_labels=5, **others
    )
    return transformers.YolosForObjectDetection(config)


def segmenting(name, **others):
    config = getattr(transformers, f"{name}Config")(
        **{**SMALL, **others}, image_size=40, patch_size=8, num_blocks=2, num_queries=7, num_upscale_blocks=1
    )
    return getattr(transformers, f"{name}ForUniversalSegmentation")(config)


def grouping():
    groups = {"depths": [6, 2, 1], "num_group_tokens": [5, 3, 0], "num_output_groups": [5, 3, 3]}
    config = transformers.GroupViTVisionConfig(**SMALL, image_size=40, patch_size=8, **groups)
    return transformers.GroupViTVisionModel(config)


def spelling():
    sizes = {name: SMALL[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    letters = {"num_character_labels": 7, "num_bpe_labels": 11, "num_wordpiece_labels": 13, "max_token_length": 5}
    config = transformers.MgpstrConfig(**sizes, **letters, image_size=[32, 48], patch_size=8, mlp_ratio=2)
    return transformers.MgpstrForSceneTextRecognition(config)


def messaging(frames=1):
    config = transformers.XCLIPVisionConfig(**SMALL, image_size=40, patch_size=8, num_frames=frames)
    return transformers.XCLIPVisionModel(config)


IN_WINDOWS = {"mlp_ratio": 2, "image_size": 80, "patch_size": 8, "out_features": ["stage3", "stage6"]}
IN_WINDOWS |= {name: SMALL[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}


def in_windows_of_dinov2():
    config = RfDetrDinov2Config(**IN_WINDOWS, num_windows=2, window_block_indexes=[0, 1, 3, 4])
    return RfDetrDinov2Backbone(config)


def in_windows():
    config = transformers.LwDetrViTConfig(
        **IN_WINDOWS, pretrain_image_size=80, num_windows=4, window_block_indices=[0, 1, 3, 4]
    )
    return transformers.LwDetrViTBackbone(config)


MODELS = {
    "beit": (beit, IMAGES),
    "beit_biased": (lambda: beit(use_relative_position_bias=True, use_mean_pooling=False), IMAGES),
    "beit_shared": (lambda: beit(use_shared_relative_position_bias=True), IMAGES),
    "data2vec": (lambda: data2vec(use_relative_position_bias=True, use_mean_pooling=False), IMAGES),
    "data2vec_shared": (lambda: data2vec(use_shared_relative_position_bias=True), IMAGES),
    "dpt": (depth, IMAGES),
    "internvl": (
        lambda: transformers.InternVLVisionModel(
            transformers.InternVLVisionConfig(**SMALL, image_size=[40, 40], patch_size=[8, 8])
        ),
        IMAGES,
    ),
    "pixio": (lambda: of_config("Pixio", n_cls_tokens=3), IMAGES),
    "sapiens2": (lambda: sapiens(4), IMAGES),
    "sapiens2_grouped": (lambda: sapiens(2), IMAGES),
    "tipsv2": (lambda: named("Tipsv2"), IMAGES),
    "radio": (lambda: of_config("Radio", max_img_size=40, num_cls_tokens=2, num_registers=3), IMAGES),
    "mlcd": (
        lambda: transformers.MLCDVisionModel(transformers.MLCDVisionConfig(**SMALL, image_size=40, patch_size=8)),
        IMAGES,
    ),
    "altclip": (lambda: named("AltCLIP"), IMAGES),
    "chinese_clip": (lambda: named("ChineseCLIP"), IMAGES),
    "metaclip_2": (lambda: named("MetaClip2"), IMAGES),
    "clipseg": (lambda: named("CLIPSeg"), IMAGES),
    "owlvit": (lambda: named("OwlViT"), IMAGES),
    "owlv2": (lambda: named("Owlv2"), IMAGES),
    "instructblip": (lambda: named("InstructBlip"), IMAGES),
    "instructblipvideo": (lambda: named("InstructBlipVideo"), IMAGES),
    "janus": (lambda: named("Janus", mlp_ratio=2), IMAGES),
    "kosmos2": (lambda: Kosmos2VisionModel(Kosmos2VisionConfig(**SMALL, image_size=40, patch_size=8)), IMAGES),
    "idefics2": (lambda: Idefics2VisionTransformer(Idefics2VisionConfig(**SMALL, image_size=40, patch_size=8)), IMAGES),
    "idefics3": (lambda: Idefics3VisionTransformer(Idefics3VisionConfig(**SMALL, image_size=40, patch_size=8)), IMAGES),
    "smolvlm": (lambda: SmolVLMVisionTransformer(SmolVLMVisionConfig(**SMALL, image_size=40, patch_size=8)), IMAGES),
    "git": (lambda: GitVisionModel(GitVisionConfig(**SMALL, image_size=40, patch_size=8)), IMAGES),
    "vitpose": (pose, (2, 3, 64, 48)),
    "groupvit": (grouping, IMAGES),
    "x_clip": (messaging, IMAGES),
    "mgp_str": (spelling, (2, 3, 32, 48)),
    "qianfan_ocr": (
        lambda: QianfanOCRVisionModel(QianfanOCRVisionConfig(**SMALL, image_size=[40, 40], patch_size=[8, 8])),
        IMAGES,
    ),
    "videomt": (lambda: segmenting("Videomt", mlp_ratio=2), (1, 2, 3, 40, 40)),
    "videomae": (lambda: of_video("VideoMAE", tubelet_size=2), VIDEOS),
    "vjepa2": (predicting, VIDEOS),
    "vivit": (lambda: of_video("Vivit", tubelet_size=[2, 8, 8]), VIDEOS),
    "ast": (listening, SOUNDS),
    "yolos": (lambda: detecting(use_mid_position_embeddings=False), IMAGES),
    "yolos_between": (detecting, (2, 3, 48, 40)),
    "rf_detr": (in_windows_of_dinov2, (2, 3, 80, 80)),
    "lw_detr": (in_windows, (2, 3, 80, 80)),
    "eomt": (lambda: segmenting("Eomt", mlp_ratio=2), IMAGES),
    "eomt_dinov3": (lambda: segmenting("EomtDinov3"), IMAGES),
}
EVERY = cases("name", sorted(MODELS), fast=["owlv2", "videomae", "ast", "yolos", "eomt", "rf_detr"])


def made(name):
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model, torch.randn(shape)


def result(out):
    if "feature_maps" in out:
        return out.feature_maps[-1]
    keys = ("logits", "masks_queries_logits", "heatmaps", "predicted_depth", "last_hidden_state")
    found = next(out[key] for key in keys if out.get(key) is not None)
    return torch.cat(found, dim=-1) if isinstance(found, tuple) else found


@EVERY
@torch.no_grad()
def test_an_encoder(name):
    model, x = made(name)
    original = result(model(x))
    evopatch.apply(model, keep_ratio=1.0)
    assert torch.equal(result(model(x)), original)
    evopatch.set_keep_ratio(model, 0.5)
    found = result(model(x))
    assert found.shape == original.shape
    assert moved(found, original) > 1e-3
    assert torch.equal(result(copy.deepcopy(model)(x)), found)
    alone = torch.cat([result(model(each)) for each in x.split(1)])
    torch.testing.assert_close(alone, found, atol=2e-5, rtol=2e-5)
    with evopatch.full_grid(model):
        torch.testing.assert_close(result(model(x)), found, atol=2e-5, rtol=2e-5)
    assert torch.equal(result(evopatch.remove(model)(x)), original)


@EVERY
@torch.no_grad()
def test_what_is_recorded_between_its_layers_is_the_full_grid(name):
    model, x = made(name)
    weights = not name.startswith("data2vec")  # has none with fused attention, which was chosen when it was made
    if weights:
        model.set_attn_implementation("eager")
    # The model for poses has no such outputs of its own: its backbone has.
    part = model.backbone if name == "vitpose" else model
    key = "feature_maps" if name == "vitpose" else "hidden_states"
    stock = part(x, output_hidden_states=True, output_attentions=weights)
    evopatch.apply(model)
    plain = result(model(x))
    ours = part(x, output_hidden_states=True, output_attentions=weights)
    assert [tokens.shape for tokens in ours[key]] == [tokens.shape for tokens in stock[key]]
    assert moved(ours[key][-1], stock[key][-1]) > 1e-4
    assert [each.shape for each in ours.get("attentions") or ()] == [
        each.shape for each in stock.get("attentions") or ()
    ]
    torch.testing.assert_close(result(model(x)), plain)


@EVERY
def test_gradients_of_an_encoder(name):
    model, x = made(name)
    stock = {n for n, p in gradients(model, x).items() if p is not None}
    evopatch.apply(model)
    ours = gradients(model, x)
    assert {n for n, p in ours.items() if p is not None} == stock
    assert all(torch.isfinite(ours[n]).all() for n in stock)


def gradients(model, x):
    model.zero_grad()
    result(model(x)).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_patches_of_video_are_no_grid():
    model, x = made("videomae")
    with pytest.raises(UnsupportedInputError, match="takes video or sound, whose patches aren't a grid"):
        Patched(evopatch.apply(model)).host.grids((40, 40))
    assert torch.isfinite(result(model(x))).all()


@torch.no_grad()
def test_slow_tokens_of_a_video_are_rotated_by_their_own_places():
    model, x = made("vjepa2")
    encoder, taken, entered = model.vjepa2.encoder, 5, []
    stock = copy.deepcopy(encoder)
    stock.layer[taken].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    stock(x)
    config = EvoConfig(keep_ratio=0.5, representative="none", start=taken, stages=1)
    state = Patched(evopatch.apply(model, config=config)).host.state
    state.passes = []
    found = encoder(x).last_hidden_state
    slow = state.passes[0].partitions[taken].leader
    images = torch.arange(2).unsqueeze(1)
    alone = stock.layer[taken](entered[0][images, slow], slow)[0]
    torch.testing.assert_close(found[images, slow], stock.layernorm(alone), atol=1e-5, rtol=1e-5)
    elsewhere = stock.layer[taken](entered[0][images, slow], slow.flip(1))[0]
    assert moved(found[images, slow], stock.layernorm(elsewhere)) > 1e-4


@cases("kind", ["sdpa", "eager"], fast=["sdpa"])
@torch.no_grad()
def test_tokens_behind_the_patch_tokens(kind):
    """They rank the patch tokens, take part in a compact set, and are where the model's code has them."""
    model, x = made("yolos")
    model.set_attn_implementation("eager")
    stock, behind, taken = model(x, output_attentions=True, output_hidden_states=True), 7, 3
    attention = torch.stack([each[:, :, -behind:, 1:-behind].mean((1, 2)) for each in stock.attentions])
    encoder = copy.deepcopy(model.vit.encoder)
    model.set_attn_implementation(kind)
    config = EvoConfig(keep_ratio=0.5, representative="none", start=taken, stages=1, tradeoff=1.0, look_ahead=0.0)
    state = Patched(evopatch.apply(model, config=config)).host.state
    assert (state.spec.prefix, state.spec.readout, state.spec.behind) == (8, 7, 7)
    seen = []
    handle = model.vit.encoder.layer[taken].layernorm_after.register_forward_pre_hook(
        lambda _, args: seen.append(*args)
    )
    state.passes = []
    found = model(x, output_hidden_states=True).hidden_states
    handle.remove()
    images = torch.arange(2).unsqueeze(1)
    slow = state.passes[0].partitions[taken].leader
    assert torch.equal(slow.sort().values, attention[taken - 1].topk(slow.shape[1]).indices.sort().values)
    there = torch.cat([torch.zeros(2, 1, dtype=torch.long), 1 + slow, torch.arange(26, 33).expand(2, -1)], 1)
    before = stock.hidden_states[taken]
    torch.testing.assert_close(found[taken], before)
    torch.testing.assert_close(
        found[taken + 1][images, there], encoder.layer[taken](before[images, there]), atol=1e-5, rtol=1e-5
    )
    fast = torch.ones(2, 33, dtype=torch.bool).scatter(1, there, False)
    torch.testing.assert_close(found[taken + 1][fast], before[fast])
    assert seen[0].shape == before.shape
    alone = encoder.layer[taken]
    attended = alone.attention(alone.layernorm_before(before[images, there])) + before[images, there]
    torch.testing.assert_close(seen[0][images, there], attended, atol=1e-5, rtol=1e-5)


@cases("kind", ["sdpa", "eager"], fast=["sdpa"])
@torch.no_grad()
def test_layers_that_add_a_message_of_the_other_frames(kind):
    """It is attended to beside the compact set, and comes of the class tokens, which are in it."""
    model, x, taken = messaging(frames=2).eval(), torch.randn(4, 3, 40, 40), 3
    model.set_attn_implementation(kind)
    layer = copy.deepcopy(model.encoder.layers[taken])
    before = model(x, output_hidden_states=True).hidden_states[taken]
    config = EvoConfig(keep_ratio=0.5, representative="none", start=taken, stages=1, tradeoff=1.0, look_ahead=0.0)
    state = Patched(evopatch.apply(model, config=config)).host.state
    state.passes = []
    found = model(x, output_hidden_states=True).hidden_states[taken + 1]
    slow = state.passes[0].partitions[taken].leader
    images, there = torch.arange(4).unsqueeze(1), torch.cat([torch.zeros(4, 1, dtype=torch.long), 1 + slow], 1)
    torch.testing.assert_close(found[images, there], layer(before[images, there], None), atol=1e-5, rtol=1e-5)
    other = model(torch.cat([x[:1], -x[1:2], x[2:]]), output_hidden_states=True).hidden_states[taken + 1]
    assert moved(other[0], found[0]) > 1e-5  # which shares a video with the image that is another one
    torch.testing.assert_close(other[2:], found[2:])


@torch.no_grad()
def test_of_an_image_in_segments_the_first_stage_is_patched(monkeypatch):
    model, x = made("groupvit")
    stages, taken = copy.deepcopy(model.vision_model.encoder.stages), 2
    before = []
    stages[0].layers[taken].register_forward_pre_hook(lambda module, args: before.append(args[0]))
    stages[0](model.vision_model.embeddings(x))
    config = EvoConfig(keep_ratio=0.5, representative="none", start=taken, stages=1, tradeoff=1.0, look_ahead=0.0)
    state = Patched(evopatch.apply(model, config=config)).host.state
    assert (state.depth, state.spec.prefix, state.spec.readout, state.spec.behind) == (6, 5, 0, 5)
    state.passes, after = [], []
    model.vision_model.encoder.stages[0].layers[taken].register_forward_hook(lambda _, args, out: after.append(out))
    model(x)
    slow = state.passes[0].partitions[taken].leader
    images, there = torch.arange(2).unsqueeze(1), torch.cat([slow, torch.arange(25, 30).expand(2, -1)], 1)
    alone = stages[0].layers[taken](before[0][images, there], None)
    torch.testing.assert_close(after[0][images, there], alone, atol=1e-5, rtol=1e-5)
    weights = []
    monkeypatch.setattr(own_attention, "is_recorded", lambda name: True)
    monkeypatch.setattr(own_attention, "spread_attention", lambda *args: weights.append(spread_attention(*args)))
    model(x)
    attended = (weights[0].sum(-1) > 0.5).all(1)  # none of a token that nothing stands for, each where the model has it
    assert torch.equal(attended, torch.zeros(2, 30, dtype=torch.bool).scatter(1, there, True))


@torch.no_grad()
def test_features_of_a_model_with_tokens_behind_the_patch_tokens():
    model, x = made("yolos")
    tokens = model.vit(x).last_hidden_state
    evopatch.apply(model, keep_ratio=1.0)
    found = FeatureExtractor(model, patches=True)(x)
    torch.testing.assert_close(found.image, tokens[:, -7:].mean(1))
    assert torch.equal(found.patches, tokens[:, 1:-7])
    judged = [each.clone() for each in (tokens, tokens, tokens)]
    judged[1][:, 1:-7] = torch.randn(2, 25, 48)
    judged[2][:, -7:] = torch.randn(2, 7, 48)
    outputs = iter(judged)
    judge = Judge(lambda _: next(outputs), [x], 8, 7)
    patches, others = (judge.all_errors(lambda _: next(outputs)).error for _ in range(2))
    assert (patches > 0.4).all()  # half of it is the patches'
    assert ((others > 0.3) & (others < 0.5)).all()  # seven of the eight others


@cases("name", ["rf_detr", "lw_detr"], fast=["rf_detr"])
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@torch.no_grad()
def test_layers_that_attend_over_several_windows(name, kind):
    model, x = made(name)
    model.set_attn_implementation(kind)
    prefix, taken = int(name == "rf_detr"), 2
    stock = model(x, output_hidden_states=True).hidden_states
    layer = copy.deepcopy(model.encoder.layer[taken])
    config = EvoConfig(keep_ratio=0.5, representative="none", start=taken, stages=1, look_ahead=0.0)
    state = Patched(evopatch.apply(model, config=config)).host.state
    norm = model.encoder.layer[taken].get_submodule("norm1" if prefix else "layernorm_before")
    seen = []
    asking = model.encoder.layer[taken].attention.q_proj
    handle = asking.register_forward_pre_hook(lambda module, args: seen.append(*args))
    state.passes = []
    found = model(x, output_hidden_states=True).hidden_states
    handle.remove()
    partition = state.passes[0].partitions[taken]
    windows = torch.arange(8).unsqueeze(1)  # four of each image
    there = torch.cat([torch.zeros(8, prefix, dtype=torch.long), prefix + partition.leader], 1)
    before = stock[taken]
    torch.testing.assert_close(found[taken], before)
    alone = layer(before[windows, there])
    torch.testing.assert_close(found[taken + 1][windows, there], alone, atol=1e-5, rtol=1e-5)
    assert moved(alone, before[windows, there]) > 1e-3
    apart = 0.0 * alone
    for window in range(8):  # on its own it would be something else
        apart[window] = layer(before[window, there[window]].repeat(4, 1, 1))[0]
    assert moved(alone, apart) > 1e-4
    normed = norm(before).view(2, 4 * before.shape[1], -1)
    places = (there + torch.arange(4).repeat(2).unsqueeze(1) * before.shape[1]).view(2, -1)
    images = torch.arange(2).unsqueeze(1)
    torch.testing.assert_close(seen[0][images, places], normed[images, places])
    with pytest.raises(UnsupportedInputError, match="has its tokens in windows"):
        evopatch.token_selection(model, x)


@torch.no_grad()
def test_what_windows_that_attend_together_are_ranked_by():
    """Attention of each window's class token to the tokens of its window."""
    model, x = made("rf_detr")
    layer, before = model.encoder.layer[2], model(x, output_hidden_states=True).hidden_states[2]
    query, key = (
        projection(layer.norm1(before)).unflatten(2, (4, -1)).transpose(1, 2)
        for projection in (layer.attention.q_proj, layer.attention.k_proj)
    )
    weights = (query[:, :, :1] @ key.transpose(2, 3) * layer.attention.scaling).softmax(-1)
    config = EvoConfig(keep_ratio=0.5, start=3, stages=1, tradeoff=1.0, look_ahead=0.0)
    state = Patched(evopatch.apply(model, config=config)).host.state
    state.passes = []
    model(x)
    torch.testing.assert_close(state.passes[0].g[2], weights.mean((1, 2))[:, 1:])


@torch.no_grad()
def test_layers_that_queries_join_stay_as_they_are():
    model, x = made("eomt")
    queries = model.query.weight.shape[0]
    evopatch.apply(model)
    assert Patched(model).host.state.depth == 4
    assert all(type(layer).__module__.startswith("transformers") for layer in model.layers[4:])
    assert [each.shape[1] for each in model(x, output_hidden_states=True).hidden_states] == [30] * 5 + [
        30 + queries
    ] * 2


def of_qwen():
    config = transformers.Qwen2VLConfig(
        vision_config={"depth": 2, "embed_dim": 48, "num_heads": 4, "hidden_size": 48},
        text_config={**SMALL, "num_key_value_heads": 4, "vocab_size": 64},
    )
    return transformers.Qwen2VLModel(config)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (of_qwen, r"visual: Qwen2VisionTransformerPretrainedModel packs the patches of all its images"),
        (lambda: transformers.ViltModel(transformers.ViltConfig(**SMALL)), "ViltModel has the tokens of a text before"),
        (lambda: transformers.TimesformerModel(transformers.TimesformerConfig(**SMALL)), r"^found .* encoder: Times"),
        (lambda: transformers.BertModel(transformers.BertConfig(**SMALL)), "no adapter serves it"),
    ],
)
def test_encoders_that_are_refused(build, text):
    model = build()
    with pytest.raises(UnsupportedModelError, match=text) as refused:
        evopatch.apply(model)
    assert not evopatch.is_patched(model)
    reasons = [candidate.reason for candidate in evopatch.inspect(model).candidates]
    assert any(reason and reason in str(refused.value) for reason in reasons) == ("no adapter" not in text)


def test_every_class_with_a_reason_exists():
    """Of the installed version; a class that is renamed would be refused without one."""
    for module, name in refusals._REASONS:
        assert hasattr(importlib.import_module(f"transformers.models.{module}"), name), (module, name)


@cases("name", ["idefics2", "idefics3", "smolvlm"], fast=["smolvlm"])
@torch.no_grad()
def test_images_of_other_sizes_are_filled_up(name):
    model, x = made(name)
    there = torch.ones(2, 5, 5, dtype=torch.bool)
    there[1, 3:] = there[1, :, 3:] = False
    evopatch.apply(model)
    seen = there.repeat_interleave(8, 1).repeat_interleave(8, 2).unsqueeze(1)
    other = torch.where(seen, x, 9 * torch.randn(x.shape))
    found = model(x, patch_attention_mask=there).last_hidden_state[there.flatten(1)]
    assert torch.equal(model(other, patch_attention_mask=there).last_hidden_state[there.flatten(1)], found)
    assert moved(model(x).last_hidden_state[there.flatten(1)], found) > 1e-3
    selected = evopatch.token_selection(model, x, patch_attention_mask=there)[1, -1]
    assert selected.any()
    assert not (selected & ~there[1]).any()


@torch.no_grad()
def test_what_layers_with_a_position_bias_refuse():
    model, x = made("beit_biased")
    evopatch.apply(model)
    with pytest.raises(
        UnsupportedInputError, match="attention_mask was passed to 'beit', which adds its position bias"
    ):
        model.beit(x, attention_mask=torch.ones(2, 26, dtype=torch.long))
    with pytest.raises(UnsupportedInputError, match="interpolate_pos_encoding, by which a layer resizes its position"):
        model(x, interpolate_pos_encoding=True)
    evopatch.set_keep_ratio(model, 1.0)
    assert torch.isfinite(model(x, interpolate_pos_encoding=True).logits).all()


def test_a_position_bias_needs_fused_attention():
    model = data2vec(use_relative_position_bias=True, attn_implementation="eager")
    with pytest.raises(
        UnsupportedModelError, match=r"layer\.0\.attention\.attention \(Data2VecVisionSelfAttention\) adds"
    ):
        evopatch.apply(model)
    assert not evopatch.is_patched(model)


@cases("name", ["beit_biased", "beit_shared", "data2vec", "data2vec_shared"], fast=["beit_biased"])
@torch.no_grad()
def test_a_position_bias_counts(name):
    model, x = made(name)
    evopatch.apply(model)
    found = model(x).logits
    for parameter_name, parameter in model.named_parameters():
        if "relative_position_bias_table" in parameter_name:
            parameter.mul_(-1.0)
    assert moved(model(x).logits, found) > 1e-4


@torch.no_grad()
def test_packed_images_are_refused():
    model, x = made("radio")
    grid = torch.tensor([[5, 5], [5, 5]])
    patches = x.view(2, 3, 5, 8, 5, 8).permute(0, 2, 4, 1, 3, 5).reshape(50, -1)
    assert torch.isfinite(model(patches, image_grid_hw=grid).last_hidden_state).all()
    evopatch.apply(model)
    with pytest.raises(UnsupportedInputError, match="cu_seqlens was passed to the patched model"):
        model(patches, image_grid_hw=grid)


@cases("name", ["internvl", "smolvlm", "data2vec", "yolos", "yolos_between", "lw_detr"], fast=["internvl"])
def test_layers_on_a_view(name):
    """Encoders that pass no keyword arguments on."""
    model, x = made(name)
    stock = gradients(model, x)
    evopatch.apply(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = result(model(x))
        torch.testing.assert_close(result(compiled(x)), expected, atol=2e-5, rtol=2e-5)
        exported = torch.export.export(model, (x,), strict=False).module()
        torch.testing.assert_close(result(exported(x)), expected, atol=2e-5, rtol=2e-5)
        with pytest.raises(evopatch.BypassError, match="called from outside"):
            next(m for m in model.modules() if type(m).__name__.endswith("Layer"))(torch.randn(1, 26, 48))
    plain = gradients(model.train(), x)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    saving = gradients(model, x)
    assert {n for n, g in saving.items() if g is not None} == {n for n, g in stock.items() if g is not None}
    for parameter, gradient in plain.items():
        if gradient is not None:
            torch.testing.assert_close(saving[parameter], gradient, atol=1e-4, rtol=1e-3)
