"""Swin and Swin V2 of both libraries: windows, views of them, attentions, feature pyramids and models around them."""

import copy
import pickle

import pytest
import timm
import torch
from comparing import moved
from internals import block_paths, keep_all_in_windows, plans
from matrix import EACH_REPRESENTATIVE, every
from transformers_weights import swin
from variants import SWIN, TIMM, TRANSFORMERS, build, call, images_for
from variants.windowed import DEPTH, SIZE

import evopatch
from evopatch import EvoConfig
from evopatch.plan import tapered_swin

TYPICAL = ("swin", "swinv2", "swinv2_cr", "torchvision_swin", "torchvision_swinv2", "hf_swin", "hf_swinv2", "hf_donut")


def images(batch=2, size=SIZE):
    return images_for("swin", batch, size)


@every(SWIN)
@torch.no_grad()
def test_hooks_on_blocks_see_the_full_grid(name):
    model, x = evopatch.apply(build(name)), images()
    plain, shapes = call(model, x), []
    for path in block_paths(model):
        model.get_submodule(path).register_forward_hook(
            lambda module, args, out: shapes.append((args[0].shape, (out[0] if isinstance(out, tuple) else out).shape))
        )
    assert torch.equal(call(model, x), plain)
    assert len(shapes) == DEPTH
    assert [a[:-1].numel() for a, _ in shapes] == [2 * n for n in (256, 256, 64, 64, 16, 16)]
    assert all(a == b for a, b in shapes)


@every(TYPICAL)
@torch.no_grad()
def test_a_block_called_from_outside_is_refused(name):
    model, x = evopatch.apply(build(name)), images()
    block = model.get_submodule(block_paths(model)[0])
    arguments = (torch.randn(2, 256, 24), (16, 16)) if name.startswith("hf") else (torch.randn(2, 16, 16, 24),)
    with pytest.raises(evopatch.BypassError, match=r"(0\.blocks|features\.1)\.0 was called from outside"):
        block(*arguments)
    evopatch.set_keep_ratio(model, 1.0)
    assert torch.isfinite(call(model, x)).all()
    block(*arguments)


# Half of the pixels' rows and columns fill no window: grids of 22 by 15, 13 by 19, and their halves.
SHAPES = [(SIZE, SIZE), (88, 60), (52, 76)]
POSITION_BIASES = ("bias_table", "cpb_mlp.2", "position_bias_mlp.2", "meta_mlp.fc2")


@every(TYPICAL)
@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("representative", ["matched", "none"])
@torch.no_grad()
def test_with_every_window_or_token_slow_the_views_equal_the_blocks(name, size, representative, monkeypatch):
    """Shifts, padding, masks and biases are in their places: the order of windows and tokens is another one."""
    model, x = build(name, **({"img_size": size} if name in TIMM else {})), images(size=size)
    if representative == "matched" and size != (SIZE, SIZE):
        # All padding of a window is one row there, with the mean of its biases.
        for parameter_name, parameter in model.named_parameters():
            if any(part in parameter_name for part in POSITION_BIASES):
                parameter.zero_()
    original = call(model, x)
    evopatch.apply(model, config=EvoConfig(keep_ratio=0.5, schedule="constant", representative=representative))
    assert moved(call(model, x), original) > 1e-4
    entered = keep_all_in_windows(monkeypatch, representative == "matched")
    torch.testing.assert_close(call(model, x), original, atol=2e-5, rtol=2e-5)
    assert len(entered) == (5 if representative == "matched" or size != (SIZE, SIZE) else 3)


@EACH_REPRESENTATIVE
@torch.no_grad()
def test_the_same_weights_give_the_same_in_both_libraries(representative):
    first, second, x = build("swin"), build("hf_swin"), images()
    second.load_state_dict(swin(first.state_dict()))
    torch.testing.assert_close(call(second, x), call(first, x), atol=2e-5, rtol=2e-5)
    for model in (first, second):
        evopatch.apply(model, config=EvoConfig(representative=representative, keep_ratio=[0.6, 0.5, 0.5]))
    torch.testing.assert_close(call(second, x), call(first, x), atol=2e-5, rtol=2e-5)
    selection = evopatch.token_selection(first, x)
    assert torch.equal(evopatch.token_selection(second, x), selection)
    assert selection.shape == (2, DEPTH, 16, 16)
    assert selection[:, 0].all()
    if representative == "matched":  # of each 16 tokens in a window
        assert (~selection[:, 1]).sum() == 2 * 16 * (16 - 10)
    else:
        assert (~selection[:, 1]).sum() == 2 * 16 * (16 - 10)  # of 16 windows
        assert selection[:, 4:].all()  # a single window
    assert torch.equal(evopatch.token_groups(first, x), evopatch.token_groups(second, x))


