"""What could be patched in a model, and what to write for it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..errors import EvoPatchError
from ..rewrite.tracing import TraceSpec, attention_cores
from . import registry
from .apply import check_own, check_unpatched
from .containers import SEQUENCES, containers
from .own_model import OwnModel
from .patch_tokens import likely_prefix, prefix_seen
from .probe import width_of
from .refusing import RefusingAdapter

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
        Every module that an adapter serves, and every list or sequence of modules of which some hold attention. Where
        the number of prefix tokens can't be read from a position embedding, the call has `PREFIX_TOKENS` in its place.

    Raises:
        AlreadyPatchedError: If the model, or a part of it, is patched.
    """
    check_unpatched(model)
    known = registry.find_hosts(model)
    hosts = [name for name, _, _ in known]
    refused = {name: adapter.reason for name, _, adapter in known if isinstance(adapter, RefusingAdapter)}
    found = [
        Candidate(name, "" if name in refused else "evopatch.apply(model)", refused.get(name, "")) for name in hosts
    ]
    likely = containers(model)
    for name, module in model.named_modules():
        served = any(not host or name == host or name.startswith(f"{host}.") for host in hosts)
        inside = any(name.startswith(f"{outer}.") for outer in likely)
        around = any(host.startswith(f"{name}.") or not name for host in hosts)
        if not served and not inside and not around and isinstance(module, SEQUENCES) and _attends(module):
            found.append(_candidate(model, name, module, name in likely))
    return Inspection(type(model).__name__, tuple(found))


def _attends(container: nn.Module) -> bool:
    blocks = list(container.children())
    return len(blocks) > 1 and any(attention_cores(block, TraceSpec()) for block in blocks)


def _candidate(model: nn.Module, path: str, container: nn.Module, every: bool) -> Candidate:
    if not every:
        without = [name for name, block in container.named_children() if not attention_cores(block, TraceSpec())]
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
    likely = likely_prefix(model, channels)
    return prefix_seen(model, called, channels) if likely is None else likely
