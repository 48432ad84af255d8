"""What is said of files that hold no weights, or not all of them."""

import re

import pytest
import timm
import torch

import evopatch
from evopatch import CheckpointError
from evopatch.sources.models import open_classifier
from evopatch.sources.weight_files import read_state

NAME = "test_vit"


def halved(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


@pytest.fixture
def folder(tmp_path):
    model = timm.create_model(NAME)
    torch.save(model.state_dict(), tmp_path / "cut.pth")
    halved(tmp_path / "cut.pth")
    evopatch.save_pretrained(evopatch.apply(model), tmp_path / "saved")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "saved" / "model.safetensors").read_bytes())
    halved(tmp_path / "cut.safetensors")
    (tmp_path / "table.parquet").write_bytes(b"PAR1" + bytes(100))
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "empty.pth").touch()
    return tmp_path


@pytest.mark.parametrize("name", ["cut.pth", "cut.safetensors", "table.parquet", "text.pth", "empty.pth"])
def test_a_file_that_is_none(name, folder):
    for read in (read_state, lambda file: open_classifier(NAME, file)):
        with pytest.raises(CheckpointError, match=f"{re.escape(name)} is damaged, or no file of weights") as error:
            read(folder / name)
        assert "weights_only" not in str(error.value)
        assert "doesn't fit" not in str(error.value)


def test_weights_of_another_model_are_whole(folder):
    torch.save(timm.create_model("test_vit2").state_dict(), folder / "other.pth")
    with pytest.raises(CheckpointError, match=rf"other\.pth doesn't fit {NAME}"):
        open_classifier(NAME, folder / "other.pth")


def test_a_saved_folder_that_is_damaged(folder):
    open_classifier(str(folder / "saved"))
    halved(folder / "saved" / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(folder / 'saved'))} holds no whole model") as error:
        open_classifier(str(folder / "saved"))
    assert "network" not in str(error.value)
