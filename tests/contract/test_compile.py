"""torch.compile: one graph, no recompilation, and changes of the keep ratio are followed."""

import pytest
import torch
from comparing import moved
from matrix import by_representative, cases, config
from variants import FLAT, PYRAMIDS, build, call, images_for

import evopatch

WINDOWED = ("swin", "swinv2_cr", "hf_swin", "hf_swinv2")
ROWS = [*by_representative(FLAT | PYRAMIDS | {*WINDOWED}, ()), ("swin", "single"), ("hf_swin", "none")]


@cases(("name", "representative"), ROWS, fast=["vit", "hf_vit", "levit", ("swin", "matched"), ("hf_swin", "none")])
@torch.no_grad()
def test_compiles_to_one_graph_without_recompiling(name, representative):
    torch._dynamo.reset()
    model, x = evopatch.apply(build(name), config=config(representative)), images_for(name)
    expected = call(model, x)
    # torch.compile breaks the graph at the zero-argument super() of a subclassed forward_features.
    compiled = torch.compile(model, fullgraph=name != "subclass", backend="eager")
    torch.testing.assert_close(call(compiled, x), expected, atol=2e-5, rtol=2e-5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        other = images_for(name, seed=2)
        torch.testing.assert_close(call(compiled, other), call(model, other), atol=2e-5, rtol=2e-5)
    assert moved(call(model, other), expected) > 1e-4
    evopatch.set_keep_ratio(model, 0.3)
    changed = call(compiled, x)
    torch.testing.assert_close(changed, call(model, x), atol=2e-5, rtol=2e-5)
    assert moved(changed, expected) > 1e-5


@cases("name", ["vit", "hf_vit", "levit", "swin"], fast=["vit", "swin"])
@torch.no_grad()
def test_compiled_sums_are_in_the_same_order_in_every_run(name):
    """Sums into repeated rows are atomic additions in compiled code, on accelerators in eager mode, too."""
    torch._dynamo.reset()
    called = set()

    def record(graph, _):
        called.update(str(getattr(node.target, "__name__", node.target)) for node in graph.graph.nodes)
        return graph.forward

    model, x = evopatch.apply(build(name)), images_for(name)
    call(torch.compile(model, fullgraph=True, backend=record), x)
    assert "topk" in called
    assert not called & {"index_add", "index_add_", "scatter_add", "scatter_add_"}


@pytest.mark.slow
@torch.no_grad()
def test_compiles_with_inductor():
    torch._dynamo.reset()
    model, x = evopatch.apply(build("vit")), images_for("vit")
    torch.testing.assert_close(call(torch.compile(model, fullgraph=True), x), call(model, x), atol=2e-5, rtol=2e-5)
    assert moved(call(model, x), call(build("vit"), x)) > 1e-4
