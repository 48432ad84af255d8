"""Patch a model in place and back: look, check everything, then change it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import registry
from .adapter import Adapter, Swap
from .config import EvoConfig
from .errors import AlreadyPatchedError, ConfigError, NotPatchedError, SpeedWarning, UnsupportedModelError
from .ops import Partition
from .spec import Block
from .stream import Patch, Stream
from .swap import Swapped, is_last, restore, swap

Model = TypeVar("Model", bound=nn.Module)


def apply(model: Model, keep_ratio: float | Sequence[float] | None = None, config: EvoConfig | None = None) -> Model:
    """Rewrite a model's blocks into slow-fast two-stream blocks, in place.

    State-dict keys, parameters and `isinstance` stay as they are; `remove` undoes it.

    Args:
        model: A supported model, or one that holds supported ones as submodules: each of them is patched.
        keep_ratio: Share of the patch tokens that are slow, in (0, 1]; overrides the one in `config`. Default 0.5.
        config: All other settings.

    Returns:
        The model itself.

    Raises:
        ConfigError: If a setting is outside its range or doesn't fit the model's depth.
        UnsupportedModelError: If nothing in the model can be patched, or a variant is refused; says why.
        AlreadyPatchedError: If the model, or a part of it, is patched already.

    In every case of an error the model is left untouched. For an architecture that doesn't get faster in some setting
    (LeViT at batch 1) there is a `SpeedWarning`, once in a program.
    """
    config = EvoConfig() if config is None else _checked(config)
    if keep_ratio is not None:
        config = dataclasses.replace(config, keep_ratio=keep_ratio)
    hosts = _hosts(model)
    changes = [change for name, host, adapter in hosts for change in _plan(name, host, adapter, config)]
    _check_shared(changes)
    for notice in dict.fromkeys(adapter.notice for _, _, adapter in hosts if adapter.notice):
        _say_once(notice)  # before the first change, as warnings may be errors
    for change in changes:
        if change.mixin is not None:
            swap(change.module, change.mixin)
        change.module.__dict__.update(change.attributes)
        if change.pre_hook is not None:
            change.module.register_forward_pre_hook(change.pre_hook, with_kwargs=True)
            change.module.__dict__["_evo_pre_hook"] = change.pre_hook
    return model


@cache
def _say_once(notice: str) -> None:
    warnings.warn(notice, SpeedWarning, stacklevel=3)


def remove(model: Model) -> Model:
    """Undo `apply`: bit-identical results, the same parameter objects.

    Raises:
        NotPatchedError: If nothing in the model is patched.
        UnsupportedModelError: If something else changed a patched module's class since; the model stays as it is.
    """
    hosts = patched_hosts(model)
    for name, module in model.named_modules():
        if isinstance(module, Swapped) and not is_last(type(module)):
            raise UnsupportedModelError(
                f"'{name or type(module).__name__}' got another class after evopatch.apply, {type(module)}: undo that "
                "first, such as torch's parametrizations or fully_shard"
            )
    for host in hosts.values():
        for module in list(host.modules()):  # also blocks that were wrapped since, such as by checkpoint wrappers
            _remove_pre_hook(module, module.__dict__.get("_evo_pre_hook"))
            for key in [key for key in module.__dict__ if key.startswith("_evo_")]:
                del module.__dict__[key]
            if isinstance(module, Swapped):
                restore(module)  # type: ignore[arg-type]
    return model


def _remove_pre_hook(module: nn.Module, hook: Any) -> None:
    # By identity: the handle that registering returns doesn't survive deepcopy.
    for key in [key for key, value in module._forward_pre_hooks.items() if hook is not None and value is hook]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)


@contextmanager
def patched(
    model: Model, keep_ratio: float | Sequence[float] | None = None, config: EvoConfig | None = None
) -> Iterator[Model]:
    """`apply` on entering, `remove` on leaving, also after an exception. Arguments and errors as for `apply`."""
    apply(model, keep_ratio, config)
    try:
        yield model
    finally:
        remove(model)


def is_patched(model: nn.Module) -> bool:
    """Whether the model, or a part of it, is patched."""
    return any("_evo_patch" in module.__dict__ for module in model.modules())


def supported(model: nn.Module) -> bool:
    """Whether `apply` would take this model with the default settings."""
    try:
        for name, host, adapter in _hosts(model):
            _plan(name, host, adapter, EvoConfig())
    except (UnsupportedModelError, AlreadyPatchedError, ConfigError):
        return False
    return True


def config_of(model: nn.Module) -> EvoConfig:
    """The configuration of a patched model.

    Raises:
        NotPatchedError: If nothing in the model is patched.
    """
    patch: Patch = next(iter(patched_hosts(model).values()))._evo_patch
    return patch.config


def set_keep_ratio(model: nn.Module, keep_ratio: float | Sequence[float]) -> None:
    """Change the keep ratio of a patched model. 1.0 is exactly the original forward.

    Args:
        model: A patched model.
        keep_ratio: One number, or one per run of blocks.

    Raises:
        ConfigError: If it is outside (0, 1] or the number of ratios doesn't fit; the old one stays then.
        NotPatchedError: If nothing in the model is patched.
    """
    changes = [
        (host._evo_patch, dataclasses.replace(host._evo_patch.config, keep_ratio=keep_ratio))
        for host in patched_hosts(model).values()
    ]
    _set_configs(changes)


def set_config(model: nn.Module, config: EvoConfig) -> None:
    """Change all settings of a patched model.

    Raises:
        ConfigError: If the configuration doesn't fit the model; the old one stays then.
        NotPatchedError: If nothing in the model is patched.
    """
    _set_configs([(host._evo_patch, _checked(config)) for host in patched_hosts(model).values()])


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """On leaving, every host has its configuration and every module its mode again; inside, all are in eval mode."""
    configs = [(host._evo_patch, host._evo_patch.config) for host in patched_hosts(model).values()]
    modes = [(module, module.training) for module in model.modules()]
    forget_caches(model)
    model.eval()
    try:
        yield
    finally:
        _set_configs(configs)
        for module, training in modes:
            module.training = training
        forget_caches(model)


def forget_caches(model: nn.Module) -> None:
    """Let a patched model compute anew what its modules keep although their weights may have changed."""
    hosts: list[Any] = [module for module in model.modules() if "_evo_patch" in module.__dict__]
    for host in hosts:
        for name in host._evo_patch.spec.caches:
            for module in host.modules():
                if name in module.__dict__:
                    module.__dict__[name] = {}


@torch.no_grad()
def token_selection(model: nn.Module, images: Tensor, **model_inputs: Any) -> Tensor:
    """Which patch tokens each block updated slowly.

    Args:
        model: A model that takes images and holds one patched host, or is one.
        images: `(B, 3, height, width)`, normalised as the model expects.
        **model_inputs: What else the model's forward takes, such as `interpolate_pos_encoding=True`.

    Returns:
        `(B, L, h, w)` bool for `L` blocks and a grid of `h` by `w` patch tokens. All True where a block takes every
        token, as the blocks before the first selection do. Of a pyramid `h` by `w` is the finest grid, and a token of a
        coarser one is repeated over the place that it stands for.

    Raises:
        NotPatchedError: If nothing in the model is patched.
        UnsupportedModelError: If several hosts in it are patched; give the part that holds one.
    """
    return _on_finest_grid([slow for slow, _ in block_maps(model, images, **model_inputs)])


@torch.no_grad()
def token_groups(model: nn.Module, images: Tensor, **model_inputs: Any) -> Tensor:
    """Which patch tokens each block updated together. Arguments and errors as for `token_selection`.

    Returns:
        `(B, L, h, w)` int64: tokens with the same number in a block shared one row of its compact set. All numbers
        differ where a block takes every token.
    """
    return _on_finest_grid([groups for _, groups in block_maps(model, images, **model_inputs)])


@torch.no_grad()
def block_maps(model: nn.Module, images: Tensor, **model_inputs: Any) -> list[tuple[Tensor, Tensor]]:
    """What `token_selection` and `token_groups` give, for every block on its own grid.

    Returns:
        `(B, h, w)` bool and `(B, h, w)` int64 for each block.
    """
    stream, grids = _observe(model, images, model_inputs)
    maps = []
    for partition, (height, width) in zip(stream, grids, strict=True):
        slow = torch.ones(len(images), height * width, dtype=torch.bool, device=images.device)
        groups = torch.arange(height * width, device=images.device).expand(len(images), -1)
        if partition is not None:
            slow, groups = partition.slow, partition.group[:, -height * width :]
        slow, groups = slow.to(images.device), groups.to(images.device)
        maps.append((slow.view(-1, height, width), groups.view(-1, height, width)))
    return maps


def _observe(
    model: nn.Module, images: Tensor, model_inputs: dict[str, Any]
) -> tuple[list[Partition | None], list[tuple[int, int]]]:
    """The partition of every block, None where it takes every token, and its grid."""
    _, host = only_host(model)
    grids = grids_of(host, (images.shape[-2], images.shape[-1]))
    patch: Patch = host._evo_patch
    with restored(model):
        streams: list[Stream] = []
        patch.streams = streams
        try:
            model(images, **model_inputs)
        finally:
            patch.streams = None
    if not patch.active or not streams:
        present = sum(is_there(host, block) for block in patch.blocks)
        return [None] * present, grids[:present]
    depth = streams[-1].depth
    return [streams[-1].partitions.get(index) for index in range(depth)], grids[:depth]


def _on_finest_grid(maps: list[Tensor]) -> Tensor:
    """`(B, h, w)` of every block as one `(B, L, h, w)`."""
    height, width = maps[0].shape[1:]
    finest = []
    for coarse in maps:
        row = torch.arange(height, device=coarse.device) * coarse.shape[1] // height
        column = torch.arange(width, device=coarse.device) * coarse.shape[2] // width
        finest.append(coarse[:, row][:, :, column])
    return torch.stack(finest, dim=1)


def is_there(host: nn.Module, block: Block) -> bool:
    """Pruned models (timm's `prune_intermediate_layers`) have fewer blocks than were patched."""
    try:
        host.get_submodule(block[0])
    except AttributeError:
        return False
    return True


def grids_of(host: Any, image_size: tuple[int, int]) -> list[tuple[int, int]]:
    """Rows and columns of the patch tokens in every block of a patched host.

    Args:
        host: As `only_host` returns it.
        image_size: `(height, width)` in pixels.
    """
    patch: Patch = host._evo_patch
    if patch.spec.pyramid is not None:
        return [patch.spec.pyramid.grids[stage] for stage in patch.stage_of]
    height, width = adapter_of(host).grid(host, image_size)
    # Between two stages windowed pyramids merge two by two tokens, padded at odd sizes.
    return [(-(-height // 2**stage), -(-width // 2**stage)) for stage in patch.stage_of]


def only_host(model: nn.Module) -> tuple[str, Any]:
    """The one patched host in a model, with its path in the model; `""` for the model itself.

    Raises:
        NotPatchedError: If there is none.
        UnsupportedModelError: If there are several.
    """
    hosts = patched_hosts(model)
    if len(hosts) > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} holds {len(hosts)} patched hosts, {', '.join(map(repr, hosts))}: expected one. "
            "Give the part of the model that holds it"
        )
    return next(iter(hosts.items()))


def adapter_of(host: nn.Module) -> Adapter:
    """The adapter that a host was patched by."""
    adapter = registry.find(host)
    assert adapter is not None
    return adapter


def _hosts(model: nn.Module) -> list[tuple[str, nn.Module, Any]]:
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"{type(model).__name__} is not a torch.nn.Module: expected a model to patch")
    for name, module in model.named_modules():
        if "_evo_patch" in module.__dict__:
            raise AlreadyPatchedError(
                f"'{name or type(module).__name__}' is already patched: use evopatch.set_keep_ratio or "
                "evopatch.set_config to change it, or evopatch.remove(model) first"
            )
    hosts = registry.find_hosts(model)
    if not hosts:
        served = ", ".join(sorted({h.__name__ for adapter in registry.adapters() for h in adapter.hosts()}))
        raise UnsupportedModelError(
            f"found nothing to patch in {type(model).__name__} ({type(model).__module__}): no adapter serves it or any "
            f"of its submodules. Served classes: {served or 'none, as no library with an adapter is imported'}"
            + "".join(f". The adapter for {name} can't be used: {why}" for name, why in registry.failures().items())
        )
    return hosts


def _plan(name: str, host: nn.Module, adapter: Adapter, config: EvoConfig) -> list[Swap]:
    spec = adapter.inspect(host, name or type(host).__name__)
    return adapter.plan(host, Patch(name, spec, spec.stages(host), config))


def _check_shared(swaps: list[Swap]) -> None:
    seen: dict[int, str] = {}
    for change in swaps:
        name = change.attributes.get("_evo_name", "")
        if id(change.module) in seen:
            raise UnsupportedModelError(
                f"{name} is the same module as {seen[id(change.module)]}: expected a block of its own at every depth, "
                "since each has its own plan"
            )
        seen[id(change.module)] = name


def _checked(config: Any) -> EvoConfig:
    if not isinstance(config, EvoConfig):
        raise ConfigError(f"config is a {type(config).__name__}: expected an evopatch.EvoConfig")
    return config


def _set_configs(changes: list[tuple[Patch, EvoConfig]]) -> None:
    for patch, config in changes:
        patch.resolve(config)
    for patch, config in changes:
        patch.set_config(config)


def patched_hosts(model: nn.Module) -> dict[str, Any]:
    """By name: the modules that hold a patch, but not its blocks, which share it."""
    hosts = {n: m for n, m in model.named_modules() if "_evo_patch" in m.__dict__ and "_evo_name" not in m.__dict__}
    if not hosts:
        raise NotPatchedError(f"{type(model).__name__} is not patched: call evopatch.apply(model) first")
    return hosts
