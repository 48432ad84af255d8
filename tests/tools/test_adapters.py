"""Adapters of third parties: they win over built-in ones, and a broken one stops nobody."""

import sys
import types
import warnings
from importlib.metadata import EntryPoint

import pytest
import timm
from third_party_adapter import ToyAdapter
from variants import build

import evopatch
from evopatch.patching import registry
from evopatch.patching.adapter import Adapter

GROUP = "evopatch.adapters"


class MyViT(ToyAdapter):
    """Serves what a built-in adapter serves."""

    def hosts(self):
        return (timm.models.VisionTransformer,)


class NoTuple(ToyAdapter):
    def hosts(self):
        return [timm.models.VisionTransformer]


class NoAdapter:
    pass


@pytest.fixture
def register(monkeypatch):
    """Entry points of this name and value, and a module that raises when it is imported."""
    registry._say_once.cache_clear()

    def register(*values):
        entries = [EntryPoint(name="timm", value=value, group=GROUP) for value in values]
        monkeypatch.setattr(registry, "entry_points", lambda group: entries if group == GROUP else [])

    module = types.ModuleType("own_adapters")
    module.MyViT, module.NoTuple, module.NoAdapter, module.Abstract = MyViT, NoTuple, NoAdapter, Adapter
    monkeypatch.setitem(sys.modules, "own_adapters", module)
    registry._load.cache_clear()
    yield register
    registry._load.cache_clear()


def test_a_third_party_wins(register):
    model = build("vit")
    assert registry.find(model).__class__.__module__ == "evopatch_timm.vit"
    register("own_adapters:MyViT")
    assert type(registry.find(model)) is MyViT
    assert [type(adapter) for _, _, adapter in registry.find_hosts(model)] == [MyViT]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("broken_adapters:Any", "RuntimeError: broken on purpose"),
        ("own_adapters:NoAdapter", "makes a NoAdapter: expected an evopatch.patching.adapter.Adapter"),
        ("own_adapters:Missing", "AttributeError: .*Missing"),
        ("own_adapters:Abstract", "TypeError: .*abstract"),
        ("own_adapters:NoTuple", "expected a tuple of classes"),
        ("no_such_module:Any", "ModuleNotFoundError"),
    ],
)
def test_a_broken_one_is_named_once_and_stops_nobody(value, reason, register, tmp_path, monkeypatch):
    (tmp_path / "broken_adapters.py").write_text("raise RuntimeError('broken on purpose')")
    monkeypatch.syspath_prepend(tmp_path)
    register(value, "own_adapters:MyViT")
    with pytest.warns(UserWarning, match=f"the adapter {value} for timm can't be used: .*{reason}"):
        found = registry.find(build("vit"))
    assert type(found) is MyViT, "the one after it"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(registry.find(build("vit"))) is MyViT
    register(value)
    assert evopatch.is_patched(evopatch.apply(build("vit")))
    assert "timm" in registry.failures()


def test_of_a_library_that_is_not_imported_nothing_is_loaded(register, monkeypatch):
    entry = EntryPoint(name="library_of_nobody", value="no_such_module:Any", group=GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.find(build("vit")) is not None
