"""Shapes that suit accelerators: rows filled up with zeros, transposed products. The results are the same."""

import torch
from comparing import assert_same_gradients, gradients
from matrix import cases, every, patched
from variants import EVERY, REDUCED, call, images_for

from evopatch.algorithm import importance, rows, selection


@every(EVERY - REDUCED)  # the whole map answers there, without sizes
def test_the_same_as_on_the_cpu(name, monkeypatch):
    model, x = patched(name), images_for(name)
    with torch.no_grad():
        expected = call(model, x)
    expected_gradients = gradients(model, x)
    asked = as_there(monkeypatch)
    with torch.no_grad():
        torch.testing.assert_close(call(model, x), expected, atol=1e-5, rtol=1e-4)
    assert_same_gradients(name, gradients(model, x), expected_gradients)
    assert asked


@cases("name", ["vit", "levit", "swin", "hf_dinov2"], fast=["vit", "swin"])
@torch.no_grad()
def test_compiled(name, monkeypatch):
    torch._dynamo.reset()
    model, x = patched(name), images_for(name)
    expected = call(model, x)
    asked = as_there(monkeypatch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(call(compiled, x), expected, atol=2e-5, rtol=2e-5)
    assert asked


def as_there(monkeypatch):
    """Tensors count as those of an accelerator; gives those that were asked about."""
    asked = []
    for module in (rows, importance, selection):
        monkeypatch.setattr(module, "on_accelerator", lambda values: asked.append(values) is None)
    return asked
