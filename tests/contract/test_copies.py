"""Copies of a patched model: deepcopy, pickle, torch.save, moving averages, other settings."""

import copy
import io
import pickle

import torch
from comparing import gradients, moved
from matrix import REPRESENTATIVES, config, every, patched
from timm.utils import ModelEmaV3
from variants import EVERY, build, call, images_for

import evopatch


@every(EVERY)
@torch.no_grad()
def test_deepcopy_pickle_and_ema_after_a_forward(name):
    model, x = evopatch.apply(build(name)), images_for(name)
    expected = call(model, x)
    twins = [copy.deepcopy(model), ModelEmaV3(model).module]
    if not name.endswith(
        ("backbone", "dense")
    ):  # transformers' hooks that record hidden states don't pickle, unpatched either
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twins += [pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for twin in twins:
        assert type(twin) is type(model)
        assert torch.equal(call(twin, x), expected)
        evopatch.set_keep_ratio(twin, 0.3)
        assert moved(call(twin, x), expected) > 1e-5
        assert torch.equal(call(model, x), expected)
        evopatch.remove(twin)
        assert evopatch.is_patched(model)


@every(EVERY)
def test_changed_settings_are_those_applied(name):
    """A copy that is given other settings is, to the bit, what applying them gives; in training too."""
    x, results = images_for(name), []
    modes = [
        config(representative, selection) for representative in REPRESENTATIVES for selection in ("stage", "layer")
    ]
    for settings in modes:
        applied, changed = evopatch.apply(build(name), config=settings), patched(name, settings)
        assert evopatch.config_of(changed) == settings
        with torch.no_grad():
            results.append(call(applied, x))
            assert torch.equal(call(changed, x), results[-1])
    expected, found = gradients(applied.train(), x), gradients(changed.train(), x)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[parameter], gradient) for parameter, gradient in expected.items())
    assert all(moved(a, b) > 1e-6 for a, b in zip(results[::2], results[2::2], strict=False))
