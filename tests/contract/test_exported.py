"""torch.export and ONNX of one size give what the model itself gives, which still runs eagerly after."""

import pytest
import torch
from comparing import moved
from matrix import REPRESENTATIVES, by_representative, cases, config
from variants import FLAT, PYRAMIDS, build, call, images_for

import evopatch

WINDOWED = ("swin", "swinv2", "swinv2_cr", "hf_swin", "hf_swinv2", "hf_swin_backbone")
ROWS = [*by_representative(FLAT | PYRAMIDS | {*WINDOWED}, ()), ("swin", "single"), ("hf_swin", "none")]


@cases(("name", "representative"), ROWS, fast=["vit", "hf_vit", "levit", "swin", ("hf_swin", "matched")])
def test_exports_and_runs_eagerly_after(name, representative):
    model, x = build(name), images_for(name)
    with torch.no_grad():
        original = call(model, x)
        evopatch.apply(model, config=config(representative))
        expected = call(model, x)
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(call(exported, x), expected, atol=2e-5, rtol=2e-5)
        assert torch.equal(call(model, x), expected)
        assert moved(call(exported, x), original) > 1e-4


@pytest.mark.parametrize("name", ["vit", "hf_vit", "levit", "swin", "hf_swinv2"])
def test_exports_with_gradients_enabled(name):
    model, x = evopatch.apply(build(name)), images_for(name)
    expected = call(model, x)
    assert expected.requires_grad
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(call(exported, x), expected, atol=2e-5, rtol=2e-5)
    evopatch.set_keep_ratio(model, 1.0)
    assert moved(call(exported, x), call(model, x)) > 1e-4


ONNX = ["vit", "gap", "relpos", "rope", "levit", "levit_conv", "hf_vit", "hf_dinov2_swiglu", "hf_siglip", "hf_levit"]
ONNX_ROWS = [(name, representative, None) for name in ONNX for representative in REPRESENTATIVES]
ONNX_ROWS += [("swin", "single", None), ("swinv2", "matched", None), ("hf_swin", "matched", (72, 88))]
ONNX_FAST = [
    ("vit", "matched", None),
    ("hf_vit", "matched", None),
    ("levit", "matched", None),
    ("swin", "single", None),
]


@cases(("name", "representative", "size"), ONNX_ROWS, fast=ONNX_FAST)
@torch.no_grad()
def test_onnx_runtime_equals_eager(name, representative, size, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = build(name), images_for(name, size=size)
    original = call(model, x)
    evopatch.apply(model, config=config(representative))
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    result = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    torch.testing.assert_close(result, call(model, x), atol=1e-4, rtol=1e-4)
    assert moved(result, original) > 1e-3
