"""The readout block: the last block does for prefix tokens alone what nobody sees of the others, and for all else."""

import pytest
import timm
import torch
from comparing import assert_same_gradients, gradients, moved
from matrix import every, patched
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from variants import FLAT, IN_WINDOWS, PIT, TRANSFORMERS, build, call, images_for

import evopatch
from evopatch import EvoConfig
from evopatch.patching.handle import Patched

READ_PREFIX = {"vit", "deit_distilled", "registers", "dinov2", "clip", "qk_norm", "post_norm", "parallel", "diff"}
READ_PREFIX |= {"diff_parallel", "relpos_class", "beit_shared", "eva", "rope_mixed", "rope_dinov3", "torchvision"}
READ_PREFIX |= {"hf_vit", "hf_vit_eager", "hf_deit", "hf_deit_teacher", "hf_msn", *PIT}
"""Whose heads read prefix tokens only, and whose blocks have one attention core that takes query, key and value."""
CLASSIFIERS = ["vit", "hf_vit"]
MADE = {
    "vit": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=40, patch_size=8, embed_dim=48, num_heads=4, depth=6, num_classes=7
    ),
    "hf_vit": lambda: build("hf_vit"),
}
"""As `save_pretrained` can build them again."""


def rows_in_last_block(model, x):
    """How many tokens the last block's MLP gets in a forward, to a hook that doesn't look at tokens."""
    rows = []

    def hook(module, args, out):
        rows.append(args[0].shape[1])

    hook.__module__ = "torch.recorders"
    last = model.get_submodule(Patched(model).host.blocks()[-1][0])
    linear = [module for module in last.modules() if isinstance(module, nn.Linear)][-1]
    handle = linear.register_forward_hook(hook)
    call(model, x)
    handle.remove()
    return rows[-1]


def record(model, path):
    """A hook on one module, and the shapes of its first argument, filled in by it."""
    shapes = []
    module = model.get_submodule(path)
    return module.register_forward_hook(lambda module, args, out: shapes.append(args[0].shape)), shapes


def called(model, x):
    """The shapes of the first argument of every module that a forward calls with one, by path; and what it gives."""
    records = {path: record(model, path) for path, module in model.named_modules() if path and list(module.modules())}
    result = call(model, x)
    for handle, _ in records.values():
        handle.remove()
    return {path: shapes for path, (_, shapes) in records.items() if shapes}, result


def prefix_of(model):
    return Patched(model).host.state.spec.prefix


@every((FLAT - IN_WINDOWS) | PIT)
@torch.no_grad()
def test_exact_is_the_original_but_for_rounding_and_costs_less(name):
    model, x = build(name), images_for(name)
    original = call(model, x)
    evopatch.apply(model, config=EvoConfig.exact())
    found, profile = call(model, x), evopatch.profile(model, tuple(x.shape[1:]))
    if name in READ_PREFIX:
        torch.testing.assert_close(found, original, atol=1e-5, rtol=1e-5)
        assert profile.blocks[-1].flops < 0.7 * profile.blocks[-1].flops_unpatched
        assert rows_in_last_block(model, x) == prefix_of(model)
    else:
        assert torch.equal(found, original)
        assert profile.ratio == 1.0
    evopatch.set_config(model, EvoConfig(keep_ratio=1.0))
    assert torch.equal(call(model, x), original)
    assert evopatch.profile(model, tuple(x.shape[1:])).ratio == 1.0


@every(READ_PREFIX)
@pytest.mark.parametrize("representative", ["matched", "single", "none"])
@torch.no_grad()
def test_a_patched_models_result_is_the_same_with_and_without(name, representative):
    x, model = images_for(name), patched(name, EvoConfig(representative=representative))
    found = call(model, x)
    assert rows_in_last_block(model, x) == prefix_of(model)
    evopatch.set_config(model, EvoConfig(representative=representative, readout=False))
    torch.testing.assert_close(call(model, x), found, atol=1e-5, rtol=1e-5)
    assert rows_in_last_block(model, x) > prefix_of(model)
    assert moved(found, call(patched(name, EvoConfig(keep_ratio=1.0)), x)) > 1e-4


@every(READ_PREFIX)
def test_gradients_are_the_same_with_and_without(name):
    x = images_for(name)
    with_it = gradients(patched(name, EvoConfig.exact()).train(), x)
    without = gradients(patched(name, EvoConfig(keep_ratio=1.0)).train(), x)
    assert_same_gradients(name, with_it, without)
    assert any(gradient.abs().max() > 1e-3 for gradient in without.values())


@pytest.mark.parametrize("name", CLASSIFIERS)
@torch.no_grad()
def test_a_loaded_model_has_it_too(name, tmp_path):
    model, x = evopatch.apply(MADE[name](), config=EvoConfig.exact()), images_for(name)
    evopatch.save_pretrained(model, tmp_path)
    loaded = evopatch.load_pretrained(tmp_path)
    assert rows_in_last_block(loaded, x) == prefix_of(loaded)
    assert torch.equal(call(loaded, x), call(model, x))


# Who looks at other tokens gets them


@pytest.mark.parametrize("config", [EvoConfig(), EvoConfig.exact()], ids=["patched", "exact"])
@pytest.mark.parametrize("name", CLASSIFIERS)
@torch.no_grad()
def test_hooks_on_the_last_block_and_after_it_see_all_tokens(name, config):
    model, x = patched(name, config), images_for(name)
    plain = call(model, x)
    last = Patched(model).host.blocks()[-1][0]
    after = {"vit": "norm", "hf_vit": "vit.layernorm"}[name]
    unpatched, _ = called(build(name), x)
    for path in (path for path in unpatched if path == after or path.startswith(last)):
        handle, seen = record(model, path)
        torch.testing.assert_close(call(model, x), plain, atol=1e-5, rtol=1e-5)
        handle.remove()
        assert seen == unpatched[path]
    assert rows_in_last_block(model, x) == 1


