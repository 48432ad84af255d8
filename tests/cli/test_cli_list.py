"""`evopatch list`."""

import pytest
import timm

from evopatch.sources import patched_names

DEIT_TINY = ["deit_tiny_distilled_patch16_224", "deit_tiny_patch16_224"]


@pytest.fixture
def checked(monkeypatch):
    """The names that are made and looked at."""
    made = []
    monkeypatch.setattr(timm, "create_model", lambda name, device: made.append(name) or name)
    monkeypatch.setattr("evopatch.patching.apply.supported", lambda model: True)
    return made


@pytest.fixture
def listed(monkeypatch, tmp_path):
    """A list of the installed version with one name in it."""
    monkeypatch.setattr(patched_names, "LIST", tmp_path / "patched_names.txt")
    patched_names.write(["deit_tiny_patch16_224"])


def test_list(command):
    assert command("list", "deit_tiny*").stdout.split() == DEIT_TINY


def test_what_the_list_does_not_have_is_looked_at(command, checked, listed):
    assert command("list", "deit_tiny*").stdout.split() == DEIT_TINY
    assert checked == DEIT_TINY[:1]


def test_the_list_of_another_version_of_timm_is_not_used(command, checked, listed, monkeypatch):
    monkeypatch.setattr(timm, "__version__", "0.0")
    assert command("list", "deit_tiny*").stdout.split() == DEIT_TINY
    assert checked == DEIT_TINY


def test_list_without_a_pattern_has_every_family(command, checked, listed):
    names = command("list").stdout.split()
    families = {timm.models.model_entrypoint(name).__module__.rpartition(".")[2] for name in names}
    assert families >= {"beit", "deit", "eva", "levit", "naflexvit", "pit", "swin_transformer", "swin_transformer_v2"}
    assert families >= {"vision_transformer", "vision_transformer_hybrid", "vision_transformer_sam"}
    assert not families & {"resnet", "convnext"}


def test_list_of_nothing_that_can_be_patched(command):
    command("list", "resnet50").assert_refused(1, "none of the 1 timm model(s) named like 'resnet50' can be patched")
    command("list", "nothing_like_it").assert_refused(1, "no timm model is named like 'nothing_like_it'")
