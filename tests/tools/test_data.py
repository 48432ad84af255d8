"""Images by name: every kind of source, splits, damaged images."""

import io
import pickle

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from evopatch import DataError, UnreadableImageError
from evopatch.sources.images import open_evaluation, open_every, open_images, open_part
from evopatch.training.items import Items, collate


def encoded(brightness):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (brightness, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def brightness(image):
    return image.getpixel((0, 0))[0]


def save(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(value))


ROWS = [{"image": {"bytes": encoded(i), "path": f"{i}.png"}, "label": i % 3} for i in range(6)]


@pytest.fixture
def sources(tmp_path):
    for i in range(6):
        save(tmp_path / "classes" / f"class{i % 3}" / f"{i}.png", i)
        save(tmp_path / "flat" / f"{i}.png", i)
        save(tmp_path / "parts" / "train" / f"class{i % 3}" / f"{i}.png", i)
        save(tmp_path / "parts" / "val" / f"class{i % 3}" / f"{i}.png", i + 100)
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "table.parquet")
    with pa.ipc.new_stream(str(tmp_path / "table.arrow"), table.schema) as writer:
        writer.write_table(table)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c", "d"])})
    data = datasets.Dataset.from_list(ROWS, features=features)
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "dictionary")
    data.to_parquet(tmp_path / "with_names.parquet")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "classes"),
    [("classes", 3), ("parts", 3), ("table.parquet", None), ("table.arrow", None), ("saved", 4), ("dictionary", 4),
     ("with_names.parquet", 4)],
)  # fmt: skip
def test_labelled_sources(name, classes, sources):
    images = open_images(sources / name)
    assert len(images) == 6
    assert images.classes == classes
    assert sorted((brightness(image), label) for image, label in images) == [(i, i % 3) for i in range(6)]
    again = pickle.loads(pickle.dumps(images))
    assert [label for _, label in again] == [label for _, label in images]


def test_a_folder_of_images_has_no_labels(sources):
    assert [(brightness(image), label) for image, label in open_images(sources / "flat")] == [
        (i, None) for i in range(6)
    ]


def test_digits():
    train, test = open_part("digits", "train"), open_part("digits", "eval")
    assert (len(train), len(test), train.classes) == (1347, 450, 10)
    image, label = train[0]
    assert image.size == (8, 8)
    assert 0 <= label < 10
    assert {image.tobytes() for image, _ in train}.isdisjoint({image.tobytes() for image, _ in test})


def test_the_part_for_evaluation(sources):
    assert sorted(brightness(image) for image, _ in open_evaluation(sources / "parts")) == list(range(100, 106))
    assert len(open_evaluation(sources / "dictionary")) == 1
    assert len(open_evaluation(sources / "table.parquet")) == 6
    for name in ("classes", "flat", "table.parquet", "saved"):
        assert open_part(sources / name, "eval") is None
        assert open_images(sources / name).part is open_evaluation(sources / name).part is None
    for source, part in ((sources / "parts", "val"), (sources / "dictionary", "test"), ("digits", "eval")):
        assert (open_images(source).part, open_evaluation(source).part) == ("train", part)


def test_the_transform_is_applied(sources):
    assert open_images(sources / "flat", brightness)[3] == (3, None)


@pytest.mark.parametrize("content", [b"", b"no image at all", encoded(1)[:40]])
def test_a_damaged_image_is_named(content, sources):
    (sources / "flat" / "3.png").write_bytes(content)
    with pytest.raises(UnreadableImageError, match=r"flat/3.png can't be read as an image"):
        open_images(sources / "flat")[3]


def test_a_damaged_row_is_named(tmp_path):
    rows = [*ROWS, {"image": {"bytes": b"broken", "path": "x.png"}, "label": 0}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "table.parquet")
    with pytest.raises(UnreadableImageError, match=r"table.parquet row 6 \(x.png\) can't be read"):
        open_images(tmp_path / "table.parquet")[6]


def test_a_name_on_a_hub_that_cannot_be_reached(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"owner/pictures: no such file or folder, and no data set of that name"
    ) as found:
        open_images("owner/pictures")
    assert "'digits'" in str(found.value)
    assert "--data" in str(found.value)
    assert "--checkpoint" in str(found.value)
    assert datasets.config.HF_HUB_OFFLINE is False


