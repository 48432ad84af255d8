"""A model that a command saves has the preprocessing that it was made with, and is one that other commands open."""

import json

import pytest
import timm
import timm.data
import torch
from samples import encoded
from terminal import unboxed
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification, ViTImageProcessor

import evopatch
from evopatch.sources.models import open_classifier
from evopatch.sources.preprocessing import Preprocessing

NORMALISED = ("--mean", "0.3", "--std", "0.2,0.3,0.4")
TIMM = ("--model", "vit_tiny_patch16_224", "--num-classes", "3", "--image-size", "64", "--crop-pct", "0.7")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Images, a folder of transformers with a processor of its own, and weights for timm."""
    folder = tmp_path_factory.mktemp("files")
    for i in range(8):
        (folder / "photos" / "abc"[i % 3]).mkdir(parents=True, exist_ok=True)
        (folder / "photos" / "abc"[i % 3] / f"{i}.jpg").write_bytes(encoded(i))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(**sizes, image_size=64, patch_size=8, num_labels=3)
    ViTForImageClassification(config).save_pretrained(folder / "hf")
    ViTImageProcessor(size={"height": 64, "width": 64}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(folder / "hf")
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    torch.save(model.state_dict(), folder / "weights.pth")
    return folder


@pytest.fixture
def done(command, files, monkeypatch):
    """A command, in the folder of files, that has to succeed."""
    monkeypatch.chdir(files)

    def run(*arguments):
        run = command(*arguments)
        assert run.returncode == 0, run.stderr
        return run

    return run


def finetuned(done, output, *options):
    how = ("--data", "photos", "--eval-data", "photos", "--epochs", "1", "--batch-size", "4", "--output", output)
    done("finetune", *how, *options)
    return json.loads((output / "result.json").read_text())["after"]["top1"]


def evaluated(done, model, out):
    done("evaluate", "--model", model, "--data", "photos", "--json", out)
    return json.loads(out.read_text())[1]["top1"]


def test_other_commands_open_what_finetune_saved_of_transformers(done, tmp_path):
    top1 = finetuned(done, tmp_path / "run", "--model", "hf", *NORMALISED)
    saved = tmp_path / "run" / "model"
    assert evaluated(done, saved, tmp_path / "out.json") == top1
    found = open_classifier(str(saved))
    assert (found.mean, found.std) == ((0.3,) * 3, (0.2, 0.3, 0.4))
    processor = AutoImageProcessor.from_pretrained(saved)
    assert isinstance(processor, ViTImageProcessor), "as if it had been saved by transformers"
    assert tuple(processor.image_mean) == (0.3,) * 3
    out = tmp_path / "file.pt"
    done("export", "--model", saved, "--format", "torchscript", "--images", "2", "--out", out)


def test_other_commands_open_what_calibrate_saved_of_transformers(done, tmp_path):
    how = ("--data", "photos", "--target-flops", "0.9", "--budget", "0.01", "--output", tmp_path / "tuned")
    done("calibrate", "--model", "hf", *how)
    assert open_classifier(str(tmp_path / "tuned")).mean == (0.1, 0.2, 0.3)
    done("embed", "--model", tmp_path / "tuned", "--data", "photos", "--out", tmp_path / "out.parquet")


def test_the_preprocessing_of_a_timm_model_is_saved_with_it(done, tmp_path):
    top1 = finetuned(done, tmp_path / "run", *TIMM, "--checkpoint", "weights.pth", *NORMALISED)
    assert evaluated(done, tmp_path / "run" / "model", tmp_path / "out.json") == top1
    stock = timm.create_model(f"local-dir:{tmp_path / 'run' / 'model'}", pretrained=True)
    for test_size in (False, True):
        found = timm.data.resolve_data_config(model=stock, use_test_size=test_size)
        expected = {"mean": (0.3,) * 3, "std": (0.2, 0.3, 0.4), "crop_pct": 0.7, "input_size": (3, 64, 64)}
        assert {name: tuple(v) if isinstance(v, list) else v for name, v in found.items()}.items() >= expected.items()


def test_what_timm_recommends_at_the_end_goes_with_what_it_was_for():
    own = timm.get_pretrained_cfg("resnet50")
    assert own.test_crop_pct not in (None, own.crop_pct)
    for share, at_the_end in ((0.8, None), (None, own.test_crop_pct)):
        model = open_classifier("resnet50", pretrained=False, preprocessing=Preprocessing(crop_pct=share)).model
        assert model.pretrained_cfg["crop_pct"] == (share or own.crop_pct)
        assert model.pretrained_cfg.get("test_crop_pct") == at_the_end


def patched(source):
    return evopatch.apply(ViTForImageClassification.from_pretrained(source))


def test_python_saves_the_processor_from_where_the_model_was(done, files, tmp_path):
    evopatch.save_pretrained(patched(files / "hf"), tmp_path / "once")
    evopatch.save_pretrained(evopatch.load_pretrained(tmp_path / "once"), tmp_path / "twice")
    for folder in ("once", "twice"):
        assert "preprocessor_config.json" in json.loads((tmp_path / folder / "evopatch.json").read_text())["files"]
    assert evaluated(done, tmp_path / "twice", tmp_path / "out.json") is not None
    assert open_classifier(str(tmp_path / "twice")).mean == (0.1, 0.2, 0.3)


def test_a_processor_that_is_given_or_there_wins(files, tmp_path):
    given, model = ViTImageProcessor(image_mean=[0.4, 0.4, 0.4]), patched(files / "hf")
    evopatch.save_pretrained(model, tmp_path / "given", processor=given)
    given.save_pretrained(tmp_path / "there")
    for _ in range(2):
        evopatch.save_pretrained(model, tmp_path / "there")
    for folder in ("given", "there"):
        assert open_classifier(str(tmp_path / folder)).mean == (0.4,) * 3
    with pytest.raises(evopatch.CheckpointError, match="processor=ViTImageProcessor: only for models of transformers"):
        evopatch.save_pretrained(evopatch.apply(timm.create_model("test_vit")), tmp_path / "timm", processor=given)


def test_a_missing_processor_is_named(command, files, tmp_path):
    model = patched(files / "hf")
    model.config.name_or_path = model.name_or_path = ""
    evopatch.save_pretrained(model, tmp_path / "model")
    run = command("evaluate", "--model", tmp_path / "model", "--data", files / "photos")
    run.assert_refused(1, f"'{tmp_path / 'model'}' holds a model and no image processor. Expected preprocessor_config")
    (tmp_path / "model" / "preprocessor_config.json").write_text("{")
    run = command("evaluate", "--model", tmp_path / "model", "--data", files / "photos")
    run.assert_refused(1, "holds a model and no image processor that can be read")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "vit", "hidden_size": "many"}')
    run = command("evaluate", "--model", tmp_path / "model", "--data", files / "photos")
    run.assert_refused(1, "no image classifier could be loaded from")
    assert "Without network" not in unboxed(run.stderr)


@pytest.mark.parametrize("option", ["--mean", "--std"])
@pytest.mark.parametrize("value", ["nan", "0.5,inf,0.5", "0", "0.5,-1,0.5"])
def test_a_normalisation_that_is_none(option, value, command, files):
    run = command("evaluate", *TIMM, "--checkpoint", files / "weights.pth", "--data", files / "photos", option, value)
    if option == "--std" or "n" in value:
        expected = "numbers above 0" if option == "--std" else "finite numbers"
        run.assert_refused(2, f"{option} '{value}': expected {expected}")
    else:
        assert run.returncode == 0, run.stderr
