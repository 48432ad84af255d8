"""What is proposed for a name that timm doesn't have."""

import pytest
import timm

from evopatch import UnsupportedModelError
from evopatch.sources.model_names import check_timm_name, hint, named


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("deit-tiny", "deit_tiny_patch16_224"),
        ("DeiT-Tiny-Patch16-224", "deit_tiny_patch16_224"),
        ("deit_tiny", "deit_tiny_patch16_224"),
        ("deit_tny_patch16_224", "deit_tiny_patch16_224"),
        ("swin-tiny", "swin_tiny_patch4_window7_224"),
        ("deit-tiny.fb_in1k", "deit_tiny_patch16_224"),
    ],
)
def test_names_that_begin_so_come_first(name, first):
    with pytest.raises(UnsupportedModelError, match=f"did you mean {first}( or|\\?)"):
        check_timm_name(name)
    assert all(timm.is_model(word) for word in hint(name).removeprefix("did you mean ")[:-1].split(" or "))


def test_other_names_are_proposed_only_where_none_begins_so():
    assert hint("deit-tiny") == "did you mean deit_tiny_patch16_224 or deit_tiny_distilled_patch16_224?"


def test_where_nothing_is_like_it():
    assert hint("nothing_like_it") == hint("*") == "`evopatch list` shows the names."


def test_a_pattern_without_a_wildcard_is_a_beginning():
    assert named("deit-tiny") == named("deit_tiny*") == ["deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224"]
    assert named("resnet50") == ["resnet50"], "one of that name is it alone"
    assert named("tiny_patch16*") == named("nothing_like_it") == []
