"""Adapters, quantisation, pruning, averages: before `apply` and after it, with the same result."""

import copy

import pytest
import torch
from comparing import moved
from torch import nn
from torch.nn.utils import prune
from variants import build, call, images_for

import evopatch

LINEAR = {"vit": ["qkv", "proj", "fc1", "fc2"], "hf_vit": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]}
NAMES = pytest.mark.parametrize("name", ["vit", "hf_vit"])


def in_both_orders(name, change):
    """The model changed before it was patched, after, and patched alone; and what they give."""
    before, after, plain = build(name), build(name), evopatch.apply(build(name))
    before = evopatch.apply(change(before))
    after = change(evopatch.apply(after))
    x = images_for(name)
    with torch.no_grad():
        return before, after, [call(model, x) for model in (before, after, plain)]


def assert_used(found):
    """The change counts, and the order doesn't matter."""
    before, after, plain = found
    torch.testing.assert_close(before, after, atol=2e-5, rtol=2e-5)
    assert moved(after, plain) > 1e-3


def linear_of(name, model):
    return sorted({path.rpartition(".")[2] for path, m in model.named_modules() if isinstance(m, nn.Linear)})


@NAMES
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_low_rank_adapters_of_peft(name, dora):
    peft = pytest.importorskip("peft")
    targets = [target for target in LINEAR[name] if target in linear_of(name, build(name))]
    assert len(targets) > 2

    def adapted(model):
        torch.manual_seed(1)
        return peft.get_peft_model(
            model, peft.LoraConfig(r=4, target_modules=targets, use_dora=dora, init_lora_weights=False)
        ).eval()

    before, after, found = in_both_orders(name, adapted)
    assert_used(found)
    x = images_for(name)
    call(after, x).square().sum().backward()
    trained = {path for path, p in after.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained
    assert all("lora" in path for path in trained)
    with torch.no_grad():
        for model in (before, after):
            torch.testing.assert_close(call(model.merge_and_unload(), x), found[1], atol=1e-4, rtol=1e-4)


@NAMES
def test_weights_quantised_by_torchao(name):
    quantization = pytest.importorskip("torchao.quantization")

    def quantised(model):
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        return model

    before, _, found = in_both_orders(name, quantised)
    assert_used(found)
    x = images_for(name)
    with torch.no_grad():
        evopatch.set_keep_ratio(before, 1.0)
        assert torch.equal(call(before, x), call(quantised(build(name)), x))


@NAMES
def test_weights_pruned_by_torch(name):
    def pruned(model):
        for module in [m for m in model.modules() if isinstance(m, nn.Linear)]:
            prune.l1_unstructured(module, "weight", amount=0.3)
        return model

    _, after, found = in_both_orders(name, pruned)
    assert_used(found)
    for module in [m for m in after.modules() if isinstance(m, nn.Linear)]:
        prune.remove(module, "weight")
    with torch.no_grad():
        assert torch.equal(call(after, images_for(name)), found[1])


@NAMES
def test_averaged_weights_of_torch(name):
    model, x = evopatch.apply(build(name)), images_for(name)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(model)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, half in zip(model.parameters(), expected.parameters(), strict=True):
            parameter.add_(0.01)
            half.add_(0.005)
        averaged.update_parameters(model)
        torch.testing.assert_close(call(averaged.module, x), call(expected, x), atol=1e-4, rtol=1e-4)
        assert moved(call(expected, x), call(model, x)) > 1e-3
