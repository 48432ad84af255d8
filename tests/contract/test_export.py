"""Programs exported from patched models, in other runtimes and at other sizes than the example's."""

import inspect

import pytest
import torch
import variants
from comparing import moved
from matrix import cases, shallow_config
from torch import nn
from torch.export import Dim

import evopatch
from evopatch.algorithm.rows import rounded_share
from evopatch.forward import ranking

EXAMPLE = (2, (48, 56))
OTHERS = [(1, (48, 56)), (3, (64, 40)), (1, (80, 72))]
"""Batch sizes and image sizes; patches are of 8 by 8 pixels."""
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
"""Of another runtime, which rounds differently."""


class Tensors(nn.Module):
    """A model as converters like it: images in, one tensor out, no other arguments."""

    def __init__(self, model: nn.Module, **options: object) -> None:
        super().__init__()
        self.model = model
        self._options = options

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return variants.call(self.model, pixels, **self._options)


def build(name, resizable=False):
    """A model that isn't patched, by the kind of its sizes."""
    if not resizable:
        return Tensors(variants.build(name, **variants.shallow(name))).eval()
    if not name.startswith("hf_"):
        return Tensors(variants.build(name, dynamic_img_size=True, **variants.shallow(name))).eval()
    model = variants.build(name, **variants.shallow(name))
    interpolates = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    return Tensors(model, **{"interpolate_pos_encoding": True} if interpolates else {}).eval()


def images(name):
    return variants.images_for(name)


def patch(name, representative="matched", selection="stage", resizable=False):
    return evopatch.apply(build(name, resizable), config=shallow_config(name, representative, selection))


def in_onnx_runtime(path, x):
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def assert_follows_sizes(run, model, original, monkeypatch):
    """At other batch and image sizes than the example's, and not with the number of slow tokens of the example."""
    stale = []
    for batch, size in [EXAMPLE, *OTHERS]:
        x = variants.images(batch, size, seed=5)
        expected, result = model(x), run(x)
        torch.testing.assert_close(result, expected, **TOLERANCE)
        assert moved(result, original(x)) > 1e-3
        with monkeypatch.context() as patched:
            patched.setattr(ranking, "num_slow", lambda _, ratio: rounded_share(6 * 7, ratio))
            stale.append(moved(result, model(x)))
    assert stale[0] < 1e-4  # the example itself
    assert stale[2] > 1e-3
    assert stale[3] > 1e-3


ANY_SIZE = [
    ("vit", "matched", "stage"),
    ("vit", "matched", "layer"),
    ("vit", "single", "stage"),
    ("vit", "none", "stage"),
    ("registers", "matched", "stage"),
    ("gap", "matched", "stage"),
    ("rope", "matched", "stage"),
    ("rope_mixed", "single", "stage"),
    ("hf_vit", "matched", "stage"),
    ("hf_dinov2", "matched", "stage"),
    ("hf_dinov3", "matched", "stage"),
]


@cases(("name", "representative", "selection"), ANY_SIZE, fast=[ANY_SIZE[0], ANY_SIZE[8]])
@torch.no_grad()
def test_exported_program_takes_other_batch_and_image_sizes(name, representative, selection, monkeypatch):
    original = build(name, resizable=True)
    model = patch(name, representative, selection, resizable=True)
    sizes = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    program = torch.export.export(model, (variants.images(*EXAMPLE),), dynamic_shapes=(sizes,)).module()
    assert_follows_sizes(program, model, original, monkeypatch)


ONNX_ANY_SIZE = [("vit", True), ("gap", True), ("rope", True), ("hf_vit", True), ("hf_vit", False)]
"""TorchScript's exporter doesn't know how timm resizes position embeddings, of unpatched models either."""


@pytest.mark.parametrize(("name", "dynamo"), ONNX_ANY_SIZE)
@pytest.mark.slow
@torch.no_grad()
def test_onnx_takes_other_batch_and_image_sizes(name, dynamo, tmp_path, monkeypatch):
    original, model, path = build(name, resizable=True), patch(name, resizable=True), tmp_path / "model.onnx"
    axes = {0: "batch", 2: "height", 3: "width"}
    sizes = {"dynamic_shapes": (dict.fromkeys(axes, Dim.DYNAMIC),)} if dynamo else {"dynamic_axes": {"pixels": axes}}
    x = variants.images(*EXAMPLE)
    torch.onnx.export(model, (x,), path, input_names=["pixels"], dynamo=dynamo, verbose=False, **sizes)
    assert_follows_sizes(lambda x: in_onnx_runtime(path, x), model, original, monkeypatch)


