"""Foresight: what tokens are ranked by, learned from a few images; it goes where the model goes."""

import copy

import pytest
import torch
from comparing import Snapshot, moved, twins
from matrix import cases, every
from torch import nn
from variants import FLAT, PYRAMIDS, build, call, images_for

import evopatch
from evopatch import ConfigError, DataError, EvoConfig, UnsupportedModelError
from evopatch.forward.look_ahead import Look
from evopatch.patching.fitting import fit_foresight
from evopatch.patching.handle import Patched
from evopatch.patching.learning import learned as foresight


def applied(name, **kwargs):
    return evopatch.apply(build(name), images=images_for(name, 16), **kwargs)


@every(FLAT)
@torch.no_grad()
def test_it_counts_and_goes_where_the_model_goes(name):
    x, original = images_for(name), call(build(name), images_for(name))
    keys = list(build(name).state_dict())
    model = applied(name)
    found = call(model, x)
    assert moved(found, call(evopatch.apply(build(name)), x)) > 1e-5
    assert list(model.state_dict()) == keys
    assert len(foresight(model)) == Patched(model).host.state.depth - 1
    assert all(torch.equal(call(twin, x), found) for twin in twins(model, name))
    evopatch.set_keep_ratio(model, 1.0)
    assert torch.equal(call(model, x), original)
    evopatch.set_keep_ratio(model, 0.5)
    assert torch.equal(call(model, x), found)
    evopatch.remove(model)
    assert torch.equal(call(model, x), original)
    assert not foresight(model)
    assert not [name for name, _ in model.named_buffers() if "evo" in name]


