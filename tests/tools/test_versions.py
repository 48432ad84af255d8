"""A pickle of a patched model says with which versions it was made."""

import pickle
import warnings

import pytest
import timm
import transformers
from variants import build

import evopatch
from evopatch import CheckpointError
from evopatch.patching import versions


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
