"""On a GPU, in eager mode, a patched model says once that its host may be too slow for few images."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from matrix import every, patched
from variants import call, images_for

import evopatch
from evopatch.forward import launches, ranking, windowed


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    launches._say_once.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    yield
    launches._say_once.cache_clear()


def on(device, numbers):
    """What is asked of a tensor, where there is no such device."""
    return SimpleNamespace(device=torch.device(device), numel=lambda: numbers)


def test_few_numbers_on_a_gpu_are_warned_of_once():
    few = on("cuda", 32 * 197 * 1024)
    with pytest.warns(evopatch.SpeedWarning, match="reduce-overhead"):
        launches.warn_if_launches_count(few)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launches.warn_if_launches_count(few)


@pytest.mark.parametrize("quiet", ["large", "cpu", "captured", "recorded"])
def test_nothing_is_said_where_the_host_is_fast_enough(quiet, monkeypatch):
    asked = on("cpu" if quiet == "cpu" else "cuda", 256 * 197 * 768 if quiet == "large" else 100)
    if quiet == "captured":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    if quiet == "recorded":
        monkeypatch.setattr(launches, "exporting", lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launches.warn_if_launches_count(asked)


@every(["vit", "levit", "swin", "sam", "pvt_v2"])
def test_asked_where_a_run_begins(name, monkeypatch):
    asked = []
    for module in (ranking, windowed):
        monkeypatch.setattr(module, "warn_if_launches_count", lambda x: asked.append(x.shape))
    call(patched(name), images_for(name))
    assert asked
    assert all(len(shape) == 3 for shape in asked)
