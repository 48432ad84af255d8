"""Encoders of which some blocks attend over the whole map: relative positions, other sizes, copies in other models."""

import copy
import importlib.util

import pytest
import timm
import torch
import transformers
from comparing import moved
from internals import block_paths, keep_all_in_windows, plans
from matrix import EACH_REPRESENTATIVE, cases, every, patched
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch.nn.functional import scaled_dot_product_attention
from variants import JOINED, TRANSFORMERS, build, call, images, images_for
from variants.joined import SAM, SIZE, VITDET

import evopatch
from evopatch import EvoConfig, UnsupportedInputError, UnsupportedModelError

SMALL = {"img_size": SIZE, "patch_size": 8, "embed_dim": 48, "depth": 6, "num_heads": 4, "window_size": 4}
SMALL |= {"global_attn_indexes": (2, 5), "neck_chans": 24, "num_classes": 7}


def copied(module, name, encoder="VisionEncoder", **others):
    """SAM's encoder as another model of transformers has it, by that model's module and name."""
    found = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    settings = SAM | others
    return lambda: getattr(found, f"{name}{encoder}")(getattr(found, f"{name}VisionConfig")(**settings))


def segmenting():
    vision = transformers.SamVisionConfig(**SAM, num_pos_feats=12)
    prompts = {"hidden_size": 24, "image_size": SIZE, "patch_size": 8, "mask_input_channels": 4}
    decoder = {"hidden_size": 24, "mlp_dim": 48, "num_attention_heads": 2, "iou_head_hidden_dim": 24}
    return transformers.SamModel(
        transformers.SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)
    )


MODELS = {
    "qk_norm": lambda: VisionTransformerSAM(**SMALL, use_rel_pos=True, qk_norm=True, init_values=0.5),
    "no_positions": lambda: VisionTransformerSAM(**SMALL, use_rel_pos=False),
    "never_windows": lambda: VisionTransformerSAM(**SMALL | {"window_size": 0}, use_rel_pos=True),
    "sam_hq": lambda: transformers.SamHQVisionModel(transformers.SamHQVisionConfig(**SAM)),
    "got_ocr": copied("got_ocr2", "GotOcr2"),
    "slanext": copied("slanext", "SLANeXt"),
    "pp_formulanet": copied("pp_formulanet", "PPFormulaNet", "VisionModel", output_channels=256),
    "vitdet_backbone": lambda: transformers.VitDetBackbone(
        transformers.VitDetConfig(**VITDET, out_features=["stage3", "stage6"])
    ),
    "vitdet_plain": lambda: transformers.VitDetModel(
        transformers.VitDetConfig(
            **VITDET | {"use_relative_position_embeddings": False, "window_block_indices": [], "window_size": 0}
        )
    ),
    "segmentation": segmenting,
}
for _module, _name in (("deepseek_ocr2", "DeepseekOcr2Sam"), ("unlimited_ocr", "UnlimitedOcrSam")):
    if importlib.util.find_spec(f"transformers.models.{_module}"):  # not in every version that is served
        MODELS[_module] = copied(_module, _name)
EVERY = cases("name", sorted(MODELS), fast=["no_positions"])


