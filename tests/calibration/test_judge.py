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
    assert judge.is_classifier
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
    assert not judge.is_classifier
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
    assert not judge.is_classifier
    assert judge.all_errors(Says(output)).error.max() < 1e-6
    opposite = judge.all_errors(Says(lambda x: output(-x))).error
    torch.testing.assert_close(opposite, torch.full((6,), 2.0, dtype=torch.float64), atol=1e-5, rtol=0)


def test_pooled_features_of_a_model_without_a_head_are_no_classes():
    assert compared(torch.ones(2, 5), Says(None)).classes
    assert not compared(torch.ones(2, 5), Says(None, num_classes=0)).classes


@pytest.mark.parametrize("output", [None, "text", torch.ones(3), {"boxes": 1}, []])
def test_unknown_outputs_are_refused(output):
    with pytest.raises(UnsupportedModelError, match="expected logits, or features"):
        compared(output, Says(None))


def test_outputs_that_are_not_finite():
    judge = Judge(Says(lambda x: x[:, :, 0, 0]), BATCHES, 1)
    with pytest.raises(DataError, match="isn't finite"):
        list(judge.errors(Says(lambda x: x[:, :, 0, 0] / 0)))
