"""Training of patched transformers models by others than evopatch: Trainer, checkpoint wrappers; and pipelines."""

import copy

import pytest
import torch
import transformers
from comparing import moved
from matrix import cases
from PIL import Image
from transformers import Trainer, TrainingArguments, ViTForImageClassification, ViTImageProcessor
from variants import build, call, images

import evopatch
from evopatch import EvoConfig


@pytest.mark.parametrize("config", [EvoConfig(), EvoConfig.paper()], ids=["matched", "paper"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_wrapped_in_torchs_checkpoints_after_apply(config, reentrant):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

    def gradients(model):
        model.zero_grad()
        call(model, images().requires_grad_()).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    model = evopatch.apply(build("hf_vit").train(), config=config)
    expected = gradients(model)
    kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    for i, layer in enumerate(list(model.vit.layers)):
        model.vit.layers[i] = checkpoint_wrapper(layer, kind)
    for ours, theirs in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    evopatch.remove(model)
    assert moved(gradients(model)[0], expected[0]) > 1e-4


def test_layers_under_composable_checkpoints_after_apply():
    from torch.distributed._composable import checkpoint

    def gradients(model):
        call(model, images()).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients(evopatch.apply(build("hf_vit").train()))
    model = evopatch.apply(build("hf_vit").train())
    for layer in model.vit.layers:
        checkpoint(layer)
    for ours, theirs in zip(gradients(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


class Labelled(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        label = index % 7
        return {"pixel_values": images(1, seed=index)[0] * 0.1 + label, "labels": label}


@cases("reentrant", [None, False, True], fast=[False])
def test_trainer(tmp_path, reentrant):
    model = evopatch.apply(build("hf_vit"))
    before = copy.deepcopy(model.state_dict())
    arguments = TrainingArguments(
        str(tmp_path),
        num_train_epochs=8,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        logging_strategy="epoch",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="epoch",
        save_total_limit=1,
        gradient_checkpointing=reentrant is not None,
        gradient_checkpointing_kwargs=None if reentrant is None else {"use_reentrant": reentrant},
    )
    trainer = Trainer(model, arguments, train_dataset=Labelled(), eval_dataset=Labelled())
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.7 * first
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert len(changed) == len(before)
    # A checkpoint of the trainer is a stock one.
    saved = next(tmp_path.glob("checkpoint-*"))
    stock = ViTForImageClassification.from_pretrained(saved).eval()
    x = images()
    model.eval()
    assert not evopatch.is_patched(stock)
    torch.testing.assert_close(evopatch.apply(stock)(x).logits, model(x).logits, atol=1e-5, rtol=1e-5)


def test_image_classification_pipeline(tmp_path):
    model = evopatch.apply(build("hf_vit"))
    processor = ViTImageProcessor(size={"height": 40, "width": 40})
    classify = transformers.pipeline("image-classification", model=model, image_processor=processor)
    image = Image.effect_noise((64, 48), 60).convert("RGB")
    answers = classify(image, top_k=7)
    with torch.no_grad():
        logits = model(**processor(images=image, return_tensors="pt")).logits
    assert answers[0]["score"] == pytest.approx(logits.softmax(-1).max().item(), abs=1e-5)
    evopatch.set_keep_ratio(model, 1.0)
    assert classify(image, top_k=7) != answers
