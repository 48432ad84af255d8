"""Patched models of transformers: what they record between their layers, and the same weights through timm."""

import copy

import pytest
import torch
import transformers
from comparing import moved
from evopatch_transformers import interface
from matrix import EACH_REPRESENTATIVE, every
from torch import nn
from transformers import BertConfig, BertModel
from transformers_weights import DINOV2_KEYS, VIT_KEYS, deit_tiny, rename
from variants import FLAT, TRANSFORMERS, build, call, images, images_for

import evopatch
from evopatch import EvoConfig

MODES = [
    EvoConfig(keep_ratio=[0.6, 0.3], stages=[2, 4], representative=r, selection=s)
    for r in ("matched", "single", "none")
    for s in ("stage", "layer")
]


FAMILIES = {
    "hf_vit": ("vit", VIT_KEYS, "vit.", {"head": "classifier"}, {}),
    "hf_deit_teacher": (
        "deit_distilled",
        VIT_KEYS,
        "deit.",
        {"head": "cls_classifier", "head_dist": "distillation_classifier"},
        {},
    ),
    "hf_dinov2_swiglu": ("dinov2", DINOV2_KEYS, "", {}, {"use_swiglu_ffn": False}),
}


@pytest.mark.parametrize("config", MODES, ids=lambda c: f"{c.representative}-{c.selection}")
@pytest.mark.parametrize("name", sorted(FAMILIES))
@torch.no_grad()
def test_same_weights_give_the_same_as_timm(name, config):
    twin, keys, prefix, heads, options = FAMILIES[name]
    theirs = build(twin, mlp_ratio=2)
    ours = build(name, layer_norm_eps=1e-6, **options)
    weights = rename(theirs.state_dict(), keys, prefix, heads)
    if name == "hf_dinov2_swiglu":
        weights = {k: v for k, v in weights.items() if not k.startswith("head")}
        weights["embeddings.mask_token"] = torch.zeros(1, 48)
    ours.load_state_dict(weights)
    x = images(3)

    def results():
        a = theirs(x) if heads else theirs.forward_features(x)
        return a, call(ours, x)

    torch.testing.assert_close(*results(), atol=1e-5, rtol=1e-5)
    before = call(ours, x)
    evopatch.apply(theirs, config=config)
    evopatch.apply(ours, config=config)
    torch.testing.assert_close(*results(), atol=1e-4, rtol=1e-4)
    assert torch.equal(evopatch.token_selection(theirs, x), evopatch.token_selection(ours, x))
    assert moved(call(ours, x), before) > 1e-3
    evopatch.set_keep_ratio(ours, [0.55, 0.3])
    assert moved(*results()) > 1e-4


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(EvoConfig(), id="matched"),
        pytest.param(EvoConfig(selection="layer"), id="matched-layer", marks=pytest.mark.slow),
        pytest.param(EvoConfig.paper(), id="paper", marks=pytest.mark.slow),
        pytest.param(EvoConfig(representative="none"), id="none", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_deit_tiny_gives_the_same_as_timm(real_data, config):
    from evopatch.sources.images import open_images
    from evopatch.sources.models import Preprocessing, open_classifier

    file = real_data / "deit_tiny" / "model.safetensors"
    theirs = open_classifier("deit_tiny_patch16_224", file, preprocessing=Preprocessing(crop_pct=1.0))
    ours = deit_tiny(file)
    dataset = open_images(real_data / "imagenet_val_1300.parquet", theirs.transform)
    x = torch.stack([dataset[i][0] for i in range(0, 160, 10)])
    evopatch.apply(theirs.model, config=config)
    evopatch.apply(ours, config=config)
    torch.testing.assert_close(ours(x).logits, theirs.model(x), atol=1e-4, rtol=1e-4)
    assert torch.equal(evopatch.token_selection(ours, x), evopatch.token_selection(theirs.model, x))
    unpatched = evopatch.remove(copy.deepcopy(ours))(x).logits
    assert moved(ours(x).logits, unpatched) > 0.05


@torch.no_grad()
def test_hidden_states_asked_for_by_a_pre_hook():
    model, x = evopatch.apply(build("hf_vit_model")), images()
    model.register_forward_pre_hook(lambda m, a, k: (a, {**k, "output_hidden_states": True}), with_kwargs=True)
    assert {h.shape[1] for h in model(x).hidden_states} == {26}


@every(TRANSFORMERS & FLAT - {"hf_eomt"})  # which loops over its layers itself: another class of the same name
@torch.no_grad()
def test_no_models_class_is_changed(name):
    model = build(name)
    classes = {n: type(m) for n, m in model.named_modules() if isinstance(m, transformers.PreTrainedModel)}
    evopatch.apply(model)
    assert {n: type(m) for n, m in model.named_modules() if isinstance(m, transformers.PreTrainedModel)} == classes
    assert evopatch.is_patched(model)


@every(TRANSFORMERS & FLAT)
@EACH_REPRESENTATIVE
@torch.no_grad()
def test_attentions_are_between_all_tokens(name, representative):
    model, x = build(name, attn_implementation="eager"), images_for(name)
    original = model(x, output_attentions=True, output_hidden_states=True)
    evopatch.apply(model, config=EvoConfig(representative=representative))
    plain = call(model, x)
    out = model(x, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(call(model, x, output_attentions=True), plain, atol=2e-5, rtol=2e-5)
    assert [a.shape for a in out.attentions] == [a.shape for a in original.attentions]
    assert len(out.attentions) == (8 if name == "hf_eomt" else 6)
    torch.testing.assert_close(out.attentions[1], original.attentions[1])
    for attention in out.attentions[2:6]:
        total = attention.sum(-1)
        stands = total > 0.5
        torch.testing.assert_close(total[stands], torch.ones_like(total[stands]), atol=1e-4, rtol=1e-4)
        assert stands.all() == (representative != "none")
    assert moved(out.attentions[2], original.attentions[2]) > 1e-4
    # The same in a second forward: hooks that record stay installed.
    again = model(x, output_attentions=True)
    torch.testing.assert_close(again.attentions[5], out.attentions[5], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_attentions_of_a_matched_group_are_split_as_its_mean_is():
    model, x = build("hf_vit_eager"), images()
    evopatch.apply(model)
    seen = []
    spread = interface.spread_attention

    def recording(weights, partition):
        seen.append((weights, partition))
        return spread(weights, partition)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interface, "spread_attention", recording)
        attentions = model(x, output_attentions=True).attentions
        count = len(seen)
        model(x)
    assert count == 4
    assert len(seen) == 4  # not computed unless asked for
    weights, partition = seen[-1]
    image, head, reader, token = 1, 2, 0, 20
    row = partition.group[image, token]
    expected = weights[image, head, reader, row] * partition.weight[image, token]
    assert attentions[5][image, head, reader, token] == expected


@torch.no_grad()
def test_outputs_asked_for_by_the_models_config():
    model, x = evopatch.apply(build("hf_vit_eager")), images()
    asked = model(x, output_hidden_states=True, output_attentions=True)
    model.config.output_hidden_states = model.config.output_attentions = True
    out = model(x)
    assert len(out.hidden_states) == 7
    for ours, theirs in zip(
        (*out.hidden_states, *out.attentions), (*asked.hidden_states, *asked.attentions), strict=True
    ):
        assert torch.equal(ours, theirs)


@torch.no_grad()
def test_some_hidden_states_and_tuples():
    model, x = evopatch.apply(build("hf_vit")), images()
    every = model(x, output_hidden_states=True).hidden_states
    some = model(x, output_hidden_states=[3, -1]).hidden_states
    assert [h is None for h in some] == [True, True, True, False, True, True, False]
    assert torch.equal(some[3], every[3])
    logits, states = model(x, output_hidden_states=True, return_dict=False)
    assert torch.equal(states[6], every[6])
    assert logits.shape == (2, 7)


@torch.no_grad()
def test_hooks_on_attention_modules_and_layers_run():
    model, x = build("hf_vit"), images()
    seen = []
    attention, layer = model.vit.layers[4].attention, model.vit.layers[3]
    attention.register_forward_hook(lambda m, args, out: seen.append("attention"))
    evopatch.apply(model)
    layer.register_forward_hook(lambda m, args, out: seen.append("layer"))
    expected = model(x).logits
    assert seen == ["layer", "attention"]
    layer.register_forward_hook(lambda m, args, out: out * 1.5)
    assert moved(model(x).logits, expected) > 1e-4


@torch.no_grad()
def test_a_layer_called_from_outside_is_refused():
    model, x = evopatch.apply(build("hf_vit")), images()
    with pytest.raises(evopatch.BypassError, match=r"vit\.layers\.0 was called from outside"):
        model.vit.layers[0](torch.randn(2, 26, 48))
    with pytest.raises(evopatch.BypassError, match=r"vit\.layers\.0"):
        model.vit.forward(x)
    evopatch.set_keep_ratio(model, 1.0)
    model.vit.forward(x)


@torch.no_grad()
def test_layers_changed_after_apply_are_refused():
    model, x = evopatch.apply(build("hf_vit")), images()
    model.vit.layers = nn.ModuleList(list(model.vit.layers)[:4])
    with pytest.raises(evopatch.BypassError, match="4 layers in 'layers' and had 6"):
        model(x)
    evopatch.remove(model)
    evopatch.apply(model)
    assert model(x).logits.shape == (2, 7)


def test_unknown_models_are_refused_with_what_is_served():
    model = BertModel(BertConfig(num_hidden_layers=2, hidden_size=48, num_attention_heads=4))
    with pytest.raises(
        evopatch.UnsupportedModelError, match=r"nothing to patch in [\w.]*\.BertModel.*\.DeiTModel.*\.ViTModel"
    ):
        evopatch.apply(model)


@torch.no_grad()
def test_profile_counts_the_real_forward():
    from torch.utils.flop_counter import FlopCounterMode

    model, x = build("hf_dinov2", attn_implementation="eager"), images(1)  # whose FLOPs every torch counts

    def count():
        with FlopCounterMode(display=False) as counter:
            model(x)
        return counter.get_total_flops()

    unpatched = count()
    evopatch.apply(model)
    profile = evopatch.profile(model, (3, 40, 40))
    assert profile.flops_unpatched == unpatched
    assert profile.flops == count()
    assert [block.tokens for block in profile.blocks] == [25, 25, 19, 14, 8, 8]
    assert sum(block.flops for block in profile.blocks) < profile.flops < unpatched
