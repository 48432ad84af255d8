"""`evopatch.export`: every format is written, run by its own runtime and compared; wrong files are removed."""

import dataclasses

import pytest
import torch
import variants
from comparing import moved
from exporting_files import ENDINGS, ONE_BATCH, export_of, needs, small
from matrix import cases, shallow_config
from torch import nn

import evopatch
from evopatch.deployment import exporting
from evopatch.deployment.conversion import Conversion, ImageModel


@cases(("form", "name"), [*((form, "vit") for form in ENDINGS), ("onnx", "hf_dinov2")], fast=["pt2"])
def test_every_format_is_written_and_verified(form, name, tmp_path):
    needs(form)
    model, x = small(name), variants.images_for(name, batch=3)
    before = variants.call(model, x)
    batch_size = 1 if form in ONE_BATCH else None
    result = evopatch.export(model, tmp_path / f"m{ENDINGS[form]}", form, images=x, batch_size=batch_size)
    assert sorted(tmp_path.iterdir()) == sorted(result.files)
    assert result.path in result.files
    assert result.size > 10_000
    assert torch.equal(variants.call(model, x), before)
    if form == "coreml":
        assert result.verification is None
        return
    checked = result.verification
    assert checked.images == 3
    assert checked.equal + checked.turned == 3
    assert {batch for batch, *_ in checked.sizes} == ({1} if batch_size else {1, 2})
    found = exporting.FORMS[form].open(result.path)(x[:1])
    expected = ImageModel(model)(x[:1])
    assert len(found) == len(expected) > 0
    assert moved(found[0], expected[0]) < 1e-3
    assert moved(ImageModel(variants.build(name, **variants.shallow(name)))(x[:1])[0], expected[0]) > 1e-3


