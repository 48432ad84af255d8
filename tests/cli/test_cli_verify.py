"""`evopatch verify`."""

import json

import pytest
from samples import encoded
from terminal import unboxed

from evopatch.forward import tokens
from evopatch.forward.tokens import distribute
from evopatch.measure import verification

SMALL = ("--model", "deit_tiny_patch16_224", "--image-size", "64", "--batch-size", "2")


def test_verify_prints_a_table_and_fails_where_a_check_does(command, tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "DRAWS", 1)
    monkeypatch.setattr(verification, "HALF", ())
    out = tmp_path / "out.json"
    run = command("verify", *SMALL, "--json", out)
    assert run.returncode == 0, run.stderr
    for word in ("keep ratio 1", "other neighbours", "finite in float32", "skipped", "not asked for", "cpu, float32"):
        assert word in run.stdout
    assert json.loads(out.read_text())["passed"]
    runs = iter(range(10**6))
    monkeypatch.setattr(tokens, "distribute", lambda *args: distribute(*args) * (1 + next(runs)))
    run = command("verify", *SMALL, "--json", out)
    assert run.returncode == 1
    assert "failed: another run gives the same" in run.stderr
    assert not json.loads(out.read_text())["passed"]


@pytest.mark.slow
def test_verify_on_images(command, tmp_path):
    import timm
    import torch

    torch.save(timm.create_model("deit_tiny_patch16_224").state_dict(), tmp_path / "weights.pth")
    (tmp_path / "images").mkdir()
    for i in range(4):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(encoded(i) if i else b"damaged")
    options = ("--checkpoint", tmp_path / "weights.pth", "--data", tmp_path / "images", "--keep-ratio", "0.3")
    run = command("verify", *SMALL[:2], *options)
    assert run.returncode == 0, run.stderr
    assert "3x3x224x224" in run.stdout
    assert "1 unreadable image(s) left out" in run.stderr
    for i in (1, 2):
        (tmp_path / "images" / f"{i}.jpg").unlink()
    command("verify", *SMALL[:2], *options).assert_refused(1, "has 1 image(s) that can be read: expected at least 2")


def test_its_help_says_which_weights_it_takes(command):
    said = unboxed(command("verify", "--help").stdout)
    assert "with --data timm's pretrained ones, else random ones" in said
    assert "else random ones" not in unboxed(command("evaluate", "--help").stdout), "which has no random ones"


def test_models_without_a_head_are_verified(command, tmp_path, monkeypatch, headless):
    monkeypatch.setattr(verification, "DRAWS", 1)
    monkeypatch.setattr(verification, "HALF", ())
    run = command("verify", "--model", headless, "--batch-size", "2", "--json", tmp_path / "out.json")
    assert run.returncode == 0, run.stderr
    assert "2x3x40x40" in run.stdout
    assert "was saved" in unboxed(run.stderr)
    assert json.loads((tmp_path / "out.json").read_text())["passed"]
    command("verify", "--model", headless, "--num-classes", "3").assert_refused(2, "--num-classes: only for timm")
