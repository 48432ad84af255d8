"""`evopatch export`, as a user runs it."""

import pytest

MODEL = ("export", "--model", "deit_tiny_patch16_224", "--no-pretrained")


def test_a_file_is_written_and_what_was_checked_is_said(command, tmp_path):
    out = tmp_path / "deit.pt"
    run = command(*MODEL, "--format", "torchscript", "--images", "3", "--keep-ratio", "0.4", "--out", out)
    assert run.returncode == 0, run.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["deit.pt"]
    assert f"{out}: {out.stat().st_size / 1e6:.1f} MB." in run.stdout
    assert "in batches of 1 of 224x224, 2 of 224x224: 3 of 3 images equal to 1e-4" in run.stdout


def test_of_a_rounded_file_only_the_error_is_said(command, tmp_path):
    run = command(*MODEL, "--format", "pt2", "--batch", "2", "--half", "--images", "2", "--out", tmp_path / "deit.pt2")
    assert run.returncode == 0, run.stderr
    assert "in batches of 2 of 224x224.\nError: " in run.stdout
    assert "equal to" not in run.stdout


@pytest.mark.slow
def test_the_setting_that_openvino_needs_is_said(command, tmp_path):
    pytest.importorskip("openvino")
    run = command(*MODEL, "--format", "openvino", "--batch", "1", "--images", "2", "--out", tmp_path / "deit.xml")
    assert run.returncode == 0, run.stderr
    assert "That is with INFERENCE_PRECISION_HINT=f32; run it with the same" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--out", "m.onnx", "--batch", "some"), 2, "--batch some: expected dynamic, or a number"),
        (("--out", "m.onnx", "--image-size", "0"), 2, "--image-size 0: expected dynamic, or a number"),
        (("--out", "no/m.onnx"), 1, "no: no such folder"),
        (("--out", "m.pt", "--format", "torchscript", "--int8"), 2, "format torchscript isn't written in int8"),
        (("--out", "m.onnx", "--int8"), 2, "--int8: expected --data too"),
        (
            ("--out", "m.pt", "--format", "torchscript", "--batch", "2", "--data", "two"),
            1,
            "expected 16 to verify with",
        ),
        (("--out", "m.pt", "--format", "pt2"), 2, "expected the ending .pt2"),
    ],
)
def test_bad_usage_is_one_message(command, arguments, code, message, tmp_path, monkeypatch):
    from samples import encoded

    folder = tmp_path / "two" / "a"
    folder.mkdir(parents=True)
    for number in range(2):
        (folder / f"{number}.jpg").write_bytes(encoded(number))
    monkeypatch.chdir(tmp_path)
    command(*MODEL, *arguments).assert_refused(code, message)
    assert [file.name for file in tmp_path.iterdir()] == ["two"]


def test_dynamic_sizes_of_a_model_of_one_size_are_refused(command, tmp_path):
    arguments = ("--no-pretrained", "--image-size", "dynamic", "--format", "pt2", "--out", tmp_path / "m.pt2")
    run = command("export", "--model", "levit_128s", *arguments)
    run.assert_refused(2, "levit_128s takes images of one size only")


def test_a_missing_package_is_one_message(command, tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "executorch" else find(name, *a))
    run = command(*MODEL, "--format", "executorch", "--out", tmp_path / "m.pte")
    run.assert_refused(1, "format executorch needs executorch: pip install executorch, or 'evopatch[export]'")
    assert "evopatch[all]" not in run.stderr


def test_models_without_a_head_are_exported(command, tmp_path, headless):
    out = tmp_path / "dino.pt"
    given = ("export", "--model", headless, "--format", "torchscript", "--images", "2", "--out", out)
    run = command(*given)
    assert run.returncode == 0, run.stderr
    assert "2 of 2 images equal to 1e-4" in run.stdout
    run = command(*given, "--no-pretrained", "--image-size", "40")
    run.assert_refused(2, "--image-size, --no-pretrained: only for timm models")
