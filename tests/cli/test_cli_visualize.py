"""`evopatch visualize`, as a user runs it."""

import pytest
import timm
import torch
from PIL import Image

MODEL = ("visualize", "--model", "vit_tiny_patch16_224")


@pytest.fixture
def pictures(tmp_path):
    for index in range(2):
        pixels = torch.randint(0, 255, (50, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{index}.png")
    torch.manual_seed(0)
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "weights.pth")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_command(command, pictures, monkeypatch):
    monkeypatch.chdir(pictures)
    run = command(*MODEL, "--checkpoint", "weights.pth", "--image", "0.png", "--image", "1.png", "--out", "slow.png")
    assert run.returncode == 0, run.stderr
    with Image.open("slow.png") as picture:
        assert picture.width > picture.height > 400
    assert run.stdout == "token selection: slow.png\n"
    run = command(*MODEL, "--checkpoint", "weights.pth", "--image", "0.png", "--groups", "--out", "groups.png")
    assert run.returncode == 0, run.stderr
    assert run.stdout == "groups of tokens: groups.png\n"


@pytest.mark.slow
def test_command_with_checkpoints_of_a_training(command, pictures, monkeypatch):
    monkeypatch.chdir(pictures)
    small = ("--model", "vit_tiny_patch16_224", "--image-size", "32")
    rows = ("--rows", ":32", "--epochs", "3", "--batch-size", "16", "--checkpoints-kept", "3")
    run = command("finetune", *small, "--no-pretrained", *rows, "--output", "run")
    assert run.returncode == 0, run.stderr
    run = command(
        *("visualize", *small, "--num-classes", "10", "--image", "0.png"), "--checkpoints", "run", "--out", "t.png"
    )
    assert run.returncode == 0, run.stderr
    with Image.open("t.png") as picture:
        assert picture.width > 3 * picture.height, "an image and three checkpoints"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--image", "broken.png"), 1, "broken.png"),
        (("--image", "0.png", "--out", "no/a.png"), 1, "no such folder"),
        (("--image", "0.png", "--checkpoints", "empty"), 1, "empty: no checkpoints there"),
        (
            ("--image", "0.png", "--checkpoints", "empty", "--groups"),
            2,
            "--checkpoints shows the slow tokens of one block",
        ),
        (("--image", "0.png", "--block", "12"), 2, "block 12: expected one of the blocks 0 to 11"),
        ((), 2, "Missing option '--image'"),
    ],
)
def test_bad_usage_is_one_message(command, pictures, arguments, code, message, monkeypatch):
    monkeypatch.chdir(pictures)
    weights = () if "--checkpoints" in arguments else ("--checkpoint", "weights.pth")
    run = command(*MODEL, *weights, *arguments)
    run.assert_refused(code, message)
