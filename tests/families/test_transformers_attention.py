"""Attention of patched transformers models: implementations, masks, and attention modules that were changed."""

import copy
import pickle

import pytest
import torch
import transformers
from comparing import moved
from internals import new_pass
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from variants import build, call, images

import evopatch
from evopatch import EvoConfig


@pytest.mark.parametrize("name", ["hf_vit", "hf_dinov2", "hf_clip", "hf_dinov3"])
@torch.no_grad()
def test_causal_attention_is_refused(name):
    model, x = evopatch.apply(build(name)), images()
    with pytest.raises(evopatch.UnsupportedInputError, match="is_causal was passed"):
        model(x, is_causal=True)
    evopatch.set_keep_ratio(model, 1.0)
    assert torch.equal(call(model, x, is_causal=True), call(evopatch.remove(model), x, is_causal=True))


@pytest.mark.parametrize("index", [2, 5])
@torch.no_grad()
def test_attention_replaced_after_apply_is_refused(index):
    model, x = evopatch.apply(build("hf_vit")), images()
    model.vit.layers[index].attention = build("hf_vit").vit.layers[index].attention
    with pytest.raises(evopatch.BypassError, match=rf"vit\.layers\.{index}\.attention is a .*ViTAttention now"):
        model(x)


@torch.no_grad()
def test_attention_replaced_where_a_block_runs_as_it_is_is_used():
    model, x = evopatch.apply(build("hf_vit")), images()
    before = call(model, x)
    torch.manual_seed(5)
    model.vit.layers[1].attention = type(build("hf_vit").vit.layers[1].attention)(model.config)
    found = call(model, x)
    assert moved(found, before) > 1e-3
    assert torch.equal(found, call(evopatch.apply(evopatch.remove(model)), x))


def test_attention_with_a_forward_of_its_own_is_refused():
    model = build("hf_vit")
    attention = model.vit.layers[2].attention
    attention.forward = lambda *args, **kwargs: type(attention).forward(attention, *args, **kwargs)
    with pytest.raises(evopatch.UnsupportedModelError, match=r"vit\.layers\.2\.attention .* forward of its own"):
        evopatch.apply(model)


@torch.no_grad()
def test_the_attention_implementation_can_change_after_apply():
    model, x = evopatch.apply(build("hf_vit")), images()
    sdpa = model(x).logits
    assert model(x, output_attentions=True).attentions == ()
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(x).logits, sdpa, atol=2e-5, rtol=2e-5)
    assert len(model(x, output_attentions=True).attentions) == 6


class OwnAttention(transformers.models.vit.modeling_vit.ViTAttention):
    """What users do: a subclass, in a module of their own."""


@torch.no_grad()
def test_a_subclass_of_an_attention_class():
    model, x = build("hf_vit_eager"), images()
    expected = evopatch.apply(copy.deepcopy(model))(x).logits
    for layer in model.vit.layers:
        layer.attention.__class__ = OwnAttention
    evopatch.apply(model)
    assert torch.equal(model(x).logits, expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x).logits, expected)


@torch.no_grad()
def test_other_implementations_never_get_a_bias():
    """As flash attention and flex attention would: they run where a block takes all tokens."""
    calls = []

    def other(module, query, key, value, attention_mask, **kwargs):
        assert attention_mask is None
        calls.append(query.shape[2])
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, **kwargs)

    transformers.AttentionInterface.register("flex_other", other)
    transformers.AttentionMaskInterface.register("flex_other", lambda *args, **kwargs: None)
    model, x = build("hf_vit"), images()
    expected = evopatch.apply(copy.deepcopy(model))(x).logits
    model.set_attn_implementation("flex_other")
    evopatch.apply(model)
    torch.testing.assert_close(model(x).logits, expected, atol=2e-5, rtol=2e-5)
    assert calls == [26, 26]
    evopatch.set_config(model, EvoConfig.paper())
    calls.clear()
    model(x)
    assert calls == [26, 26, 15, 15, 15, 15]


@torch.no_grad()
def test_an_implementation_of_ones_own_runs_in_every_block():
    """Its mathematics is its own: no other may take its place."""
    calls = []

    def colder(module, query, key, value, attention_mask, **kwargs):
        calls.append(attention_mask is not None)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, 0.5 * query, key, value, attention_mask, **kwargs)

    transformers.AttentionInterface.register("colder", colder)
    transformers.AttentionMaskInterface.register("colder", lambda *args, **kwargs: None)
    model, x = build("hf_vit"), images()
    model.set_attn_implementation("colder")
    evopatch.apply(model)
    out = model(x).logits
    assert calls == [False, False, True, True, True, True]
    model.set_attn_implementation("sdpa")
    assert moved(out, model(x).logits) > 1e-4


@pytest.mark.slow  # compiles
@torch.no_grad()
def test_flex_attention_checks_the_mask_that_transformers_makes_for_it():
    model, x = build("hf_vit", attn_implementation="flex_attention"), images()
    original = call(model, x)
    evopatch.apply(model)
    torch.testing.assert_close(call(model, x), call(evopatch.apply(build("hf_vit")), x), atol=2e-5, rtol=2e-5)
    keep = torch.ones(2, 26, dtype=torch.long)
    keep[1, -2:] = 0
    with pytest.raises(RuntimeError, match="attention mask that masks tokens"):
        model(x, attention_mask=keep)
    evopatch.set_keep_ratio(model, 1.0)
    assert torch.equal(call(model, x), original)


@pytest.mark.parametrize("name", ["hf_vit", "hf_vit_eager", "hf_dinov2", "hf_clip", "hf_dinov3"])
@torch.no_grad()
def test_masks_of_more_than_padding_are_refused(name):
    model, x = build(name), images()
    tokens = next(iter(model(x, output_hidden_states=True).hidden_states)).shape[1]
    layer = next(m for m in model.modules() if type(m).__name__.endswith(("Layer", "EncoderLayer")))
    mask = torch.full((2, 1, tokens, tokens), -1e9).triu(1)
    evopatch.apply(model)
    with pytest.raises(evopatch.UnsupportedInputError, match=r"attention_mask .*was passed .* at block 0"):
        layer(torch.randn(2, tokens, 48), mask, **new_pass(model))
    if name in ("hf_vit", "hf_vit_eager", "hf_dinov2"):
        keep = torch.ones(2, tokens, dtype=torch.long)
        torch.testing.assert_close(call(model, x, attention_mask=keep), call(model, x))
        keep[:, :3] = 0  # the class token among them
        with pytest.raises(evopatch.UnsupportedInputError, match=r"set_keep_ratio\(model, 1.0\)"):
            model(x, attention_mask=keep)
        evopatch.set_keep_ratio(model, 1.0)
        masked = call(model, x, attention_mask=keep)
        assert torch.equal(masked, call(evopatch.remove(model), x, attention_mask=keep))


@torch.no_grad()
def test_an_exported_model_checks_its_attention_mask():
    model, x = evopatch.apply(build("hf_vit")), images()
    keep = torch.ones(2, 26, dtype=torch.long)
    exported = torch.export.export(model, (x,), {"attention_mask": keep}).module()
    torch.testing.assert_close(exported(x, attention_mask=keep).logits, model(x).logits, atol=2e-5, rtol=2e-5)
    keep[1, 3] = 0
    with pytest.raises(RuntimeError, match="attention mask that masks tokens"):
        exported(x, attention_mask=keep)
