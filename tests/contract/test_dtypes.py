"""Half precision and autocast stay near to float32."""

import copy

import pytest
import torch
from comparing import moved
from matrix import FAST, by_representative, cases, config, patched
from variants import EVERY, WINDOWED, build, call, images_for

import evopatch

ROWS = by_representative(EVERY, WINDOWED)


def cosine(a, b):
    return torch.cosine_similarity(a.float().flatten(), b.float().flatten(), dim=0).item()


@cases(("name", "representative"), ROWS, fast=FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(name, dtype, representative):
    model, x = build(name), images_for(name)
    reference = call(model, x)
    # LeViT keeps position biases, in the former type, until it trains.
    half = evopatch.apply(copy.deepcopy(model).to(dtype).train().eval(), config=config(representative))
    result = call(half, x.to(dtype))
    assert result.dtype == dtype
    assert torch.isfinite(result).all()
    expected = call(patched(name, config(representative)), x)
    # Half precision may choose a few other tokens or windows; it must stay near to its own float32 result.
    assert cosine(result, expected) > 0.7
    if name not in WINDOWED:
        evopatch.set_keep_ratio(half, 1.0)
        stock = moved(call(half, x.to(dtype)).float(), reference)
        assert moved(result.float(), expected) < max(4 * stock, 0.5 * expected.abs().max().item())


@cases(("name", "representative"), ROWS, fast=FAST)
@torch.no_grad()
def test_autocast(name, representative):
    model, x = patched(name, config(representative)), images_for(name)
    expected = call(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        result = call(model, x)
    assert torch.isfinite(result).all()
    assert not torch.equal(result.float(), expected), "nothing was cast"
    assert cosine(result, expected) > 0.7
    if name not in WINDOWED:
        assert moved(result.float(), expected) < 0.5 * expected.abs().max().item()
