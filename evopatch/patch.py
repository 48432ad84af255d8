"""Patch a model in place and back: look, check everything, then change it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import graph, registry
from .config import EvoConfig
from .errors import AlreadyPatchedError, ConfigError, NotPatchedError, UnsupportedModelError
from .stream import Patch, SlowFastBlock, Stream, walk
from .swap import restore, swap

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

    In every case of an error the model is left untouched.
    """
    config = EvoConfig() if config is None else _checked(config)
    if keep_ratio is not None:
        config = dataclasses.replace(config, keep_ratio=keep_ratio)
    plans = [_prepare(name, host, adapter, config) for name, host, adapter in _hosts(model)]
    _check_shared(plans)
    for host, adapter, patch, codes in plans:
        swap(host, adapter.mixin)
        host.__dict__["_evo_patch"] = patch
        for block, name, code in codes:
            swap(block, SlowFastBlock)
            block.__dict__.update(_evo_patch=patch, _evo_name=name, _evo_code=code)
    return model


def remove(model: Model) -> Model:
    """Undo `apply`: bit-identical results, the same parameter objects.

    Raises:
        NotPatchedError: If nothing in the model is patched.
    """
    for host in _patched_hosts(model):
        for block in list(host.modules()):  # also blocks that were wrapped since, such as by checkpoint wrappers
            if isinstance(block, SlowFastBlock):
                for key in ("_evo_patch", "_evo_name", "_evo_code"):
                    del block.__dict__[key]
                restore(block)  # type: ignore[arg-type]
        del host.__dict__["_evo_patch"]
        restore(host)
    return model


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
            _prepare(name, host, adapter, EvoConfig())
    except (UnsupportedModelError, AlreadyPatchedError, ConfigError):
        return False
    return True


def config_of(model: nn.Module) -> EvoConfig:
    """The configuration of a patched model.

    Raises:
        NotPatchedError: If nothing in the model is patched.
    """
    config: EvoConfig = _patched_hosts(model)[0]._evo_patch.config
    return config


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
        for host in _patched_hosts(model)
    ]
    _set_configs(changes)


def set_config(model: nn.Module, config: EvoConfig) -> None:
    """Change all settings of a patched model.

    Raises:
        ConfigError: If the configuration doesn't fit the model; the old one stays then.
        NotPatchedError: If nothing in the model is patched.
    """
    _set_configs([(host._evo_patch, _checked(config)) for host in _patched_hosts(model)])


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """On leaving, every host has its configuration and every module its mode again; inside, all are in eval mode."""
    configs = [(host._evo_patch, host._evo_patch.config) for host in _patched_hosts(model)]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        _set_configs(configs)
        for module, training in modes:
            module.training = training


@torch.no_grad()
def token_selection(model: nn.Module, images: Tensor) -> Tensor:
    """Which patch tokens each block updated slowly.

    Args:
        model: A patched host, such as a timm model.
        images: `(B, 3, height, width)`, normalised as the model expects.

    Returns:
        `(B, L, h, w)` bool for `L` blocks and a grid of `h` by `w` patch tokens. All True where a block takes every
        token, as the blocks before the first selection do.

    Raises:
        NotPatchedError: If the model itself is not patched.
    """
    if "_evo_patch" not in model.__dict__:
        raise NotPatchedError(f"{type(model).__name__} is not a patched host: expected a model given to evopatch.apply")
    adapter = registry.find(model)
    assert adapter is not None
    height, width = adapter.grid(model, (images.shape[-2], images.shape[-1]))
    stream = Stream(model, compact=True)
    with restored(model):
        walk(model, adapter.method, images, compact=True, stream=stream)
    everything = torch.ones(images.shape[0], height * width, dtype=torch.bool, device=images.device)
    slow = [stream.partitions[i].slow if i in stream.partitions else everything for i in range(len(stream.blocks))]
    return torch.stack(slow, dim=1).view(images.shape[0], len(slow), height, width)


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
        )
    return hosts


def _prepare(
    name: str, host: nn.Module, adapter: Any, config: EvoConfig
) -> tuple[nn.Module, Any, Patch, list[tuple[nn.Module, str, graph.BlockCode]]]:
    """Everything that can fail, and nothing that changes the model."""
    spec = adapter.inspect(host, name or type(host).__name__)
    blocks = _blocks(host, spec.blocks)
    patch = Patch(name, spec, len(blocks), config)
    codes = []
    for index, block in enumerate(blocks):
        block_name = ".".join(filter(None, (name, spec.blocks, str(index))))
        if "forward" in block.__dict__:
            raise UnsupportedModelError(
                f"{block_name} ({type(block).__name__}) has a forward of its own beside its class's: expected a plain "
                "block, since the patch works by its class. Undo what replaced it, and do it again after apply"
            )
        _check_hooks(block, block_name)
        codes.append((block, block_name, graph.generate(block, block_name, spec.trace)))
    return host, adapter, patch, codes


def _check_shared(plans: list[tuple[nn.Module, Any, Patch, list[tuple[nn.Module, str, graph.BlockCode]]]]) -> None:
    seen: dict[int, str] = {}
    for _, _, _, codes in plans:
        for block, name, _ in codes:
            if id(block) in seen:
                raise UnsupportedModelError(
                    f"{name} is the same module as {seen[id(block)]}: expected a block of its own at every depth, "
                    "since each has its own plan"
                )
            seen[id(block)] = name


def _checked(config: Any) -> EvoConfig:
    if not isinstance(config, EvoConfig):
        raise ConfigError(f"config is a {type(config).__name__}: expected an evopatch.EvoConfig")
    return config


def _set_configs(changes: list[tuple[Patch, EvoConfig]]) -> None:
    for patch, config in changes:
        config.resolve(patch.depth)
    for patch, config in changes:
        patch.set_config(config)


def _check_hooks(block: nn.Module, name: str) -> None:
    for inner in graph.traced_through(block):
        module = block.get_submodule(inner)
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(hooks):
            raise UnsupportedModelError(
                f"{name}.{inner} ({type(module).__name__}) has hooks, which would not run: the patched block runs "
                "generated code in its place. Remove them, or hook the block or a module inside instead"
            )


def _blocks(host: Any, attribute: str) -> list[nn.Module]:
    return list(getattr(host, attribute))


def _patched_hosts(model: nn.Module) -> list[Any]:
    hosts = [m for m in model.modules() if "_evo_patch" in m.__dict__ and not isinstance(m, SlowFastBlock)]
    if not hosts:
        raise NotPatchedError(f"{type(model).__name__} is not patched: call evopatch.apply(model) first")
    return hosts