def made(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    return model


def result(model, x, **options):
    out = model(x, **options)
    if isinstance(out, torch.Tensor):
        return out
    if "pred_masks" in out:
        return out.pred_masks
    return out.last_hidden_state if "last_hidden_state" in out else out.feature_maps[-1]


@EVERY
@torch.no_grad()
def test_other_structures(name, monkeypatch):
    model, x = made(name), images_for("sam")
    options = {"input_points": torch.tensor([[[[20.0, 30.0]]]] * 2)} if name == "segmentation" else {}
    original = result(model, x, **options)
    evopatch.apply(model, keep_ratio=1.0)
    assert torch.equal(result(model, x, **options), original)
    evopatch.set_keep_ratio(model, 0.5)
    found = result(model, x, **options)
    assert moved(found, original) > 1e-3
    assert torch.equal(result(copy.deepcopy(model), x, **options), found)
    assert evopatch.token_selection(model, x, **options).shape == (2, 6, 8, 8)
    with monkeypatch.context() as patches:
        keep_all_in_windows(patches, matched=True)
        torch.testing.assert_close(result(model, x, **options), original, atol=2e-5, rtol=2e-5)
    assert torch.equal(result(evopatch.remove(model), x, **options), original)


@torch.no_grad()
def test_sam_hq_is_given_whole_maps_of_the_blocks_that_join_windows():
    model, x = made("sam_hq"), images_for("sam")
    stock = model(x).intermediate_embeddings
    found = evopatch.apply(model)(x).intermediate_embeddings
    assert [each.shape for each in found] == [each.shape for each in stock] == [(2, 8, 8, 48)] * 2
    assert moved(found[1], stock[1]) > 1e-3


# transformers' SAM takes images of its own size only.
ROWS = [(name, (SIZE, SIZE)) for name in sorted(JOINED)] + [("sam", (88, 56)), ("hf_vitdet", (88, 56))]


@cases(("name", "size"), ROWS, fast=[("sam", (88, 56))])
@pytest.mark.parametrize("representative", ["matched", "none"])
@torch.no_grad()
def test_with_every_window_or_token_slow_the_views_equal_the_blocks(name, size, representative, monkeypatch):
    """Windows, padding and relative positions are in their places: the order of windows and tokens is another one."""
    model, x = build(name), images(size=size)
    if representative == "matched" and size != (SIZE, SIZE):
        # All padding of a window is one row there, with the mean of its biases.
        for parameter_name, parameter in model.named_parameters():
            if "rel_pos" in parameter_name and parameter.shape[0] == 7:
                parameter.zero_()
    original = call(model, x)
    evopatch.apply(model, config=EvoConfig(keep_ratio=0.9, schedule="constant", representative=representative))
    entered = keep_all_in_windows(monkeypatch, representative == "matched")
    torch.testing.assert_close(call(model, x), original, atol=2e-5, rtol=2e-5)
    assert len(entered) == 4
    for parameter_name, parameter in model.named_parameters():
        if "rel_pos" in parameter_name and parameter.shape[0] != 7:
            parameter.copy_(parameter.flip(0))
    for buffer_name, buffer in model.named_buffers():
        if "position_ids" in buffer_name and buffer.shape[0] == 64:
            buffer.copy_(buffer.flip(0))
    assert moved(call(model, x), original) > 1e-4


def reference(block, x, groups, side):
    """What a block that joins windows makes of `(N, C)` tokens, in Python loops; of each group the first is slow."""
    attn = block.attn
    rows = torch.stack([torch.stack([x[t] for t in members]).mean(0) for members in groups])
    qkv = attn.qkv(block.norm1(rows)).view(len(groups), 3, attn.num_heads, -1)
    out = []
    for head in range(attn.num_heads):
        query, key, value = (qkv[:, part, head] for part in range(3))
        bias = torch.zeros(len(groups), len(groups))
        for i, (a, *_) in enumerate(groups):
            for j, (b, *others) in enumerate(groups):
                down = attn.rel_pos_h[a // side - b // side + side - 1]
                beside = attn.rel_pos_w[a % side - b % side + side - 1]
                bias[i, j] = query[i] @ down + query[i] @ beside + torch.tensor(1.0 + len(others)).log()
        out.append(scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=bias)[0])
    changed = rows + attn.proj(torch.cat(out, dim=1))
    changed = changed + block.mlp(block.norm2(changed))
    found = x.clone()
    for row, change, members in zip(rows, changed, groups, strict=True):
        for token in members:
            found[token] = x[token] + change - row
    return found


@torch.no_grad()
def test_a_block_over_the_whole_map_equals_the_reference():
    model, x = build("sam"), images_for("sam", 1)
    evopatch.apply(model, config=EvoConfig(keep_ratio=[0.4], stages=(5,)))
    *_, before, after = model.forward_intermediates(x, intermediates_only=True)
    groups = evopatch.token_groups(model, x)[0, 5].flatten().tolist()
    slow = evopatch.token_selection(model, x)[0, 5].flatten().tolist()
    members = {}
    for token, group in enumerate(groups):
        members.setdefault(group, []).append(token)
    ordered = [sorted(own, key=lambda token: not slow[token]) for own in members.values()]
    assert len(ordered) == 4 * 6  # of each 16 tokens in a window
    tokens = before[0].flatten(1).T
    expected = reference(evopatch.remove(model).blocks[5], tokens, ordered, 8)
    torch.testing.assert_close(after[0].flatten(1).T, expected, atol=2e-5, rtol=2e-5)
    assert moved(after[0].flatten(1).T, reference(model.blocks[5], tokens, [[t] for t in range(64)], 8)) > 1e-3


@EACH_REPRESENTATIVE
@torch.no_grad()
def test_the_same_weights_give_the_same_in_both_libraries(representative):
    first, second, x = build("sam"), build("hf_sam", mlp_dim=192).vision_encoder, images_for("sam")
    names = {"patch_embed.projection": "patch_embed.proj", "layers.": "blocks.", "layer_norm1": "norm1"}
    names |= {"layer_norm2": "norm2", "lin1": "fc1", "lin2": "fc2", "neck.conv1": "neck.0", "neck.norm1": "neck.1"}
    names |= {"neck.conv2": "neck.2", "neck.norm2": "neck.3"}
    weights = {}
    for name in second.state_dict():
        theirs = name
        for old, new in names.items():
            theirs = theirs.replace(old, new)
        weights[name] = first.state_dict()[theirs]
    second.load_state_dict(weights)
    for block, layer in zip(first.blocks, second.layers, strict=True):
        layer.layer_norm1.eps, layer.layer_norm2.eps = block.norm1.eps, block.norm2.eps
    for model in (first, second):
        evopatch.apply(model, config=EvoConfig(representative=representative))
    found = second(x, output_hidden_states=True).hidden_states[-1]
    expected = first.forward_intermediates(x, intermediates_only=True)[-1].permute(0, 2, 3, 1)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    assert torch.equal(evopatch.token_selection(second, x), evopatch.token_selection(first, x))
    assert not evopatch.token_selection(first, x)[:, 5].all()


@every(JOINED)
def test_blocks_of_a_run_share_a_choice_whatever_they_attend_to(name):
    model, x = patched(name), images_for(name)
    assert [plan.keep_ratio for plan in plans(model)] == [1.0, 1.0, 0.5, 0.5, 0.5, 0.5]
    assert [plan.selects for plan in plans(model)] == [False, False, True, True, True, False]
    with torch.no_grad():
        selection = evopatch.token_selection(model, x)
    assert selection[:, :2].all()
    assert selection[:, 2:].flatten(2).sum(2).eq(4 * 8).all()
    assert torch.equal(selection[:, 4], selection[:, 5])
    assert not torch.equal(selection[:, 3], selection[:, 4])


@every(TRANSFORMERS & JOINED)
@torch.no_grad()
def test_attentions_are_refused(name):
    model, x = build(name, attn_implementation="eager"), images_for(name)
    expected = model(x, output_attentions=True).attentions
    evopatch.apply(model)
    with pytest.raises(UnsupportedInputError, match="output_attentions was asked of"):
        model(x, output_attentions=True)
    evopatch.set_keep_ratio(model, 1.0)
    found = model(x, output_attentions=True).attentions
    assert len(found) == len(expected) == 6
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every(JOINED)
@torch.no_grad()
def test_a_block_called_from_outside_is_refused(name):
    model = evopatch.apply(build(name))
    block = model.get_submodule(block_paths(model)[0])
    with pytest.raises(evopatch.BypassError, match="0 was called from outside"):
        block(torch.randn(2, 8, 8, 48))


@torch.no_grad()
def test_hooks_see_the_full_grid():
    model, x = build("sam"), images_for("sam")
    evopatch.apply(model)
    plain, shapes = call(model, x), []
    for path in ("blocks.4", "blocks.5", "blocks.5.norm1", "blocks.5.mlp"):
        model.get_submodule(path).register_forward_hook(lambda m, args, out: shapes.append(args[0].shape))
    torch.testing.assert_close(call(model, x), plain, atol=2e-5, rtol=2e-5)
    assert shapes == [(2, 8, 8, 48), (2, 8, 8, 48), (2, 64, 48), (2, 8, 8, 48)]


@pytest.mark.parametrize(
    ("build_model", "text"),
    [
        (
            lambda: VisionTransformerSAM(**SMALL, use_rope=True),
            r"blocks\.0\.attn has rotary positions, by place in a window or in the map",
        ),
        (
            lambda: timm.create_model("hiera_tiny_224"),
            "found nothing to patch in timm.models.hiera.Hiera",
        ),
        (
            lambda: timm.create_model("mvitv2_tiny"),
            "found nothing to patch in timm.models.mvitv2.MultiScaleVit",
        ),
    ],
)
def test_what_is_refused(build_model, text):
    model = build_model()
    with pytest.raises(UnsupportedModelError, match=text):
        evopatch.apply(model)
    assert not evopatch.is_patched(model)


@torch.no_grad()
def test_windows_of_several_sizes_have_choices_of_their_own():
    model, x = VisionTransformerSAM(**SMALL).eval(), images_for("sam")
    model.blocks[3].window_size = 8
    original = model(x)
    evopatch.apply(model, config=EvoConfig(start=2, stages=1))
    assert moved(model(x), original) > 1e-4
    selection = evopatch.token_selection(model, x)
    assert torch.equal(selection[:, 2], selection[:, 4])
    assert not torch.equal(selection[:, 2], selection[:, 3])
    assert selection[:, 2:].flatten(2).sum(2).eq(32).all()


@pytest.mark.parametrize("representative", ["single", "none"])
@torch.no_grad()
def test_the_representative_window_has_a_place(representative):
    """Where windows are chosen, the blocks over the whole map see those that are, and what stands for the others."""
    model, x = build("sam"), images_for("sam")
    evopatch.apply(model, config=EvoConfig(representative=representative, keep_ratio=0.5))
    found = call(model, x)
    model.blocks[5].attn.rel_pos_h.mul_(-1.0)
    assert moved(call(model, x), found) > 1e-4
