"""What counts as equal, as a choice that turned, and as wrong."""

import pytest
import torch

from evopatch.deployment import checking
from evopatch.deployment.checking import batches_of, verify, verify_half, verify_int8
from evopatch.errors import DataError, ExportError

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


def rounded(run):
    return lambda x: tuple(value.half().float() for value in run(x))


def by_precision(precision, run, model, half=None):
    batches = batches_of(pictures(), None, None)
    names = ("features", "logits")[: len(model(batches[0]))]
    if precision == "half":
        return verify_half(run, model, half or rounded(model), batches, "a file", names)
    return {"float32": verify, "int8": verify_int8}[precision](run, model, batches, "a file", names)


EACH_PRECISION = pytest.mark.parametrize("precision", ["float32", "half", "int8"])


@EACH_PRECISION
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused_in_every_precision(precision, value):
    run = otherwise(rounded(choosy), [5], lambda row: row.clone().fill_(value))
    with pytest.raises(
        ExportError, match="a file is wrong: the output of image 5, in a batch of 7 images of 8 by 8 px, h"
    ):
        by_precision(precision, run, choosy)


def test_a_model_that_overflows_in_float16_measures_nothing():
    def half(x):
        return (choosy(x)[0] * torch.nan,)

    with pytest.raises(ExportError, match="can't be verified: in float16 the outputs of the model itself hold infinit"):
        by_precision("half", choosy, choosy, half)


@EACH_PRECISION
def test_a_model_that_gives_nan_is_no_measure(precision):
    model = otherwise(choosy, [5], lambda row: row * torch.nan)
    with pytest.raises(DataError, match="the model's output holds NaN for image 5"):
        by_precision(precision, model, model)


@EACH_PRECISION
def test_equal_infinities_are_equal(precision):
    def masked(x):
        return (torch.where(choosy(x)[0] > 0.5, choosy(x)[0], -torch.inf),)

    result = by_precision(precision, masked, masked)
    assert (result.equal, result.difference, result.error) == (8, 0, 0)


@EACH_PRECISION
def test_a_small_output_that_is_wrong_beside_a_large_one_is_refused(precision):
    def two(x):
        return x.flatten(1) * 1000, choosy(x)[0]

    def wrong(x):
        return two(x)[0], -two(x)[1]

    assert by_precision(precision, two, two).equal == 8
    with pytest.raises(ExportError, match=r"a file is wrong: (its outputs|the output) 'logits'"):
        by_precision(precision, wrong, two)


@EACH_PRECISION
@pytest.mark.parametrize("factor", [1e-5, 1, 1e3])
def test_outputs_are_measured_by_their_own_size(precision, factor):
    def model(x):
        return (choosy(x)[0] * factor,)

    result = by_precision(precision, lambda x: (model(x)[0] * (1 + 3e-5),), model)
    assert (result.equal, result.output) == (8, "features")
    assert 1e-5 < result.error < 3e-3
    with pytest.raises(ExportError, match="a file is wrong"):
        by_precision(precision, lambda x: (-model(x)[0],), model)


@EACH_PRECISION
def test_one_number_per_image_and_what_is_the_same_for_all_images_are_compared(precision):
    def model(x):
        same = torch.ones(len(x), 5)
        return choosy(x)[0][:, 0], same

    result = by_precision(precision, lambda x: (model(x)[0], model(x)[1] * (1 + 3e-5)), model)
    assert (result.equal, result.output) == (8, "logits")
    assert result.error == pytest.approx(3e-5, rel=0.1)


def test_batches_have_the_sizes_that_a_file_is_for():
    x = torch.zeros(40, 3, 8, 8)
    assert [len(batch) for batch in batches_of(x, None, None)] == [1, 16, 16, 7]
    assert [len(batch) for batch in batches_of(x, 16, None)] == [16, 16]
    assert [tuple(batch.shape) for batch in batches_of(x, 16, (16, 4))][-1] == (16, 3, 16, 4)
