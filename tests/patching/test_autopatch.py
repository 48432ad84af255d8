"""Unmodified scripts get patched models."""

import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import timm
import timm.models
import torch
import transformers
from timm import create_model as imported_by_name
from variants import build, images

import evopatch
from evopatch import ConfigError, EvoConfig, autopatch

TINY = {"img_size": 32, "num_classes": 3}
EXAMPLE = Path(__file__).parents[2] / "examples" / "train_timm.py"


def test_create_model_under_every_name():
    original, method = timm.create_model, transformers.PreTrainedModel.__dict__["from_pretrained"]
    with autopatch(keep_ratio=0.4) as patched:
        made = [f("vit_tiny_patch16_224", **TINY) for f in (timm.create_model, timm.models.create_model)]
        made.append(imported_by_name("vit_tiny_patch16_224", **TINY))
        kept = timm.create_model
    assert all(evopatch.is_patched(model) for model in made)
    assert [id(model) for model in patched] == [id(model) for model in made]
    assert evopatch.config_of(made[0]).keep_ratio == 0.4
    assert timm.create_model is timm.models.create_model is original is imported_by_name
    assert transformers.PreTrainedModel.__dict__["from_pretrained"] is method
    assert not evopatch.is_patched(timm.create_model("vit_tiny_patch16_224", **TINY))
    assert not evopatch.is_patched(kept("vit_tiny_patch16_224", **TINY)), "a reference that outlived the scope"


def test_from_pretrained(tmp_path):
    build("hf_vit").save_pretrained(tmp_path)
    with autopatch():
        named = type(build("hf_vit")).from_pretrained(tmp_path)
        auto, info = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert evopatch.is_patched(named)
    assert evopatch.is_patched(auto)
    assert "missing_keys" in info
    assert not evopatch.is_patched(type(named).from_pretrained(tmp_path))


def test_other_models_are_left_alone(caplog):
    with caplog.at_level(logging.INFO), autopatch() as patched:
        timm.create_model("resnet18", num_classes=3)
    assert patched == []
    assert "patched" not in caplog.text


def test_a_refused_model_is_a_warning(caplog, monkeypatch):
    from evopatch.errors import UnsupportedModelError

    def refuse(*arguments):
        raise UnsupportedModelError("no way")

    monkeypatch.setattr(sys.modules["evopatch.patching.autopatch"], "apply", refuse)
    with autopatch() as patched:
        model = timm.create_model("vit_tiny_patch16_224", **TINY)
    assert "left unpatched: no way" in caplog.text
    assert patched == []
    assert not evopatch.is_patched(model)


def test_settings_that_do_not_fit_are_an_error_and_undone():
    original = timm.create_model
    with pytest.raises(ConfigError, match="block"), autopatch(config=EvoConfig(stages=[40])):
        timm.create_model("vit_tiny_patch16_224", **TINY)
    assert timm.create_model is original


def test_nested_scopes_and_threads():
    original = timm.create_model
    found = []
    with autopatch(keep_ratio=0.8):
        with autopatch(keep_ratio=0.3):
            inner = timm.models.create_model("vit_tiny_patch16_224", **TINY)
        outer = timm.create_model("vit_tiny_patch16_224", **TINY)
        thread = threading.Thread(target=lambda: found.append(timm.create_model("vit_tiny_patch16_224", **TINY)))
        thread.start()
        thread.join()
    assert evopatch.config_of(inner).keep_ratio == 0.3
    assert evopatch.config_of(outer).keep_ratio == 0.8
    assert evopatch.is_patched(found[0])
    assert timm.create_model is original


@pytest.mark.slow
def test_models_compile():
    with autopatch():
        model = timm.create_model("vit_tiny_patch16_224", **TINY).eval()
    torch._dynamo.reset()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_libraries_imported_inside():
    code = (
        "import sys, evopatch\n"
        "assert 'timm' not in sys.modules\n"
        "with evopatch.autopatch():\n"
        "    from timm import create_model\n"
        "    model = create_model('vit_tiny_patch16_224', img_size=32)\n"
        "    assert 'transformers' not in sys.modules\n"
        "assert evopatch.is_patched(model)\n"
        "assert not evopatch.is_patched(create_model('vit_tiny_patch16_224', img_size=32))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def run(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "evopatch", "run", *map(str, arguments)], capture_output=True, text=True, cwd=cwd
    )


@pytest.mark.slow
def test_run_a_training_script(tmp_path):
    arguments = (EXAMPLE, "--model", "vit_tiny_patch16_224", "--img-size", 32, "--epochs", 1, "--steps", 2)
    patched = run("--keep-ratio", "0.4", *arguments, "--output", tmp_path / "patched")
    assert patched.returncode == 0, patched.stderr
    assert "evopatch: patched a VisionTransformer" in patched.stderr
    plain = subprocess.run(
        [sys.executable, *map(str, arguments), "--output", tmp_path / "plain"], capture_output=True, text=True
    )
    assert plain.returncode == 0, plain.stderr
    states = [
        torch.load(tmp_path / name / "last.pth.tar", weights_only=True)["state_dict"] for name in ("patched", "plain")
    ]
    assert list(states[0]) == list(states[1])
    assert not torch.equal(states[0]["head.weight"], states[1]["head.weight"]), "nothing was different in training"


@pytest.mark.slow
def test_run_passes_everything_on(tmp_path):
    (tmp_path / "helper.py").write_text("VALUE = 5\n")
    (tmp_path / "script.py").write_text(
        "import sys, helper\nprint(sys.argv[1:], helper.VALUE, __name__)\nsys.exit(int(sys.argv[-1]))\n"
    )
    found = run(tmp_path / "script.py", "--keep-ratio", "x", "--help", 7)
    assert found.returncode == 7
    assert "['--keep-ratio', 'x', '--help', '7'] 5 __main__" in found.stdout
    assert "built no model that could be patched" in found.stderr
    found = run("-m", "script", 3, cwd=tmp_path)
    assert found.returncode == 3
    assert "['3'] 5 __main__" in found.stdout


def test_run_bad_usage(command):
    command("run", "nowhere.py").assert_refused(2, "nowhere.py: no such file")


def test_autopatched_equals_applied():
    torch.manual_seed(0)
    with autopatch(keep_ratio=0.5):
        model = timm.create_model("vit_tiny_patch16_224", img_size=40, patch_size=8, num_classes=7).eval()
    torch.manual_seed(0)
    expected = evopatch.apply(timm.create_model("vit_tiny_patch16_224", img_size=40, patch_size=8, num_classes=7))
    with torch.no_grad():
        assert torch.equal(model(images()), expected.eval()(images()))