@pytest.mark.parametrize(
    ("form", "settings"),
    [("pt2", {"half": True}), ("onnx", {"half": True}), ("openvino", {"half": True}), ("onnx", {"any_size": True})]
    # By fewer images NNCF finds ranges that are as far off for the unpatched model.
    + [(form, {"int8": variants.images_for("vit", batch=64, seed=9)}) for form in ("onnx", "openvino", "pt2")]
    # The last batch of images to quantise by isn't whole.
    + [
        (form, {"int8": variants.images_for("vit", batch=62, seed=9).double(), "batch_size": 4})
        for form in ("onnx", "openvino")
    ]
    + [("pt2", {"int8": True})],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
@pytest.mark.slow
def test_half_int8_and_any_size(form, settings, tmp_path):
    needs(form)
    if "int8" in settings:
        pytest.importorskip({"onnx": "onnxruntime", "openvino": "nncf", "pt2": "torchao"}[form])
    model = small(**{"dynamic_img_size": True} if "any_size" in settings else {})
    path = tmp_path / f"m{ENDINGS[form]}"
    result = evopatch.export(model, path, form, images=variants.images_for("vit", batch=4, seed=2), **settings)
    assert result.verification.error < (0.3 if "int8" in settings else 0.01)
    assert (result.verification.equal == result.verification.images) == ("any_size" in settings)
    sizes = {size for _, *size in map(list, result.verification.sizes) for size in [tuple(size)]}
    assert sizes == ({(40, 40), (48, 32)} if "any_size" in settings else {(40, 40)})


@cases(
    ("form", "name"),
    [(form, name) for form in sorted(set(ENDINGS) - {"coreml"}) for name in ("vit", "hf_dinov2")],
    fast=[("openvino", "vit"), ("torchscript", "vit")],
)
def test_a_file_refuses_batches_and_sizes_that_it_is_not_for(form, name, tmp_path):
    needs(form)
    run = exporting.FORMS[form].open(export_of(small(name), form, tmp_path, batch_size=2).path)
    assert len(run(variants.images(2))[0]) == 2
    for batch, size in ((1, 40), (4, 40), (2, 48), (2, 43), (2, 80), (2, (32, 40))):
        with pytest.raises(Exception, match=r"."):  # each runtime has its own error
            run(variants.images(batch, size))


@pytest.mark.parametrize(
    ("any_batch", "expected"), [(True, [[0], [1], [2], [3], [4]]), (False, [[0, 1, 2], [3, 4, 0]])]
)
def test_images_to_quantise_by_come_in_the_batches_of_the_file(any_batch, expected):
    images = torch.arange(5.0)[:, None, None, None]
    conversion = Conversion(nn.Identity(), images[:3], ["output"], any_batch, False, False, True, images)
    assert [batch.flatten().tolist() for batch in conversion.calibration_batches()] == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hf_vit", "hf_dinov2"])
def test_any_size_of_transformers(name, tmp_path):
    needs("onnx")
    checked = export_of(small(name), "onnx", tmp_path, any_size=True).verification
    assert checked.equal == checked.images == 6
    assert {(height, width) for _, height, width in checked.sizes} == {(40, 40), (48, 32)}


@torch.no_grad()
def test_patching_and_quantising_in_either_order():
    pytest.importorskip("torchao")
    from evopatch.deployment.torch_int8 import quantise

    x = variants.images_for("vit")
    first, last = variants.build("vit", **variants.shallow("vit")), small()
    whole = last(x)
    quantise(last)
    quantise(first)
    evopatch.apply(first, config=shallow_config("vit"))
    assert torch.equal(first(x), last(x))
    assert moved(last(x), whole) > 1e-3


class Broken(nn.Module):
    """Another model than was asked for, of the same shapes."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return tuple(value * 1.01 for value in self.model(images))


def test_a_wrong_file_is_removed(tmp_path, monkeypatch):
    model, x, path = small(), variants.images_for("vit", batch=3), tmp_path / "m.pt"
    form = exporting.FORMS["torchscript"]

    def write(conversion, target):
        form.write(dataclasses.replace(conversion, model=Broken(conversion.model).eval()), target)

    path.write_text("what was there before")
    with monkeypatch.context() as patching:
        patching.setitem(exporting.FORMS, "torchscript", dataclasses.replace(form, write=write))
        with pytest.raises(
            evopatch.ExportError, match="m.pt is wrong: the output of image 0, in a batch of 1 image of"
        ):
            evopatch.export(model, path, "torchscript", images=x)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["what was there before"]
    evopatch.export(model, path, "torchscript", images=x)
    assert path.stat().st_size > 10_000


class WithTokens(nn.Module):
    """Large values beside the logits."""

    def __init__(self):
        super().__init__()
        self.model = small()

    def forward(self, images):
        tokens = self.model.forward_features(images)
        return {"tokens": tokens * 50, "logits": self.model.forward_head(tokens)}


class OtherLogits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        tokens, logits = self.model(images)
        return tokens, logits.flip(1)


@pytest.mark.parametrize("settings", [{}, {"half": True}], ids=str)
def test_one_wrong_output_of_several_is_found(settings, tmp_path, monkeypatch):
    form = exporting.FORMS["torchscript"]

    def write(conversion, target):
        form.write(dataclasses.replace(conversion, model=OtherLogits(conversion.model).eval()), target)

    export_of(WithTokens(), "torchscript", tmp_path, **settings).path.unlink()
    monkeypatch.setitem(exporting.FORMS, "torchscript", dataclasses.replace(form, write=write))
    with pytest.raises(evopatch.ExportError, match=r"m.pt is wrong: .* 'logits'"):
        export_of(WithTokens(), "torchscript", tmp_path, **settings)
    assert not list(tmp_path.iterdir())


@cases("form", ["pt2", "onnx", "openvino"], fast=["pt2"])
def test_a_model_that_overflows_in_float16_gives_no_float16_file(form, tmp_path):
    needs(form)
    model = small()
    with torch.no_grad():
        model.norm.weight.mul_(1e5)
        model.head.weight.mul_(1e-5)
    with pytest.raises(evopatch.ExportError, match="Leave half"):
        export_of(model, form, tmp_path, half=True)


@pytest.mark.parametrize("name", ["m.pt", "unpatched.pt", "patched.pt"])
def test_timed_against_unpatched(name, tmp_path):
    x = variants.images_for("vit", batch=2)
    result = evopatch.export(small(), tmp_path / name, "torchscript", images=x, benchmark=True)
    assert result.speed.ratio > 0
    assert result.speed.patched > 0
    assert [file.name for file in tmp_path.iterdir()] == [name]
