"""What users give to `finetune` by mistake: refused and named, and what looks unusual and is right."""

import copy
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from samples import Images
from torch.utils.data import Subset
from transformers import Dinov2Config, Dinov2Model
from variants import build, images_for

import evopatch
from evopatch import CheckpointError, DataError, FinetuneConfig, UnsupportedModelError

ONCE = FinetuneConfig(epochs=1, batch_size=8)


def finetune(data, model=None, config=ONCE, **given):
    model = evopatch.apply(build("vit")) if model is None else model
    return evopatch.finetune(model, data, config=config, progress=False, **given)


def changed(change, kind="tuple"):
    return [change(item) for item in (Images(kind)[i] for i in range(16))]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda item: ((item[0] * 40 + 128).byte(), item[1]),
            r"item \d+ .* is \(3, 40, 40\) torch.uint8: exp",
        ),
        (lambda item: (item[0][None], item[1]), r"item \d+ of the training data is \(1, 3, 40, 40\) torch.float32: "),
        (lambda item: (item[0] / 0, item[1]), r"is \(3, 40, 40\) torch.float32, and not finite: expected finite"),
        (lambda item: (item[0].permute(1, 2, 0), item[1]), r"doesn't run on images \(1, 40, 40, 3\)"),
        (lambda item: (item[0][:1], item[1]), r"doesn't run on images \(1, 1, 40, 40\)"),
    ],
)
def test_images_that_are_none(change, text):
    with pytest.raises(DataError, match=text):
        finetune(changed(change))


def test_one_image_that_is_not_finite_is_named():
    data = changed(lambda item: item)
    data[11] = (torch.full((3, 40, 40), torch.nan), 0)
    with pytest.raises(DataError, match="item 11 of the training data .* not finite"):
        finetune(data)
    with pytest.raises(DataError, match="item 11 of the evaluation data .* not finite"):
        finetune(changed(lambda item: item), eval_data=data)


def test_labels_by_another_name():
    data = [{"pixel_values": image, "target": label} for image, label in changed(lambda item: item)]
    with pytest.raises(DataError, match=r"no 'labels' and no 'label', and whole numbers named \['target'\]"):
        finetune(data)
    assert finetune(data, config=FinetuneConfig(epochs=1, batch_size=8, objective="distillation")).losses
    others = [{"pixel_values": item["pixel_values"], "path": "a.jpg"} for item in data]
    assert finetune(others).losses[0] < 1e-2, "without any it teaches itself"


def test_an_empty_entry_beside_the_label():
    data = [{"pixel_values": image, "labels": None, "label": label} for image, label in changed(lambda item: item)]
    assert finetune(data).losses[0] > 0.5


@pytest.mark.parametrize("name", ["hf_swin", "hf_pvt_v2", "hf_levit"])
def test_blocks_that_return_tuples(name):
    model = evopatch.apply(build(name))
    before = copy.deepcopy(model.state_dict())
    data = [(image, index % 5) for index, image in enumerate(images_for(name, 16))]
    assert finetune(data, model).losses
    assert any(not torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_what_gives_no_logits():
    model = evopatch.apply(
        Dinov2Model(
            Dinov2Config(hidden_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=40, patch_size=8)
        )
    )
    with pytest.raises(UnsupportedModelError, match=r"returns a BaseModelOutputWithPooling: expected logits"):
        finetune(Images("none"), model)


def test_half_precision_is_warned_of():
    with pytest.warns(UserWarning, match=r"weights that are trained are bfloat16, .* model\.float\(\)"):
        finetune(Images("tuple"), evopatch.apply(build("vit").bfloat16()))


@pytest.mark.parametrize("folder", ["file/run", "/proc/evopatch"])
def test_folders_that_cant_be_made(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"can't be made \(.*\): expected a folder for the run"):
        finetune(Images("tuple"), output=tmp_path / folder)


def test_other_rows_of_the_same_images_are_another_run(tmp_path):
    data, config = Images("tuple"), FinetuneConfig(epochs=2, batch_size=8)
    model = evopatch.apply(build("vit"))
    finetune(Subset(data, range(16)), model, config, output=tmp_path)
    with pytest.raises(evopatch.ConfigError, match="images"):
        finetune(Subset(data, range(16, 32)), model, config, output=tmp_path, resume=True)
    assert finetune(Subset(data, range(16)), model, config, output=tmp_path, resume=True).losses


TRAINING = textwrap.dedent("""
    import sys
    sys.path[:0] = {path!r}
    from samples import Images
    from variants import build
    import evopatch

    if __name__ == "__main__":
        config = evopatch.FinetuneConfig(epochs=500, batch_size=8, workers=2)
        evopatch.finetune(evopatch.apply(build("vit")), Images("tuple"), config=config, output={output!r})
""")


def test_a_termination_of_all_processes_saves(tmp_path):
    """As of a service manager; data-loading processes are the main one's to end."""
    script, output = tmp_path / "train.py", tmp_path / "run"
    script.write_text(TRAINING.format(path=[p for p in sys.path if "tests" in p], output=str(output)))
    run = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not list(output.glob("checkpoints/step-*")):
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGTERM)
    _, said = run.communicate(timeout=120)
    assert "everything up to there is saved" in said
