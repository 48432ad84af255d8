"""Key padding masks: tokens that are left out are neither slow nor members of a group, and stay as they are."""

import copy

import pytest
import torch
from comparing import moved
from correcting import correct
from internals import new_pass, plans
from matrix import EACH_REPRESENTATIVE, EACH_SELECTION, cases, config, every
from torch.utils.checkpoint import checkpoint
from transformers import Siglip2VisionConfig, Siglip2VisionModel
from variants import between, build, call, images_for, shallow

import evopatch
from evopatch import EvoConfig, UnsupportedInputError
from evopatch.algorithm import foresight
from evopatch.algorithm.selection import num_slow
from evopatch.patching.handle import Patched

MASKED = {
    "vit": "attn_mask",
    "gap": "attn_mask",
    "registers": "attn_mask",
    "diff": "attn_mask",
    "rope": "attn_mask",
    "naflex": "attn_mask",
    "hf_vit": "attention_mask",
    "hf_vit_eager": "attention_mask",
    "hf_registers": "attention_mask",
}
"""Models that pass a mask on to their blocks, and by what name."""
PADDED = [0, 3, 4, 10, 17, 23, 24]
"""Of the 25 patch tokens, other ones in every image but equally many."""


def padding(images: int = 2) -> torch.Tensor:
    """`(B, 25)` bool, True for patch tokens that are left out."""
    out = torch.zeros(images, 25, dtype=torch.bool)
    for image in range(images):
        out[image, [(place + 5 * image) % 25 for place in PADDED]] = True
    return out


def mask_for(name: str, kind: str = "key") -> dict[str, torch.Tensor]:
    """A model's argument that leaves `padding()` out."""
    model, x = build(name), images_for(name)
    prefix = between(name, model, x)[0].shape[1] - 25
    there = torch.cat([torch.ones(2, prefix, dtype=torch.bool), ~padding()], dim=1)
    if MASKED[name] == "attention_mask":
        return {"attention_mask": there.long()}
    mask = there[:, None, None]
    if kind == "pairs":
        mask = mask & there[:, None, :, None]
    if kind == "pairs, infinite":
        mask = torch.zeros(2, 1, prefix + 25, prefix + 25).masked_fill(~mask, -torch.inf)
    if kind == "added":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -1e9)
    return {"attn_mask": mask}


def outside(x: torch.Tensor) -> torch.Tensor:
    """The same images with other pixels in the patches that are left out."""
    pixels = padding().view(2, 1, 5, 5).repeat_interleave(8, 2).repeat_interleave(8, 3)
    return torch.where(pixels, 30 * torch.randn(x.shape, generator=torch.Generator().manual_seed(5)), x)


@every(MASKED)
@EACH_SELECTION
@EACH_REPRESENTATIVE
@torch.no_grad()
def test_what_is_left_out_changes_nothing(name, representative, selection):
    x, mask = images_for(name), mask_for(name)
    model = evopatch.apply(build(name), config=config(representative, selection))
    features = call_features(name, model, x, mask)
    assert moved(outside(x), x) > 1
    assert torch.equal(call_features(name, model, outside(x), mask), features)
    # Without the mask it does, and other tokens are left out than nothing.
    assert moved(call_features(name, model, outside(x), {}), call_features(name, model, x, {})) > 1e-4
    assert moved(features, call_features(name, model, x, {})) > 1e-4


@every(["vit", "registers", "hf_vit"])
@torch.no_grad()
def test_nor_does_it_where_the_last_block_does_for_prefix_tokens_alone(name):
    x, mask = images_for(name), mask_for(name)
    model = evopatch.apply(build(name))
    found = call(model, x, **mask)
    assert Patched(model).host.state.reads_out
    assert torch.equal(call(model, outside(x), **mask), found)
    evopatch.set_config(model, EvoConfig(readout=False))
    torch.testing.assert_close(found, call(model, x, **mask), atol=2e-5, rtol=2e-5)
    assert moved(found, call(model, x)) > 1e-4


