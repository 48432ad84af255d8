"""`config.toml` in the folder of a run says the same wherever it is read from, and where the run was moved to."""

import json
import shutil

import pytest
import timm
import torch
from samples import encoded

from evopatch.cli.options import read_toml


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A folder with a run that was begun there with relative paths."""
    folder = tmp_path_factory.mktemp("begun")
    (folder / "photos").mkdir()
    for i in range(8):
        (folder / "photos" / f"{i}.jpg").write_bytes(encoded(i))
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=3).state_dict(), folder / "weights.pth")
    return folder


COMMON = ("finetune", "--model", "vit_tiny_patch16_224", "--image-size", "32", "--num-classes", "3", "--epochs", "1")
COMMON += ("--batch-size", "4", "--checkpoint", "weights.pth", "--data", "photos", "--output", "run")


@pytest.fixture
def begun(command, started, tmp_path, monkeypatch):
    folder = tmp_path / "begun"
    shutil.copytree(started, folder)
    monkeypatch.chdir(folder)
    run = command(*COMMON)
    assert run.returncode == 0, run.stderr
    return folder


def test_a_run_goes_on_from_another_folder(begun, command, tmp_path, monkeypatch):
    saved = read_toml(begun / "run" / "config.toml")
    assert saved["data"] == str(begun / "photos")
    assert saved["checkpoint"] == str(begun / "weights.pth")
    assert saved["model"] == "vit_tiny_patch16_224", "a name stays one"
    again = command(*COMMON, "--resume")
    assert again.returncode == 0, again.stderr
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = command("finetune", "--config", begun / "run" / "config.toml", "--resume")
    assert run.returncode == 0, run.stderr
    assert not list((tmp_path / "elsewhere").iterdir())
    command("finetune", "--config", begun / "run" / "config.toml", "--resume", "--output", "other").assert_refused(
        1, "--resume: other holds no run to go on with"
    )


def test_a_run_that_was_moved_goes_on_where_it_is(begun, command, tmp_path):
    shutil.move(begun / "run", tmp_path / "moved")
    run = command("finetune", "--config", tmp_path / "moved" / "config.toml", "--resume")
    assert run.returncode == 0, run.stderr
    assert not (begun / "run").exists()
    assert json.loads((tmp_path / "moved" / "result.json").read_text())["steps"] == 2


def test_settings_with_relative_paths_of_an_earlier_version(begun, command):
    file = begun / "run" / "config.toml"
    file.write_text(file.read_text().replace(f"{begun}/", ""))
    assert read_toml(file)["data"] == "photos"
    run = command("finetune", "--config", "run/config.toml", "--resume")
    assert run.returncode == 0, run.stderr
