"""A file given on the command line is read, not run, and what is wrong with it is one message."""

import sys

import pytest
import torch
from PIL import Image
from samples import Malicious

from evopatch.cli import main


@pytest.fixture
def files(tmp_path):
    torch.save({"head.weight": Malicious(tmp_path / "was-run")}, tmp_path / "weights.pth")
    Image.new("RGB", (40, 40)).save(tmp_path / "image.png")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "images" / "image.png")
    (tmp_path / "checkpoints").mkdir()
    torch.save({"head.weight": Malicious(tmp_path / "was-run")}, tmp_path / "checkpoints" / "1.pth")
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ("evaluate", "--checkpoint", "weights.pth", "--data", "images"),
        ("finetune", "--checkpoint", "weights.pth", "--data", "images"),
        ("finetune", "--no-pretrained", "--teacher", "vit_tiny_patch16_224", "--teacher-checkpoint", "weights.pth",
         "--data", "images"),
        ("visualize", "--checkpoint", "weights.pth", "--image", "image.png"),
        ("visualize", "--checkpoints", "checkpoints", "--image", "image.png"),
    ],
)  # fmt: skip
def test_malicious(arguments, files, monkeypatch, capsys):
    monkeypatch.chdir(files)
    command, *rest = arguments
    monkeypatch.setattr(sys, "argv", ["evopatch", command, "--model", "vit_tiny_patch16_224", *rest])
    with pytest.raises(SystemExit) as stop:
        main()
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert "mkdir, which aren't run" in error
    assert "Traceback" not in error
    assert not (files / "was-run").exists()
    torch.load(files / "weights.pth", weights_only=False)
    assert (files / "was-run").exists(), "the control: the file does it where it is trusted"
