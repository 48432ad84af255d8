"""What tells a model's weights from others."""

import pytest
import torch

from evopatch.measure.fingerprint import fingerprint

WEIGHTS = {"a": torch.arange(12.0).view(3, 4), "b": torch.tensor(True)}


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.arange(12.0).view(4, 3)},
        {"a": torch.arange(12.0).view(3, 4).flip(0)},
        {"a": torch.arange(12.0).view(3, 4).double()},
        {"a": torch.nextafter(WEIGHTS["a"], torch.tensor(99.0))},
        {"b": torch.tensor(False)},
        {"c": torch.empty(0)},
        {"a": torch.empty(3, 4, device="meta")},
    ],
)
def test_anything_else_is_noticed(other):
    assert fingerprint(WEIGHTS | other) != fingerprint(WEIGHTS)


def test_the_same_values_are_the_same():
    assert fingerprint(dict(reversed(WEIGHTS.items()))) == fingerprint(WEIGHTS)
    assert fingerprint({"a": WEIGHTS["a"].t().contiguous().t(), "b": WEIGHTS["b"]}) == fingerprint(WEIGHTS)
    assert fingerprint({"a": torch.nn.Parameter(WEIGHTS["a"]), "b": WEIGHTS["b"]}) == fingerprint(WEIGHTS)


def test_weights_that_hold_others():
    from torch.testing._internal.two_tensor import TwoTensor

    first, second, third = (torch.arange(4.0) + i for i in range(3))
    found = {fingerprint({"a": TwoTensor(first, other)}) for other in (second, second.clone(), third)}
    assert len(found) == 2
