"""Features of images: the right ones, and the same file however often a run is killed, by any number of processes."""

import json
import os
import signal
import socket
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import PartialState
from matrix import cases, patched
from PIL import Image
from samples import encoded
from variants import images_for

import evopatch
from evopatch.embedding import shards
from evopatch.embedding.features import FeatureExtractor
from evopatch.embedding.shards import Shards
from evopatch.sources.images import open_every

IMAGES, ROWS = 11, 3
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are made by forking this one")


def as_tensor(image):
    values = torch.frombuffer(bytearray(image.resize((40, 40)).tobytes()), dtype=torch.uint8)
    return values.view(40, 40, 3).permute(2, 0, 1) / 127.5 - 1


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Images at several depths, one of them damaged."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(IMAGES):
        path = folder / ("train" if i % 2 else "b/c") / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(i) if i != 5 else b"damaged")
    return folder


def embed(photos, out, **options):
    return evopatch.embed(
        patched("vit"), open_every(photos, as_tensor), out, **{"batch_size": 2, "shard_rows": ROWS, **options}
    )


@pytest.fixture(scope="module")
def uninterrupted(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "features.parquet"
    embed(photos, out, patch_features=True)
    return pq.read_table(out)


def test_rows_are_the_images_features_in_file_order(photos, uninterrupted, tmp_path):
    names = sorted(file.relative_to(photos).as_posix() for file in photos.rglob("*.jpg"))
    readable = [name for name in names if name != "train/05.jpg"]
    assert uninterrupted["image"].to_pylist() == readable
    extract = FeatureExtractor(patched("vit"), patches=True)
    found = extract(torch.stack([as_tensor(Image.open(photos / name).convert("RGB")) for name in readable]))
    features = torch.tensor(uninterrupted["features"].to_pylist())
    torch.testing.assert_close(features, found.image, atol=2e-5, rtol=2e-5)
    assert (features[0] - features[1]).abs().max() > 1e-3
    patches = torch.tensor(np.array(uninterrupted["patch_features"].to_pylist(), dtype=np.float32))
    assert patches.shape == (10, 25, 48)
    torch.testing.assert_close(patches, found.patches, atol=2e-5, rtol=2e-5)
    metadata = json.loads(uninterrupted.schema.metadata[shards.METADATA])
    assert metadata["unreadable"] == ["train/05.jpg"]
    assert metadata["settings"]["batch_size"] == 2
    result = embed(photos, str(tmp_path / "plain.parquet"))
    assert (result.rows, result.unreadable) == (10, ("train/05.jpg",))
    assert pq.read_table(result.output).column_names == ["image", "features"]
    assert not list(tmp_path.glob("*.shards"))


@cases("name", ["vit", "gap", "levit", "swin", "deit_distilled", "registers", "hf_vit", "hf_dinov2", "hf_swin"],
       fast=["vit", "hf_vit"])  # fmt: skip
@torch.no_grad()
def test_features_are_what_the_head_reads(name):
    """At keep ratio 1: of timm's what a model without a head gives, of transformers what the classifier is given."""
    model, x = patched(name, evopatch.EvoConfig(keep_ratio=1.0)), images_for(name)
    found = FeatureExtractor(model, patches=True)(x)
    assert found.patches.dim() == 3
    assert found.patches.shape[::2] == (2, found.image.shape[1])
    if hasattr(model, "forward_head"):
        model.reset_classifier(0)
        expected = model(x)
        if isinstance(expected, tuple):
            expected = (expected[0] + expected[1]) / 2
    elif name == "hf_swin":
        expected = model.swin(x).pooler_output
    else:
        expected = model.base_model(x).last_hidden_state[:, 0]
    torch.testing.assert_close(found.image, expected, atol=1e-6, rtol=1e-6)
    assert not torch.equal(found.image[0], found.image[1])


def in_child(do):
    """Run it in a process of its own; its exit status, negative for the signal that ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        signal.alarm(100)
        torch.set_num_threads(1)  # threads don't survive a fork
        try:
            do()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(point, photos, out, events=("replace", "fsync", "unlink")):
    """Whether a run was killed before the so-manieth of its calls that change the folder or wait for the disk."""

    def do():
        count = iter(range(10**6))
        for name in events:
            own = getattr(os, name)

            def call(*args, own=own, **kwargs):
                if next(count) == point:
                    os.kill(os.getpid(), signal.SIGKILL)
                return own(*args, **kwargs)

            setattr(os, name, call)
        embed(photos, out, patch_features=True)

    return in_child(do) == -signal.SIGKILL


def test_killed_at_every_point_and_resumed(photos, uninterrupted, tmp_path):
    out, points, before = tmp_path / "features.parquet", 0, []
    while killed_at(points, photos, out):
        before.append(out.exists())
        embed(photos, out, patch_features=True)
        assert pq.read_table(out).equals(uninterrupted, check_metadata=True), points
        assert not list(tmp_path.glob("*.shards"))
        out.unlink()
        points += 1
    assert points > 3 * 6, "settings, four shards and the file: each is flushed, renamed, and its folder flushed"
    assert before[0] is False
    assert before[-1] is True, "the last kills were while the shards were removed"


def test_killed_again_and_again_loses_no_shard(photos, uninterrupted, tmp_path):
    out = tmp_path / "features.parquet"
    there = []
    for _ in range(3):
        assert killed_at(4, photos, out)  # before the second file that is written gets its name
        assert not out.exists()
        there.append(len(list(Shards(out, IMAGES, ROWS).folder.glob("shard-*"))))
    assert there == [0, 1, 2]
    embed(photos, out, patch_features=True)
    assert pq.read_table(out).equals(uninterrupted, check_metadata=True)


def test_without_whole_shards_a_kill_would_be_noticed(photos, tmp_path, monkeypatch):
    """The control: shards written in place. A half one is found and named, not merged."""
    out = tmp_path / "features.parquet"

    def in_place(self, path, content):
        content = bytes(content)
        if path.suffix == ".parquet" and "000002" in path.name:
            path.write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        path.write_bytes(content)

    monkeypatch.setattr(Shards, "_write", in_place)
    assert in_child(lambda: embed(photos, out)) == -signal.SIGKILL
    monkeypatch.undo()
    with pytest.raises(evopatch.DataError, match="shard-000002.parquet is damaged: .* Remove it"):
        embed(photos, out)
    assert not out.exists()
    (out.with_name("features.parquet.shards") / "shard-000002.parquet").unlink()
    assert embed(photos, out).rows == 10


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def as_process(rank, port, photos, out):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "1"}
    PartialState._reset_state()
    written, own = [], Shards.write
    Shards.write = lambda self, shard, *args: (written.append(shard), own(self, shard, *args))
    result = embed(photos, out, patch_features=True)
    assert (result is None) == (rank == 1)
    out.with_name(f"written{rank}.json").write_text(json.dumps(written))


def test_two_processes_write_the_same_file(photos, uninterrupted, tmp_path):
    out, port = tmp_path / "features.parquet", free_port()
    other = os.fork()
    if other == 0:
        os._exit(-in_child(lambda: as_process(1, port, photos, out)))
    assert in_child(lambda: as_process(0, port, photos, out)) == 0
    assert os.waitpid(other, 0)[1] == 0
    assert pq.read_table(out).equals(uninterrupted, check_metadata=True)
    written = [json.loads((tmp_path / f"written{rank}.json").read_text()) for rank in (0, 1)]
    assert written == [[0, 2], [1, 3]]


@pytest.mark.parametrize("images", [torch.rand(2, 3, 40, 40), [torch.rand(3, 40, 40)], "photos"])
def test_what_has_no_names_is_refused(images, tmp_path):
    model = patched("vit")
    with pytest.raises(evopatch.DataError, match=r"images are a \w+: expected images with names, as of"):
        evopatch.embed(model, images, tmp_path / "features.parquet")
    assert not list(tmp_path.iterdir())
    assert FeatureExtractor(model, patches=False)(torch.rand(2, 3, 40, 40)).image.shape == (2, 48)


def test_other_settings_are_refused(photos, tmp_path, monkeypatch):
    out = tmp_path / "features.parquet"
    assert killed_at(6, photos, out)
    others = {
        "batch_size was 2": {"batch_size": 4},
        "patch_features was True": {"patch_features": False},
        "model was None and is 'x' now": {"settings": {"model": "x"}},
    }
    for name, changed in others.items():
        with pytest.raises(evopatch.ConfigError, match=name):
            embed(photos, out, **{"patch_features": True, **changed})
    with monkeypatch.context() as patch:
        patch.setattr("evopatch.embedding.writing.VERSION", "0.0.0")
        with pytest.raises(evopatch.ConfigError, match="evopatch was '.*' and is '0.0.0' now"):
            embed(photos, out, patch_features=True)
    images = open_every(photos, as_tensor)
    for settings in (evopatch.EvoConfig(keep_ratio=0.4), evopatch.EvoConfig()):
        model = patched("vit", settings)
        with torch.no_grad():
            next(model.parameters()).add_(1e-3 if settings == evopatch.EvoConfig() else 0)
        expected = "weights was" if settings == evopatch.EvoConfig() else "keep_ratio was 0.5 and is 0.4 now. Use"
        with pytest.raises(evopatch.ConfigError, match=expected):
            evopatch.embed(model, images, out, patch_features=True, batch_size=2, shard_rows=ROWS)
    (photos / "z.jpg").write_bytes(encoded(99))
    try:
        with pytest.raises(evopatch.ConfigError, match="images was '11, .* and is '12, "):
            embed(photos, out, patch_features=True)
    finally:
        (photos / "z.jpg").unlink()
    embed(photos, out, patch_features=True)
    with pytest.raises(evopatch.ConfigError, match="is there already"):
        embed(photos, out, patch_features=True)


def test_shards_without_any_readable_image(photos, tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.jpg").write_bytes(b"" if i < 2 else encoded(i))
    out = tmp_path / "features.parquet"
    assert embed(tmp_path, out, shard_rows=1).unreadable == ("0.jpg", "1.jpg")
    assert pq.read_table(out)["features"].type.list_size == 48


@pytest.mark.slow
def test_embed_on_the_command_line(photos, tmp_path):
    """By two processes of accelerate, killed from outside, then by one."""
    import timm

    torch.manual_seed(0)
    torch.save(timm.create_model("deit_tiny_patch16_224").state_dict(), tmp_path / "weights.pth")
    out = tmp_path / "features.parquet"
    model = ["--model", "deit_tiny_patch16_224", "--checkpoint", str(tmp_path / "weights.pth"), "--image-size", "64"]
    files = ["--data", str(photos), "--out", str(out)]
    command = ["embed", *model, *files, "--shard-rows", "1", "--batch-size", "1"]
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "evopatch"]
    process = subprocess.Popen([sys.executable, *launch, *command], start_new_session=True, stderr=subprocess.PIPE)
    folder = out.with_name(f"{out.name}.shards")
    while process.poll() is None and len(list(folder.glob("shard-*"))) < 3:
        pass
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    run = subprocess.run([sys.executable, "-m", "evopatch", *command], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "10 images in" in run.stdout
    assert "of 11 shards are there already" in run.stderr
    assert "1 unreadable image(s) left out, all named in the file's metadata: train/05.jpg" in run.stderr
    killed = pq.read_table(out)
    out.unlink()
    run = subprocess.run([sys.executable, *launch, *command], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert pq.read_table(out).equals(killed, check_metadata=True)
