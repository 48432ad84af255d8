"""Files of weights are read, never run."""

import json
import os
import pickle

import pytest
import timm
import torch
from samples import Malicious
from variants import build, images

import evopatch
from evopatch import CheckpointError, FinetuneConfig
from evopatch.patching.weights import foreign_code, weights_only
from evopatch.sources.models import open_classifier
from evopatch.sources.weight_files import read_state
from evopatch.training import checkpoints

NAME = "vit_tiny_patch16_224"


@pytest.fixture
def mark(tmp_path):
    """Where the folder would be, were something run."""
    return tmp_path / "was-run"


def state(mark):
    model = timm.create_model(NAME, img_size=32, num_classes=3)
    return {**model.state_dict(), "extra": Malicious(mark)}


def torch_save(values, file):
    torch.save(values, file)


def plain_pickle(values, file):
    file.write_bytes(pickle.dumps(values))


WRITERS = pytest.mark.parametrize("write", [torch_save, plain_pickle])


@WRITERS
def test_the_files_of_these_tests_are_malicious(write, mark, tmp_path):
    write({"extra": Malicious(mark)}, tmp_path / "weights.pth")
    if write is torch_save:
        torch.load(tmp_path / "weights.pth", weights_only=False)
    else:
        pickle.loads((tmp_path / "weights.pth").read_bytes())
    assert mark.exists()


@WRITERS
@pytest.mark.parametrize("reader", ["open_classifier", "read_state"])
def test_a_checkpoint(reader, write, mark, tmp_path):
    file = tmp_path / "weights.pth"
    write(state(mark), file)
    with pytest.raises(CheckpointError, match=r"weights\.pth"):
        open_classifier(NAME, file, num_classes=3) if reader == "open_classifier" else read_state(file)
    assert not mark.exists()


def test_the_message_names_what_would_have_run(mark, tmp_path):
    torch.save(state(mark), tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"asks for (posix|nt)\.mkdir, which aren't run.*state_dict\(\) alone"):
        open_classifier(NAME, tmp_path / "weights.pth", num_classes=3)
    torch.save({"a": torch.zeros(2)}, tmp_path / "harmless.pth")
    assert foreign_code(tmp_path / "harmless.pth") == ""


def test_weights_alone_load(tmp_path):
    model = timm.create_model(NAME, num_classes=3)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    found = open_classifier(NAME, tmp_path / "weights.pth", num_classes=3).model.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in model.state_dict().items())
    assert read_state(tmp_path / "weights.pth").keys() == found.keys()


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_folder(library, mark, tmp_path):
    if library == "timm":
        model = timm.create_model(NAME, img_size=32, num_classes=3)
        timm.models.save_for_hf(model, str(tmp_path), safe_serialization=False)
    else:
        build("hf_vit").save_pretrained(tmp_path)
    for file in (*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.bin")):
        file.unlink()
    torch.save({"extra": Malicious(mark)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError):
        open_classifier(str(tmp_path))
    assert not mark.exists()


def test_a_library_that_asks_for_more_gets_weights_only(mark, tmp_path):
    torch.save({"extra": Malicious(mark)}, tmp_path / "file")
    before = dict(os.environ)
    with weights_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "file", weights_only=False)
    assert not mark.exists()
    assert dict(os.environ) == before
    torch.load(tmp_path / "file", weights_only=False)
    assert mark.exists()


def test_a_setting_for_less_care_is_set_aside(monkeypatch, mark, tmp_path):
    torch.save({"extra": Malicious(mark)}, tmp_path / "file")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with weights_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "file")
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert not mark.exists()


RUN = {"config": FinetuneConfig(epochs=2, batch_size=4, ema_decay=0.9), "progress": False}


def data():
    return torch.utils.data.TensorDataset(images(8), torch.arange(8) % 7)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    evopatch.finetune(evopatch.apply(build("vit")), data(), output=folder, **RUN)
    return folder


def resumed(folder):
    return evopatch.finetune(evopatch.apply(build("vit")), data(), output=folder, resume=True, **RUN)


FILES = ("optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl", "initial.pt")


@WRITERS
@pytest.mark.parametrize("name", FILES)
def test_the_files_of_a_resumed_run(name, write, finished, mark, tmp_path):
    """Also where whoever changed them made the manifest fit."""
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    newest = checkpoints.latest(folder)
    file = folder / checkpoints.FOLDER / name if name == "initial.pt" else newest / name
    assert file.is_file()
    write({"extra": Malicious(mark)}, file)
    manifest = json.loads((newest / "manifest.json").read_text())
    if name in manifest["files"]:
        manifest["files"][name] = checkpoints._digest(file)
        (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=rf"{name}.* can't be read"):
        resumed(folder)
    assert not mark.exists()


def test_a_run_that_nobody_changed_goes_on(finished):
    assert resumed(finished).steps == 4