def future_attention(model, x, first):
    """Mean class attention of the blocks from one on, `(B, N)`, and the tokens before it, by a loop of its own."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    seen, prefix = [], model.num_prefix_tokens
    for index, block in enumerate(model.blocks):
        if index == first:
            tokens = nn.functional.layer_norm(x, x.shape[-1:])[:, prefix:]
        if index >= first:
            attention, normed = block.attn, block.norm1(x)
            q, k, _ = attention.qkv(normed).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
            logits = q[:, :, :1] @ k.transpose(2, 3) * attention.scale
            seen.append(logits.softmax(-1).mean((1, 2))[:, prefix:])
        x = block(x)
    return torch.stack(seen).mean(0), tokens


@torch.no_grad()
def test_it_is_the_ridge_regression_of_the_attention_still_to_come():
    model, x = build("vit"), images_for("vit", 16)
    attention, tokens = future_attention(model, x, 3)
    target = (attention + 1e-6).log()
    target = (target - target.mean(1, keepdim=True)).flatten().double()
    tokens = (tokens - tokens.mean(1, keepdim=True)).flatten(0, 1).double() / tokens.shape[-1] ** 0.5
    square = tokens.T @ tokens
    ridge = 1e-3 * square.diagonal().mean() * torch.eye(len(square), dtype=torch.float64)
    expected = torch.linalg.solve(square + ridge, tokens.T @ target)
    evopatch.apply(model, images=x)
    torch.testing.assert_close(foresight(model)["blocks.3"].double(), expected, atol=1e-3, rtol=1e-3)
    predicted = tokens @ expected
    assert torch.corrcoef(torch.stack([predicted, target]))[0, 1] > 0.3  # on random weights, whose attention is flat


@torch.no_grad()
def test_a_selection_ranks_by_it_alone(monkeypatch):
    model, x = applied("vit"), images_for("vit")
    monkeypatch.setattr(Look, "ahead", lambda *_: pytest.fail("looked ahead"))
    before = evopatch.token_selection(model, x)
    for weights in foresight(model).values():
        weights.neg_()
    assert not torch.equal(evopatch.token_selection(model, x), before)


@torch.no_grad()
def test_half_precision_and_later_images():
    model, x = applied("vit"), images_for("vit")
    weights = foresight(model)["blocks.3"].clone()
    half = copy.deepcopy(model).bfloat16()
    assert foresight(half)["blocks.3"].dtype == torch.bfloat16
    torch.testing.assert_close(call(half, x.bfloat16()).float(), call(model, x), atol=0.1, rtol=0.1)
    other = images_for("vit", 16, seed=4)
    fit_foresight(model, other)
    changed = foresight(model)["blocks.3"].clone()
    assert moved(changed, weights) > 1e-4
    fit_foresight(model, torch.cat([other, other]))  # two forwards
    torch.testing.assert_close(foresight(model)["blocks.3"], changed, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_offloaded_models_keep_it():
    from accelerate import cpu_offload

    model, x = build("hf_vit"), images_for("hf_vit")
    expected = call(applied("hf_vit"), x)
    cpu_offload(model, torch.device("cpu"), preload_module_classes=["ViTLayer"])
    assert any(p.is_meta for p in model.parameters())
    evopatch.apply(model, images=images_for("hf_vit", 16))
    assert not any(weights.is_meta for weights in foresight(model).values())
    torch.testing.assert_close(call(model, x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["hf_vit", "hf_dinov2"])
@torch.no_grad()
def test_saved_and_loaded(name, tmp_path):
    model, x = applied(name), images_for(name)
    evopatch.save_pretrained(model, tmp_path)
    loaded = evopatch.load_pretrained(tmp_path)
    assert torch.equal(call(loaded, x), call(model, x))
    for path, weights in foresight(model).items():
        assert torch.equal(foresight(loaded)[path], weights)
    evopatch.save_pretrained(evopatch.apply(build(name)), tmp_path)
    assert not (tmp_path / "evopatch.safetensors").exists()
    assert not foresight(evopatch.load_pretrained(tmp_path))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"vit.layers.9": torch.ones(48)}, "'vit.layers.9', which is no patched block"),
        ({"vit.layers.3": torch.ones(47)}, r"'vit.layers.3' has the shape \(47,\): expected \(48,\)"),
        ({"vit.layers.3": torch.full((48,), float("nan"))}, "finite numbers"),
    ],
)
def test_files_that_do_not_fit(wrong, message, tmp_path):
    from safetensors.torch import save_file

    evopatch.save_pretrained(applied("hf_vit"), tmp_path)
    save_file(wrong, tmp_path / "evopatch.safetensors")
    with pytest.raises(evopatch.CheckpointError, match=message):
        evopatch.load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "images", "config", "error", "message"),
    [
        ("vit", 7, None, DataError, r"images are \(7, 3.* at least 8"),
        ("vit", "nan", None, DataError, "aren't finite"),
        ("vit", "ints", None, DataError, r"doesn\'t run on images \(16, 3, .* torch.int64 on cpu: RuntimeError"),
        ("vit", "list", None, DataError, "images are a list"),
        ("vit", "doubles", None, DataError, r"doesn't run on images \(16, 3, .* torch\.float64 on cpu"),
        ("swin", "doubles", None, DataError, r"doesn't run on images \(16, 3, .* torch\.float64 on cpu"),
        ("hf_vit", 16, EvoConfig.paper(), ConfigError, "representative='single'.* Leave them out"),
        *((name, 16, None, UnsupportedModelError, "pools its tokens on the way") for name in sorted(PYRAMIDS)),
    ],
)
def test_bad_input_leaves_the_model_untouched(name, images, config, error, message):
    model, x = build(name), images_for(name, 16)
    given = {"nan": x * float("nan"), "ints": torch.ones_like(x).long(), "list": list(x)}
    given["doubles"] = x.double()
    before = Snapshot(model)
    with pytest.raises(error, match=message):
        evopatch.apply(model, config=config, images=given[images] if isinstance(images, str) else x[:images])
    before.assert_untouched(model)


@cases("name", ["vit", "hf_vit"], fast=["hf_vit"])
@torch.no_grad()
def test_compiled_and_exported(name):
    torch._dynamo.reset()
    model, x = applied(name), images_for(name)
    expected = call(model, x)
    assert moved(expected, call(evopatch.apply(build(name)), x)) > 1e-5
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(call(compiled, x), expected, atol=2e-5, rtol=2e-5)
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(logits(program.module()(x)), expected, atol=2e-5, rtol=2e-5)


def logits(out):
    return getattr(out, "logits", out)
