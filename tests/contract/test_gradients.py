"""Training: checkpointing changes no gradient, forwards don't share state, and regularisation follows the mode."""

from contextlib import contextmanager

import pytest
import torch
from comparing import assert_same_gradients, checkpoint, gradients, moved
from matrix import FAST, REPRESENTATIVES, cases, config, every, patched
from timm import layers
from variants import EVERY, FLAT, PIT, PYRAMIDS, TRANSFORMERS, WINDOWED, build, call, images_for

import evopatch

# LeViT, EoMT and others of transformers, PiT, and torchvision's models, have no checkpointing.
CHECKPOINTING = EVERY - (PYRAMIDS & TRANSFORMERS) - PIT
CHECKPOINTING -= {"torchvision", "torchvision_swin", "torchvision_swinv2", "hf_sam3", "hf_pvt", "hf_eomt"}


def regularisation(name, rate):
    """The setting by which a model's blocks draw random numbers in training; "hf_sam" has none."""
    if name in ("hf_sam_eager", "hf_sam3"):
        return {"attention_dropout": rate}
    if name not in TRANSFORMERS & FLAT or "dino" in name or "registers" in name:
        return {"drop_path_rate": rate}
    attention = name in ("hf_clip", "hf_siglip", "hf_aimv2", "hf_blip", "hf_blip2", "hf_x_clip")
    return {"attention_dropout": rate} if attention else {"hidden_dropout_prob": rate}


def windowed_regularisation(name):
    """DropPath, for a recomputed block has to draw the same."""
    return regularisation(name, 0.2) if name in WINDOWED else {}


MODES = [(representative, selection) for representative in REPRESENTATIVES for selection in ("stage", "layer")]
ROWS = [
    (name, *mode)
    for name in sorted(CHECKPOINTING)
    for mode in MODES
    # Of windowed models either kind of representative with either kind of selection.
    if name not in WINDOWED or mode not in (("single", "layer"), ("none", "stage"))
]
FAST_ROWS = [row for row in ROWS if row[0] in FAST and row[1:] in (("matched", "stage"), ("single", "layer"))]
FAST_ROWS += [row for row in ROWS if row[0] in FAST & WINDOWED and row[1:] == ("single", "stage")]


@cases(("name", "representative", "selection"), ROWS, fast=FAST_ROWS)
def test_gradient_checkpointing_changes_no_gradient(name, representative, selection):
    options, x = windowed_regularisation(name), images_for(name).requires_grad_()
    original = gradients(build(name, **options).train(), x)
    model = patched(name, config(representative, selection), **options).train()
    plain = gradients(model, x)
    checkpoint(model)
    checkpointed = gradients(model, x)
    # Without a representative nothing may be left for a windowed block's parameters to do.
    assert plain.keys() == original.keys() or (name in WINDOWED and plain.keys() < original.keys())
    assert_same_gradients(name, checkpointed, plain)
    assert max(moved(plain[p], original[p]) for p in plain) > 1e-3


@contextmanager
def reentrant(model):
    checkpoint(model, reentrant=True)
    switch = getattr(layers, "set_reentrant_ckpt", lambda on: None)  # which older versions of timm always are
    switch(True)
    try:
        yield
    finally:
        switch(False)


# timm's others pass keywords; transformers' PVT v2 checkpoints the embedding of its images, which need no gradient.
REENTRANT = {"vit", "gap", "dinov2", "parallel"} | ((TRANSFORMERS & FLAT | WINDOWED) & CHECKPOINTING)
REENTRANT -= {"hf_pvt_v2", "hf_pvt_v2_backbone"}


@every(REENTRANT)
def test_reentrant_checkpointing_changes_no_gradient(name):
    model = patched(name, **windowed_regularisation(name)).train()
    x = images_for(name).requires_grad_()
    plain = gradients(model, x)
    with reentrant(model):
        checkpointed = gradients(model, x)
    assert_same_gradients(name, checkpointed, plain)
    assert any(gradient.abs().max() > 1e-3 for gradient in plain.values())


@pytest.mark.parametrize("name", ["hf_swin", "hf_swinv2", "hf_donut", "hf_swin_backbone", "hf_swinv2_backbone"])
def test_checkpointed_stages_keep_less(name):
    """The stages really are checkpointed while patched."""
    model, x = evopatch.apply(build(name).train()), images_for(name)

    def kept():
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            call(model, x)
        return sum(saved)

    plain = kept()
    checkpoint(model)
    assert kept() < plain / 3


TWICE = CHECKPOINTING - WINDOWED | {"swin", "swinv2", "swinv2_cr", "hf_swin", "hf_swinv2"}
TWICE |= {"pvt_v2", "hf_pvt_v2", "hf_segformer"}


@every(TWICE)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_forwards_before_one_backward(name, checkpointing):
    model = patched(name).train()
    if checkpointing:
        checkpoint(model)
    a, b = images_for(name, seed=1), images_for(name, seed=2)
    first, second = gradients(model, a), gradients(model, b)
    separate = {n: gradient + second[n] for n, gradient in first.items()}
    model.zero_grad()
    losses = []
    for x in (a, b):
        torch.manual_seed(0)  # some have dropout in all of their settings
        losses.append(call(model, x).square().sum())
    evopatch.set_keep_ratio(model, 0.4)  # what was begun ends as it began
    sum(losses).backward()
    assert_same_gradients(name, {n: model.get_parameter(n).grad for n in separate}, separate)
    assert any(g.abs().max() > 1e-3 for g in separate.values())


@every(EVERY - {"hf_sam"})
def test_training_with_drop_path(name):
    model, x = build(name, **regularisation(name, 0.3)).train(), images_for(name, 8)
    evopatch.apply(model)
    torch.manual_seed(3)
    first = call(model, x)
    torch.manual_seed(3)
    assert torch.equal(call(model, x), first)
    torch.manual_seed(4)
    assert moved(call(model, x), first) > 1e-5
    grads = gradients(model, x)
    assert grads
    assert all(torch.isfinite(g).all() for g in grads.values())
    model.eval()
    assert torch.equal(call(model, x), call(model, x))


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        *((name, "attn_drop_rate") for name in ("vit", "parallel", "eva", "diff", "swin", "swinv2", "swinv2_cr")),
        *((name, "attention_probs_dropout_prob") for name in ("hf_vit", "hf_vit_eager", "hf_deit", "hf_dinov2")),
        *((name, "attention_probs_dropout_prob") for name in ("hf_swin", "hf_swinv2", "hf_donut")),
        *((name, "attention_dropout") for name in ("torchvision_swin", "hf_clip", "hf_dinov3")),
    ],
)
@torch.no_grad()
def test_attention_dropout_follows_the_mode(name, setting):
    model, x = build(name, **{setting: 0.5}), images_for(name)
    assert torch.equal(call(evopatch.apply(model), x), call(model, x))
    model.train()
    assert moved(call(model, x), call(model, x)) > 1e-4
    model.eval()
    assert torch.equal(call(model, x), call(model, x))
