"""A pickle of a patched model says with which versions it was made."""

import pickle
import re
import warnings
from pathlib import Path

import pytest
import timm
import transformers
from variants import FLAT, build

import evopatch
from evopatch import CheckpointError
from evopatch.patching import registry, versions


def pickled(name="vit"):
    return pickle.dumps(versions.versions_of(evopatch.apply(build(name))))


@pytest.mark.parametrize(("name", "library"), [("vit", timm), ("hf_vit", transformers)])
def test_the_same_versions_are_silent(name, library):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = pickle.loads(pickled(name))
    assert found.made_with == {"evopatch": evopatch.__version__, library.__name__: library.__version__}


def test_another_version_of_the_library_is_a_warning(monkeypatch):
    data, here = pickled(), timm.__version__
    monkeypatch.setattr(timm, "__version__", "9.0")
    with pytest.warns(UserWarning, match=rf"pickled with evopatch .* and timm {here}, and is read with .* timm 9\.0"):
        pickle.loads(data)


def test_another_version_of_evopatch_is_an_error(monkeypatch):
    data = pickled()
    monkeypatch.setattr(versions, "VERSION", "9.9.9")
    with pytest.raises(CheckpointError, match=r"pickled with evopatch 0.* with evopatch 9\.9\.9 .*save_pretrained"):
        pickle.loads(data)


def test_a_subclass_elsewhere_names_the_library_too():
    class Own(timm.models.VisionTransformer):
        pass

    model = Own(img_size=16, patch_size=8, embed_dim=16, depth=3, num_heads=2)
    assert set(versions.versions_of(model).made_with) == {"evopatch", "timm"}


@pytest.mark.parametrize("name", ["vit", "levit", "hf_vit", "hf_levit"])
def test_a_whole_models_pickle_says_so_before_anything_else(name, monkeypatch):
    data = pickle.dumps(evopatch.apply(build(name)))
    pickle.loads(data)
    monkeypatch.setattr(versions, "VERSION", "9.9.9")
    with pytest.raises(CheckpointError, match=r"pickled with evopatch 0.* with evopatch 9\.9\.9 .*save_pretrained"):
        pickle.loads(data)


def test_the_oldest_versions_declared_are_those_run():
    root = Path(__file__).resolve().parents[2]
    declared = re.findall(r'"(torch|timm|transformers)>=([\d.]+)"', (root / "pyproject.toml").read_text())
    run = dict(line.split("==") for line in (root / ".ci" / "oldest.txt").read_text().split())
    assert {name for name, _ in declared} == {"torch", "timm", "transformers"}
    for name, version in [*declared, ("torchvision", registry._LEAST["torchvision"])]:
        assert run[name].startswith(version)
    assert registry._LEAST["timm"] == run["timm"]
    assert run["transformers"].startswith(registry._LEAST["transformers"])
    assert ".ci/oldest" in (root / ".ci" / "run").read_text()


def test_no_structure_is_left_out_with_the_newest_versions():
    assert {"diff", "diff_parallel", "naflex", "naflex_padded"} <= FLAT
