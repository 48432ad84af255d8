"""A new head for another number of classes: as the library builds and initialises it, whatever the head is made of."""

import pytest
import torch
import transformers
from samples import FAST, Images
from transformers import CLIPConfig, CLIPForImageClassification, LevitConfig, LevitForImageClassification, ViTModel
from variants import EVERY, TIMM, TRANSFORMERS, build, call, images_for

import evopatch
from evopatch import UnsupportedModelError
from evopatch.sources.heads import count_classes, reset_head

ONE_LAYER = {"classifier.weight", "classifier.bias"}
HEADS = {
    "hf_vit": ONE_LAYER,
    "hf_deit_teacher": {f"{part}_classifier.{name}" for part in ("cls", "distillation") for name in ("weight", "bias")},
    "hf_levit": {"classifier.linear.weight", "classifier.linear.bias"},
    "hf_levit_teacher": {
        f"{part}.linear.{name}" for part in ("classifier", "classifier_distill") for name in ("weight", "bias")
    },
    "hf_dinov2": ONE_LAYER,
    "hf_segformer": ONE_LAYER,
}


DENSE = {"hf_eomt", "hf_segformer_dense"}
"""With a head, of which an image has a map of logits."""


def has_head(model):
    return isinstance(getattr(model, "num_classes", None), int) or "ImageClassification" in type(model).__name__


@pytest.mark.parametrize("name", sorted(((TIMM | TRANSFORMERS) & EVERY) - DENSE))
def test_every_classifier_gets_one(name):
    model, x = build(name), images_for(name)
    before = model.state_dict()
    if not has_head(model):
        with pytest.raises(UnsupportedModelError, match="can't get a head for 3 classes"):
            reset_head(model, 3)
        assert model.state_dict().keys() == before.keys()
        return
    assert call(model, x).shape == (2, 7)
    reset_head(model, 3)
    logits = call(model, x)
    assert logits.shape == (2, 3)
    assert logits.isfinite().all()
    assert count_classes(model) == 3
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = {key for key in after if after[key] is not before[key] and not torch.equal(after[key], before[key])}
    assert changed == HEADS.get(name, changed)
    assert all("head" in key or "classifier" in key for key in changed)
    assert changed


@pytest.mark.parametrize("name", ["hf_levit", "hf_levit_teacher", "hf_deit_teacher"])
def test_it_is_trained_and_saved(name, tmp_path):
    model = build(name)
    reset_head(model, 3)
    evopatch.apply(model, keep_ratio=0.5)
    x = images_for(name, 8)
    data = list(zip(x, torch.arange(8) % 3, strict=True))
    evopatch.finetune(model, data, config=FAST, progress=False)
    evopatch.save_pretrained(model, tmp_path)
    assert torch.equal(call(evopatch.load_pretrained(tmp_path), x), call(model, x))


def test_initialised_as_the_library_does():
    """CLIP's head is initialised by the class that holds it, to another deviation than the layer would be."""
    small = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = CLIPConfig(vision_config=small | {"image_size": 32, "patch_size": 8}, text_config=small)
    model, fresh = CLIPForImageClassification(config), CLIPForImageClassification(config)
    model.classifier.weight.data.fill_(5.0)
    model = model.to(torch.bfloat16).eval().requires_grad_(False)
    reset_head(model, 30)
    assert model.classifier.weight.float().std().item() == pytest.approx(fresh.classifier.weight.std().item(), rel=0.15)
    assert model.classifier.weight.dtype == torch.bfloat16
    assert model.classifier.weight.requires_grad
    assert not model.classifier.training
    assert not model.vision_model.encoder.layers[0].mlp.fc1.weight.requires_grad


def test_what_the_old_head_meant_goes_with_it():
    model = build("hf_vit", num_labels=1, problem_type="regression")
    reset_head(model, 7)
    assert model.config.problem_type is None
    evopatch.apply(model)
    evopatch.finetune(model, Images("tuple"), config=FAST, progress=False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ViTModel(build("hf_vit").config), "ViTModel can't get a head for 3 classes: it has no layer of"),
        (lambda: LevitForImageClassification(LevitConfig(num_labels=0)), "it has no 'classifier.linear'"),
    ],
)
def test_models_without_a_place_for_one_are_refused_as_they_are(make, message):
    model = make()
    labels, keys = model.config.num_labels, set(model.state_dict())
    with pytest.raises(evopatch.UnsupportedModelError, match=message):
        reset_head(model, 3)
    assert (model.config.num_labels, set(model.state_dict())) == (labels, keys)
    assert isinstance(model, transformers.PreTrainedModel)
