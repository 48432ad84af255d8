"""Corrections in windowed blocks, learned from a few images; they go where the model goes."""

import pytest
import torch
from comparing import Snapshot, moved, twins
from matrix import cases, every
from variants import REDUCED, WINDOWED, build, call, images_for

import evopatch
from evopatch import ConfigError, DataError, EvoConfig
from evopatch.forward.learned import give_correction
from evopatch.patching.fitting import blocks_of
from evopatch.patching.handle import Patched
from evopatch.patching.learning import learned, set_learned


def applied(name, **kwargs):
    return evopatch.apply(build(name), images=images_for(name, 16), **kwargs)


@every(WINDOWED)
@torch.no_grad()
def test_they_count_and_go_where_the_model_goes(name):
    x, original = images_for(name), call(build(name), images_for(name))
    keys = list(build(name).state_dict())
    model, plain = applied(name), evopatch.apply(build(name))
    found = call(model, x)
    assert moved(found, call(plain, x)) > 1e-5
    assert list(model.state_dict()) == keys
    assert len(learned(model)) == 2 * (Patched(model).host.state.depth - 1)
    assert all(torch.equal(call(twin, x), found) for twin in twins(model, name))
    set_learned(plain, learned(model))
    assert torch.equal(call(plain, x), found)
    with evopatch.full_grid(model):
        torch.testing.assert_close(call(model, x), found, atol=2e-5, rtol=2e-5)
    evopatch.set_keep_ratio(model, 1.0)
    assert torch.equal(call(model, x), original)
    evopatch.remove(model)
    assert torch.equal(call(model, x), original)
    assert not learned(model)
    assert not [name for name, _ in model.named_buffers() if "evo" in name]


def after(model, module, x):
    """What a submodule gives in a forward of its model."""
    found = []
    handle = model.get_submodule(module).register_forward_hook(lambda _module, _args, out: found.append(out))
    call(model, x)
    handle.remove()
    return found[0][0] if isinstance(found[0], tuple) else found[0]


@every(WINDOWED)
@torch.no_grad()
def test_tokens_come_closer_to_what_they_would_have_been(name):
    model, x = evopatch.apply(build(name)), images_for(name, 16, seed=5)
    host = Patched(model).host
    plans = host.state.plans
    first = next(i for i, plan in enumerate(plans) if plan.keep_ratio < 1.0)
    path = host.blocks()[first][0]
    whole = after(Patched(model).original(), path, x)
    before = (after(model, path, x) - whole).norm()
    set_learned(model, learned(applied(name)))
    corrected = (after(model, path, x) - whole).norm()
    # With random weights the convolutions of PVT make most of the difference, of what is around a token.
    assert corrected < (0.998 if name in REDUCED else 0.99) * before
    for index, block in enumerate(blocks_of(Patched(model), host)):
        give_correction(block, index, None)
    assert (after(model, path, x) - whole).norm() == before


@cases("name", ["swin", "hf_swin", "sam"], fast=["swin"])
@torch.no_grad()
def test_compiled_exported_and_in_half_precision(name):
    torch._dynamo.reset()
    model, x = applied(name), images_for(name)
    expected = call(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(call(compiled, x), expected, atol=2e-5, rtol=2e-5)
    program = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(call(program, x), expected, atol=2e-5, rtol=2e-5)
    half = call(model.bfloat16(), x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, atol=0.2, rtol=0.2)


def test_gradients_pass():
    model, x = applied("swin"), images_for("swin").requires_grad_()
    call(model, x).square().sum().backward()
    assert x.grad.abs().max() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_saved_and_loaded(tmp_path):
    model, x = applied("hf_swin"), images_for("hf_swin")
    evopatch.save_pretrained(model, tmp_path)
    loaded = evopatch.load_pretrained(tmp_path)
    assert torch.equal(call(loaded, x), call(model, x))
    assert learned(loaded).keys() == learned(model).keys()


@pytest.mark.parametrize(
    ("images", "config", "error", "message"),
    [
        (7, None, DataError, r"images are \(7, 3.* at least 8"),
        (16, EvoConfig(representative="single"), ConfigError, "representative='single'.* Leave them out"),
        ("nan", None, DataError, "aren't finite"),
    ],
)
def test_bad_input_leaves_the_model_untouched(images, config, error, message):
    model, x = build("swin"), images_for("swin", 16)
    before = Snapshot(model)
    with pytest.raises(error, match=message):
        evopatch.apply(model, config=config, images=x * float("nan") if images == "nan" else x[:images])
    before.assert_untouched(model)
