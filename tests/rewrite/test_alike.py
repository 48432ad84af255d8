"""Blocks that are alike are traced once, and those that aren't are traced for themselves."""

import pytest
import torch
from comparing import moved
from torch import nn
from variants import build, call, images_for

import evopatch
from evopatch.patching import adapter
from evopatch.rewrite.alike import fingerprint

NAMES = ["vit", "hf_vit", "qk_norm", "eva", "hf_dinov2"]


def attentions(model):
    return [m for m in model.modules() if type(m).__name__.endswith(("Attention", "AttentionRope"))]


def heads_of(module):
    return "num_heads" if hasattr(module, "num_heads") else "num_attention_heads"


def with_other_heads(name):
    """A model whose third block has half as many heads, twice as wide."""
    model = build(name)
    attention = attentions(model)[2]
    head_size = "head_dim" if hasattr(attention, "head_dim") else "attention_head_size"
    setattr(attention, heads_of(attention), getattr(attention, heads_of(attention)) // 2)
    setattr(attention, head_size, getattr(attention, head_size) * 2)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_equal_blocks_are_traced_once(name, monkeypatch):
    traced = []
    real = adapter._generate
    monkeypatch.setattr(adapter, "_generate", lambda block, *rest: traced.append(block) or real(block, *rest))
    evopatch.apply(build(name))
    assert len(traced) == 1


@pytest.mark.parametrize("name", ["vit", "hf_vit"])
@torch.no_grad()
def test_a_block_with_other_settings_runs_by_its_own(name, monkeypatch):
    x = images_for(name)
    found = call(evopatch.apply(with_other_heads(name)), x)
    monkeypatch.setattr(adapter, "fingerprint", lambda block: object())  # every block for itself
    assert torch.equal(call(evopatch.apply(with_other_heads(name)), x), found)
    monkeypatch.setattr(adapter, "fingerprint", lambda block: "alike")  # the control: all by the first one's code
    assert moved(call(evopatch.apply(with_other_heads(name)), x), found) > 1e-4


def test_what_tells_modules_apart():
    def block():
        return nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))

    assert fingerprint(block()) == fingerprint(block())
    assert fingerprint(block()) == fingerprint(block().eval())
    changed = [block() for _ in range(6)]
    changed[0][1].p = 0.2
    changed[1][0] = nn.Linear(4, 4, bias=False)
    changed[2][1] = nn.Identity()
    changed[3].register_forward_hook(lambda *_: None)
    changed[4][0].forward = lambda x: x
    changed[5].append(nn.Identity())
    assert len({fingerprint(module) for module in (block(), *changed)}) == 7
