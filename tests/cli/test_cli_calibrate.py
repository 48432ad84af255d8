"""`evopatch calibrate`, as a user runs it, and what other commands make of its folder."""

import json

import pytest
import timm
import torch
from PIL import Image
from terminal import unboxed

import evopatch
from evopatch.patching.learning import learned


@pytest.fixture
def files(tmp_path):
    """A small checkpoint and sixteen images without labels."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    (tmp_path / "photos").mkdir()
    for number in range(16):
        pixels = (torch.rand(80, 80, 3, generator=torch.Generator().manual_seed(number)) * 255).byte().numpy()
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    return tmp_path


def arguments(folder, *more):
    common = ("--model", "vit_tiny_patch16_224", "--checkpoint", folder / "weights.pth", "--image-size", "64")
    return ("calibrate", *common, "--data", folder / "photos", "--budget", "0.02", *more)


@pytest.mark.slow
def test_calibrate_then_evaluate_and_finetune(command, files):
    tuned = files / "tuned"
    run = command(*arguments(files, "--target-flops", "0.7", "--output", tuned))
    assert run.returncode == 0, run.stderr
    said = unboxed(run.stdout)
    for word in ("default", "calibrated", "Reached", "load_pretrained", "on 8 images", "figures on 8 others"):
        assert word in said
    written = {path.name for path in tuned.iterdir()}
    assert {"evopatch.json", "evopatch.safetensors", "calibration.json", "calibration.png", "README.md"} <= written
    content = json.loads((tuned / "calibration.json").read_text())
    model = evopatch.load_pretrained(tuned)
    assert evopatch.config_of(model).to_dict() == content["after"]["config"]
    assert learned(model)
    out = files / "out.json"
    run = command("evaluate", "--model", tuned, "--data", files / "photos", "--json", out)
    assert run.returncode == 0, run.stderr
    assert "patched as" in run.stderr
    assert json.loads(out.read_text())[1]["config"] == content["after"]["config"]
    run = command("benchmark", "--model", tuned, "--batch-size", "2", "--rounds", "2", "--warm-up", "1", "--json", out)
    assert run.returncode == 0, run.stderr
    assert [side["config"] for side in json.loads(out.read_text())[0]["sides"][1:]] == [content["after"]["config"]]
    run = command("profile", "--model", tuned, "--json", out)
    assert run.returncode == 0, run.stderr
    assert json.loads(out.read_text())["config"] == content["after"]["config"]
    photo = next(path for path in (files / "photos").rglob("*") if path.is_file())
    run = command("visualize", "--model", tuned, "--image", photo, "--out", files / "selection.png")
    assert run.returncode == 0, run.stderr
    assert "patched as" in run.stderr
    several = ("--keep-ratio", "0.5", "--keep-ratio", "0.3")
    run = command("evaluate", "--model", tuned, "--data", files / "photos", "--json", out, *several)
    assert run.returncode == 0, run.stderr
    assert "but for what was given here: keep_ratio" in unboxed(run.stderr)
    settings = [row["config"] for row in json.loads(out.read_text())[1:]]
    assert settings == [content["after"]["config"] | {"keep_ratio": ratio} for ratio in (0.5, 0.3)]
    run = command(
        "finetune", "--model", tuned, "--data", files / "photos", "--no-labels", "--epochs", "1", "--batch-size", "8",
        "--output", files / "run",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    trained = evopatch.load_pretrained(files / "run" / "model")
    assert evopatch.config_of(trained) == evopatch.config_of(model)
    assert learned(trained).keys() == learned(model).keys()


@pytest.mark.parametrize(
    ("more", "message", "code"),
    [
        ((), "none given: expected one of target_flops", 2),
        (("--target-flops", "0.6", "--target-kl", "0.1"), "target_flops and target_kl given", 2),
        (("--target-flops", "1.2"), "target_flops=1.2", 2),
    ],
)
def test_targets_are_checked_first(command, tmp_path, more, message, code):
    run = command("calibrate", "--model", "no_such_model", "--data", tmp_path / "nothing", *more)
    assert run.returncode == code
    assert message in unboxed(run.stderr)
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("tried", [False, True])
def test_an_interrupted_calibration_says_what_is_kept(command, files, tried, monkeypatch):
    def interrupted(*given, output, **options):
        output.mkdir()
        if tried:
            (output / "search.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr("evopatch.calibration.calibrating.calibrate", interrupted)
    run = command(*arguments(files, "--target-flops", "0.7", "--output", files / "tuned"))
    kept = f"what was tried is kept in {files / 'tuned'}, the same command goes on"
    run.assert_refused(130, f"interrupted: {kept if tried else 'nothing was tried yet'}")


def test_a_file_for_the_folder(command, files):
    run = command(*arguments(files, "--target-flops", "0.7", "--output", files / "weights.pth"))
    run.assert_refused(1, f"--output {files / 'weights.pth'} is a file: expected a folder")


@pytest.mark.slow
def test_too_few_images(command, files):
    run = command(*arguments(files, "--target-flops", "0.7", "--rows", ":5"))
    assert run.returncode == 1
    assert "5 image(s): expected at least 8" in unboxed(run.stderr)
