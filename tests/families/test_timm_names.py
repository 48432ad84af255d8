"""Every name of timm's ViT, DeiT, LeViT, PiT and Swin families."""

import importlib
import re

import pytest
import timm
import torch
from comparing import moved
from evopatch_timm import refusals
from matrix import REPRESENTATIVES, config, every
from variants import calibrate

import evopatch

NAMES = {name for family in ("vit_*", "deit*", "levit*", "pit_*") for name in timm.list_models(family)}
SWIN_NAMES = {*timm.list_models("swin_*"), *timm.list_models("swinv2*")}
FAST = ("vit_tiny_patch16_224", "vit_small_patch14_dinov2", "deit_tiny_distilled_patch16_224", "levit_128s")
FAST += ("pit_ti_224",)
SWIN_FAST = ("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224")
SHRUNK = {"embed_dim": 16, "num_heads": (2, 2, 4, 4), "depths": (2, 2, 2, 2)}
SHALLOW = {"vit": {"depth": 6}, "deit": {"depth": 6}, "deit3": {"depth": 6}}
"""By the first part of a name. Sapiens 2 says of every block what is in it."""
SMALL = 30_000_000
SHAPED, SEEN = set(), set()
"""Structures that this process has run without values and with them: their other names differ in sizes, mostly."""


def test_the_families_are_as_large_as_expected():
    assert len(timm.list_models("vit_*")) >= 214
    assert len(timm.list_models("deit*")) >= 16
    assert len(timm.list_models("levit*")) >= 20
    assert len(timm.list_models("pit_*")) >= 8
    assert len(timm.list_models("swin_*")) >= 9
    assert len(timm.list_models("swinv2*")) >= 28
    assert NAMES.issuperset(FAST)
    assert SWIN_NAMES.issuperset(SWIN_FAST)


def create(name, device, **settings):
    model = timm.create_model(name, device=device, **settings).eval()
    return model, torch.empty(1, *model.pretrained_cfg["input_size"], device=device)


def shallow(name):
    return {} if "sapiens2" in name else SHALLOW.get(name.partition("_")[0], {})


def structure_of(model):
    """What kinds of modules are where, and what says how they are used: flags, numbers of prefix tokens, pooling."""
    parts = {(re.sub(r"\d+", "#", path), type(module)) for path, module in model.named_modules()}
    flags = {
        (key, value)
        for module in model.modules()
        for key, value in vars(module).items()
        if key != "training" and isinstance(value, (bool, str)) and not key.startswith("_")
    }
    prefix = getattr(model, "num_prefix_tokens", None), getattr(model, "num_reg_tokens", None)
    return frozenset(parts | flags | {("prefix", prefix)})


def test_structures_are_told_apart():
    names = ("vit_tiny_patch16_224", "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "levit_128s")
    structures = {structure_of(create(name, "meta")[0]) for name in (*names, "deit_tiny_distilled_patch16_224")}
    assert len(structures) == 5
    assert structure_of(create("vit_base_patch16_224", "meta")[0]) in structures  # as vit_tiny_patch16_224


@every(NAMES, fast=FAST)
@torch.no_grad()
def test_name(name):
    model, x = create(name, "meta", **shallow(name))
    structure = structure_of(model)
    if name not in FAST and structure in SHAPED:
        assert evopatch.is_patched(evopatch.apply(model, keep_ratio=0.5))
    else:
        SHAPED.add(structure)
        shape = model(x).shape
        evopatch.apply(model, keep_ratio=0.5)
        assert model(x).shape == shape  # on the meta device nothing can wait for a value
    if name in FAST:
        blocks = [path for path, _ in model.named_modules() if re.search(r"blocks\.\d+$", path)]
        assert evopatch.token_selection(model, x).shape[1] == len(blocks)
    if structure in SEEN or sum(p.numel() for p in model.parameters()) > SMALL:
        return
    SEEN.add(structure)
    torch.manual_seed(0)
    model, x = create(name, "cpu", **shallow(name))
    # Fresh LayerScale weights are so small that no block would matter.
    for parameter_name, parameter in model.named_parameters():
        if "gamma" in parameter_name or ".norm" in parameter_name:
            parameter.fill_(0.5)
    x.normal_()
    if name.startswith("levit"):  # whose norms begin at 0
        calibrate(model, torch.randn(4, *x.shape[1:]))
    original = model.forward_features(x)
    evopatch.apply(model, keep_ratio=1.0)
    assert torch.equal(model.forward_features(x), original)
    evopatch.set_keep_ratio(model, 0.5)
    changed = model.forward_features(x)
    assert torch.isfinite(changed).all()
    assert moved(changed, original) > 1e-5 * original.abs().max()


@every(SWIN_NAMES, fast=SWIN_FAST)
@torch.no_grad()
def test_name_of_swin(name):
    model, x = create(name, "meta")
    shape = model(x).shape
    evopatch.apply(model, keep_ratio=0.5)
    assert model(x).shape == shape  # on the meta device nothing can wait for a value
    torch.manual_seed(0)
    model, x = create(name, "cpu", **SHRUNK)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    x.normal_()
    original = model.forward_features(x)
    structure = structure_of(model)
    representatives = REPRESENTATIVES[:1] if structure in SEEN and name not in SWIN_FAST else REPRESENTATIVES
    SEEN.add(structure)
    for representative in representatives:
        evopatch.apply(model, config=config(representative))
        changed = model.forward_features(x)
        assert torch.isfinite(changed).all()
        assert moved(changed, original) > 1e-5 * original.abs().max()
        evopatch.remove(model)
    evopatch.apply(model, keep_ratio=1.0)
    assert torch.equal(model.forward_features(x), original)


@pytest.mark.parametrize("name", ["convit_tiny", "xcit_nano_12_p8_224", "hiera_tiny_224"])
def test_what_is_known_not_to_be_served_says_why(name):
    model = timm.create_model(name, device="meta")
    reason = refusals.why_not(model)
    assert reason
    with pytest.raises(evopatch.UnsupportedModelError, match=f"found nothing .*: {type(model).__name__} {reason}"):
        evopatch.apply(model)


def test_every_class_with_a_reason_exists():
    for module, name in refusals._REASONS:
        assert hasattr(importlib.import_module(f"timm.models.{module}"), name), (module, name)
