"""Data and settings that can't be trained on: refused and named, or counted and left out."""

import json

import pytest
import torch
from samples import FAST, Images
from torch.utils.data import Dataset
from variants import build

import evopatch
from evopatch import ConfigError, DataError, FinetuneConfig


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


def test_names_that_timm_does_not_know():
    for settings, message in (({"optimizer": "best"}, "optimizer='best'"), ({"scheduler": "up"}, "scheduler='up'")):
        model = evopatch.apply(build("vit"))
        with pytest.raises(ConfigError, match=message):
            evopatch.finetune(model, Images("tuple"), config=FinetuneConfig(**settings), progress=False)


@pytest.mark.parametrize("label", [-1, 7, -100])
def test_a_label_outside_the_classes_is_named(label):
    data = Images("tuple")
    data.labels[5] = label
    with pytest.raises(DataError, match=rf"item 5 of the training data has the label {label}: expected 0 to 6"):
        evopatch.finetune(evopatch.apply(build("vit")), data, config=FAST, progress=False)


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
