"""What could be patched in a model, and what to write for it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from ..errors import EvoPatchError, UnsupportedModelError
from ..rewrite.tracing import TraceSpec, attention_cores
from . import registry
from .apply import check_own, check_unpatched
from .containers import SEQUENCES, containers
from .own_model import OwnModel
from .patch_tokens import likely_prefix, patch_sizes
from .probe import width_of
from .trying import try_out

_UNKNOWN = "PREFIX_TOKENS"


@dataclass(frozen=True)
class Candidate:
    """One container of modules, or a module that an adapter serves."""

    path: str
    """In the model."""
    call: str
    """What to write; empty where it can't be patched."""
    reason: str
    """Why it can't be patched; empty where it can."""


@dataclass(frozen=True)
class Inspection:
    """What `evopatch.inspect` found; `str` of it says it in lines."""

    model: str
    candidates: tuple[Candidate, ...]

    def __str__(self) -> str:
        if not self.candidates:
            return f"{self.model}: no nn.ModuleList or nn.Sequential whose modules hold attention"
        lines = [
            f"  {candidate.path or '(the model itself)'}: {candidate.call or f'no: {candidate.reason}'}"
            for candidate in self.candidates
        ]
        return "\n".join([f"{self.model}:", *lines])


def inspect(model: nn.Module) -> Inspection:
    """Which parts of a model can be patched, and by which arguments of `evopatch.apply`; the model stays as it is.

    Args:
        model: An unpatched one.

    Returns:
        Every module that an adapter serves, or knows not to be served, and every list or sequence of modules of which
        some hold attention. Where the number of prefix tokens can neither be found out by running the model on images
        nor be read from its parameters, the call has `PREFIX_TOKENS` in its place.

    Raises:
        AlreadyPatchedError: If the model, or a part of it, is patched.
    """
    check_unpatched(model)
    hosts = [name for name, _, _ in registry.find_hosts(model)]
    found = [Candidate(name, "evopatch.apply(model)", "") for name in hosts]
    unserved = registry.unserved(model)
    found += [Candidate(name, "", reason) for name, reason in unserved.items()]
    likely = containers(model)
    for name, module in model.named_modules():
        known = any(not host or name == host or name.startswith(f"{host}.") for host in (*hosts, *unserved))
        inside = any(name.startswith(f"{outer}.") for outer in likely)
        around = any(host.startswith(f"{name}.") or not name for host in hosts)
        if not known and not inside and not around and isinstance(module, SEQUENCES) and _attends(module):
            found.append(_candidate(model, name, module, name in likely))
    return Inspection(type(model).__name__, tuple(found))


def _attends(container: nn.Module) -> bool:
    blocks = list(container.children())
    return len(blocks) > 1 and any(attention_cores(block, TraceSpec()) for block in blocks)


def _candidate(model: nn.Module, path: str, container: nn.Module, every: bool) -> Candidate:
    if not every:
        without = [name for name, block in container._modules.items() if not attention_cores(block, TraceSpec())]
        return Candidate(path, "", f"{path}.{without[0]} holds no attention")
    prefix = _prefix_tokens(model, path, container)
    try:
        check_own(model, OwnModel(model, path, prefix or 0, None, tried=prefix is not None))
    except EvoPatchError as error:
        return Candidate(path, "", str(error))
    return Candidate(
        path, f"evopatch.apply(model, blocks={path!r}, prefix_tokens={_UNKNOWN if prefix is None else prefix})", ""
    )


def _prefix_tokens(model: nn.Module, path: str, container: nn.Module) -> int | None:
    name, block = next(container.named_children())
    channels = width_of(block)
    if channels is None:
        return None
    called = f"{path}.{name}.0" if isinstance(block, nn.ModuleList) else f"{path}.{name}"
    try:
        seen = try_out(model, "", called, channels)
    except UnsupportedModelError:
        seen = None
    tokens_first = seen is not None and seen.tokens.shape[:2] != (1, 1) and seen.tokens.shape[1] == 1
    if seen is None or seen.constant(tokens_first) is None:
        return likely_prefix(model, channels)
    leading, sizes = seen.leading(tokens_first), patch_sizes(model)
    others = seen.count(tokens_first) - leading
    if seen.behind(tokens_first):
        return leading  # which is refused, with that reason
    if sizes and seen.patch_size(others, sizes) is None and others > math.prod(seen.grid(sizes[0])):
        return None  # some may be prefix tokens that are made of the image
    return leading
