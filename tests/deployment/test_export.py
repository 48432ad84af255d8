"""`evopatch.export`: every format is written, run by its own runtime and compared; wrong files are removed."""

import dataclasses
import importlib.util

import pytest
import torch
import variants
from comparing import moved
from matrix import cases, patched, shallow_config
from torch import nn

import evopatch
from evopatch.deployment import exporting
from evopatch.deployment.conversion import Conversion, ImageModel

ENDINGS = {name: form.ending for name, form in exporting.FORMS.items()}
ONE_BATCH = {"executorch", "coreml"}


def small(name="vit", **options):
    return patched(name, shallow_config(name), **variants.shallow(name), **options)


def export_of(model, form, folder, images=None, **settings):
    shown = variants.images(4) if images is None else images
    return evopatch.export(model, folder / f"m{ENDINGS[form]}", form, images=shown, **settings)


def needs(form):
    for package in exporting.FORMS[form].packages:
        pytest.importorskip(package)


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
    + [(form, {"int8": variants.images_for("vit", batch=8, seed=9)}) for form in ("onnx", "openvino", "pt2")]
    # The last batch of images to quantise by isn't whole.
    + [
        (form, {"int8": variants.images_for("vit", batch=6, seed=9).double(), "batch_size": 4})
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
    assert result.verification.error < (0.6 if "int8" in settings else 0.01)
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


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("m.onx", "onnx"), evopatch.ConfigError, "expected the ending .onnx"),
        (("m.onnx", "onix"), evopatch.ConfigError, "format='onix': expected one of onnx, openvino"),
        (("m.pte", "executorch"), evopatch.ConfigError, "takes batches of one size"),
        (("no/m.pt", "torchscript"), evopatch.DataError, "no such folder"),
        (("m.pt", "torchscript", {"any_size": True}), evopatch.ConfigError, "takes images of one size"),
        (("m.pt2", "pt2", {"any_size": True}), evopatch.ConfigError, "doesn't take an image of 48 by 32 px"),
        (
            ("m.pt", "torchscript", {"batch_size": 9}),
            evopatch.DataError,
            "expected a tensor (M, C, height, width) with 9 images",
        ),
        (("m.pt", "torchscript", {"int8": torch.zeros(1)}), evopatch.ConfigError, "isn't written in int8"),
        (("m.pt2", "pt2", {"int8": torch.zeros(1), "half": True}), evopatch.ConfigError, "expected one of them"),
        (("m.onnx", "onnx", {"int8": True}), evopatch.ConfigError, "int8=True: format onnx is quantised by images"),
        (("m.onnx", "onnx", {"int8": [variants.images(1)]}), evopatch.DataError, "int8: a list: expected images as"),
        (("m.onnx", "onnx", {"int8": torch.zeros(3, 5)}), evopatch.DataError, "int8: a tensor (3, 5): expected"),
        (("m.onnx", "onnx", {"int8": variants.images(0)}), evopatch.DataError, "int8: a tensor (0, 3, 40, 40)"),
        (("m.onnx", "onnx", {"int8": variants.images(2, 48)}), evopatch.DataError, "as images have, (2, 3, 40, 40)"),
        (("m.pt2", "pt2", {"images": [*variants.images(2)]}), evopatch.DataError, "images: a list: expected a tensor"),
        (
            ("m.pt2", "pt2", {"images": torch.zeros(2, 1, 40, 40)}),
            evopatch.ExportError,
            "shape (2, 1, 40, 40) in float",
        ),
        (("m.pt2", "pt2", {"images": variants.images(2, 48)}), evopatch.ExportError, "shape (2, 3, 48, 48) in float32"),
    ],
)
def test_what_cannot_be_written_is_refused(arguments, error, message, tmp_path):
    path, form, settings = (*arguments, {})[:3]
    with pytest.raises(error) as found:
        evopatch.export(small(), tmp_path / path, form, **{"images": variants.images_for("vit"), **settings})
    assert message in str(found.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("form", "folder"), [("onnx", "m.onnx"), ("onnx", "m.onnx.data"), ("openvino", "m.bin"), ("coreml", "m.mlpackage")]
)
def test_a_folder_in_the_way_is_kept(form, folder, tmp_path):
    needs(form)
    kept = tmp_path / folder / "kept.txt"
    kept.parent.mkdir()
    kept.write_text("the user's")
    with pytest.raises(evopatch.DataError, match=rf"{folder} is (a folder|no package)"):
        export_of(small(), form, tmp_path, batch_size=1)
    assert [path.name for path in tmp_path.rglob("*")] == [folder, "kept.txt"]