def call_features(name, model, x, mask):
    """Tokens after the last block, `(B, T', C)`: those that aren't left out."""
    if MASKED[name] == "attention_mask":
        tokens = model(x, output_hidden_states=True, **mask).hidden_states[-1]
    else:
        tokens = model.forward_features(x, **mask)
    return torch.stack([own[kept(own, out)] for own, out in zip(tokens, padding(), strict=True)])


def kept(tokens, out):
    """Places of prefix tokens and of the patch tokens that aren't left out."""
    prefix = len(tokens) - 25
    return torch.cat([torch.arange(prefix), prefix + (~out).nonzero().flatten()])


@every(sorted(MASKED))
@EACH_REPRESENTATIVE
@torch.no_grad()
def test_what_is_left_out_stays_in_a_run(name, representative):
    model = evopatch.apply(build(name), config=EvoConfig(stages=1, representative=representative))
    states = between(name, _Masked(model, mask_for(name)), images_for(name))
    starts = next(index for index, plan in enumerate(plans(model)) if plan.selects)
    before, after = states[starts - 1][:, -25:], states[5][:, -25:]
    if name.startswith("hf_"):  # the last hidden state is normed
        after = states[4][:, -25:]
    assert torch.equal(before[padding()], after[padding()])
    assert (before - after)[~padding()].abs().amax(-1).gt(1e-4).all() == (representative != "none")


class _Masked(torch.nn.Module):
    def __init__(self, model, mask):
        super().__init__()
        self.model, self.mask = model, mask
        self.num_prefix_tokens = getattr(model, "num_prefix_tokens", None)

    def forward(self, x, **options):
        return self.model(x, **self.mask, **options)

    def forward_intermediates(self, x, **options):
        return self.model.forward_intermediates(x, **self.mask, **options)


@pytest.mark.parametrize("kind", ["pairs", "added", "pairs, infinite"])
@pytest.mark.parametrize("name", ["vit", "rope", "gap", "diff"])
@torch.no_grad()
def test_masks_of_every_form_say_the_same(name, kind):
    model, x = evopatch.apply(build(name)), images_for(name)
    expected = call_features(name, model, x, mask_for(name))
    torch.testing.assert_close(call_features(name, model, x, mask_for(name, kind)), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["vit", "hf_vit"])
@torch.no_grad()
def test_what_is_learned_leaves_it_out_too(name):
    x, mask = images_for(name), mask_for(name)
    model = evopatch.apply(build(name), config=EvoConfig(readout=False), images=images_for(name, 16))
    correct(model, images_for(name, 16))
    features = call_features(name, model, x, mask)
    assert torch.equal(call_features(name, model, outside(x), mask), features)
    assert moved(features, call_features(name, evopatch.apply(build(name)), x, mask)) > 1e-4


@torch.no_grad()
def test_nothing_is_learned_of_what_is_left_out():
    torch.manual_seed(0)
    tokens, attention, out = torch.randn(4, 25, 8), torch.rand(4, 25), padding(4)
    attention = attention / attention.sum(1, keepdim=True)
    found = []
    for noise in (0.0, 100.0):
        regression = foresight.Regression(8, tokens.device)
        regression.add(tokens + noise * out.unsqueeze(2), attention.masked_fill(out, noise), out)
        found.append(regression.weights())
    assert torch.equal(*found)
    few = foresight.Regression(8, tokens.device)
    few.add(tokens[~out].view(4, -1, 8), attention[~out].view(4, -1))
    torch.testing.assert_close(found[0], few.weights(), atol=1e-4, rtol=1e-4)