@every(TYPICAL)
def test_by_default_every_block_keeps_what_its_place_says(name):
    evopatch.apply(model := build(name), keep_ratio=0.4)
    kept = [plan.keep_ratio for plan in plans(model)]
    assert kept == [1.0, *(tapered_swin(0.4, block, (2, 2, 2)) for block in range(1, 6))]
    assert min(kept[2], kept[4]) > max(kept[1], kept[3], kept[5])  # where a stage begins
    assert all(plan.selects == (plan.keep_ratio < 1.0) for plan in plans(model)[1:])
    evopatch.set_config(model, EvoConfig(keep_ratio=0.4, schedule="constant"))
    assert [plan.keep_ratio for plan in plans(model)] == [1.0, *[0.4] * 5]
    evopatch.set_config(model, EvoConfig(keep_ratio=0.4, representative="single"))
    assert [plan.keep_ratio for plan in plans(model)] == [1.0, *[0.4] * 5]


def test_keep_ratios_of_a_swin():
    kept = [tapered_swin(0.5, block, (2, 2, 6)) for block in range(1, 10)]
    assert kept == pytest.approx([0.161, 0.741, 0.259, 1.0, 0.5, 0.611, 0.611, 0.45, 0.299], abs=1e-3)
    assert [tapered_swin(1.0, block, (2, 2, 6)) for block in range(10)] == [1.0] * 10
    assert tapered_swin(0.5, 0, (2, 2, 6)) == pytest.approx(tapered_swin(0.5, 1, (2, 2, 6)))


@torch.no_grad()
def test_profile_counts_the_tokens_that_went_through():
    model = evopatch.apply(build("swin"), config=EvoConfig(keep_ratio=[0.6, 0.5, 0.5]))
    profile = evopatch.profile(model, (3, SIZE, SIZE))
    assert [block.tokens for block in profile.blocks] == [256, 160, 32, 32, 8, 8]
    assert all(block.flops < block.flops_unpatched for block in profile.blocks[1:])
    assert 0.45 < profile.ratio < 0.8
    evopatch.set_config(model, EvoConfig(representative="none", keep_ratio=[0.6, 0.5, 0.5]))
    profile = evopatch.profile(model, (3, SIZE, SIZE))
    assert [block.tokens for block in profile.blocks] == [256, 160, 32, 32, 16, 16]


@torch.no_grad()
def test_a_stage_with_a_single_window_is_left_alone_where_windows_are_chosen():
    model, x = build("swin"), images()
    config = EvoConfig(keep_ratio=[1.0, 1.0, 0.5], representative="single")
    original = call(model, x)
    assert torch.equal(call(evopatch.apply(model, config=config), x), original)
    evopatch.set_config(model, EvoConfig(keep_ratio=[1.0, 1.0, 0.5]))
    assert moved(call(model, x), original) > 1e-4


@torch.no_grad()
def test_windows_larger_than_the_grid_in_transformers():
    """The layer itself makes its window smaller then, and keeps it so."""
    model, x = build("hf_swin", image_size=32), images(size=32)  # grids of 8, 4 and 2
    for stage in model.swin.encoder.layers[2:]:
        for layer in stage.blocks:
            layer.attention.relative_position_bias = type(layer.attention.relative_position_bias)(4, (2, 2))
    twin = copy.deepcopy(model)
    original = call(twin, x)
    evopatch.apply(model, keep_ratio=0.5)
    assert torch.isfinite(call(model, x)).all()
    assert moved(call(model, x), original) > 1e-4
    evopatch.set_keep_ratio(model, 1.0)
    assert torch.equal(call(model, x), original)


