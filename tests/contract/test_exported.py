"""torch.export of one size gives what the model itself gives, which still runs eagerly after."""

import torch
from comparing import moved
from matrix import SAME_GRAPH, by_representative, cases, shallow_config
from torch import nn
from torch._ops import HigherOrderOperator, OpOverload
from variants import FLAT, PYRAMIDS, build, call, images_for, shallow

import evopatch

WINDOWED = {"swin", "swinv2", "swinv2_cr", "torchvision_swin", "torchvision_swinv2"}
WINDOWED |= {"hf_swin", "hf_swinv2", "hf_swin_backbone", "hf_donut", "sam", "hf_sam", "hf_vitdet"}
WINDOWED |= {"pvt_v2", "pvt_v2_linear", "hf_pvt_v2", "hf_segformer"}
BRANCHING = {"hf_eomt"}
"""Models whose own forward branches by a tensor's value, unpatched, too."""
ROWS = [
    *by_representative((FLAT | PYRAMIDS | WINDOWED) - SAME_GRAPH - BRANCHING, ()),
    ("swin", "single"),
    ("hf_swin", "none"),
]


CONTROL_FLOW = ("cond", "while_loop", "scan", "map_impl", "associative_scan")
UNWANTED = {
    f"aten.{name}"
    for name in """
    nonzero masked_select unique_consecutive unique_dim _unique2 _local_scalar_dense item scatter_add
    scatter_add_ scatter_reduce scatter_reduce_ index_add index_add_ index_reduce index_reduce_
    """.split()  # noqa: SIM905
}
"""Sizes that depend on values, and sums in an order that a runtime may choose, as it is on a GPU."""


def unwanted(program):
    """What a program holds of those, and of control flow; what that calls is looked into as well."""
    nodes = [n for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule) for n in m.graph.nodes]
    operators = {node.target for node in nodes if node.op == "call_function"}
    overloads = {str(operator).rpartition(".")[0] for operator in operators if isinstance(operator, OpOverload)}
    higher = {operator.name() for operator in operators if isinstance(operator, HigherOrderOperator)}
    return (overloads & UNWANTED) | (higher & {*CONTROL_FLOW})


def test_unwanted_operators_are_found():
    """The control of the test below."""

    class Unwanted(nn.Module):
        def forward(self, x):
            rows = torch.tensor([[0], [0], [2]]).expand(3, 4)
            sums = torch.cond(x.sum() > 0, lambda x: x.new_zeros(3, 4).scatter_add(0, rows, x), lambda x: x * 2, (x,))
            return sums, x.nonzero()

    program = torch.export.export(Unwanted(), (torch.randn(3, 4),))
    assert unwanted(program) == {"cond", "aten.scatter_add", "aten.nonzero"}


@cases(("name", "representative"), ROWS, fast=["vit", "levit", "swin", ("hf_swin", "matched")])
def test_exports_and_runs_eagerly_after(name, representative):
    model, x = build(name, **shallow(name)), images_for(name)
    with torch.no_grad():
        original = call(model, x)
        evopatch.apply(model, config=shallow_config(name, representative))
        expected = call(model, x)
        program = torch.export.export(model, (x,))
        exported = program.module()
        torch.testing.assert_close(call(exported, x), expected, atol=2e-5, rtol=2e-5)
        assert torch.equal(call(model, x), expected)
        assert unwanted(program) == set()
        assert moved(call(exported, x), original) > 1e-4


@cases("name", ["vit", "hf_vit", "levit", "swin", "hf_swinv2"], fast=["levit", "hf_vit"])
def test_exports_with_gradients_enabled(name):
    model, x = evopatch.apply(build(name)), images_for(name)
    expected = call(model, x)
    assert expected.requires_grad
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(call(exported, x), expected, atol=2e-5, rtol=2e-5)
    evopatch.set_keep_ratio(model, 1.0)
    assert moved(call(exported, x), call(model, x)) > 1e-4