def padded_to(tokens: int, sizes: list[tuple[int, int]], seed: int = 1) -> dict[str, torch.Tensor]:
    """Inputs of SigLIP 2: images of so many patches each, filled up to `tokens`."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.full((len(sizes), tokens, 48), 7.0)
    there = torch.zeros(len(sizes), tokens, dtype=torch.long)
    for image, (rows, columns) in enumerate(sizes):
        values[image, : rows * columns] = torch.randn(rows * columns, 48, generator=generator)
        there[image, : rows * columns] = 1
    return {"pixel_values": values, "pixel_attention_mask": there, "spatial_shapes": torch.tensor(sizes)}


def siglip2(**others) -> Siglip2VisionModel:
    torch.manual_seed(0)
    small = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4}
    model = Siglip2VisionModel(Siglip2VisionConfig(num_patches=25, patch_size=4, **small, **others)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    return model


@EACH_SELECTION
@EACH_REPRESENTATIVE
@torch.no_grad()
def test_a_padded_image_is_what_it_is_alone(representative, selection):
    """With as many slow tokens: their number goes by that of all tokens."""
    sizes = [(4, 5), (5, 4)]
    model = evopatch.apply(siglip2(), config=EvoConfig([0.5, 0.25], representative=representative, selection=selection))
    alone = model(**padded_to(20, sizes))
    evopatch.set_keep_ratio(model, [10 / 40, 5 / 40])
    assert [num_slow(40, ratio) for ratio in (10 / 40, 5 / 40)] == [10, 5]
    padded = model(**padded_to(40, sizes))
    torch.testing.assert_close(padded.pooler_output, alone.pooler_output, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(padded.last_hidden_state[:, :20], alone.last_hidden_state, atol=2e-5, rtol=2e-5)
    evopatch.set_keep_ratio(model, 1.0)
    assert moved(alone.pooler_output, model(**padded_to(20, sizes)).pooler_output) > 1e-3


@EACH_SELECTION
@EACH_REPRESENTATIVE
@torch.no_grad()
def test_where_fewer_are_left_than_are_slow_all_are(representative, selection):
    settings = EvoConfig([0.6, 0.4], representative=representative, selection=selection)
    model, inputs = siglip2(), padded_to(30, [(2, 3), (5, 6), (1, 1), (3, 5)])
    original = model(**inputs).pooler_output
    found = evopatch.apply(model, config=settings)(**inputs).pooler_output
    change = (found - original).abs().amax(1)
    assert (change[[0, 2]] < 2e-5).all()
    assert (change[[1, 3]] > 1e-4).all()
    alone = [model(**{name: value[[image]] for name, value in inputs.items()}).pooler_output for image in range(4)]
    torch.testing.assert_close(torch.cat(alone), found, atol=2e-5, rtol=2e-5)


@cases("attention", ["sdpa", "eager"], fast=["eager"])
@torch.no_grad()
def test_siglip2(attention):
    inputs, other = padded_to(30, [(4, 5), (5, 6)]), padded_to(30, [(2, 9), (3, 5)], seed=2)
    model = siglip2(attn_implementation=attention)
    original = model(**inputs).pooler_output
    evopatch.apply(model, keep_ratio=1.0)
    assert torch.equal(model(**inputs).pooler_output, original)
    evopatch.set_keep_ratio(model, 0.5)
    found = model(**inputs, output_hidden_states=True, output_attentions=attention == "eager")
    torch.testing.assert_close(found.pooler_output, model(**inputs).pooler_output, atol=2e-5, rtol=2e-5)
    assert {state.shape for state in found.hidden_states} == {(2, 30, 48)}
    if attention == "eager":
        for weights in found.attentions:
            assert weights[0, :, :20, 20:].abs().max() == 0
            torch.testing.assert_close(weights[0, :, :20].sum(-1), torch.ones(4, 20))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    exported = torch.export.export(model, (), inputs, strict=False).module()
    for given in (inputs, other):
        expected = model(**given).pooler_output
        torch.testing.assert_close(compiled(**given).pooler_output, expected, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(exported(**given).pooler_output, expected, atol=2e-5, rtol=2e-5)
    with pytest.raises(UnsupportedInputError, match="takes patches of images"):
        evopatch.token_selection(model, inputs.pop("pixel_values"), **inputs)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_of_checkpointed_layers(reentrant):
    inputs = padded_to(30, [(4, 5), (5, 6)])
    plain = evopatch.apply(siglip2()).train()
    saving = copy.deepcopy(plain)
    saving.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for model in (plain, saving):
        model(**inputs).pooler_output.square().sum().backward()
    for (name, expected), (_, found) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, atol=1e-4, rtol=1e-3, msg=name)


def test_a_checkpointed_block_of_timm():
    model, x, mask = evopatch.apply(build("vit")), images_for("vit"), mask_for("vit")
    expected = torch.autograd.grad(model(x, **mask).square().sum(), model.blocks[5].mlp.fc1.weight)[0]
    model.set_grad_checkpointing()
    found = torch.autograd.grad(
        checkpoint(model, x, use_reentrant=False, **mask).square().sum(), model.blocks[5].mlp.fc1.weight
    )
    torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=1e-3)


NOT_PADDING = {
    "causal": torch.ones(26, 26, dtype=torch.bool).tril(),
    "another one for every head": torch.cat(
        [torch.eye(26, dtype=torch.bool).logical_not()[None, i, None] for i in range(4)]
    ),
    "a position bias": torch.linspace(-3, 3, 26 * 26).view(26, 26),
    "without the class token": torch.arange(26).gt(0)[None],
    "for pairs": torch.ones(26, 26, dtype=torch.bool).triu(-5),
}


@pytest.mark.parametrize("kind", sorted(NOT_PADDING))
@pytest.mark.parametrize("name", ["vit", "rope"])
@torch.no_grad()
def test_other_masks_are_refused(name, kind):
    model, x = evopatch.apply(build(name)), images_for(name)
    for run in (model, model.forward_features, model.forward_intermediates):
        with pytest.raises(UnsupportedInputError, match=r"more than a key padding mask.*at block 0.*set_keep_ratio"):
            run(x, attn_mask=NOT_PADDING[kind])
    with pytest.raises(UnsupportedInputError, match=r"attn_mask of shape \(26, 25\)"):
        model(x, attn_mask=torch.ones(26, 25, dtype=torch.bool))


@pytest.mark.parametrize("kind", [pytest.param("causal"), pytest.param("for pairs", marks=pytest.mark.slow)])
@torch.no_grad()
def test_other_masks_are_refused_when_compiled(kind):
    model, x = evopatch.apply(build("vit", **shallow("vit"))), images_for("vit")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="more than a key padding mask"):
        compiled(x, attn_mask=NOT_PADDING[kind])


@torch.no_grad()
def test_other_masks_at_other_blocks_are_refused():
    model, x = evopatch.apply(build("vit")), images_for("vit")
    mask = torch.ones(1, 26, dtype=torch.bool)
    mask[:, 20:] = False
    other = mask.roll(-3)

    class Changes(type(model.blocks[2])):
        given: torch.Tensor | None

        def __call__(self, x, **options):
            return super().__call__(x, **options | {"attn_mask": self.given})

    model.blocks[2].__class__ = Changes
    for given, text in ((other, "another one at every block"), (None, "to some blocks only")):
        model.blocks[2].given = given
        with pytest.raises(UnsupportedInputError, match=f"{text}.* at block 2"):
            model(x, attn_mask=mask)
    model.blocks[2].given = mask.clone()
    assert torch.isfinite(model(x, attn_mask=mask)).all()


def test_masks_of_flash_attention_are_refused():
    model, x = evopatch.apply(build("hf_vit")), torch.randn(2, 26, 48)
    with pytest.raises(UnsupportedInputError, match=r"use model\.set_attn_implementation\('sdpa'\)"):
        model.vit.layers[0](x, torch.ones(2, 26, dtype=torch.long), **new_pass(model))
