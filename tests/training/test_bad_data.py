"""Data and settings that can't be trained on: refused and named, or counted and left out."""

import json

import numpy as np
import pytest
import torch
from samples import FAST, Images
from torch.utils.data import DataLoader, Dataset
from variants import build

import evopatch
from evopatch import ConfigError, DataError, FinetuneConfig
from evopatch.calibration.batches import images_of
from evopatch.training.items import Items


class Damaged(Images):
    def __init__(self, broken, count):
        super().__init__("tuple", count)
        self.broken = broken

    def __getitem__(self, index):
        if index < self.broken:
            raise OSError("image file is truncated")
        return super().__getitem__(index)


def test_unreadable_images_are_counted_and_named(tmp_path):
    model = evopatch.apply(build("vit"))
    config = FinetuneConfig(epochs=2, batch_size=50)
    result = evopatch.finetune(model, Damaged(1, 100), Damaged(1, 101), config=config, output=tmp_path, progress=False)
    assert result.unreadable == result.unreadable_evaluation == ("item 0 (image file is truncated)",)
    assert result.after.images == 100
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines if line.get("event") == "unreadable"] == [list(result.unreadable)]


def test_too_many_unreadable_images():
    with pytest.raises(DataError, match=r"2 of 12 evaluation images can't be read, more than 1%: item 0"):
        evopatch.finetune(
            evopatch.apply(build("vit")), Images("tuple"), Damaged(2, 12), FinetuneConfig(batch_size=8), progress=False
        )
    with pytest.raises(
        DataError, match=r"2 of 100 training images can't be read, more than 1%: item [01] \(image file"
    ):
        evopatch.finetune(
            evopatch.apply(build("vit")), Damaged(2, 100), config=FinetuneConfig(batch_size=100), progress=False
        )


def test_mixup_of_an_odd_batch():
    with pytest.raises(ConfigError, match="batch_size=7: Mixup and CutMix mix pairs"):
        FinetuneConfig(batch_size=7, mixup=0.2)
    with pytest.raises(ConfigError, match="5 training images: Mixup and CutMix need an even batch"):
        evopatch.finetune(evopatch.apply(build("vit")), Images("tuple", count=5), config=FinetuneConfig(mixup=0.2))


def test_names_that_timm_does_not_know(tmp_path):
    for settings, message in (({"optimizer": "best"}, "optimizer='best'"), ({"scheduler": "up"}, "scheduler='up'")):
        model = evopatch.apply(build("vit"))
        with pytest.raises(ConfigError, match=message):
            evopatch.finetune(
                model, Images("tuple"), config=FinetuneConfig(**settings), output=tmp_path / "run", progress=False
            )
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("label", [-1, 7, -100])
def test_a_label_outside_the_classes_is_named(label):
    data = Images("tuple")
    data.labels[5] = label
    with pytest.raises(DataError, match=rf"item 5 of the training data has the label {label}: expected 0 to 6"):
        evopatch.finetune(evopatch.apply(build("vit")), data, config=FAST, progress=False)


@pytest.mark.parametrize(
    ("label", "found"),
    [
        (0.5, r"0.5 \(float\)"),
        (torch.tensor(2.0), r"tensor\(2.\) \(Tensor\)"),
        (np.float32(1), r"np.float32\(1.0\) \(float32\)"),
        (torch.eye(7)[2], r"Tensor of shape \(7,\)"),
        ("cat", r"'cat' \(str\)"),
    ],
)
def test_a_label_that_is_no_number_of_a_class_is_named(label, found):
    data = [(torch.zeros(3, 40, 40), 1), (torch.zeros(3, 40, 40), label)]
    with pytest.raises(DataError, match=rf"item 1 of the training data has the label {found}: expected the number"):
        evopatch.finetune(evopatch.apply(build("vit")), data, config=FAST, progress=False)
    with pytest.raises(DataError, match=rf"item 1 of the evaluation data has the label {found}"):
        evopatch.finetune(evopatch.apply(build("vit")), Images("none"), data, config=FAST, progress=False)


