"""Patch a model in place and back: look, check everything, then change it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

from torch import Tensor, nn

from ..config import EvoConfig
from ..errors import AlreadyPatchedError, ConfigError, SpeedWarning, UnsupportedModelError
from ..forward.host_state import HostState
from ..forward.walk import full_name
from . import changes, registry
from .adapter import Adapter, walking_methods, walks_by_itself
from .changes import Change
from .containers import containers, looked_at_around
from .from_images import check_to_learn_from, learn_from
from .given_images import check_images
from .handle import Patched, unpatch
from .own_model import OwnModel
from .skipping import skip_slow_runs
from .versions import versions_of

Model = TypeVar("Model", bound=nn.Module)


def apply(
    model: Model,
    keep_ratio: float | Sequence[float] | None = None,
    config: EvoConfig | None = None,
    images: Tensor | None = None,
    *,
    blocks: str | None = None,
    prefix_tokens: int | None = None,
    readout: int | None = None,
    token_inputs: Sequence[str] = (),
    skip_slow: Tensor | None = None,
) -> Model:
    """Rewrite a model's blocks into slow-fast two-stream blocks, in place.

    State-dict keys, parameters and `isinstance` stay as they are; `remove` undoes it.

    Args:
        model: A supported model, or one that holds supported ones as submodules: each of them is patched.
        keep_ratio: Share of the patch tokens that are slow, in (0, 1]; overrides the one in `config`. Default 0.5.
        config: All other settings.
        images: `(B, 3, height, width)`, 16 or more, as the model expects them and on its device, to learn from in a few
            seconds and without labels: a flat model what to rank its tokens by, from its own attention on them; a model
            with windows what its fast tokens miss (see `docs/concepts.md`, foresight and Swin). With matched
            representatives; not for LeViT and PiT.
        blocks: For a model that no adapter knows: path of the `nn.ModuleList` or `nn.Sequential` that holds its blocks,
            such as `"encoder.layers"`. `evopatch.inspect(model)` says which would do. Blocks take `(B, T, C)`, or
            `(T, B, C)`, and give the same.
        prefix_tokens: With `blocks`, how many tokens precede the patch tokens: class token, registers.
        readout: With `blocks`, how many of the first prefix tokens the head reads; 0 where it averages the patch
            tokens. Default: 1 where there are any.
        token_inputs: With `blocks`, names of those other inputs of a block that have one entry per patch token, such as
            a rotary table.
        skip_slow: `(B, 3, height, width)`, images as the model expects them, on its device and as many as in your
            batches: only runs of blocks that are faster there than unpatched ones are kept, measured in some seconds;
            the others take all tokens. `evopatch.config_of(model)` says which.

    Returns:
        The model itself.

    Raises:
        ConfigError: If a setting is outside its range or doesn't fit the model's depth, or what is said of the blocks
            isn't so.
        UnsupportedModelError: If nothing in the model can be patched, or a variant is refused; says why.
        AlreadyPatchedError: If the model, or a part of it, is patched already.
        DataError: If `images` are fewer than 8, or no such tensor, or what the model makes of them isn't finite, or it
            doesn't run on them; if `skip_slow` is no such tensor, or it doesn't run on that.

    In every case of an error the model is left untouched. For an architecture that doesn't get faster in some setting
    (LeViT at batch 1) there is a `SpeedWarning`, once in a program, unless `skip_slow` is given.
    """
    if config is None:
        config = EvoConfig()
    elif not isinstance(config, EvoConfig):
        raise ConfigError(f"config is a {type(config).__name__}: expected an evopatch.EvoConfig")
    if keep_ratio is not None:
        config = dataclasses.replace(config, keep_ratio=keep_ratio)
    if images is not None:
        check_to_learn_from(images, config)
    if skip_slow is not None:
        check_images(skip_slow, "skip_slow is")
    if blocks is None:
        _check_unused(prefix_tokens=prefix_tokens, readout=readout, token_inputs=token_inputs or None)
        hosts = _hosts(model)
    else:
        check_unpatched(model)
        own = OwnModel(model, blocks, prefix_tokens, readout, token_inputs, images)
        hosts = [(own.host_name, own.host, own)]
    _patch(model, hosts, dict.fromkeys((name for name, _, _ in hosts), config), measured=skip_slow is not None)
    try:
        if images is not None:
            learn_from(model, images)
        if skip_slow is not None:
            skip_slow_runs(model, skip_slow)
    except BaseException:
        unpatch(model)
        raise
    return model


def _check_unused(**given: object) -> None:
    for name, value in given.items():
        if value is not None:
            raise ConfigError(f"{name}={value!r} is for models that no adapter knows: expected blocks= beside it")


def apply_again(model: Model, configs: Mapping[str, EvoConfig]) -> Model:
    """Patch what was patched in another model of the same structure: `Patched(other).configs`, by the hosts' names.

    Raises:
        UnsupportedModelError: If a name isn't one of a module that can be patched.
        ConfigError, AlreadyPatchedError: As for `apply`.
    """
    hosts = _hosts(model)
    if missing := configs.keys() - {name for name, _, _ in hosts}:
        raise UnsupportedModelError(f"{type(model).__name__} has nothing to patch that is named {sorted(missing)}")
    _patch(model, [host for host in hosts if host[0] in configs], configs)
    return model


def _patch(
    model: nn.Module,
    hosts: list[tuple[str, nn.Module, Adapter]],
    configs: Mapping[str, EvoConfig],
    measured: bool = False,
) -> None:
    planned = [change for name, host, adapter in hosts for change in _plan(model, name, host, adapter, configs[name])]
    changes.check(planned)
    for notice in dict.fromkeys(adapter.notice for _, _, adapter in hosts if adapter.notice and not measured):
        _say_once(notice)  # before the first change, as warnings may be errors
    changes.make(planned)


@cache
def _say_once(notice: str) -> None:
    warnings.warn(notice, SpeedWarning, stacklevel=4)


def remove(model: Model) -> Model:
    """Undo `apply`: bit-identical results, the same parameter objects.

    Raises:
        NotPatchedError: If nothing in the model is patched.
        UnsupportedModelError: If something else changed a patched module's class since; the model stays as it is.
    """
    return unpatch(model)


@contextmanager
def patched(
    model: Model,
    keep_ratio: float | Sequence[float] | None = None,
    config: EvoConfig | None = None,
    images: Tensor | None = None,
    **described: Any,
) -> Iterator[Model]:
    """`apply` on entering, `remove` on leaving, also after an exception. Arguments and errors as for `apply`."""
    apply(model, keep_ratio, config, images, **described)
    try:
        yield model
    finally:
        remove(model)


def is_patched(model: nn.Module) -> bool:
    """Whether the model, or a part of it, is patched."""
    return any("_evo_state" in module.__dict__ for module in model.modules())


def supported(model: nn.Module) -> bool:
    """Whether `apply` would take this model with the default settings."""
    try:
        changes.check(
            change for name, host, adapter in _hosts(model) for change in _plan(model, name, host, adapter, EvoConfig())
        )
    except (UnsupportedModelError, AlreadyPatchedError, ConfigError):
        return False
    return True


def config_of(model: nn.Module) -> EvoConfig:
    """The configuration of a patched model.

    Raises:
        NotPatchedError: If nothing in the model is patched.
    """
    return Patched(model).config


def set_keep_ratio(model: nn.Module, keep_ratio: float | Sequence[float]) -> None:
    """Change the keep ratio of a patched model. 1.0 is exactly the original forward.

    Args:
        model: A patched model.
        keep_ratio: One number, or one per run of blocks.

    Raises:
        ConfigError: If it is outside (0, 1] or the number of ratios doesn't fit; the old one stays then.
        NotPatchedError: If nothing in the model is patched.
    """
    Patched(model).set_keep_ratio(keep_ratio)


def set_config(model: nn.Module, config: EvoConfig) -> None:
    """Change all settings of a patched model.

    Raises:
        ConfigError: If the configuration doesn't fit the model; the old one stays then.
        NotPatchedError: If nothing in the model is patched.
    """
    Patched(model).set_config(config)


def check_unpatched(model: nn.Module) -> None:
    """
    Raises:
        UnsupportedModelError: If this isn't a module.
        AlreadyPatchedError: If it, or a part of it, is patched.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"{type(model).__name__} is not a torch.nn.Module: expected a model to patch")
    for name, module in model.named_modules():
        if "_evo_state" in module.__dict__:
            raise AlreadyPatchedError(
                f"'{name or type(module).__name__}' is already patched: use evopatch.set_keep_ratio or "
                "evopatch.set_config to change it, or evopatch.remove(model) first"
            )