@torch.no_grad()
def test_who_asks_for_features_gets_all_tokens():
    model, x = patched("vit"), images_for("vit")
    head = call(model, x)
    tokens = model.forward_features(x)
    assert tokens.shape == (2, 26, 48)
    torch.testing.assert_close(model.forward_head(tokens), head, atol=1e-5, rtol=1e-5)
    final, _ = model.forward_intermediates(x)
    assert final.shape == (2, 26, 48)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 26, 48)
    model.reset_classifier(0, "avg")
    torch.testing.assert_close(model(x), tokens[:, 1:].mean(1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [EvoConfig(), EvoConfig.exact()], ids=["patched", "exact"])
@torch.no_grad()
def test_who_asks_for_hidden_states_or_attentions_gets_all_tokens(config):
    model, x = patched("hf_vit_eager", config), images_for("hf_vit_eager")
    plain = model(x).logits
    asked = model(x, output_hidden_states=True)
    assert asked.hidden_states[-1].shape == (2, 26, 48)
    torch.testing.assert_close(asked.logits, plain, atol=1e-5, rtol=1e-5)
    asked = model(x, output_attentions=True)
    assert asked.attentions[-1].shape == (2, 4, 26, 26)
    torch.testing.assert_close(asked.logits, plain, atol=1e-5, rtol=1e-5)
    assert model.vit(x).last_hidden_state.shape == (2, 26, 48)
    seen = []
    model.vit.register_forward_hook(lambda module, args, out: seen.append(out.last_hidden_state.shape))
    torch.testing.assert_close(model(x).logits, plain, atol=1e-5, rtol=1e-5)
    assert seen == [(2, 26, 48)]


@torch.no_grad()
def test_a_loss_of_ones_own_gets_no_strange_arguments():
    model, x = patched("hf_vit", EvoConfig.exact()), images_for("hf_vit")
    model.loss_function = lambda labels, logits, config: logits.sum()
    assert model(x, labels=torch.tensor([1, 2])).loss.isfinite()


class ReadsAll(VisionTransformer):
    def forward(self, x):
        return self.head(self.forward_features(x).mean(1))


class PoolsAll(VisionTransformer):
    def pool(self, x, pool_type=None):
        return x.mean(1)


class MixesTokens(nn.Module):
    def forward(self, x):
        return x - x.mean(1, keepdim=True)


@pytest.mark.parametrize("config", [EvoConfig(), EvoConfig.exact()], ids=["patched", "exact"])
@torch.no_grad()
def test_code_of_ones_own_that_reads_all_tokens_gets_them(config):
    x = images_for("vit")
    for cls in (ReadsAll, PoolsAll):
        torch.manual_seed(0)
        model = cls(img_size=40, patch_size=8, embed_dim=48, depth=6, num_heads=4, num_classes=7).eval()
        evopatch.apply(model, config=config)
        assert rows_in_last_block(model, x) > 1
    model = patched("vit", config)
    model.forward_head = lambda tokens: tokens
    assert model(x).shape == (2, 26, 48)
    model = patched("vit", config)
    model.norm = MixesTokens()
    expected = model.forward_head(model.forward_features(x))
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_attention_pool_set_after_apply_gets_all_tokens():
    model, x = patched("vit", EvoConfig.exact()), images_for("vit")
    model.attn_pool = MixesTokens()
    model.pool_include_prefix = True
    assert model(x).shape == (2, 26, 7)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_models_notice_who_looks_too():
    x = images_for("vit")
    torch._dynamo.reset()
    model = patched("vit", EvoConfig.exact())
    expected = call(model, x)
    handle, seen = record(model, "blocks.5.mlp.fc2")
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), expected, atol=1e-5, rtol=1e-5)
    handle.remove()
    assert seen[-1] == (2, 26, 192)
    model.forward_head = lambda tokens: tokens
    torch._dynamo.reset()
    assert torch.compile(model, backend="eager")(x).shape == (2, 26, 48)


@pytest.mark.parametrize("name", ["vit", "eva"])
@torch.no_grad()
def test_exact_honours_a_mask(name):
    original, model, x = build(name), patched(name, EvoConfig.exact()), images_for(name)
    mask = torch.ones(26, 26, dtype=torch.bool).tril()
    masked = original(x, attn_mask=mask)
    assert torch.equal(model(x, attn_mask=mask), masked)
    assert moved(masked, original(x)) > 1e-3


@torch.no_grad()
def test_exact_honours_a_mask_in_transformers():
    original, model, x = build("hf_vit"), patched("hf_vit", EvoConfig.exact()), images_for("hf_vit")
    mask = torch.ones(2, 26, dtype=torch.long)
    mask[:, 10:] = 0
    masked = original(x, attention_mask=mask).logits
    assert torch.equal(model(x, attention_mask=mask).logits, masked)
    assert moved(masked, original(x).logits) > 1e-3


@every(sorted(set(TRANSFORMERS) & READ_PREFIX))
def test_remove_takes_the_word_back(name):
    model, x = build(name), images_for(name)
    original = call(model, x)
    evopatch.apply(model, config=EvoConfig.exact())
    assert model._forward_pre_hooks
    evopatch.remove(model)
    assert not model._forward_pre_hooks
    assert torch.equal(call(model, x), original)
    evopatch.apply(model)
    host = Patched(model).host.module
    evopatch.remove(host)
    assert torch.equal(call(model, x), original)
