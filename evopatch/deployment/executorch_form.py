"""ExecuTorch programs for the XNNPACK backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

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
    # Parts of weights are constants then: XNNPACK multiplies by no others, and without it a product is a plain loop.
    program: Any = constant_prop_pass(conversion.program())
    for name, value in program.constants.items():
        if isinstance(value, Tensor):  # what it writes of a view is from where the view's storage begins
            program.constants[name] = value.detach().clone()
    lowered = to_edge_transform_and_lower(program, partitioner=[partitioner])
    lowered.to_executorch().save(str(path))


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
