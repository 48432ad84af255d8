"""Folders of images: nothing in them is left out unsaid, and classes have the numbers that their names say."""

import pytest
from samples import encoded

from evopatch import DataError
from evopatch.sources.images import open_evaluation, open_every, open_images


def fill(folder, *names):
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(seed))


def labels(images):
    return {images.name(i).rpartition("/")[2]: images.labels[i] for i in range(len(images))}


def test_images_beside_class_folders_are_refused(tmp_path):
    fill(tmp_path, "a/0.jpg", "b/deep/1.jpg", "c/2.jpg", "preview.jpg", "other.jpg")
    message = r"holds both images \(2, such as other.jpg\) and subfolders with images \(a, b, c\): expected"
    with pytest.raises(DataError, match=message):
        open_images(tmp_path)
    assert len(open_every(tmp_path)) == 5
    for name in ("preview.jpg", "other.jpg"):
        (tmp_path / name).unlink()
    assert open_images(tmp_path).class_names == ("a", "b", "c")


def test_a_folder_without_images_beside_images_is_none_of_their_classes(tmp_path):
    fill(tmp_path, "0.jpg", "notes/read.txt")
    images = open_images(tmp_path)
    assert (len(images), images.labels) == (1, None)


@pytest.mark.parametrize(
    ("names", "ordered"),
    [
        (("0", "1", "10", "2"), ("0", "1", "2", "10")),
        (("1", "02", "10"), ("1", "02", "10")),
        (("1", "10", "2a"), ("1", "10", "2a")),
        (("1", "01", "10", "9"), ("01", "1", "10", "9")),
        (("b", "B", "a"), ("B", "a", "b")),
    ],
)
def test_the_order_of_classes(names, ordered, tmp_path):
    """Of numbers theirs; of anything else, also of one number written twice, that of the text."""
    fill(tmp_path, *(f"{name}/{name}.jpg" for name in names))
    images = open_images(tmp_path)
    assert images.class_names == ordered
    assert labels(images) == {f"{name}.jpg": number for number, name in enumerate(ordered)}


def test_hidden_files_and_folders_are_left_out(tmp_path, capsys):
    fill(tmp_path, "a/0.jpg", "a/.thumbnails/0.jpg", "a/._0.jpg", "b/1.jpg", ".ipynb_checkpoints/0.jpg", ".trash/x")
    images = open_images(tmp_path)
    assert (len(images), images.class_names) == (2, ("a", "b"))
    assert len(open_every(tmp_path)) == 2
    assert capsys.readouterr().err == ""
    hidden = tmp_path / ".photos"
    fill(hidden, "a/0.jpg")
    assert len(open_images(hidden)) == len(open_every(hidden)) == 1, "one that is asked for isn't hidden"


def test_an_empty_folder_keeps_its_number_and_is_named(tmp_path, capsys):
    fill(tmp_path, "a/0.jpg", "b/notes.txt", "c/1.jpg")
    images = open_images(tmp_path)
    assert images.class_names == ("a", "b", "c")
    assert labels(images) == {"0.jpg": 0, "1.jpg": 2}
    assert "1 folder(s) without images are counted as classes: b" in " ".join(capsys.readouterr().err.split())
    for file in (tmp_path / "a" / "0.jpg", tmp_path / "c" / "1.jpg"):
        file.unlink()
    with pytest.raises(DataError, match="expected images, or one subfolder with images per class"):
        open_images(tmp_path)


def test_a_class_named_train(tmp_path):
    fill(tmp_path, "bus/0.jpg", "train/1.jpg")
    for function in (open_images, open_evaluation):
        with pytest.raises(DataError, match=r"others with images \(bus\): expected val, validation or test beside it"):
            function(tmp_path)
    fill(tmp_path, "val/2.jpg")
    assert len(open_images(tmp_path)) == 1
    assert open_evaluation(tmp_path).name(0).endswith("val/2.jpg")


def test_a_part_for_evaluation_alone_is_no_class(tmp_path):
    """Its folders are the classes: one class named `val` would be the label of all images."""
    fill(tmp_path, "val/bus/0.jpg", "val/cat/1.jpg", "notes/read.txt")
    images = open_evaluation(tmp_path)
    assert (images.part, images.class_names, labels(images)) == ("val", ("bus", "cat"), {"0.jpg": 0, "1.jpg": 1})
    with pytest.raises(DataError, match=r"holds val and no train: expected a folder 'train' beside it"):
        open_images(tmp_path)
    fill(tmp_path, "dog/2.jpg")
    assert open_images(tmp_path).class_names == ("dog", "notes", "val")


def test_images_beside_parts_are_named(tmp_path, capsys):
    fill(tmp_path, "train/bus/0.jpg", "val/bus/1.jpg")
    assert len(open_images(tmp_path)) == 1
    assert capsys.readouterr().err == ""
    fill(tmp_path, "2.jpg", "3.jpg")
    assert len(open_images(tmp_path)) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "2 image(s) beside train, val, such as 2.jpg, belong to no part" in said