@every(TRANSFORMERS & SWIN)
@torch.no_grad()
def test_attentions_between_windows_are_refused(name):
    model, x = build(name, attn_implementation="eager"), images()
    expected = model(x, output_attentions=True).attentions
    evopatch.apply(model)
    with pytest.raises(evopatch.UnsupportedInputError, match="output_attentions was asked of"):
        model(x, output_attentions=True)
    evopatch.set_keep_ratio(model, 1.0)
    found = model(x, output_attentions=True).attentions
    assert len(found) == len(expected) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every(TRANSFORMERS & SWIN)
@torch.no_grad()
def test_hidden_states_of_transformers_are_complete(name):
    model, x = build(name), images()
    expected = model(x, output_hidden_states=True)
    evopatch.apply(model)
    found = model(x, output_hidden_states=True)
    assert [h.shape for h in found.hidden_states] == [h.shape for h in expected.hidden_states]
    assert len(found.hidden_states) == 4
    assert moved(found.hidden_states[2], expected.hidden_states[2]) > 1e-4


@every(TIMM & SWIN)
@torch.no_grad()
def test_features_only(name):
    architecture = {
        "swin": "swin_tiny_patch4_window7_224",
        "swinv2": "swinv2_tiny_window8_256",
        "swinv2_cr": "swinv2_cr_tiny_224",
    }[name]
    small = {"img_size": SIZE, "window_size": 4, "embed_dim": 24, "depths": (2, 2, 2), "num_heads": (2, 4, 4)}
    model, x = timm.create_model(architecture, features_only=True, out_indices=(0, 1, 2), **small).eval(), images()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.08)
    original = model(x)
    keys = list(model.state_dict())
    evopatch.apply(model)
    features = model(x)
    assert list(model.state_dict()) == keys
    assert [f.shape for f in features] == [f.shape for f in original]
    assert all(moved(a, b) > 1e-4 for a, b in zip(features, original, strict=True))
    compiled = torch.compile(model, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(compiled[2], features[2], atol=2e-5, rtol=2e-5)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(x)[2], features[2])
    whole = timm.create_model(architecture, **small).eval()
    weights = {k.replace("layers_", "layers.").replace("stages_", "stages."): v for k, v in model.state_dict().items()}
    whole.load_state_dict(weights, strict=False)
    maps = evopatch.apply(whole).forward_intermediates(x, intermediates_only=True)
    for found, expected in zip(features, maps, strict=True):
        assert torch.equal(found if found.shape == expected.shape else found.permute(0, 3, 1, 2), expected)
    evopatch.remove(model)
    assert torch.equal(model(x)[2], original[2])


def test_a_feature_extractor_without_swin_stages_is_refused():
    model = timm.create_model("resnet18", features_only=True)
    with pytest.raises(evopatch.UnsupportedModelError, match="found nothing to patch"):
        evopatch.apply(model)


@EACH_REPRESENTATIVE
def test_upernet_on_a_patched_backbone(representative):
    from transformers import SwinConfig, UperNetConfig, UperNetForSemanticSegmentation

    torch.manual_seed(0)
    backbone = SwinConfig(
        embed_dim=24, depths=[2, 2, 2, 2], num_heads=[2, 4, 4, 4], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=24, num_labels=5, auxiliary_channels=24, auxiliary_in_channels=96
    )
    model = UperNetForSemanticSegmentation(config).eval()
    x = images(1, (512, 384))
    with torch.no_grad():
        original = model(x).logits
    evopatch.apply(model, config=EvoConfig(representative=representative))
    with torch.no_grad():
        result = model(x).logits
    assert result.shape == original.shape == (1, 5, 512, 384)
    assert moved(result, original) > 1e-4
    assert torch.cosine_similarity(result.flatten(), original.flatten(), dim=0) > 0.9
    model.train()
    labels = torch.zeros(1, 512, 384, dtype=torch.long)
    model(torch.cat([x, x]), labels=torch.cat([labels, labels])).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.backbone.parameters() if p.grad is not None)
    if representative == "matched":
        assert evopatch.profile(model.eval(), (3, 128, 96)).ratio < 0.97