def _hosts(model: nn.Module) -> list[tuple[str, nn.Module, Adapter]]:
    check_unpatched(model)
    hosts = registry.find_hosts(model)
    if not hosts:
        raise UnsupportedModelError(_nothing_found(model))
    return hosts


def _nothing_found(model: nn.Module) -> str:
    start, leave = f"found nothing to patch in {_full_name(type(model))}: ", "Leave it unpatched, or write an adapter"
    if known := registry.unserved(model):
        reasons = "; ".join(f"{name}: {reason}" if name else reason for name, reason in known.items())
        return f"{start}{reasons}. {leave} (docs/adapters.md)"
    served = sorted({_full_name(cls) for adapter in registry.adapters() for cls in adapter.hosts()})
    found = containers(model)
    likely = f" Likely: blocks={' or '.join(map(repr, found))}." if found else ""
    text = (
        f"{start}no adapter serves it or any of its submodules. Say "
        "where its blocks are, as in evopatch.apply(model, blocks='encoder.layers', prefix_tokens=1); "
        f"evopatch.inspect(model) lists what would do.{likely} Where nothing does: {leave} (docs/adapters.md). Served "
        f"classes: {', '.join(served) or 'none, as no library with an adapter is imported'}"
    )
    return text + "".join(f". The adapter for {name} can't be used: {why}" for name, why in registry.failures().items())


def _full_name(cls: type[Any]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def check_own(model: nn.Module, own: OwnModel) -> None:
    """
    Raises:
        UnsupportedModelError: If what somebody says of their own model can't be patched.
    """
    changes.check(_plan(model, own.host_name, own.host, own, EvoConfig()))


def _plan(model: nn.Module, name: str, host: nn.Module, adapter: Adapter, config: EvoConfig) -> list[Change]:
    spec = adapter.inspect(host, name or type(host).__name__)
    state = HostState(name, spec, spec.stages(host), config)
    looks = looked_at_around(host, state)
    state.foreign = walks_by_itself(host, adapter, state) or looks
    state.methods = {
        name: full_name(getattr(type(host), name)) for name in walking_methods(adapter) if hasattr(type(host), name)
    }
    made_with = {"_evo_versions": versions_of(host)}
    planned = adapter.plan(host, state)
    state.generated.clear()
    if name:
        planned += adapter.plan_holder(model.get_submodule(name.rpartition(".")[0]), host)
    return [dataclasses.replace(change, attributes=made_with | dict(change.attributes)) for change in planned]
