"""timm's PiT: runs between its poolings, class tokens alone after the last block, whole maps for who looks."""

import pytest
import timm
import torch
from comparing import moved
from internals import plans
from matrix import patched
from timm.models.pit import Pooling, PoolingVisionTransformer
from torch import nn
from variants import PIT, build, call, images_for

import evopatch
from evopatch import EvoConfig, UnsupportedInputError, UnsupportedModelError
from evopatch.patching.handle import Patched

EVERY_PIT = pytest.mark.parametrize("name", sorted(PIT))
BOTH = pytest.mark.parametrize("config", [EvoConfig(), EvoConfig.exact()], ids=["patched", "exact"])


def rows_in_last_block(model, x):
    """How many tokens its MLP gets, to a hook that doesn't look at tokens."""
    rows = []

    def hook(module, args, out):
        rows.append(args[0].shape[1])

    hook.__module__ = "torch.recorders"
    handle = model.transformers[-1].blocks[-1].mlp.fc2.register_forward_hook(hook)
    call(model, x)
    handle.remove()
    return rows[-1]


def test_runs_by_default():
    """The first stage is left alone, a run in each of the others, which keep the same."""
    model = evopatch.apply(build("pit"))
    assert [plan.selects for plan in plans(model)] == [False, False, True, False, False, True, False]
    assert [plan.keep_ratio for plan in plans(model)] == [1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5]
    evopatch.set_config(model, EvoConfig(start=1))
    assert [plan.selects for plan in plans(model)] == [False, True, True, False, False, True, False]
    one_stage = evopatch.apply(build("pit", depth=(4,), heads=(2,), base_dims=(12,)))
    assert [plan.selects for plan in plans(one_stage)] == [False, True, True, True]


