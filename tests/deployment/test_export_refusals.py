"""What `evopatch.export` refuses before it converts anything, and what it does with unusual outputs."""

import dataclasses
import importlib.util

import pytest
import torch
import variants
from comparing import moved
from exporting_files import export_of, needs, small
from torch import nn

import evopatch
from evopatch.deployment import exporting


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("m.onx", "onnx"), evopatch.ConfigError, "expected the ending .onnx"),
        (("m.onnx", "onix"), evopatch.ConfigError, "format='onix': expected one of onnx, openvino"),
        (("m.pte", "executorch"), evopatch.ConfigError, "takes batches of one size"),
        (("no/m.pt", "torchscript"), evopatch.DataError, "no such folder"),
        (("m.pt", "torchscript", {"any_size": True}), evopatch.ConfigError, "takes images of one size"),
        (("m.xml", "openvino", {"any_size": True}), evopatch.ConfigError, "takes images of one size"),
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


@pytest.mark.slow
def test_openvino_refuses_a_tensor_that_is_returned_twice(tmp_path):
    needs("openvino")
    with pytest.raises(evopatch.ExportError, match="output 'a' is another output as well, or the input"):
        export_of(Scores(lambda logits: {"a": logits, "b": logits}), "openvino", tmp_path)


def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "openvino" else find(name, *a))
    x = variants.images_for("vit")
    with pytest.raises(ModuleNotFoundError, match=r"pip install openvino, or 'evopatch\[export\]'"):
        evopatch.export(small(), tmp_path / "m.xml", "openvino", images=x)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torchao" else find(name, *a))
    with pytest.raises(ModuleNotFoundError, match=r"format pt2 in int8 needs torchao: pip install torchao"):
        evopatch.export(small(), tmp_path / "m.pt2", "pt2", images=x, int8=x)