@pytest.mark.parametrize("label", [3, np.int64(3), np.uint8(3), torch.tensor(3), torch.tensor([3]), True + 2])
def test_whole_numbers_of_any_kind_are_labels(label):
    assert Items([(torch.zeros(3, 4, 4), label)])[0].label == 3


def test_labels_that_are_not_looked_at_may_be_anything():
    data = [(image, 0.5) for image in Images("none", count=8)]
    config = FinetuneConfig(epochs=1, objective="distillation")
    assert evopatch.finetune(evopatch.apply(build("vit")), data, config=config, progress=False).steps == 1
    images = images_of(data, torch.device("cpu"), torch.float32)
    assert torch.equal(images[0], data[0][0])


def test_a_label_of_the_evaluation_data_outside_the_classes_is_named():
    data = Images("tuple", count=8)
    data.labels[5] = 7
    with pytest.raises(DataError, match="item 5 of the evaluation data has the label 7: expected 0 to 6"):
        evopatch.finetune(evopatch.apply(build("vit")), Images("tuple"), data, config=FAST, progress=False)


def test_images_that_make_no_batch():
    sizes = [(torch.zeros(3, size, 40), 0) for size in (40, 48)]
    message = r"of the sizes \(3, 40, 40\), \(3, 48, 40\): expected one \(3, height, width\)"
    with pytest.raises(DataError, match=message):
        evopatch.finetune(evopatch.apply(build("vit")), sizes, config=FAST, progress=False)
    some = [(torch.zeros(3, 40, 40), 0), torch.zeros(3, 40, 40)]
    with pytest.raises(DataError, match="1 of 2 images of a batch have no label"):
        evopatch.finetune(evopatch.apply(build("vit")), some, config=FAST, progress=False)


def test_settings_of_another_kind():
    with pytest.raises(ConfigError, match="config is a dict: expected an evopatch.FinetuneConfig"):
        evopatch.finetune(evopatch.apply(build("vit")), Images("tuple"), config={"epochs": 1})


class Other(Dataset):
    def __init__(self, item):
        self.item = item

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.item


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Other({"image": 1, "label": 2}), r"a mapping with \['image', 'label'\]: expected a tensor"),
        (Other(("picture", 1)), "an item of the data is str"),
        (iter([]), "has no length"),
        (
            DataLoader(Images("tuple")),
            "DataLoader has no items by position: .* Give the data set that the loader is of",
        ),
    ],
)
def test_data_of_another_kind(data, message):
    with pytest.raises(DataError, match=message):
        evopatch.finetune(evopatch.apply(build("vit")), data)


def test_parts_with_different_settings_are_refused():
    both = torch.nn.ModuleList([evopatch.apply(build("vit"), 0.9), evopatch.apply(build("gap"), 0.4)])
    with pytest.raises(ConfigError, match="different settings"):
        evopatch.finetune(both, Images("tuple"))


def test_bad_input():
    model = build("vit")
    with pytest.raises(evopatch.NotPatchedError):
        evopatch.finetune(model, Images("tuple"))
    evopatch.apply(model)
    with pytest.raises(DataError, match="no images to train on"):
        evopatch.finetune(model, Images("tuple", count=0))
    with pytest.raises(DataError, match="objective='labels', but the training data have none"):
        evopatch.finetune(model, Images("none"), config=FinetuneConfig(objective="labels"))
    with pytest.raises(DataError, match="label_weight=0.5, but the training data have no labels"):
        evopatch.finetune(model, Images("none"), config=FinetuneConfig(label_weight=0.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs=0: expected a whole number of at least 1"),
        ({"batch_size": 1.5}, "batch_size=1.5"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: expected a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"weight_decay": -1}, "weight_decay=-1"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"objective": "hard"}, "objective='hard': expected one of 'auto', 'labels', 'distillation'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        FinetuneConfig(**settings)
