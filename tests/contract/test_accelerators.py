"""Shapes that suit accelerators: rows filled up with zeros, transposed products. The results are the same."""

import torch
from comparing import assert_same_gradients, gradients
from matrix import every, patched
from variants import EVERY, REDUCED, call, images_for

from evopatch.algorithm import importance, rows


@every(EVERY - REDUCED)  # the whole map answers there, without sizes
def test_the_same_as_on_the_cpu(name, monkeypatch):
    model, x = patched(name), images_for(name)
    with torch.no_grad():
        expected = call(model, x)
    expected_gradients = gradients(model, x)
    asked = []
    for module in (rows, importance):
        monkeypatch.setattr(module, "on_accelerator", lambda values: asked.append(values) is None)
    with torch.no_grad():
        torch.testing.assert_close(call(model, x), expected, atol=1e-5, rtol=1e-4)
    assert_same_gradients(name, gradients(model, x), expected_gradients)
    assert asked
