"""A folder that is saved to again, by a process that is stopped half-way or beside one that loads: the model that it
gives is one of the two, or none."""

import os
from pathlib import Path

import pytest
import timm
import torch
import transformers
from terminal import unboxed
from variants import build, call, images

import evopatch
from evopatch import CheckpointError
from evopatch.sources import saving


def timm_model():
    sizes = {"patch_size": 8, "img_size": 40, "embed_dim": 48, "depth": 4, "num_heads": 4}
    return timm.create_model("vit_tiny_patch16_224", num_classes=7, **sizes).eval()


MAKERS = {"timm": timm_model, "transformers": lambda: build("hf_vit")}
LIBRARIES = pytest.mark.parametrize("library", sorted(MAKERS))


@torch.no_grad()
def made(library, seed, keep_ratio):
    model = MAKERS[library]()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    return evopatch.apply(model, images=images(16), keep_ratio=keep_ratio)


@pytest.fixture
def stopped(monkeypatch):
    """Saves until so many files were put into the folder; says whether that stopped it."""

    def save(model, folder, number):
        done, replace = [], os.replace

        def limited(source, target):
            if Path(target).parent == folder:
                if len(done) == number:
                    raise KeyboardInterrupt
                done.append(target)
            replace(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", limited)
            try:
                evopatch.save_pretrained(model, folder)
            except KeyboardInterrupt:
                return True
        return False

    return save


@LIBRARIES
@torch.no_grad()
def test_a_save_that_was_stopped_after_any_file_gives_one_of_the_two_models_or_an_error(library, stopped, tmp_path):
    before, after, x = made(library, 1, 0.7), made(library, 2, 0.3), images()
    expected, other = call(before, x), call(after, x)
    outcomes, number = [], 0
    while not outcomes or outcomes[-1] != "after":
        folder = tmp_path / str(number)
        evopatch.save_pretrained(before, folder)
        was_stopped = stopped(after, folder, number)
        try:
            found = call(evopatch.load_pretrained(folder), x)
        except CheckpointError as error:
            refusal = str(error)
        else:
            refusal = ""
        if refusal:
            assert "holds an unfinished save" in refusal
            outcomes.append("refused")
            evopatch.save_pretrained(after, folder)
            assert torch.equal(call(evopatch.load_pretrained(folder), x), other), "saving again mends it"
        else:
            assert torch.equal(found, expected) or torch.equal(found, other), f"a mixture after {number} files"
            outcomes.append("before" if torch.equal(found, expected) else "after")
            assert was_stopped is (outcomes[-1] == "before")
        number += 1
    assert outcomes[0] == "before"
    assert outcomes.count("refused") >= 3, "it was stopped between two files of one model"


@torch.no_grad()
def test_a_stopped_save_over_a_stock_checkpoint_is_refused(stopped, tmp_path, command):
    build("hf_vit").save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 40, "width": 40}).save_pretrained(tmp_path)
    assert stopped(made("transformers", 1, 0.7), tmp_path, 3)
    with pytest.raises(CheckpointError, match="holds an unfinished save"):
        evopatch.load_pretrained(tmp_path)
    run = command("verify", "--model", tmp_path)
    run.assert_refused(1, "holds an unfinished save")
    assert "patched as" not in unboxed(run.stderr)


@torch.no_grad()
def test_files_of_a_stopped_save_go_with_the_next_one(stopped, tmp_path, monkeypatch):
    save = transformers.PreTrainedModel.save_pretrained
    with monkeypatch.context() as patched:
        patched.setattr(
            transformers.PreTrainedModel,
            "save_pretrained",
            lambda self, folder, **kwargs: save(self, folder, max_shard_size="10KB", **kwargs),
        )
        assert stopped(made("transformers", 1, 0.7), tmp_path, 6)
    assert list(tmp_path.glob("model-*.safetensors"))
    evopatch.save_pretrained(made("transformers", 2, 0.7), tmp_path)
    assert not list(tmp_path.glob("model-*.safetensors"))


@pytest.mark.parametrize("moment", ["before the weights", "after the weights"])
@torch.no_grad()
def test_a_model_that_is_replaced_while_it_is_loaded_is_refused(moment, tmp_path, monkeypatch):
    # Of equal settings: only the files' weights, and what their blocks learned, differ.
    before, after, x = made("timm", 1, 0.5), made("timm", 2, 0.5), images()
    evopatch.save_pretrained(before, tmp_path)
    create = timm.create_model

    def slowly(name, **options):
        if moment == "after the weights":
            model = create(name, **options)
        with monkeypatch.context() as patched:
            patched.setattr(timm, "create_model", create)
            evopatch.save_pretrained(after, tmp_path)
        return model if moment == "after the weights" else create(name, **options)

    with monkeypatch.context() as patched:
        patched.setattr(timm, "create_model", slowly)
        with pytest.raises(CheckpointError, match="was saved to by another process while its model was loaded"):
            evopatch.load_pretrained(tmp_path)
    assert torch.equal(call(evopatch.load_pretrained(tmp_path), x), call(after, x))


def test_a_model_is_on_the_disk_before_it_is_called_whole(tmp_path, monkeypatch):
    steps, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: steps.append("flushed"))
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append(Path(b).name), replace(a, b)))
    evopatch.save_pretrained(made("timm", 1, 0.5), tmp_path)
    named = [step for step in steps if step != "flushed"]
    assert named[0] == named[-1] == saving.FILE_NAME
    around = [(steps[i - 1], steps[i + 1]) for i, step in enumerate(steps) if step in ("model.safetensors", named[0])]
    assert set(around) == {("flushed", "flushed")}