def test_a_package_takes_the_place_of_a_package_only(tmp_path):
    needs("coreml")
    path = tmp_path / "m.mlpackage"
    path.write_text("a file")
    with pytest.raises(evopatch.DataError, match="is no package of Core ML"):
        export_of(small(), "coreml", tmp_path, batch_size=1)
    assert path.read_text() == "a file"
    path.unlink()
    path.mkdir()
    (path / "Manifest.json").touch()
    (path / "old").touch()
    export_of(small(), "coreml", tmp_path, batch_size=1)
    assert (path / "Manifest.json").stat().st_size
    assert not (path / "old").exists()


def test_an_unpatched_model_and_other_outputs_are_refused(tmp_path):
    x = variants.images_for("vit")
    with pytest.raises(evopatch.NotPatchedError):
        evopatch.export(variants.build("vit"), tmp_path / "m.pt", "torchscript", images=x)

    class Talks(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = small()

        def forward(self, x):
            return {"logits": self.model(x), "comment": "fine"}

    with pytest.raises(evopatch.UnsupportedModelError, match="returns a str as comment"):
        evopatch.export(Talks(), tmp_path / "m.pt", "torchscript", images=x)


class Scores(nn.Module):
    """What a function makes of the logits."""

    def __init__(self, function):
        super().__init__()
        self.model, self.function = small(), function

    def forward(self, images):
        return self.function(self.model(images))


def test_one_number_per_image_is_written(tmp_path):
    result = export_of(Scores(lambda logits: logits[:, 0]), "torchscript", tmp_path)
    assert (result.verification.equal, result.verification.images) == (4, 4)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda logits: {"scores": logits, "mean": logits.mean()}, r"output 'mean' has the shape \(\) for 2 images"),
        (lambda logits: logits[:1], r"output 'output' has the shape \(1, 7\) for 2 images"),
        (lambda logits: None, "returns no tensors"),
    ],
)
def test_outputs_that_are_not_of_an_image_are_refused_before_the_conversion(function, message, tmp_path, monkeypatch):
    form = dataclasses.replace(exporting.FORMS["torchscript"], write=None)
    monkeypatch.setitem(exporting.FORMS, "torchscript", form)
    with pytest.raises(evopatch.UnsupportedModelError, match=message):
        export_of(Scores(function), "torchscript", tmp_path)


def test_a_model_that_needs_more_than_images_is_refused_with_its_error(tmp_path):
    class WithText(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = small()

        def forward(self, input_ids, images):
            return self.model(images)

    with pytest.raises(
        evopatch.ExportError, match=r"WithText doesn't run on images of shape \(2, 3, 40, 40\).*images'"
    ):
        export_of(WithText(), "torchscript", tmp_path)


def test_in_autocast_a_file_is_in_float32_all_the_same(tmp_path):
    model = small()
    expected = model(variants.images(4))
    with torch.autocast("cpu", torch.bfloat16):
        result = export_of(model, "torchscript", tmp_path)
    assert result.verification.equal == 4
    assert moved(exporting.FORMS["torchscript"].open(result.path)(variants.images(4))[0], expected) < 1e-5


def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "openvino" else find(name, *a))
    x = variants.images_for("vit")
    with pytest.raises(ModuleNotFoundError, match=r"pip install openvino, or 'evopatch\[export\]'"):
        evopatch.export(small(), tmp_path / "m.xml", "openvino", images=x)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torchao" else find(name, *a))
    with pytest.raises(ModuleNotFoundError, match=r"format pt2 in int8 needs torchao: pip install torchao"):
        evopatch.export(small(), tmp_path / "m.pt2", "pt2", images=x, int8=x)
