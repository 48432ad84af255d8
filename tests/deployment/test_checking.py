"""What counts as equal, as a choice that turned, and as wrong."""

import pytest
import torch

from evopatch.deployment import checking
from evopatch.deployment.checking import batches_of, verify, verify_half, verify_int8
from evopatch.errors import ExportError

TIED = 3
"""The image whose two halves are equal but for rounding."""


def choosy(x):
    """What the stronger half of an image says, as a selection does: a choice by values, with a jump."""
    left, right = x[..., :4].mean((1, 2, 3)), x[..., 4:].mean((1, 2, 3))
    chosen = torch.where((left > right)[:, None], torch.stack([left, left + 1], 1), torch.stack([right, right - 1], 1))
    return (chosen,)


def pictures():
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x[TIED, ..., 4:] = x[TIED, ..., :4]
    x[TIED, 0, 0, 0] += 1e-4
    return x


def otherwise(run, images, change):
    """A file that gives something else for some images."""
    everything = pictures()

    def changed(batch):
        (out,) = run(batch)
        for place, image in enumerate(batch):
            for index in images:
                if torch.equal(image, everything[index]):
                    out[place] = change(out[place])
        return (out,)

    return changed


def turned(batch):
    """Rounded otherwise: the tie is decided the other way."""
    moved = batch.clone()
    moved[..., 4:] += 3e-6
    return choosy(moved)


def test_equal_images():
    result = verify(choosy, choosy, batches_of(pictures(), None, None), "a file")
    assert (result.images, result.equal, result.turned, result.difference, result.error) == (8, 8, 0, 0, 0)
    assert result.sizes == ((1, 8, 8), (7, 8, 8))


def test_a_choice_that_turned_is_counted():
    result = verify(turned, choosy, batches_of(pictures(), None, None), "a file")
    assert (result.images, result.equal, result.turned) == (8, 7, 1)
    assert result.difference > 1000


@pytest.mark.parametrize(
    ("images", "change"),
    [
        ([1], lambda row: row + 0.01),
        ([TIED], lambda row: row + 0.01),
        (range(8), lambda row: row + 0.0005),
        ([2], lambda row: row * torch.nan),
    ],
    ids=["one", "the tied one, but to something else", "all a little", "not finite"],
)
def test_wrong_outputs_are_refused(images, change):
    with pytest.raises(ExportError, match="a file is wrong: the output of image"):
        verify(otherwise(choosy, images, change), choosy, batches_of(pictures(), 4, None), "a file")


def test_another_shape_and_a_crash_are_refused():
    batches = batches_of(pictures(), None, None)
    with pytest.raises(ExportError, match=r"for a batch of 7 images of 8 by 8 px it returns \[\(1, 2\)\], the model"):
        verify(lambda x: (choosy(x)[0][:1],), choosy, batches, "a file")
    with pytest.raises(ExportError, match="doesn't run on a batch of 1 image of 8 by 8 px: AssertionError"):
        verify(crash, choosy, batches, "a file")


def crash(batch):
    raise AssertionError


def test_half_is_measured_by_the_model_in_half():
    def half(x):
        return tuple(value.half().float() for value in choosy(x.half().float()))

    batches = batches_of(pictures(), None, None)
    result = verify_half(half, choosy, half, batches, "a file")
    assert 0 < result.error < 1
    with pytest.raises(ExportError, match="those of the model itself in float16 by"):
        verify_half(otherwise(half, range(8), lambda row: -row), choosy, half, batches, "a file")


def test_choices_that_turn_in_half_are_explained_by_rounding(monkeypatch):
    def half(x):  # decides as in float32, and rounds after it
        return tuple(value.half().float() for value in choosy(x))

    batches = batches_of(pictures(), None, None)
    found = verify_half(turned, choosy, half, batches, "a file")
    assert 0 < found.error < 1
    monkeypatch.setattr(checking, "HALF_DRAWS", 0)  # the control
    with pytest.raises(ExportError, match="those of the model itself in float16 by"):
        verify_half(turned, choosy, half, batches, "a file")


def test_int8_is_refused_where_it_says_nothing():
    batches = batches_of(pictures(), None, None)
    result = verify_int8(otherwise(choosy, range(8), lambda row: row * 1.1), choosy, batches, "a file")
    assert 0 < result.error < 0.2
    with pytest.raises(ExportError, match="no less than the same answer for all"):
        verify_int8(otherwise(choosy, range(8), lambda row: -row), choosy, batches, "a file")


def test_batches_have_the_sizes_that_a_file_is_for():
    x = torch.zeros(40, 3, 8, 8)
    assert [len(batch) for batch in batches_of(x, None, None)] == [1, 16, 16, 7]
    assert [len(batch) for batch in batches_of(x, 16, None)] == [16, 16]
    assert [tuple(batch.shape) for batch in batches_of(x, 16, (16, 4))][-1] == (16, 3, 16, 4)
