"""Other image sizes, and sizes changed after apply."""

import copy
import math

import pytest
import torch
from comparing import moved
from internals import plans
from matrix import EACH_REPRESENTATIVE, config, every, patched
from variants import REDUCED, SWIN, TIMM, TRANSFORMERS, between, build, call, images_for

import evopatch
from evopatch import EvoConfig

FLAT_SIZES = ((40, 40), (56, 24), (64, 80))


@every(["vit", "registers", "gap", "rope", "rope_mixed", "eva"])
@torch.no_grad()
def test_dynamic_image_sizes_of_flat_models(name):
    model = evopatch.apply(build(name, dynamic_img_size=True))
    for size in FLAT_SIZES:
        x = images_for(name, size=size)
        result, intermediates = model.forward_intermediates(x)
        assert intermediates[-1].shape[-2:] == (size[0] // 8, size[1] // 8)
        torch.testing.assert_close(model.forward_features(x), result, atol=2e-5, rtol=2e-5)
        selection = evopatch.token_selection(model, x)
        assert selection.shape[-2:] == intermediates[-1].shape[-2:]
        patches = selection.shape[-2] * selection.shape[-1]
        assert selection[:, -1].sum() == 2 * int(patches * plans(model)[-1].keep_ratio + 0.5)
        assert moved(result, evopatch.remove(copy.deepcopy(model)).forward_features(x)) > 1e-4


@every(TIMM & (SWIN | REDUCED))
@EACH_REPRESENTATIVE
@torch.no_grad()
def test_dynamic_image_sizes_of_windowed_models(name, representative):
    # PVT takes any size.
    model = patched(name, config(representative), **{"dynamic_img_size": True} if name in SWIN else {})
    for size in ((64, 64), (88, 60), (32, 100)):
        x = images_for(name, size=size)
        result, maps = model.forward_intermediates(x)
        assert maps[0].shape[-2:] == (size[0] // 4, size[1] // 4)
        assert maps[2].shape[-2:] == (math.ceil(size[0] / 16), math.ceil(size[1] / 16))
        assert torch.equal(model.forward_features(x), result)
        selection = evopatch.token_selection(model, x)
        assert selection.shape[-2:] == (size[0] // 4, size[1] // 4)
        assert 0.2 < selection[:, 3].float().mean() < 0.8
        assert moved(result, evopatch.remove(copy.deepcopy(model)).forward_features(x)) > 1e-4


@every(["hf_vit", "hf_deit", "hf_dinov2", "hf_registers", "hf_dinov3", "hf_clip", "hf_siglip"])
@torch.no_grad()
def test_other_image_sizes_of_flat_models(name):
    model = build(name)
    options = {} if "dino" in name or "registers" in name else {"interpolate_pos_encoding": True}
    for size in FLAT_SIZES[1:]:
        x = images_for(name, size=size)
        original = call(model, x, **options)
        evopatch.apply(model)
        result = call(model, x, **options)
        states = model(x, output_hidden_states=True, **options).hidden_states
        patches = (size[0] // 8) * (size[1] // 8)
        assert {s.shape[1] - patches for s in states} <= {0, 1, 2, 4, 5}
        assert len({s.shape for s in states}) == 1
        selection = evopatch.token_selection(model, x, **options)
        assert selection.shape == (2, 6, size[0] // 8, size[1] // 8)
        assert selection[:, -1].sum() == 2 * int(patches * 0.309 + 0.5)
        assert moved(result, original) > 1e-4
        evopatch.remove(model)


# The others have absolute positions, or a decoder of square images.
@every(name for name in TRANSFORMERS & SWIN if not name.endswith(("_model", "_masked")))
@EACH_REPRESENTATIVE
@torch.no_grad()
def test_other_image_sizes_of_windowed_models(name, representative):
    model = patched(name, config(representative))
    for size in ((88, 60), (70, 100)):  # the second is padded to whole patches
        x = images_for(name, size=size)
        maps = between(name, model, x)
        finest = tuple(math.ceil(side / 4) for side in size)
        merged = 1 if "backbone" in name else 2
        assert maps[0].shape[-2:] == tuple(math.ceil(side / merged) for side in finest)
        assert torch.equal(call(model, x, output_hidden_states=True), call(model, x))
        assert evopatch.token_selection(model, x).shape[-2:] == finest
        assert moved(call(model, x), call(evopatch.remove(copy.deepcopy(model)), x)) > 1e-4


@every(["vit", "relpos", "relpos_class", "relpos_shared", "rope", "deit_distilled"])
@torch.no_grad()
def test_changed_input_sizes_of_a_patched_flat_model(name):
    model, twin = evopatch.apply(build(name)), build(name)
    x = images_for(name, size=(64, 48))
    for m in (model, twin):
        m.set_input_size(img_size=(64, 48))
    original = call(twin, x)
    assert torch.equal(call(model, x), call(evopatch.apply(twin), x))
    assert model.forward_intermediates(x, intermediates_only=True)[-1].shape == (2, 48, 8, 6)
    assert moved(call(model, x), original) > 1e-4


CHANGES = [
    {"img_size": (96, 56)},
    {"img_size": (96, 56), "window_size": 4},
    {"window_size": (3, 5)},
    {"window_size": 8},
    {"img_size": 48, "window_size": 4, "always_partition": True},
    {"img_size": 40, "window_size": 16},
]


@every(TIMM & SWIN)
@pytest.mark.parametrize("change", CHANGES, ids=str)
@EACH_REPRESENTATIVE
@torch.no_grad()
def test_changed_input_and_window_sizes_of_a_patched_windowed_model(name, change, representative):
    settings = EvoConfig(keep_ratio=0.4, schedule="constant", representative=representative)
    model, twin = evopatch.apply(build(name), config=settings), build(name)
    x = images_for(name, size=change.get("img_size"))
    for m in (model, twin):
        m.set_input_size(**change)
    original = call(twin, x)
    result = call(model, x)
    assert torch.isfinite(result).all()
    assert torch.equal(result, call(evopatch.apply(twin, config=settings), x))
    single = change.get("window_size") == 16 and representative != "matched"
    assert (moved(result, original) > 1e-4) == (not single)
