"""Looking at blocks outside of their own run: with the weights that they would have in it, and leaving no trace."""

import copy

import pytest
import torch
from comparing import moved
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from variants import build, call, images, images_for

import evopatch
from evopatch import EvoConfig
from evopatch.forward.block import layer_norm_of
from evopatch.patching.handle import Patched


def prune_third(layer):
    prune.l1_unstructured(layer, "weight", 0.3)


def changed(model, change):
    for block in model.blocks:
        change(block.attn.qkv)
    return model


def other_weights(model):
    """A state dict for it in which what is learned is other than what it has."""
    torch.manual_seed(3)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for name, value in state.items():
        if value.is_floating_point() and not name.endswith(("_mask", "_u", "_v")):
            value.add_(0.1 * torch.randn_like(value))
    return state


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("change", [weight_norm, spectral_norm, prune_third, parametrizations.weight_norm])
@torch.no_grad()
def test_weights_that_are_made_before_a_call_are_those_of_this_forward(change):
    """Torch's older hooks make a layer's weight when it is called, which is after an earlier block has looked at it."""
    model, x = evopatch.apply(changed(build("vit"), change)), images()
    model.load_state_dict(other_weights(model))
    first = model(x)
    assert torch.equal(model(x), first)
    fresh = evopatch.apply(changed(build("vit"), change))
    assert moved(fresh(x), first) > 1e-4


@torch.no_grad()
def test_so_they_are_where_the_last_block_does_for_prefix_tokens_alone():
    model, x = build("vit"), images()
    prune.l1_unstructured(model.blocks[-1].norm1, "weight", 0.3)
    original = copy.deepcopy(model)
    evopatch.apply(model, config=EvoConfig.exact())
    state = other_weights(model)
    model.load_state_dict(state)
    original.load_state_dict(state)
    torch.testing.assert_close(model(x), original(x), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("name", "representative"), [("vit", "matched"), ("registers", "matched"), ("swin", "single"), ("swin", "matched")]
)
def test_cached_parametrizations_keep_their_gradients(name, representative):
    model, x = build(name), images_for(name)
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            parametrizations.weight_norm(module)
    evopatch.apply(model, config=EvoConfig(representative=representative)).train()

    def gradients(cached):
        model.zero_grad()
        with parametrize.cached() if cached else torch.enable_grad():
            loss = call(model, x).square().sum()
        loss.backward()
        return {path: parameter.grad for path, parameter in model.named_parameters()}

    expected, found = gradients(cached=False), gradients(cached=True)
    assert [path for path in expected if (expected[path] is None) != (found[path] is None)] == []
    for path, gradient in expected.items():
        if gradient is not None:
            torch.testing.assert_close(found[path], gradient, atol=1e-5, rtol=1e-4, msg=path)


class BatchNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.bn = nn.BatchNorm1d(channels)

    def forward(self, x):
        return self.bn(x.transpose(1, 2)).transpose(1, 2)


@torch.no_grad()
def test_norms_of_batches_count_a_batch_once():
    model = build("vit")
    for block in model.blocks:
        block.norm1 = BatchNorm(block.norm1.normalized_shape[0])
    evopatch.apply(model).train()
    for times in (1, 2):
        model(images())
        assert [int(block.norm1.bn.num_batches_tracked) for block in model.blocks] == [times] * 6


@torch.no_grad()
def test_prefix_tokens_are_not_normed_as_a_batch_of_their_own():
    model, x = build("vit"), images()
    model.blocks[-1].mlp = nn.Sequential(model.blocks[-1].mlp, BatchNorm(model.embed_dim))
    original = copy.deepcopy(model).train()
    evopatch.apply(model, config=EvoConfig.exact()).train()
    torch.testing.assert_close(model(x), original(x), atol=2e-5, rtol=2e-5)
    assert Patched(model.eval()).host.state.reads_out


class Shifted(nn.LayerNorm):
    """Gemma's kind: weights are what is added to one."""

    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, 1 + self.weight, self.bias, self.eps)


@torch.no_grad()
def test_a_norm_is_looked_through_only_where_it_is_one(monkeypatch):
    """Whatever looks, ranks by what the block's own norm would give."""
    plain, shifted, x = build("vit"), build("vit"), images()
    for block in shifted.blocks:
        block.norm1.__class__ = Shifted
        block.norm1.weight -= 1
    assert layer_norm_of(evopatch.apply(plain).blocks[3]) is not None
    assert layer_norm_of(evopatch.apply(shifted).blocks[3]) is None
    torch.testing.assert_close(shifted(x), plain(x), atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_norms_of_queries_that_are_put_in_later_count():
    def with_norms(model):
        for number, block in enumerate(model.blocks):
            for name in ("q_norm", "k_norm"):
                torch.manual_seed(number)
                norm = nn.LayerNorm(model.embed_dim // block.attn.num_heads)
                norm.weight.copy_(torch.rand_like(norm.weight))
                setattr(block.attn, name, norm)
        return model

    x = images()
    before = evopatch.apply(with_norms(build("vit")))
    after = with_norms(evopatch.apply(build("vit")))
    assert torch.equal(after(x), before(x))
    assert moved(evopatch.apply(build("vit"))(x), before(x)) > 1e-4


@pytest.mark.parametrize("representative", ["matched", "single", "none"])
def test_derivatives_in_forward_mode_are_those_of_backward(representative):
    config = EvoConfig(representative=representative)
    model = evopatch.apply(build("vit").double().requires_grad_(False), config=config)
    x = images().double()
    along = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, forward = torch.func.jvp(lambda x: model(x).square().sum(), (x,), (along,))
        asked = x.requires_grad_()
        (gradient,) = torch.autograd.grad(model(asked).square().sum(), asked)
    torch.testing.assert_close((gradient * along).sum(), forward)


class LowRank(nn.Linear):
    """As peft puts in the place of a linear layer."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        self.load_state_dict(layer.state_dict())
        self.down, self.up = nn.Linear(self.in_features, 4, bias=False), nn.Linear(4, self.out_features, bias=False)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


@pytest.mark.parametrize(
    ("name", "representative"), [("vit", "matched"), ("swin", "single"), ("torchvision_swin", "single")]
)
def test_weights_that_autocast_keeps_have_their_gradients(name, representative):
    """In older torch (2.6) also those that it cast where no gradient was wanted."""
    torch.manual_seed(0)
    model, x = build(name), images_for(name)
    if name == "vit":
        for block in model.blocks:
            block.attn.qkv = LowRank(block.attn.qkv)
    evopatch.apply(model, config=EvoConfig(representative=representative)).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        call(model, x).float().square().sum().backward()
    assert [path for path, parameter in model.named_parameters() if parameter.grad is None] == []


@torch.no_grad()
def test_a_norm_is_one_wherever_tensors_are_made_by_default():
    """As models are built on the meta device, to be filled later, or in half precision."""
    model = build("vit").to("meta")  # older versions of timm can't build one under torch.device("meta")
    with torch.device("meta"):
        evopatch.apply(model)
    assert layer_norm_of(model.blocks[3]) is not None
    torch.set_default_dtype(torch.bfloat16)
    try:
        half = evopatch.apply(build("vit").bfloat16())
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer_norm_of(half.blocks[3]) is not None
