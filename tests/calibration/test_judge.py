"""What of a model's outputs is compared, and how."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from evopatch import DataError, UnsupportedModelError
from evopatch.calibration.judge import Judge
from evopatch.measure.outputs import compared

BATCHES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)).split(4)


class Says(nn.Module):
    """Returns what a function makes of the images."""

    def __init__(self, function, **attributes):
        super().__init__()
        self.function = function
        self.__dict__.update(attributes)

    def forward(self, x):
        return self.function(x)


def features(x):
    return x.flatten(2).transpose(1, 2)  # (B, 64, 3)


def test_logits_by_kl():
    whole, own = Says(lambda x: x[:, :, 0, 0]), Says(lambda x: 2 * x[:, :, 0, 0])
    judge = Judge(whole, BATCHES, 1)
    assert judge.kind == "classes"
    found = judge.all_errors(own)
    logits = torch.cat([whole(batch) for batch in BATCHES]).double()
    p, q = logits.softmax(1), (2 * logits).softmax(1)
    torch.testing.assert_close(found.error, (p * (p / q).log()).sum(1), atol=1e-5, rtol=1e-4)
    assert found.agrees.all()
    assert not judge.all_errors(Says(lambda x: -x[:, :, 0, 0])).agrees.any()
    assert judge.all_errors(whole).error.max() == 0


@pytest.mark.parametrize("prefix", [0, 2])
def test_tokens_by_cosine_class_and_patches_alike(prefix):
    noise = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    whole = Says(lambda x: SimpleNamespace(last_hidden_state=features(x)))
    own = Says(lambda x: SimpleNamespace(last_hidden_state=features(x) + noise))
    judge = Judge(whole, BATCHES, prefix)
    assert judge.kind == "features"
    x = torch.cat(BATCHES)
    distance = 1 - F.cosine_similarity(features(x), features(x) + noise, dim=-1)
    parts = [distance[:, :prefix].mean(1), distance[:, prefix:].mean(1)] if prefix else [distance.mean(1)]
    found = judge.all_errors(own)
    torch.testing.assert_close(found.error.float(), torch.stack(parts).mean(0), atol=1e-6, rtol=1e-5)
    assert found.agrees is None


@pytest.mark.parametrize(
    "output",
    [
        lambda x: [x, x[:, :, ::2]],
        lambda x: SimpleNamespace(feature_maps=(x, x[:, :, ::2])),
        lambda x: SimpleNamespace(logits=x),
        lambda x: SimpleNamespace(predicted_depth=x[:, 0]),
        lambda x: SimpleNamespace(image_embeds=x.flatten(1)),
    ],
)
def test_maps_depth_and_embeddings(output):
    judge = Judge(Says(output), BATCHES, 1)
    assert judge.kind == "features"
    assert judge.all_errors(Says(output)).error.max() < 1e-6
    opposite = judge.all_errors(Says(lambda x: output(-x))).error
    torch.testing.assert_close(opposite, torch.full((6,), 2.0, dtype=torch.float64), atol=1e-5, rtol=0)


def test_pooled_features_of_a_model_without_a_head_are_no_classes():
    assert compared(torch.ones(2, 5), Says(None)).kind == "classes"
    assert compared(torch.ones(2, 5), Says(None, num_classes=0)).kind == "features"


def of_problem(function, problem):
    return Says(function, config=SimpleNamespace(problem_type=problem))


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("columns", [1, 3])
def test_numbers_by_their_spread_between_images(columns, scale):
    """In whatever unit each of them is."""

    def numbers(x):
        return x[:, :columns, 0, 0] * torch.tensor([1.0, scale, 1.0][:columns]) + 7.0

    judge = Judge(of_problem(numbers, "regression" if columns > 1 else None), BATCHES, 1)
    assert judge.kind == "numbers"
    whole = torch.cat([numbers(batch) for batch in BATCHES]).double()
    found = judge.all_errors(of_problem(lambda x: numbers(x) + scale, "regression"))
    torch.testing.assert_close(found.error, (scale**2 / whole.var(0, correction=0)).mean().expand(6), rtol=1e-3, atol=0)
    assert found.agrees is None
    same = judge.all_errors(of_problem(lambda x: whole.mean(0).float().expand(len(x), -1), "regression")).error
    assert same.mean().item() == pytest.approx(1.0, rel=1e-3)


def test_labels_by_the_kl_of_each():
    judge = Judge(of_problem(lambda x: x[:, :, 0, 0], "multi_label_classification"), BATCHES, 1)
    assert judge.kind == "labels"
    found = judge.all_errors(of_problem(lambda x: x[:, :, 0, 0] + 1, "multi_label_classification"))
    logits = torch.cat([batch[:, :, 0, 0] for batch in BATCHES]).double()
    whole, own = (torch.distributions.Bernoulli(logits=values) for values in (logits, logits + 1))
    expected = torch.distributions.kl_divergence(whole, own).sum(1)
    torch.testing.assert_close(found.error, expected, atol=1e-5, rtol=1e-4)
    assert found.agrees is None


def test_numbers_that_are_the_same_for_all_images():
    with pytest.raises(DataError, match="output 0 of the unpatched model is the same for all 6 images"):
        Judge(Says(lambda x: torch.ones(len(x), 1)), BATCHES, 1)


@pytest.mark.parametrize("output", [None, "text", torch.ones(3), {"boxes": 1}, []])
def test_unknown_outputs_are_refused(output):
    with pytest.raises(UnsupportedModelError, match="expected logits, or features"):
        compared(output, Says(None))


def test_outputs_that_are_not_finite():
    judge = Judge(Says(lambda x: x[:, :, 0, 0]), BATCHES, 1)
    with pytest.raises(DataError, match="isn't finite"):
        list(judge.errors(Says(lambda x: x[:, :, 0, 0] / 0)))
