"""Accelerate wraps the forward of a model that it prepares with mixed precision."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from accelerate.state import AcceleratorState
from comparing import moved
from variants import build, images

import evopatch
from evopatch import UnsupportedModelError


@pytest.fixture
def accelerator():
    """One for this test: accelerate keeps the precision of a process's first accelerator for all that follow."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def prepared(accelerator):
    return accelerator, accelerator.prepare(evopatch.apply(build("vit")))


@torch.no_grad()
def test_a_wrapped_forward_comes_off_before_the_patch(prepared):
    (accelerator, model), x = prepared, images()
    before = model(x)
    with pytest.raises(UnsupportedModelError, match=r"got a forward of its own .*unwrap_model\(model, keep_fp32"):
        evopatch.remove(model)
    assert torch.equal(model(x), before)
    plain = evopatch.remove(accelerator.unwrap_model(model, keep_fp32_wrapper=False))
    assert torch.equal(plain(x), build("vit")(x))


@torch.no_grad()
def test_unwrapped_models_are_patched(accelerator):
    x = images()
    model = accelerator.unwrap_model(accelerator.prepare(build("vit")), keep_fp32_wrapper=False)
    assert "forward" in model.__dict__
    torch.testing.assert_close(evopatch.apply(model)(x), evopatch.apply(build("vit"))(x))


@pytest.mark.parametrize("name", ["vit", "hf_vit"])
@torch.no_grad()
def test_hooks_of_accelerate_come_and_go(name):
    model, x = build(name), images()
    call = model if name == "vit" else lambda x: model(x).logits
    original = call(x)
    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook("cpu"))
    remove_hook_from_submodules(model)
    evopatch.apply(model)
    assert moved(call(x), original) > 1e-3
    evopatch.remove(model)
    assert torch.equal(call(x), original)


@torch.no_grad()
def test_only_prefix_tokens_go_through_the_last_block(prepared):
    (_, model), seen = prepared, []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.append(out.shape[1]) if type(module).__name__ == "Block" else None
    )
    model(images())
    handle.remove()
    assert seen[-1] == 1