def test_other_layouts(tmp_path):
    (tmp_path / "empty").mkdir()
    pq.write_table(pa.table({"picture": [1]}), tmp_path / "other.parquet")
    for name in ("bad.arrow", "bad.parquet", "notes.txt"):
        (tmp_path / name).write_bytes(b"nothing")
    save(tmp_path / "photos" / "0.png", 1)
    for name, message in (
        ("empty", "expected images, or one subfolder"),
        ("other.parquet", r"found the columns \['picture'\]"),
        ("bad.arrow", "can't be read as an arrow"),
        ("bad.parquet", "can't be read as a parquet file"),
        ("notes.txt", "notes.txt is a file, and no parquet: expected a folder with one subfolder per class"),
        ("photos/0.png", "0.png is a file, and no parquet: .* a folder of images without labels, a .parquet or .arrow"),
        ("nowhere.parquet", "no such file or folder; .* a folder of images without labels, a .parquet"),
    ):
        with pytest.raises(DataError, match=message):
            open_images(tmp_path / name)


GREYS = np.array([[0, 255, 256, 32768, 65280, 65535]], dtype=np.uint16)


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".pgm"])
def test_sixteen_bits_are_scaled_to_eight(suffix, tmp_path):
    file = tmp_path / f"deep{suffix}"
    if suffix == ".pgm":
        file.write_bytes(b"P5 6 1 65535\n" + GREYS.astype(">u2").tobytes())
    else:
        Image.fromarray(GREYS).save(file)
    image, _ = open_images(tmp_path)[0]
    assert image.mode == "RGB"
    assert [image.getpixel((x, 0)) for x in range(6)] == [(v, v, v) for v in (0, 1, 1, 128, 254, 255)]


def test_files_of_every_suffix_are_read_or_counted(tmp_path, capsys):
    for folder in ("flat", "classes/a", "classes/b/deep"):
        for name in ("1.png", "2.GIF", "3.jfif"):
            save(tmp_path / folder / name, 7)
        for name in ("4.heic", "5.heic", "README", ".hidden"):
            (tmp_path / folder / name).write_bytes(b"other")
    for function, folder, images, others in (
        (open_images, tmp_path / "flat", 3, 3),
        (open_images, tmp_path / "classes", 6, 6),
        (open_every, tmp_path, 9, 9),
    ):
        opened = function(folder)
        assert len(opened) == images
        assert all(brightness(image) == 7 for image, _ in opened)
        said = " ".join(capsys.readouterr().err.split())
        assert f"{others} file(s) in {folder} left out" in said
        assert f"by their names no images: .heic ({2 * others // 3}), no suffix ({others // 3})" in said


def test_nothing_is_said_of_a_folder_of_images_alone(sources, capsys):
    open_images(sources / "classes")
    open_images(sources / "flat")
    assert capsys.readouterr().err == ""


class Broken(torch.utils.data.Dataset):
    """Ten images, some of which can't be read."""

    def __init__(self, *broken):
        self.broken = broken

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if index in self.broken:
            raise OSError("truncated")
        return torch.full((3, 2, 2), float(index)), index


def test_in_training_the_next_readable_image_stands_in():
    items = Items(Broken(3, 4, 9), seed=0)
    assert [items[i].label for i in range(10)] == [0, 1, 2, 5, 5, 5, 6, 7, 8, 0]
    assert items[3].unreadable == ("item 3 (truncated)", "item 4 (truncated)")
    with pytest.raises(DataError, match="no image can be read: item 2"):
        Items(Broken(*range(10)), seed=0)[2]


def test_in_evaluation_unreadable_images_are_left_out():
    items = Items(Broken(3))
    batch = collate([items[i] for i in range(10)])
    assert batch.images.shape == (9, 3, 2, 2)
    assert batch.labels.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    assert batch.unreadable == ("item 3 (truncated)",)
    assert len(collate([items[3]]).images) == 0


def test_a_missing_image_is_named(tmp_path):
    rows = [*ROWS, {"image": None, "label": 0}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "images.parquet")
    with pytest.raises(UnreadableImageError, match="row 6"):
        open_images(tmp_path / "images.parquet")[6]


def test_evaluation_folders_are_numbered_as_those_for_training(tmp_path):
    for split, classes in (("train", "abc"), ("val", "ac"), ("other", "ad")):
        for number, name in enumerate(classes):
            save(tmp_path / split / name / "0.png", number)
    train = open_part(tmp_path, "train")
    evaluation = open_part(tmp_path, "eval")
    assert (list(evaluation.labels), evaluation.classes) == ([0, 1], 2)
    evaluation.number_as(train.class_names, "val")
    assert (list(evaluation.labels), evaluation.classes) == ([0, 2], 3)
    with pytest.raises(
        DataError, match="other has classes that the training data don't have: d; expected some of a, b, c"
    ):
        open_images(tmp_path / "other").number_as(train.class_names, "other")
