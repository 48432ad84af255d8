"""Copies of a patched model: deepcopy, pickle, torch.save, moving averages."""

import copy
import io
import pickle

import torch
from comparing import moved
from matrix import every
from timm.utils import ModelEmaV3
from variants import EVERY, build, call, images_for

import evopatch


@every(EVERY)
@torch.no_grad()
def test_deepcopy_pickle_and_ema_after_a_forward(name):
    model, x = evopatch.apply(build(name)), images_for(name)
    expected = call(model, x)
    twins = [copy.deepcopy(model), ModelEmaV3(model).module]
    if "backbone" not in name:  # transformers' hooks that record hidden states don't pickle, unpatched either
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twins += [pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for twin in twins:
        assert type(twin) is type(model)
        assert torch.equal(call(twin, x), expected)
        evopatch.set_keep_ratio(twin, 0.25)
        assert moved(call(twin, x), expected) > 1e-5
        assert torch.equal(call(model, x), expected)
        evopatch.remove(twin)
        assert evopatch.is_patched(model)
