"""Images that a model doesn't take, given to whatever runs it on images: an error of evopatch, the model as it was."""

import pytest
import torch
from variants import build

import evopatch
from evopatch import DataError, EvoConfig

CALLS = {
    "apply": lambda model, x: evopatch.apply(evopatch.remove(model), images=x),
    "skip_slow": lambda model, x: evopatch.apply(evopatch.remove(model), skip_slow=x),
    "calibrate": lambda model, x: evopatch.calibrate(model, x, target_flops=0.7, budget=1, progress=False),
    "benchmark": lambda model, x: evopatch.benchmark(model, x, rounds=1, warm_up=1),
    "verify": lambda model, x: evopatch.verify(model, x),
    "profile": lambda model, x: evopatch.profile(model, tuple(x.shape[1:])),
    "token_selection": lambda model, x: evopatch.token_selection(model, x),
}
NEEDS_SEVERAL = ("apply", "calibrate", "verify")
ALONE = ("profile", "token_selection")


@pytest.mark.parametrize("name", ["vit", "hf_vit", "hf_swin"])
@pytest.mark.parametrize("call", CALLS)
def test_of_another_size(name, call):
    model, config = evopatch.apply(build(name)), EvoConfig()
    # Swin takes any size, and no other number of channels.
    x = torch.rand(8, 5, 48, 48) if name == "hf_swin" else torch.rand(8, 3, 48, 48)
    with pytest.raises(
        DataError, match=r"doesn't run on images \(\d+, [35], 48, 48\) torch\.float32 on cpu: \w+: .*48"
    ):
        CALLS[call](model, x)
    assert evopatch.is_patched(model) is (call not in ("apply", "skip_slow"))
    assert call in ("apply", "skip_slow") or evopatch.config_of(model) == config


@pytest.mark.parametrize("call", [call for call in CALLS if call != "profile"])
@pytest.mark.parametrize("x", [torch.zeros(9, 3, 40, 40, dtype=torch.uint8), torch.rand(3, 40, 40), "images"])
def test_that_are_none(call, x):
    with pytest.raises(DataError, match="[eE]xpected"):
        CALLS[call](evopatch.apply(build("vit")), x)


@pytest.mark.parametrize("call", NEEDS_SEVERAL)
def test_that_are_too_few(call):
    with pytest.raises(DataError, match="at least"):
        CALLS[call](evopatch.apply(build("vit")), torch.rand(1, 3, 40, 40))


@pytest.mark.parametrize("call", [call for call in CALLS if call not in ALONE])
def test_of_another_type(call):
    model = evopatch.apply(build("vit"))
    if call in ("calibrate", "verify"):  # which bring the images to the model's type
        CALLS[call](model, torch.rand(8, 3, 40, 40, dtype=torch.float64))
        return
    with pytest.raises(DataError, match=r"doesn't run on images .* torch\.float64 on cpu: RuntimeError: .*double"):
        CALLS[call](model, torch.rand(8, 3, 40, 40, dtype=torch.float64))
