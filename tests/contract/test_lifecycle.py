"""What applying and removing leave behind, and what a failed apply does."""

import copy

import pytest
import torch
from comparing import Snapshot, moved
from internals import block_paths, fail_at_block
from matrix import every
from variants import EVERY, FLAT, PYRAMIDS, build, call, images_for

import evopatch
from evopatch.patching.handle import Patched


@every(EVERY)
def test_state_dict_is_unchanged_and_a_stock_checkpoint_loads(name):
    model = build(name)
    keys = list(model.state_dict())
    evopatch.apply(model)
    assert list(model.state_dict()) == keys
    other = build(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    x = images_for(name)
    before = call(copy.deepcopy(model), x)  # LeViT keeps position biases from its first forward on
    model.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(call(model, x), call(evopatch.apply(other), x))
    assert moved(call(model, x), before) > 1e-4


@every(EVERY)
@torch.no_grad()
def test_remove_restores_the_model(name):
    model, x = build(name), images_for(name)
    original, before = call(model, x), Snapshot(model)
    evopatch.apply(model)
    before.assert_classes_differ(model)
    call(model, x)
    assert evopatch.remove(model) is model
    before.assert_same_modules(model)
    assert torch.equal(call(model, x), original)
    evopatch.apply(model)
    assert evopatch.is_patched(model)


@every(FLAT | PYRAMIDS)
@torch.no_grad()
def test_a_failed_rewriting_leaves_the_model_untouched(name, monkeypatch):
    model, x = build(name), images_for(name)
    original, before = call(model, x), Snapshot(model)
    rewritten = fail_at_block(monkeypatch, 5, evopatch.AttentionNotFoundError("planted"))
    with pytest.raises(evopatch.AttentionNotFoundError, match="planted"):
        evopatch.apply(model)
    assert len(rewritten) == 5
    before.assert_untouched(model)
    assert torch.equal(call(model, x), original)


@every(EVERY)
@torch.no_grad()
def test_a_replaced_method_of_the_host_is_refused_or_calls_the_patch(name):
    expected = call(evopatch.apply(build(name)), images_for(name))
    path, methods = walking_methods_of(evopatch.apply(build(name)))
    refused = 0
    for method in methods:
        model = build(name)
        host = model.get_submodule(path)
        own = getattr(host, method)
        setattr(host, method, lambda *args, own=own, **kwargs: own(*args, **kwargs))
        before = Snapshot(model)
        if evopatch.supported(model):
            torch.testing.assert_close(call(evopatch.apply(model), images_for(name)), expected)
            continue
        refused += 1
        with pytest.raises(evopatch.UnsupportedModelError, match=rf"\(\w+\) has a {method} of its own"):
            evopatch.apply(model)
        before.assert_untouched(model)
    assert refused or methods == ["forward"]


def walking_methods_of(model):
    """Path of the first patched host, and its methods that the patch replaces; `forward` where its blocks are all."""
    path, host = next(iter(Patched(model).hosts.items()))
    host_class = getattr(host.module, "_evo_host_class", type(host.module))
    ours = {name for name in dir(host_class) if name.startswith("forward")}
    ours = {name for name in ours if getattr(type(host.module), name) is not getattr(host_class, name)}
    return path, sorted(ours | {"forward"})


@every(EVERY)
@torch.no_grad()
def test_a_refused_block_leaves_the_model_untouched(name):
    model, x = build(name), images_for(name)
    original = call(model, x)
    path = block_paths(evopatch.apply(copy.deepcopy(model)))[-1]
    block = model.get_submodule(path)
    own = block.forward
    block.forward = lambda *args, **kwargs: own(*args, **kwargs)
    before = Snapshot(model)
    with pytest.raises(evopatch.UnsupportedModelError, match=rf"{path} \(\w+\) has a forward of its own"):
        evopatch.apply(model)
    before.assert_untouched(model)
    assert torch.equal(call(model, x), original)
    block.forward = own  # no other than its class's, as what takes wrappers off leaves it
    assert evopatch.is_patched(evopatch.apply(model))
