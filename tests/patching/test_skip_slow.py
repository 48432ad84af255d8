"""Runs of blocks that don't make a model faster are left alone, where that is asked for."""

import time
import warnings

import pytest
import torch
from variants import build, call, images_for

import evopatch
from evopatch.patching import skipping
from evopatch.patching.handle import Patched


def timed(monkeypatch, costs):
    """Forwards take as long as these runs cost, and what they save, say.

    Args:
        costs: By run, the seconds that it takes longer than unpatched.
    """
    seen = []

    def alternate(calls, device, rounds, warm_up=1):
        found = {}
        for key, forward in calls.items():
            (host,) = Patched(forward.args[0]).hosts.values()
            forward()
            used = [cost for cost, ratio in zip(costs, host.state.config.keep_ratio, strict=True) if ratio < 1.0]
            seen.append(host.state.config.keep_ratio)
            found[key] = [1.0 + sum(used)] * rounds
        return found

    monkeypatch.setattr(skipping, "alternate", alternate)
    return seen


@pytest.mark.parametrize("name", ["levit", "vit", "swin", "hf_vit"])
@torch.no_grad()
def test_only_faster_runs_are_kept(name, monkeypatch):
    x = images_for(name, 1)
    plain = evopatch.apply(build(name))
    expected = Patched(plain).host.state.written_out().keep_ratio
    others = len(expected) - 3  # a Swin has a run per block
    timed(monkeypatch, [0.1, -0.2, 0.05, *[0.1] * others])
    model = evopatch.apply(build(name), skip_slow=x)
    config = evopatch.config_of(model)
    assert config.keep_ratio == (1.0, expected[1], 1.0, *[1.0] * others)
    same = evopatch.apply(build(name), config=config)
    assert torch.equal(call(model, x), call(same, x))
    assert not torch.equal(call(model, x), call(plain, x))


@torch.no_grad()
def test_written_out_settings_are_the_same_settings():
    for name in ("vit", "levit", "swin"):
        for config in (evopatch.EvoConfig(), evopatch.EvoConfig(keep_ratio=0.3, stages=2), evopatch.EvoConfig.paper()):
            state = Patched(evopatch.apply(build(name), config=config)).host.state
            assert state.plan(state.written_out()) == state.plans


@torch.no_grad()
def test_a_model_that_is_slower_in_all_is_the_unpatched_one(monkeypatch):
    model, x = build("levit"), images_for("levit", 1)
    expected = call(model, x)
    timed(monkeypatch, [0.1, 0.0, 0.1])  # no slower isn't faster
    with warnings.catch_warnings():
        warnings.simplefilter("error", evopatch.SpeedWarning)
        evopatch.apply(model, skip_slow=x)
    assert evopatch.config_of(model).keep_ratio == (1.0, 1.0, 1.0)
    assert torch.equal(call(model, x), expected)
    evopatch.set_keep_ratio(model, 0.5)
    assert not torch.equal(call(model, x), expected)


@torch.no_grad()
def test_runs_that_are_faster_one_by_one_and_not_together(monkeypatch):
    model, x = build("vit"), images_for("vit", 1)
    seconds = {3: 1.1, 2: 1.2, 1: 0.9, 0: 1.0}  # by the number of runs

    def alternate(calls, device, rounds, warm_up=1):
        hosts = {key: Patched(forward.args[0]).host for key, forward in calls.items()}
        number = {key: sum(ratio < 1.0 for ratio in host.state.config.keep_ratio) for key, host in hosts.items()}
        return {key: [seconds[number[key]]] * rounds for key in calls}

    monkeypatch.setattr(skipping, "alternate", alternate)
    evopatch.apply(model, skip_slow=x)
    assert evopatch.config_of(model).keep_ratio == (1.0, 1.0, 1.0)


@torch.no_grad()
def test_it_is_measured(monkeypatch):
    """A block that takes its time for every token: fewer are faster."""
    monkeypatch.setattr(skipping, "_SECONDS", 0.0)
    model, x = build("vit"), images_for("vit", 1)

    class Waiting(torch.nn.Identity):
        def forward(self, x):
            time.sleep(x.shape[1] * 2e-3)
            return x

    model.blocks[4].mlp.norm = Waiting()
    evopatch.apply(model, skip_slow=x)
    assert evopatch.config_of(model).keep_ratio[-1] < 1.0


@pytest.mark.parametrize(
    ("images", "text"),
    [
        (
            torch.zeros(3, 40, 40),
            r"skip_slow is \(3, 40, 40\) torch.float32 on cpu: expected a tensor \(B, 3, height, width\)",
        ),
        (torch.zeros(0, 3, 40, 40), r"skip_slow is \(0, 3, 40, 40\)"),
        (True, "skip_slow is a bool"),
    ],
)
def test_no_images(images, text):
    model = build("vit")
    with pytest.raises(evopatch.DataError, match=text):
        evopatch.apply(model, skip_slow=images)
    assert not evopatch.is_patched(model)


def test_what_fails_leaves_the_model_unpatched():
    model = build("vit")
    with pytest.raises(evopatch.DataError, match=r"doesn't run on images \(1, 3, 48, 48\).*Input height"):
        evopatch.apply(model, skip_slow=torch.zeros(1, 3, 48, 48))
    assert not evopatch.is_patched(model)
