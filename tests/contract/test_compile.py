"""torch.compile: one graph, no recompilation; changes of the keep ratio are followed, each by a graph of its own."""

import inspect

import pytest
import torch
from comparing import moved
from matrix import SAME_GRAPH, by_representative, cases, shallow_config
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from variants import FLAT, PYRAMIDS, build, call, images_for, shallow

import evopatch
from evopatch.forward import host_state

WINDOWED = ("swin", "swinv2_cr", "torchvision_swin", "torchvision_swinv2", "hf_swin", "hf_swinv2", "hf_donut",
            "sam", "hf_sam", "hf_vitdet", "pvt_v2", "hf_pvt_v2", "hf_segformer")  # fmt: skip
ROWS = [*by_representative((FLAT | PYRAMIDS | {*WINDOWED}) - SAME_GRAPH, ()), ("swin", "single"), ("hf_swin", "none")]


class WholeSums(TorchDispatchMode):
    """Fails where numbers are scattered and added that float32 doesn't add exactly."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__.startswith("scatter_add"):
            assert torch.equal(args[3], args[3].round())
            assert out.max() < 2**24
        return out


@cases(("name", "representative"), ROWS, fast=["vit", "hf_vit", "levit", ("swin", "matched"), ("hf_swin", "none")])
@torch.no_grad()
def test_compiles_to_one_graph_without_recompiling(name, representative):
    torch._dynamo.reset()
    model, x = build(name, **shallow(name)), images_for(name)
    evopatch.apply(model, config=shallow_config(name, representative))
    with WholeSums():
        expected = call(model, x)
    # torch.compile breaks the graph at the zero-argument super() of a subclass's method that walks, and where a model's
    # own forward branches by a tensor's value.
    whole, backend = name not in ("subclass", "own_written_out", "hf_eomt"), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=whole, backend=backend)
    torch.testing.assert_close(call(compiled, x), expected, atol=2e-5, rtol=2e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        other = images_for(name, seed=2)
        torch.testing.assert_close(call(compiled, other), call(model, other), atol=2e-5, rtol=2e-5)
    assert moved(call(model, other), expected) > 1e-4
    nodes = [node for graph in backend.graphs for node in graph.graph.nodes]
    called = {str(getattr(node.target, "__name__", node.target)) for node in nodes}
    assert ("topk" in called) == (name not in ("subclass", "own_written_out"))
    # Sums into repeated rows are atomic additions in compiled code, in another order in every run. That changes nothing
    # where whole numbers are added.
    assert not called & {"index_add", "index_add_", "scatter_add_", "embedding_bag"}
    # Compiled for this keep ratio, not for any: that takes several times as long, and makes slower kernels. Between two
    # graphs of one forward there may be sizes.
    symbols = [n for n in nodes if isinstance(n.meta.get("example_value"), torch.SymInt | torch.SymFloat)]
    assert name == "hf_eomt" or not symbols


@cases("name", ["vit", "relpos", "levit", "swin", "hf_vit", "own_parts"], fast=["vit"])
@torch.no_grad()
def test_a_changed_keep_ratio_is_followed(name):
    torch._dynamo.reset()
    model, x = build(name, **shallow(name)), images_for(name)
    evopatch.apply(model, config=shallow_config(name))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected = call(compiled, x)
    evopatch.set_keep_ratio(model, 0.3)
    changed = call(compiled, x)
    torch.testing.assert_close(changed, call(model, x), atol=2e-5, rtol=2e-5)
    assert moved(changed, expected) > 1e-5


def run_keep_ratios(name, number, **options):
    """Compiled at many keep ratios, each compared with eager; and how often it was compiled."""
    torch._dynamo.reset()
    model, x = evopatch.apply(build(name, **shallow(name)), config=shallow_config(name)), images_for(name)
    backend = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend, **options)
    with torch._dynamo.config.patch(recompile_limit=8):  # torch's own, which other packages change
        for step in range(number):
            evopatch.set_keep_ratio(model, 0.3 + 0.6 * step / number)
            torch.testing.assert_close(call(compiled, x), call(model, x), atol=2e-5, rtol=2e-5)
    return backend.frame_count


@cases("name", ["vit", "hf_vit", "gap", "levit", "pit", "swin"], fast=["vit"])
@torch.no_grad()
def test_any_number_of_keep_ratios(name):
    assert run_keep_ratios(name, 12 if name == "swin" else 20) <= 8


@torch.no_grad()
def test_only_keep_ratios_that_are_run_compiled_count():
    torch._dynamo.reset()
    model, x = evopatch.apply(build("vit", **shallow("vit")), config=shallow_config("vit")), images_for("vit")
    for step in range(9):
        evopatch.set_keep_ratio(model, 0.3 + 0.05 * step)
        call(model, x)
    backend = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for ratio in (0.42, 0.57, 0.42, 0.72):
        evopatch.set_keep_ratio(model, ratio)
        torch.testing.assert_close(call(compiled, x), call(model, x), atol=2e-5, rtol=2e-5)
    assert backend.frame_count == 3, "each has code of its own"
    for ratio in (0.87, 0.62, 0.77, 0.67):
        evopatch.set_keep_ratio(model, ratio)
        torch.testing.assert_close(call(compiled, x), call(model, x), atol=2e-5, rtol=2e-5)
    assert backend.frame_count <= 5, "these share it"


@pytest.mark.slow
@torch.no_grad()
def test_keep_ratios_that_are_compiled_alone_end_at_the_limit(monkeypatch):
    monkeypatch.setattr(host_state, "_COMPILED_ALONE", 100)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        run_keep_ratios("vit", 9)
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        assert run_keep_ratios("vit", 9, recompile_limit=9) == 9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "swin"])
@torch.no_grad()
def test_compiles_with_inductor(name):
    torch._dynamo.reset()
    options = {"depths": (2, 2), "num_heads": (2, 4)} if name == "swin" else shallow(name)
    model, x = evopatch.apply(build(name, **options), config=shallow_config(name)), images_for(name)
    torch.testing.assert_close(call(torch.compile(model, fullgraph=True), x), call(model, x), atol=2e-5, rtol=2e-5)
    assert moved(call(model, x), call(build(name, **options), x)) > 1e-4
