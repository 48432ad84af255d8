"""Models whose outputs are no classes: a softmax over one logit is 1, so each loss and figure would be perfect."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from samples import FAST, Images
from variants import build, call, images

import evopatch
from evopatch import ConfigError, DataError, FinetuneConfig
from evopatch.measure.accuracy import evaluate
from evopatch.training.objective import Objective
from evopatch.training.student import Outputs

MODELS = {
    "one logit": ("vit", {"num_classes": 1}, "numbers"),
    "one label": ("hf_vit", {"num_labels": 1}, "numbers"),
    "regression": ("hf_vit", {"problem_type": "regression"}, "numbers"),
    "several labels": ("hf_vit", {"problem_type": "multi_label_classification"}, "labels"),
    "one of several": ("hf_vit", {"num_labels": 1, "problem_type": "multi_label_classification"}, "labels"),
    "no head": ("vit", {"num_classes": 0}, "features"),
}
FORMULA = {
    "numbers": lambda own, whole: F.mse_loss(own, whole),
    "labels": lambda own, whole: (
        torch.distributions.kl_divergence(
            torch.distributions.Bernoulli(logits=whole), torch.distributions.Bernoulli(logits=own)
        )
        .sum(1)
        .mean()
    ),
    "features": lambda own, whole: (1 - F.cosine_similarity(own, whole)).mean(),
}


def patched(name):
    kind, settings, _ = MODELS[name]
    return evopatch.apply(build(kind, **settings), keep_ratio=0.3)


@pytest.mark.parametrize("name", MODELS)
def test_they_learn_from_themselves_unpatched(name, tmp_path):
    """And nothing says how many classes agree."""
    kind, model, data = MODELS[name][2], patched(name), Images("none")
    with torch.no_grad():
        whole, before = call(evopatch.remove(patched(name)), data.images), call(model, data.images)
    config = replace(FAST, epochs=20, learning_rate=1e-4, log_every=1)
    result = evopatch.finetune(model, data, data, config, output=tmp_path, progress=False)
    after = call(model, data.images).detach()
    assert FORMULA[kind](after, whole) < 0.7 * FORMULA[kind](before, whole)
    assert 0 < result.losses[-1] < result.losses[0]
    for found in (result.unpatched, result.before, result.after):
        assert found.outputs == kind
        assert found.top1 is found.top5 is found.agreement is None
        assert (found.kl is None) != (found.difference is None)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert not any("agreement" in line or "accuracy" in line for line in lines)
    own = json.loads((tmp_path / "result.json").read_text())["after"]
    assert own["difference" if kind != "labels" else "kl"] > 0


@pytest.mark.parametrize("kind", FORMULA)
def test_equations(kind):
    torch.manual_seed(0)
    own, whole = torch.randn(2, 4, 3)
    for temperature in (1.0, 3.0):
        objective = Objective(FinetuneConfig(temperature=temperature), distils=True)
        objective.learn(kind, "Model")
        (loss,) = objective.terms(Outputs(own, own, None), None, whole).values()
        t = temperature if kind == "labels" else 1.0
        torch.testing.assert_close(loss, t * t * FORMULA[kind](own / t, whole / t))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "ViT.* gives numbers, no classes, and labels are learned as classes here: expected objective='distill"),
        ({"objective": "distillation", "label_weight": 0.5}, "labels are learned as classes"),
        ({"objective": "distillation", "distillation": "hard"}, "distillation='hard': ViT.* gives numbers"),
    ],
)
def test_what_needs_classes_is_refused_before_training(settings, message, tmp_path):
    model, data = patched("one label"), [(image, 0) for image in images(8)]
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        evopatch.finetune(model, data, config=replace(FAST, **settings), output=tmp_path / "run", progress=False)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert not (tmp_path / "run").exists()


def test_labels_that_are_no_classes_are_left_aside():
    """Of a regression they may be anything."""
    data = [(image, 0.37) for image in images(8)]
    config = replace(FAST, epochs=1, objective="distillation")
    result = evopatch.finetune(patched("regression"), data, data, config, progress=False)
    assert result.after.top1 is None
    with pytest.raises(DataError, match=r"has the label 0.37 \(float\): expected the number of its class"):
        evopatch.finetune(evopatch.apply(build("hf_vit")), data, data, config, progress=False)


@pytest.mark.parametrize("name", MODELS)
def test_evaluated_by_a_distance_of_their_own(name):
    kind, model, x = MODELS[name][2], patched(name), images(8)
    batches = [(x[:3], None), (x[3:], torch.zeros(5, dtype=torch.long))]
    same, found = evaluate(model, batches, [evopatch.config_of(model)], (3, 40, 40))
    with torch.no_grad():
        own, whole = call(model, x), call(evopatch.remove(model), x)
    if kind == "numbers":
        own, whole = own / whole.std(0, correction=0), whole / whole.std(0, correction=0)
    expected = FORMULA[kind](own, whole).item()
    assert expected > 1e-4
    assert (found.difference if found.kl is None else found.kl) == pytest.approx(expected, rel=1e-3)
    assert (same.difference if same.kl is None else same.kl) < 1e-6
    assert found.top1 is found.agreement is None


@pytest.mark.parametrize("first", [True, False])
def test_labels_of_some_images_only(first):
    model, x, y = evopatch.apply(build("vit")), images(8), torch.arange(8) % 7
    parts = [(x[:5], y[:5] if first else None), (x[5:], None if first else y[5:])]
    have = ("labels", "no labels") if first else ("no labels", "labels")
    message = f"images 0 to 4 have {have[0]} and the next 3 have {have[1]}: expected"
    with pytest.raises(DataError, match=message):
        evaluate(model, parts, [], (3, 40, 40))
    (whole,) = evaluate(model, [(x[:5], y[:5]), (x[5:], y[5:])], [], (3, 40, 40))
    hits = call(evopatch.remove(model), x).argmax(1) == y
    assert whole.top1 == pytest.approx(100 * hits.float().mean().item())