@EVERY_PIT
@torch.no_grad()
def test_stages_give_whole_maps(name):
    model, x = build(name), images_for(name)
    original = model.forward_intermediates(x, intermediates_only=True)
    evopatch.apply(model)
    plain, maps, seen = call(model, x), model.forward_intermediates(x, intermediates_only=True), []
    prefix = Patched(model).host.state.spec.prefix
    assert rows_in_last_block(model, x) == prefix
    modules = (*model.transformers, model.transformers)
    handles = [m.register_forward_hook(lambda module, args, out: seen.append(out)) for m in modules]
    torch.testing.assert_close(call(model, x), plain, atol=2e-5, rtol=2e-5)
    for handle in handles:
        handle.remove()
    for (found, prefix_tokens), expected in zip(seen, (*maps, maps[-1]), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
        assert prefix_tokens.shape[:2] == (2, prefix)
    assert moved(maps[-1], original[-1]) > 1e-3
    assert rows_in_last_block(model, x) == prefix


@BOTH
@pytest.mark.parametrize("path", ["transformers", "transformers.2", "transformers.2.blocks", "transformers.2.blocks.1"])
@torch.no_grad()
def test_a_hook_on_one_module_that_gives_the_last_map_gets_it(config, path):
    model, x, seen = patched("pit", config), images_for("pit"), []
    module = model.get_submodule(path)
    handle = module.register_forward_hook(lambda module, args, out: seen.append(out))
    shown = call(model, x)
    handle.remove()
    found = seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0].flatten(2).transpose(1, 2)
    expected = model.forward_intermediates(x, intermediates_only=True)[-1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(found[:, -4:], expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(call(model, x), shown, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_features_only_and_pruned_models():
    settings = {"img_size": 48, "num_classes": 7}
    torch.manual_seed(0)
    stock = timm.create_model("pit_ti_224", **settings).eval()
    model = timm.create_model("pit_ti_224", features_only=True, **settings).eval()
    model.body.load_state_dict(stock.state_dict(), strict=False)
    x = images_for("pit", size=48)
    original = model(x)
    evopatch.apply(model)
    maps = evopatch.apply(stock).forward_intermediates(x, intermediates_only=True)
    assert [f.shape for f in model(x)] == [f.shape for f in original]
    for found, expected in zip(model(x), maps, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)
    assert moved(model(x)[-1], original[-1]) > 1e-4
    whole, x = evopatch.apply(build("pit")), images_for("pit")
    expected = whole.forward_intermediates(x, [1], intermediates_only=True)[0]
    whole.prune_intermediate_layers([1])
    assert torch.equal(whole.forward_intermediates(x, intermediates_only=True)[-1], expected)
    assert call(whole, x).shape == (2, 1, 48)


class Adds(PoolingVisionTransformer):
    def forward_features(self, x):
        return super().forward_features(x) + 1.0


class ReadsMap(PoolingVisionTransformer):
    def forward_features(self, x):
        x = self.pos_drop(self.patch_embed(x) + self.pos_embed)
        x, prefix = self.transformers((x, self.cls_token.expand(len(x), -1, -1)))
        return self.norm(prefix) + x.mean((2, 3)).unsqueeze(1)


@BOTH
@pytest.mark.parametrize("cls", [Adds, ReadsMap])
@torch.no_grad()
def test_code_of_ones_own_that_may_read_the_map_gets_it(cls, config):
    model, x = build("pit"), images_for("pit")
    model.__class__ = cls
    original = call(model, x)
    evopatch.apply(model, config=config)
    assert rows_in_last_block(model, x) > 1
    found = call(model, x)
    with evopatch.full_grid(model):
        torch.testing.assert_close(call(model, x), found, atol=2e-5, rtol=2e-5)
    assert (moved(found, original) > 1e-4) == (config.keep_ratio < 1)


def test_a_distilled_models_two_heads_train():
    model, x = patched("pit_distilled").train(), images_for("pit_distilled")
    model.set_distilled_training()
    first, second = model(x)
    assert first.shape == second.shape == (2, 7)
    (first.square().sum() + second.square().sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    evopatch.set_keep_ratio(model, 1.0)
    assert moved(model(x)[0], first) > 1e-4


@torch.no_grad()
def test_saved_and_loaded(tmp_path):
    model = timm.create_model("pit_ti_distilled_224", num_classes=7, img_size=48, depth=[1, 2, 2]).eval()
    settings, x = EvoConfig(keep_ratio=[0.6, 0.5]), images_for("pit", size=48)
    original = call(model, x)
    evopatch.apply(model, config=settings)
    evopatch.save_pretrained(model, tmp_path)
    twin = evopatch.load_pretrained(tmp_path).eval()
    assert evopatch.config_of(twin) == settings
    assert torch.equal(call(twin, x), call(model, x))
    assert moved(call(twin, x), original) > 1e-5


@torch.no_grad()
def test_grids_that_are_not_square():
    model, x = evopatch.apply(build("pit", img_size=(40, 54))), torch.randn(2, 3, 40, 54)
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert [f.shape[-2:] for f in maps] == [(5, 7), (3, 4), (2, 2)]
    assert evopatch.token_selection(model, x).shape == (2, 7, 5, 7)


@torch.no_grad()
def test_positions_of_another_grid_set_after_apply_are_refused():
    model = evopatch.apply(build("pit"))
    model.pos_embed = nn.Parameter(torch.zeros(1, 24, 6, 6))
    with pytest.raises(
        UnsupportedInputError, match=r"36 patch tokens reached stage 1 of 'model', which had 25 \(5x5\)"
    ):
        model(images_for("pit", size=47))


def test_pyramids_of_another_shape_are_refused():
    model = build("pit")
    model.transformers[2].pool = Pooling(48, 96, stride=4)
    with pytest.raises(UnsupportedModelError, match=r"expected \(2, 2\) after \(3, 3\)"):
        evopatch.apply(model)
    model = build("pit", depth=(2, 0, 2))
    with pytest.raises(UnsupportedModelError, match="a stage without blocks"):
        evopatch.apply(model)
    assert not evopatch.is_patched(model)