FAMILIES = [
    ("vit", "matched", "stage"),
    ("vit", "single", "layer"),
    ("vit", "none", "stage"),
    ("levit", "matched", "stage"),
    ("levit", "single", "stage"),
    ("pit", "matched", "stage"),
    ("swin", "matched", "stage"),
    ("swin", "single", "layer"),
    ("swin", "none", "stage"),
    ("hf_vit", "matched", "stage"),
]
QUICK = [("vit", "matched", "stage"), ("levit", "matched", "stage"), ("hf_vit", "matched", "stage")]
NOT_CONVERTED = [("vit", "none", "stage"), ("levit", "single", "stage"), ("swin", "single", "layer")]
NOT_CONVERTED += [("pit", "matched", "stage"), ("swin", "none", "stage"), ("vit", "single", "layer")]
NOT_CONVERTED += [("hf_vit", "matched", "stage")]
"""Of operators that other rows have."""
EVERY_FAMILY = cases(("name", "representative", "selection"), FAMILIES, fast=QUICK)


@EVERY_FAMILY
@torch.no_grad()
def test_torchscript_onnx_equals_eager(name, representative, selection, tmp_path):
    original, x, path = build(name)(images(name)), images(name), tmp_path / "model.onnx"
    model = patch(name, representative, selection)
    torch.onnx.export(model, (x,), path, dynamo=False, verbose=False)
    result = in_onnx_runtime(path, x)
    torch.testing.assert_close(result, model(x), **TOLERANCE)
    assert moved(result, original) > 1e-3


@cases(("name", "representative", "selection"), [row for row in FAMILIES if row not in NOT_CONVERTED], fast=())
@torch.no_grad()
def test_openvino_equals_eager(name, representative, selection):
    openvino = pytest.importorskip("openvino")
    original, x = build(name)(images(name)), images(name)
    model = patch(name, representative, selection)
    converted = openvino.convert_model(torch.export.export(model, (x,)))
    compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    result = torch.from_numpy(compiled(x.numpy())[0])
    torch.testing.assert_close(result, model(x), **TOLERANCE)
    assert moved(result, original) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("representative", ["matched", "single", "none"])
@torch.no_grad()
def test_core_ml_converts(representative):
    coremltools = pytest.importorskip("coremltools")
    model, x = patch("vit", representative), images("vit")
    program = torch.export.export(model, (x,)).run_decompositions({})
    converted = coremltools.convert(program, skip_model_load=True)
    (function,) = converted.get_spec().mlProgram.functions.values()
    (block,) = function.block_specializations.values()
    assert "topk" in {operation.type for operation in block.operations}


@EVERY_FAMILY
def test_traces_with_gradients_on(name, representative, selection):
    """`torch.jit.trace` checks a trace by another one, made without gradients, and raises where they differ."""
    original, x = build(name)(images(name)), images(name)
    model = patch(name, representative, selection)
    assert all(parameter.requires_grad for parameter in model.parameters())
    traced = torch.jit.trace(model, (x,), check_tolerance=1e-4)
    other = x.flip(3)
    torch.testing.assert_close(traced(other), model(other), **TOLERANCE)
    assert moved(traced(x), original) > 1e-3
    twin = patch(name, representative, selection)  # LeViT keeps biases of the forward that came first
    found, expected = gradients(model, traced, x), gradients(twin, twin, x)
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        scale = gradient.abs().max().item() + 1e-2
        torch.testing.assert_close(found[parameter], gradient, atol=1e-3 * scale, rtol=1e-3)
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-2


def gradients(model, run, x):
    model.zero_grad()
    run(x).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


class Share(nn.Module):
    """A number that follows from a size."""

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self.ratio = ratio

    def forward(self, x):
        return x[:, 0] + rounded_share(x.shape[1], self.ratio)


@pytest.mark.parametrize(("size", "ratio"), [(25, 0.5), (25, 0.7), (1369, 0.5), (4096, 0.436182), (729, 0.123456789)])
def test_sizes_are_the_same_in_other_runtimes(size, ratio, tmp_path):
    """The exporter by TorchScript folds constants in single precision: 12.5 of 25 were 12."""
    path, x = tmp_path / "model.onnx", torch.zeros(1, size)
    torch.onnx.export(Share(ratio), (x,), path, dynamo=False, verbose=False, input_names=["x"])
    assert in_onnx_runtime(path, x).item() == rounded_share(size, ratio)


def test_number_of_slow_tokens_is_rounded_half_up():
    """As `int(number * ratio + 0.5)` in floating point, but for halves that it loses to rounding."""
    lost = 0
    for thousandths in range(1, 1000):
        ratio = thousandths / 1000
        number = torch.arange(2, 10_001, dtype=torch.int64)
        floating = (number.double() * ratio + 0.5).long()
        whole = rounded_share(number, ratio)
        half = (number * thousandths) % 1000 == 500
        assert torch.equal(whole[~half], floating[~half])
        assert torch.equal(whole[half], (number[half] * thousandths + 500) // 1000)
        lost += int((whole != floating).sum())
    assert lost < 1200  # of ten million
    assert all(rounded_share(n, r) == int(n * r + 0.5) for n in (4, 49, 196, 256, 1369) for r in (0.37, 0.5, 0.63))
