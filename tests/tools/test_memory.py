"""What patched models need at their peak: no more than unpatched ones, and less in training."""

import functools

import pytest
import timm
import torch
from matrix import cases, config

import evopatch
from evopatch.measure.memory import peak_memory

# Sizes of tensors alone, so on a device that computes nothing.
META = torch.device("meta")
NAMES = [
    "deit_small_patch16_224",
    "vit_base_patch14_dinov2",
    "vit_relpos_base_patch16_224",
    "levit_128s",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
]
ROWS = [(name, *mode) for name in NAMES for mode in (("matched", "stage"), ("single", "stage"), ("none", "layer"))]
FAST = ["deit_small_patch16_224", "levit_128s", "swin_tiny_patch4_window7_224"]


def peak(model, batch, train):
    x = torch.empty(batch, *model.pretrained_cfg["input_size"], device=META)
    model.train(train)

    def step():
        out = model(x)
        if train:
            out.sum().backward()
            model.zero_grad()

    with torch.set_grad_enabled(train):
        return peak_memory(step, META)


@functools.cache
def unpatched(name, batch, train):
    return peak(timm.create_model(name, device="meta"), batch, train)


@cases(("name", "representative", "selection"), ROWS, fast=FAST)
@pytest.mark.filterwarnings("ignore::evopatch.errors.SpeedWarning")
def test_a_patched_model_needs_no_more_memory(name, representative, selection):
    model = timm.create_model(name, device="meta")
    evopatch.apply(model, config=config(representative, selection))
    assert peak(model, 2, train=False) <= 1.05 * unpatched(name, 2, False)
    assert peak(model, 32, train=True) < 0.95 * unpatched(name, 32, True)


@cases(
    "name",
    ["deit_tiny_patch16_224", "cait_xxs24_224", "pit_s_224", "vit_base_patch16_siglip_224"],
    fast=["deit_tiny_patch16_224", "cait_xxs24_224"],
)
@pytest.mark.parametrize("selection", ["stage", "layer"])
def test_nor_where_most_tokens_are_slow(name, selection):
    """A compact set of nearly all tokens saves little, and all tokens are kept beside it until its run ends."""
    model = timm.create_model(name, device="meta")
    evopatch.apply(model, config=evopatch.EvoConfig(keep_ratio=0.9, selection=selection))
    assert peak(model, 2, train=False) <= 1.05 * unpatched(name, 2, False)


@cases(
    ("name", "keep_ratio"),
    [("levit_128s", 0.6), ("levit_256", 0.6), ("samvit_base_patch16", 0.9)],
    fast=["levit_128s"],
)
@pytest.mark.filterwarnings("ignore::evopatch.errors.SpeedWarning")
def test_nor_where_the_compact_set_needs_more_than_its_tokens(name, keep_ratio):
    """LeViT's position biases, one table unpatched, are merged for each image; SAM's windows are padded."""
    model = timm.create_model(name, device="meta")
    evopatch.apply(model, keep_ratio=keep_ratio)
    assert peak(model, 2, train=False) <= 1.05 * unpatched(name, 2, False)


def test_one_that_keeps_more_is_noticed():
    model = timm.create_model("deit_small_patch16_224", device="meta")
    kept = []
    model.blocks[3].mlp.register_forward_hook(lambda module, args, out: kept.append(out.repeat(1, 2, 2)))
    assert peak(model, 2, train=False) > 1.05 * unpatched("deit_small_patch16_224", 2, False)
