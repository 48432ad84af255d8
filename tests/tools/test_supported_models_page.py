"""The page of supported models says what a run says."""

import importlib.util
from pathlib import Path

import pytest
import timm
import transformers

from evopatch.sources import patched_names

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "supported-models.md").read_text()

_spec = importlib.util.spec_from_file_location("supported_models", ROOT / "docs" / "supported_models.py")
supported_models = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(supported_models)

TIMM = (
    "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_relpos_small_patch16_224", "eva02_tiny_patch14_224",
    "levit_128s", "swin_tiny_patch4_window7_224", "swinv2_cr_tiny_ns_224", "beit_base_patch16_224",
    "pit_ti_224", "samvit_base_patch16", "pvt_v2_b0", "resnet18",
)  # fmt: skip
TRANSFORMERS = (
    ("vit", "ViTForImageClassification"), ("levit", "LevitModel"), ("swin", "SwinBackbone"),
    ("beit", "BeitForImageClassification"), ("yolos", "YolosModel"), ("sam", "SamModel"),
    ("resnet", "ResNetForImageClassification"),
)  # fmt: skip


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    found = supported_models.try_timm(name)
    assert not supported_models.contradictions(PAGE, [found])
    assert supported_models.contradictions(PAGE, [_otherwise(found)])


@pytest.mark.parametrize(("family", "name"), TRANSFORMERS)
def test_transformers(family, name):
    found = supported_models.try_transformers(family, name)
    assert not supported_models.contradictions(PAGE, [found])
    assert supported_models.contradictions(PAGE, [_otherwise(found)])


def _otherwise(found):
    patched = found.outcome == supported_models.PATCHED
    return found._replace(outcome=supported_models.NO_ADAPTER if patched else supported_models.PATCHED)


def test_a_page_is_read_as_it_was_written():
    tried = [
        supported_models.Found("timm", "vision_transformer", "vit_a", "patched", True),
        supported_models.Found("timm", "eva", "eva_b", "eva_b has a | in its way: leave it", True),
        supported_models.Found("timm", "beit", "beit_c", "no adapter", True),
        supported_models.Found("timm", "resnet", "resnet_d", "no adapter", False),
        supported_models.Found("transformers", "vit_mae", "ViTMAEModel", "patched, not run", True),
        supported_models.Found("transformers", "detr", "DetrModel", "not built", False),
    ]
    page = supported_models.render(tried)
    assert supported_models.read(page) == supported_models.Page(
        {"vit_a": "patched", "eva_b": "eva_b has a / in its way: leave it", "ViTMAEModel": "patched, not run"},
        {"beit": 1, "resnet": 1},
    )
    assert not supported_models.contradictions(page, tried[:-1])
    for entry in tried[:-1]:
        assert supported_models.contradictions(page, [_otherwise(entry)])
    assert supported_models.contradictions(page.replace("`vit_a`", "`vit_z`"), tried[:1])


@pytest.mark.parametrize("library", [timm, transformers])
def test_of_the_installed_version_the_page_lists_every_patched_family(library):
    """A name that is new in the library is missing from the page until it is made anew."""
    if f"## {library.__name__} {library.__version__}\n" not in PAGE:
        pytest.skip(f"the page is of another version of {library.__name__}")
    said = supported_models.read(PAGE)
    if library is timm:
        names = [n for p in ("vit_*", "deit*", "levit*", "pit_*", "swin*", "samvit_*") for n in timm.list_models(p)]
        assert len(names) > 250
        assert {name: said.outcomes.get(name) for name in names} == dict.fromkeys(names, supported_models.PATCHED)
    else:
        listed = {name for _, name in supported_models.transformers_names() if name.startswith(("ViTFor", "SwinFor"))}
        assert len(listed) > 3
        assert listed <= set(said.outcomes)


def test_evopatch_list_knows_the_names_that_the_page_lists():
    version, *names = patched_names.LIST.read_text().split()
    assert f"## {version.replace('==', ' ')}\n" in PAGE
    said = supported_models.read(PAGE.partition("\n## transformers")[0])
    patched = {name for name, outcome in said.outcomes.items() if outcome.startswith(supported_models.PATCHED)}
    assert set(names) == patched
    assert len(names) == len(patched) > 400
