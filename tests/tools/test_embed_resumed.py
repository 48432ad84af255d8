"""A run of `embed` goes on with the same images only, whatever they are called."""

import copy
import os
import shutil

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from matrix import patched
from samples import encoded

import evopatch
from evopatch.embedding.shards import Shards
from evopatch.sources.images import open_every


class Killed(BaseException):
    """In place of a signal."""


def as_tensor(image):
    values = torch.frombuffer(bytearray(image.resize((40, 40)).tobytes()), dtype=torch.uint8)
    return values.view(40, 40, 3).permute(2, 0, 1) / 127.5 - 1


def embed(data, out, model=None, transform=as_tensor):
    return evopatch.embed(model or patched("vit"), open_every(data, transform), out, batch_size=2, shard_rows=2)


def begun(data, out, monkeypatch, **others):
    """One of two shards is written."""
    write = Shards.write

    def one(self, shard, *args):
        if shard:
            raise Killed
        write(self, shard, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Shards, "write", one)
        with pytest.raises(Killed):
            embed(data, out, **others)


def folder(path, first):
    path.mkdir()
    for i in range(4):
        (path / f"{i}.jpg").write_bytes(encoded(first + i))
    return path


def rows(first, path=None):
    return [{"image": {"bytes": encoded(first + i), "path": path}} for i in range(4)]


def parquet(path, first):
    pq.write_table(pa.Table.from_pylist(rows(first)), path)
    return path


def saved(path, first):
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_list(rows(first), features=features).save_to_disk(path)
    return path


def features(file):
    return pq.read_table(file)["features"].to_pylist()


@pytest.mark.parametrize("make", [folder, parquet, saved])
def test_other_images_of_the_same_names_are_refused(make, tmp_path, monkeypatch):
    """The same data go on; at their place others of the same number and names don't."""
    name = "photos.parquet" if make is parquet else "photos"
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    data, out = make(tmp_path / "a" / name, 0), tmp_path / "features.parquet"
    begun(data, out, monkeypatch)
    embed(data, out)
    whole = features(out)
    out.unlink()
    begun(data, out, monkeypatch)
    shutil.move(data, tmp_path / "b" / name)
    make(data, 100)
    with pytest.raises(evopatch.ConfigError, match=r"images was '4, .*' and is '4, .*' now\. Use the same ones"):
        embed(data, out)
    shutil.rmtree(out.with_name("features.parquet.shards"))
    embed(data, out)
    assert not set(map(tuple, whole)) & set(map(tuple, features(out))), "the control: they have other features"


def test_a_copy_that_keeps_the_times_goes_on(tmp_path, monkeypatch):
    data, out = folder(tmp_path / "photos", 0), tmp_path / "features.parquet"
    begun(data, out, monkeypatch)
    copy = shutil.copytree(data, tmp_path / "copy")
    assert embed(copy, out).rows == 4
    out.unlink()
    begun(data, out, monkeypatch)
    os.utime(copy / "3.jpg", ns=(0, 0))
    with pytest.raises(evopatch.ConfigError, match="images was"):
        embed(copy, out)


def darker(image):
    return as_tensor(image) - 0.1


def test_another_transform_is_refused(tmp_path, monkeypatch):
    data, out = folder(tmp_path / "photos", 0), tmp_path / "features.parquet"
    begun(data, out, monkeypatch)
    with pytest.raises(evopatch.ConfigError, match="transform was"):
        embed(data, out, transform=darker)
    assert embed(data, out).rows == 4


@pytest.mark.parametrize(("name", "setting"), [("vit", "global_pool"), ("hf_dinov2", "hidden_act")])
def test_another_way_to_compute_with_the_same_weights_is_refused(name, setting, tmp_path, monkeypatch):
    data, out, model = folder(tmp_path / "photos", 0), tmp_path / "features.parquet", patched(name)
    begun(data, out, monkeypatch, model=model)
    other = copy.deepcopy(model)
    setattr(*((other, setting, "avg") if name == "vit" else (other.config, setting, "relu")))
    with pytest.raises(evopatch.ConfigError, match="computes was"):
        embed(data, out, model=other)
    assert embed(data, out, model=model).rows == 4


def test_images_that_a_table_names_by_their_paths(tmp_path):
    images = folder(tmp_path / "photos", 0)
    row = {"image": {"bytes": None, "path": str(images / "0.jpg")}}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "images.parquet")
    before = open_every(tmp_path / "images.parquet").stamp(0)
    assert open_every(tmp_path / "images.parquet").stamp(0) == before
    (images / "0.jpg").write_bytes(encoded(1) + b"more")
    assert open_every(tmp_path / "images.parquet").stamp(0) != before


def test_without_any_readable_image_nothing_is_written(tmp_path):
    data, out = tmp_path / "photos", tmp_path / "features.parquet"
    data.mkdir()
    for i in range(3):
        (data / f"{i}.jpg").write_bytes(b"damaged")
    for _ in range(2):
        with pytest.raises(evopatch.DataError, match=r"none of 3 image\(s\) can be read, such as 0.jpg: expected at"):
            embed(data, out)
        assert not out.exists()
    (data / "1.jpg").write_bytes(encoded(1))
    shutil.rmtree(out.with_name("features.parquet.shards"))
    assert embed(data, out).rows == 1


def test_the_model_stays_in_its_mode(tmp_path):
    """Each module in its own, as of a fine-tuning with a part in eval mode; also after a refusal."""
    model = patched("vit").train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    images = open_every(folder(tmp_path / "photos", 0), as_tensor)
    evopatch.embed(model, images, tmp_path / "features.parquet")
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(evopatch.ConfigError, match="is there already"):
        evopatch.embed(model, images, tmp_path / "features.parquet", batch_size=3)
    assert [module.training for module in model.modules()] == modes


def test_a_file_of_another_ending_is_refused(command, tmp_path):
    data = folder(tmp_path / "photos", 0)
    for name in ("features.csv", "features"):
        with pytest.raises(evopatch.ConfigError, match=f"{name}: features are written as parquet, expected the ending"):
            embed(data, tmp_path / name)
        run = command("embed", "--model", "none_such", "--data", data, "--out", tmp_path / name)
        run.assert_refused(2, f"{name}: features are written as parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
