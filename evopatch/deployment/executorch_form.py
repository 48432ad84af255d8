"""ExecuTorch programs for the XNNPACK backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from .conversion import Conversion
from .form import Form, Run


def _write(conversion: Conversion, path: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.exir.backend.canonical_partitioners.pattern_op_partitioner import (
        generate_partitions_from_list_of_nodes,
    )
    from executorch.exir.passes.constant_prop_pass import constant_prop_pass

    partitioner: Any = XnnpackPartitioner()

    def partitions(program: Any) -> Any:
        matched = partitioner.get_matched_nodes_from_configs(program)
        return generate_partitions_from_list_of_nodes(program.graph_module, matched)

    # Its own way of merging, for dynamic quantisation, looks at each partition by itself, and makes some that wait for
    # each other ("found dependency cycles").
    partitioner.generate_partitions = partitions
    ops = torch.ops.aten
    quicker: Any = {ops.linalg_vector_norm.default: _length, ops.matmul.default: _multiplied}
    shorter = conversion.program().run_decompositions(quicker)
    _uncopy(shorter.graph)
    # Parts of weights are constants then: XNNPACK multiplies by no others, and without it a product is a plain loop.
    program: Any = constant_prop_pass(shorter)
    for name, value in program.constants.items():
        if isinstance(value, Tensor):  # what it writes of a view is from where the view's storage begins
            program.constants[name] = value.detach().clone()
    lowered = to_edge_transform_and_lower(program, partitioner=[partitioner])
    lowered.to_executorch().save(str(path))


# What XNNPACK doesn't know runs in plain loops on one thread, some of them slow ones.


def _length(x: Tensor, ord: float = 2.0, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    """By a product, which XNNPACK knows, in place of powers."""
    if ord != 2.0 or dim is None or dtype is not None:
        return NotImplemented
    return (x * x).sum(dim, keepdim=keepdim).sqrt()


def _multiplied(x: Tensor, y: Tensor) -> Any:
    """Without copying each side to the axes that it has."""
    if x.dim() < 3 or x.shape[:-2] != y.shape[:-2]:
        return NotImplemented
    product = torch.bmm(x.reshape(-1, *x.shape[-2:]), y.reshape(-1, *y.shape[-2:]))
    return product.view(*x.shape[:-1], y.shape[-1])


def _uncopy(graph: fx.Graph) -> None:
    """Divide by what was copied to as many channels, not by the copies; and leave copies out that nobody writes to,
    which XNNPACK takes for outputs that are inputs."""
    ops = torch.ops.aten
    for node in graph.nodes:
        if node.target is ops.div.Tensor and getattr(node.args[1], "target", None) is ops.expand.default:
            divided, copies = node.args
            if divided.meta["val"].shape == copies.meta["val"].shape:
                node.args = (divided, copies.args[0])
        elif node.target is ops.clone.default and not node.kwargs:
            node.replace_all_uses_with(node.args[0])
    graph.eliminate_dead_code()


def _open(path: Path) -> Run:
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(str(path))
    method: Any = program.load_method("forward")

    def run(images: Tensor) -> tuple[Tensor, ...]:
        assert program  # which the method doesn't keep alive
        # Outputs lie in memory that the next call reuses.
        return tuple(value.clone() for value in method.execute([images.contiguous()]))

    return run


EXECUTORCH = Form("executorch", ".pte", ("executorch",), _write, _open, any_batch=False, any_size=False)
