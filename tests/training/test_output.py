"""What a fine-tuning run writes, logs and returns, and going on from it in the same process."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from samples import FAST, Images
from torchvision.transforms.functional import to_tensor
from variants import build

import evopatch
from evopatch import ConfigError, DataError, EvoConfig, FinetuneConfig
from evopatch.sources.images import open_part


def test_a_bad_loss_leaves_the_last_checkpoint(tmp_path):
    model = evopatch.apply(build("vit"))
    calls = []

    def hook(gradient):
        calls.append(gradient)
        return gradient * math.nan if len(calls) == 6 else gradient

    model.head.weight.register_hook(hook)
    config = FinetuneConfig(epochs=3, batch_size=8)
    message = rf"at step 5 \(epoch 1, learning rate .*The last checkpoint, of step 4, is in {tmp_path}"
    with pytest.raises(evopatch.TrainingError, match=message):
        evopatch.finetune(model, Images("tuple"), config=config, output=tmp_path, progress=False)
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["event"] == "failed"


def test_an_output_folder_that_is_in_use(tmp_path):
    model = evopatch.apply(build("vit"))
    evopatch.finetune(model, Images("tuple"), config=FAST, output=tmp_path, progress=False)
    with pytest.raises(evopatch.CheckpointError, match="holds the checkpoints of a run: give resume=True"):
        evopatch.finetune(model, Images("tuple"), config=FAST, output=tmp_path, progress=False)
    with pytest.raises(ConfigError, match="resume=True without an output folder"):
        evopatch.finetune(model, Images("tuple"), config=FAST, resume=True, progress=False)


def test_the_log_and_the_result(tmp_path):
    model = evopatch.apply(build("vit"))
    config = FinetuneConfig(epochs=2, batch_size=8, log_every=2)
    result = evopatch.finetune(model, Images("tuple"), Images("tuple", seed=4), config, output=tmp_path, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8]
    assert [line["event"] for line in lines if "event" in line] == ["begin", "checkpoint", "checkpoint", "end"]
    logged = [line["loss"] for line in lines if "loss" in line]
    assert sum(result.losses) / 2 == pytest.approx(sum(logged) / 4)
    assert {"accuracy", "learning_rate", "gradient_norm", "images_per_second"} <= set(lines[1])
    assert list((tmp_path / "tensorboard").iterdir())
    assert json.loads((tmp_path / "result.json").read_text())["after"]["kl"] == result.after.kl
    assert (result.steps, result.seconds > 0) == (8, True)
    for speed in (result.speed, result.training_speed):
        assert speed.patched > 0
        assert speed.unpatched > 0


def test_agreement_after_training_is_with_the_model_before():
    model = evopatch.apply(build("vit"))
    original = copy.deepcopy(evopatch.remove(copy.deepcopy(model)))
    data = Images("tuple", seed=4)
    result = evopatch.finetune(model, Images("tuple"), data, FAST, progress=False)
    with torch.no_grad():
        own, theirs = model(data.images), original(data.images)
    assert result.after.agreement == pytest.approx(100 * (own.argmax(1) == theirs.argmax(1)).float().mean().item())
    expected = F.kl_div(own.log_softmax(1), theirs.log_softmax(1), reduction="batchmean", log_target=True).item()
    assert result.after.kl == pytest.approx(expected, rel=1e-4)


def test_evaluation_without_labels():
    model = evopatch.apply(build("vit"), keep_ratio=0.3)
    result = evopatch.finetune(model, Images("none"), Images("none", seed=4), FAST, progress=False)
    assert result.before.top1 is result.after.top1 is None
    assert result.before.kl > 0
    with pytest.raises(DataError, match="no images to evaluate on"):
        evopatch.finetune(model, Images("none"), Images("none", count=0), FAST, progress=False)


class StopError(Exception):
    pass


@pytest.mark.slow
def test_resuming_in_the_same_process_begins_with_the_same_weights(tmp_path):
    """The model is half trained when a run is interrupted; it teaches itself as it was before."""

    def run(folder, model, **arguments):
        return evopatch.finetune(
            model, Images("none"), Images("tuple", seed=9), FinetuneConfig(epochs=4, batch_size=8, learning_rate=1e-3),
            output=folder, progress=False, **arguments,
        )  # fmt: skip

    whole = evopatch.apply(build("vit"), config=EvoConfig.paper(0.3))
    expected = run(tmp_path / "whole", whole)
    model = evopatch.apply(build("vit"), config=EvoConfig.paper(0.3))
    calls = []

    def stop(gradient):
        calls.append(gradient)
        if len(calls) == 7:
            raise StopError

    handle = model.head.weight.register_hook(stop)
    with pytest.raises(StopError):
        run(tmp_path / "run", model)
    handle.remove()
    result = run(tmp_path / "run", model, resume=True)
    assert (result.unpatched, result.before, result.after) == (expected.unpatched, expected.before, expected.after)
    assert result.losses == expected.losses
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": FinetuneConfig(epochs=1, ema_decay=0.9)}, "ema_decay was None and is 0.9 now"),
        ({"config": FinetuneConfig(epochs=1, trainable="norms")}, "trainable was 'all' and is 'norms' now"),
        ({"train_data": Images("none")}, "objective was 'labels' and is 'distillation' now"),
        ({"teacher": build("gap")}, "teacher was None and is "),
        ({"model": evopatch.apply(build("vit", num_classes=9))}, "is of another model than this VisionTransformer"),
        (
            {"model": evopatch.apply(build("vit"), images=Images("none").images)},
            "what the blocks learned from images was None and is '",
        ),
    ],
)
def test_a_refused_resume_leaves_the_model_untouched(changes, message, tmp_path):
    arguments = {"train_data": Images("tuple"), "config": FinetuneConfig(epochs=1)}
    evopatch.finetune(evopatch.apply(build("vit")), **arguments, output=tmp_path, progress=False)
    arguments |= {"model": evopatch.apply(build("vit"))} | changes
    before = copy.deepcopy(arguments["model"].state_dict())
    with pytest.raises(ConfigError, match=message):
        evopatch.finetune(**arguments, output=tmp_path, resume=True, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in arguments["model"].state_dict().items())
    assert all(p.requires_grad for p in arguments["model"].parameters())


def test_a_resume_with_other_frozen_parameters_names_them(tmp_path):
    def run(*frozen, resume):
        model = evopatch.apply(build("vit"))
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        config = FinetuneConfig(epochs=1)
        evopatch.finetune(model, Images("tuple"), config=config, output=tmp_path, resume=resume, progress=False)

    run("head.weight", resume=False)
    message = (
        "trained parameters are no longer 'cls_token', 'pos_embed', 'norm.weight' and 1 more, "
        "trained parameters are now also 'head.weight'."
    )
    with pytest.raises(ConfigError, match=message):
        run("cls_token", "pos_embed", "norm.weight", "norm.bias", resume=True)
    run("head.weight", resume=True)


def test_other_images_are_refused_and_a_moved_folder_is_not(tmp_path):
    def folder(name, *images):
        for path in images:
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), ord(path[2])).save(tmp_path / name / path)
        return open_part(tmp_path / name, "train", to_tensor)

    def run(data, resume):
        model, config = evopatch.apply(build("vit")), FinetuneConfig(epochs=1, batch_size=2)
        evopatch.finetune(model, data, config=config, output=tmp_path / "run", resume=resume, progress=False)

    run(folder("images", "a/1.png", "b/2.png"), resume=False)
    (tmp_path / "images").rename(tmp_path / "moved")
    run(folder("moved"), resume=True)
    with pytest.raises(ConfigError, match="names and labels of the images was"):
        run(folder("others", "a/1.png", "b/3.png"), resume=True)
