"""ONNX of one size, by torch.export: ONNX Runtime gives what the model gives; operators that all runtimes know."""

import pytest
import torch
from comparing import moved
from matrix import by_representative, cases, shallow_config
from torch import nn
from variants import build, call, images_for, shallow

import evopatch

NAMES = ["vit", "gap", "relpos", "rope", "levit", "levit_conv", "hf_vit", "hf_dinov2_swiglu", "hf_siglip", "hf_levit"]
ROWS = [(*row, "stage", None) for row in by_representative([*NAMES, "pit", "swin"], ["vit", "swin"])]
ROWS += [("vit", "single", "layer", None), ("levit", "single", "stage", None)]
ROWS += [("swinv2", "matched", "stage", None), ("hf_swin", "matched", "stage", (72, 88))]
ROWS += [("pvt_v2", "matched", "stage", (72, 88)), ("hf_segformer", "matched", "stage", None)]
ROWS += [("torchvision_swin", "matched", "stage", None), ("hf_sam", "matched", "stage", None)]
FAST = [("hf_vit", "matched", "stage", None)]

REVIEWED = set(
    """
    Add And ArgMax AveragePool BatchNormalization Cast Clip Concat ConstantOfShape Conv Div Einsum Equal Exp Expand
    Gather GatherElements GatherND Gelu Gemm Greater GreaterOrEqual HardSwish Identity LayerNormalization Less
    LessOrEqual Log MatMul Mod Mul Neg Not Pad Pow Reciprocal ReduceL2 ReduceMax ReduceMean ReduceSum Relu Reshape
    ScatterElements Sigmoid Slice Softmax Split Sqrt Squeeze Sub TopK Transpose Unsqueeze Where
    """.split()  # noqa: SIM905
)
"""Operators that every runtime knows, and whose result doesn't depend on the order of anything. No control flow, no
sizes that depend on values."""


def unreviewed(graph):
    """What a graph holds beside those, also in the functions that it calls."""
    found = set()
    for node in graph.node:
        reduction = [a.s.decode() for a in node.attribute if a.name == "reduction"]
        if node.op_type not in REVIEWED:
            found.add(node.op_type)
        elif reduction and reduction != ["none"]:
            found.add(f"{node.op_type} with reduction {reduction[0]}")
    return found


@cases(("name", "representative", "selection", "size"), ROWS, fast=FAST)
@torch.no_grad()
def test_onnx_runtime_equals_eager(name, representative, selection, size, tmp_path):
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model, x = build(name, **shallow(name)), images_for(name, size=size)
    original = call(model, x)
    evopatch.apply(model, config=shallow_config(name, representative, selection))
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path)
    result = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    torch.testing.assert_close(result, call(model, x), atol=1e-4, rtol=1e-4)
    assert moved(result, original) > 1e-3
    proto = onnx.load(path, load_external_data=False)
    assert not proto.functions
    ((domain, version),) = [(opset.domain, opset.version) for opset in proto.opset_import]
    assert (domain, version >= 17) == ("", True)
    assert unreviewed(proto.graph) == set()
    assert {"TopK", "Softmax", "MatMul"} <= {node.op_type for node in proto.graph.node}


@torch.no_grad()
def test_unreviewed_operators_are_found(tmp_path):
    """The control of the test above: repeated rows summed up, and a size that depends on values."""
    onnx = pytest.importorskip("onnx")

    class Sums(nn.Module):
        def forward(self, x):
            rows = torch.tensor([[0], [0], [2]]).expand(3, 4)
            return x.new_zeros(3, 4).scatter_add(0, rows, x), x.nonzero()

    path = tmp_path / "model.onnx"
    torch.onnx.export(Sums().eval(), (torch.randn(3, 4),), path, dynamo=True, verbose=False, external_data=False)
    assert unreviewed(onnx.load(path).graph) == {"NonZero", "ScatterElements with reduction add"}
