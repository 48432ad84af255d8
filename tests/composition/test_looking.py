"""What looks into a patched model: attributions see every token, and counters count what they see."""

import copy

import pytest
import torch
from comparing import moved
from variants import build, images_for

import evopatch

TOKENS = 26


def test_attributions_of_captum():
    attribution = pytest.importorskip("captum.attr")
    model, x = evopatch.apply(build("vit")), images_for("vit")
    plain = model(x)
    seen = attribution.LayerActivation(model, model.blocks[4].norm1).attribute(x)
    assert seen.shape == (2, TOKENS, 48)
    cam = attribution.LayerGradCam(model, model.blocks[4].norm1).attribute(x, target=1)
    assert cam.shape[-1] == 48 or cam.shape[1] == 1
    assert cam.abs().sum() > 0
    pixels = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(pixels)[:, 1].sum(), pixels)
    found = attribution.Saliency(model).attribute(x, target=1, abs=False)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(model(x), plain)


def test_integrated_gradients_of_captum_do_not_add_up():
    """Which tokens merge changes along the way from the baseline, in steps that no gradient sees."""
    attribution = pytest.importorskip("captum.attr")
    model, x = evopatch.apply(build("vit")), images_for("vit")

    def missing(keep_ratio):
        evopatch.set_keep_ratio(model, keep_ratio)
        integrated = attribution.IntegratedGradients(model)
        _, delta = integrated.attribute(x, target=1, n_steps=100, return_convergence_delta=True)
        return delta.abs().max().item()

    assert missing(0.5) > 10 * missing(1.0)


def test_maps_of_pytorch_grad_cam():
    grad_cam = pytest.importorskip("pytorch_grad_cam")
    model, x = evopatch.apply(build("vit")), images_for("vit")
    seen = []

    def as_map(tokens):
        seen.append(tokens.shape[1])
        return tokens[:, 1:].transpose(1, 2).reshape(len(tokens), -1, 5, 5)

    with grad_cam.GradCAM(model, [model.blocks[-2].norm1], reshape_transform=as_map) as cam:
        found = cam(x, targets=None)
    assert set(seen) == {TOKENS}
    assert found.shape == (2, 40, 40)
    assert found.std() > 0.01


@torch.no_grad()
def counted(tool, model, x):
    if tool == "thop":
        return pytest.importorskip("thop").profile(copy.deepcopy(model), (x,), verbose=False)[0]
    if tool == "torchinfo":
        return pytest.importorskip("torchinfo").summary(copy.deepcopy(model), input_data=x, verbose=0).total_mult_adds
    analysis = pytest.importorskip("fvcore.nn").FlopCountAnalysis(model, x)
    return analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total()


@pytest.mark.parametrize("tool", ["thop", "torchinfo", "fvcore"])
def test_counters_of_operations_do_not_count_what_is_saved(tool):
    """They count by hooks, or have some, and those see all tokens."""
    model, x = evopatch.apply(build("vit")), images_for("vit")
    assert counted(tool, model, x) > 0.95 * counted(tool, build("vit"), x)
    assert evopatch.profile(model, (3, 40, 40)).ratio < 0.75
    assert moved(model(x), build("vit")(x)) > 1e-4
