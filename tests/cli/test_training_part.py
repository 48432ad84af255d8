"""What is tuned or quantised by images takes those for training, so that those for evaluation stay unseen."""

from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from terminal import unboxed

from evopatch.cli import main
from evopatch.cli.export import _images

TRAIN, EVALUATION = 10, 200
"""Brightness of the images of either part."""


@pytest.fixture
def parts(tmp_path):
    for name, value in (("train", TRAIN), ("val", EVALUATION)):
        for number in range(12):
            file = tmp_path / "data" / name / f"class{number % 2}" / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (value, 0, number)).save(file)
    return tmp_path / "data"


def pixel(image):
    return torch.tensor(image.getpixel((0, 0)))


class Seen(BaseException):
    """Of a command that was stopped before its work."""


def test_calibrate(parts, tmp_path, monkeypatch, capsys):
    def stopped(network, images, **options):
        raise Seen([images.dataset.name(row) for row in images.indices])

    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "weights.pth")
    monkeypatch.setattr("evopatch.calibration.calibrating.calibrate", stopped)
    common = ("--model", "vit_tiny_patch16_224", "--checkpoint", tmp_path / "weights.pth", "--target-flops", "0.7")
    for data, parted in ((parts, True), (parts / "val", False)):
        monkeypatch.setattr("sys.argv", ["evopatch", "calibrate", *map(str, common), "--data", str(data)])
        with pytest.raises(Seen) as seen:
            main()
        (names,) = seen.value.args
        assert len(names) == 12
        assert {("train" in name, "/val/" in name) for name in names} == {(parted, not parted)}
        assert (f"{data}: its part 'train'" in unboxed(capsys.readouterr().err)) is parted


@pytest.mark.parametrize(("calibration", "found"), [(8, [TRAIN] * 8), (128, [TRAIN] * 12), (0, [])])
def test_export(calibration, found, parts, capsys):
    shown, by = _images(SimpleNamespace(transform=pixel), str(parts), 12, calibration)
    assert shown[:, 0].tolist() == [EVALUATION] * 12
    assert by.reshape(-1, 3)[:, 0].tolist() == found
    assert len(by.unique(dim=0)) == len(found)
    said = "quantised by its part 'train', verified with 'val'"
    assert (said in unboxed(capsys.readouterr().err)) is bool(found)


def test_export_of_data_without_parts(parts):
    shown, by = _images(SimpleNamespace(transform=pixel), str(parts / "val"), 4, 6)
    numbers = [set(images[:, 2].tolist()) for images in (shown, by)]
    assert [len(own) for own in numbers] == [4, 6]
    assert numbers[0].isdisjoint(numbers[1])
