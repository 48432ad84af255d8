"""All that tests know of evopatch's insides, in one place: where those move, this file follows."""

from collections.abc import Callable

import pytest
from torch import Tensor, nn

from evopatch.forward import block as block_module
from evopatch.forward import windowed
from evopatch.forward.tokens import TokenPass
from evopatch.patching import adapter as adapter_module
from evopatch.patching import apply as applying
from evopatch.patching.handle import Patched
from evopatch.plan import BlockPlan
from evopatch.rewrite import graph
from evopatch.rewrite.tracing import TraceSpec


def block_paths(model: nn.Module) -> list[str]:
    """Paths in the model of the first module of each patched block."""
    return [paths[0] for paths in Patched(model).host.blocks()]


def plans(model: nn.Module) -> tuple[BlockPlan, ...]:
    """What each block of a patched model is to do."""
    return Patched(model).host.state.plans


def forward_code(block: nn.Module) -> Callable[..., object]:
    """The generated forward of the module that holds a patched block's attention core, in eval mode."""
    codes = (getattr(module, "_evo_code", None) for module in block.modules())
    (function,) = {code.functions[False] for code in codes if code is not None}
    return function


def states(model: nn.Module, block: nn.Module) -> tuple[object, object]:
    """The state that a patched model holds, and the one that its block holds."""
    return Patched(model).host.state, block._evo_state


def generated_functions() -> int:
    """How many functions were generated in this process."""
    return len(graph._functions)


def new_pass(model: nn.Module) -> dict[str, object]:
    """The keyword argument with which a patched model of transformers calls its layers."""
    state = Patched(model).host.state
    forward_pass = TokenPass(state)
    forward_pass.depth = state.depth
    return {"evo_pass": forward_pass}


def fail_at_block(monkeypatch: pytest.MonkeyPatch, number: int, error: Exception) -> list[str]:
    """Let the rewriting of the so many-th block fail, each being traced for itself.

    Returns:
        Filled with the names of the blocks that are rewritten.
    """
    names: list[str] = []
    generate = block_module.generate_metric

    def failing(block: nn.Module, name: str, spec: TraceSpec) -> graph.Code:
        if name not in names:
            names.append(name)
        if len(names) == number:
            raise error
        return generate(block, name, spec)

    monkeypatch.setattr(block_module, "generate_metric", failing)
    monkeypatch.setattr(adapter_module, "fingerprint", lambda block: object())
    return names


def keep_all_in_windows(monkeypatch: pytest.MonkeyPatch, matched: bool) -> list[Tensor]:
    """Let every window, or of matched windows every token, be slow, whatever the keep ratio.

    Returns:
        Filled with what enters the blocks.
    """
    match, merge = windowed.match_tokens, windowed.merge_windows
    entered: list[Tensor] = []
    monkeypatch.setattr(windowed, "num_slow", lambda number, ratio: 1 if matched else number)
    monkeypatch.setattr(windowed, "match_tokens", lambda metric, keep, *a: match(metric, a[1].area, *a))
    monkeypatch.setattr(windowed, "merge_windows", lambda *a: entered.append(merge(*a)) or entered[-1])
    return entered


def say_again() -> None:
    """Forget which warnings `apply` has given in this process."""
    applying._say_once.cache_clear()
