"""One handle on a patched model: everything that a tool asks of it, so that none looks inside."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import nn

from ..config import EvoConfig
from ..errors import ConfigError, NotPatchedError, UnsupportedModelError
from ..forward.host_state import HostState
from ..forward.spec import qualified
from . import changes, registry

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Host:
    """One patched host in a model: the module whose forward walks over the blocks."""

    name: str
    """Its path in the model; `""` for the model itself."""
    module: Any
    state: HostState

    def blocks(self) -> list[list[str]]:
        """Paths in the model of the modules that make up each block; of a pruned model, of those that are left."""
        # timm's `prune_intermediate_layers` leaves fewer blocks than were patched.
        there = [block for block in self.state.blocks if _has(self.module, block[0])]
        return [[qualified(self.name, path) for path in block] for block in there]

    def grids(self, image_size: tuple[int, int]) -> list[tuple[int, int]]:
        """Rows and columns of the patch tokens in every block.

        Args:
            image_size: `(height, width)` in pixels.
        """
        spec, stage_of = self.state.spec, self.state.stage_of
        if spec.pyramid is not None:
            return [spec.pyramid.grids[stage] for stage in stage_of]
        if spec.patch_size is not None:
            return [(image_size[0] // spec.patch_size[0], image_size[1] // spec.patch_size[1])] * len(stage_of)
        adapter = registry.find(self.module)
        if adapter is None:
            raise UnsupportedModelError(
                f"'{self.name or type(self.module).__name__}' was patched by blocks=, and no grid is known of its "
                "patch tokens: expected as many as its first convolution, or the first ones, make patches of an image. "
                "Write an adapter (docs/adapters.md)"
            )
        height, width = adapter.grid(self.module, image_size)
        if not spec.coarsens:
            return [(height, width)] * len(stage_of)
        # Between two stages windowed pyramids merge two by two tokens, padded at odd sizes.
        return [(-(-height // 2**stage), -(-width // 2**stage)) for stage in stage_of]

    def last_grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the patch tokens that the model gives."""
        rows, columns = self.grids(image_size)[-1]
        return rows // self.state.spec.coarser, columns // self.state.spec.coarser


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


class Patched(Generic[Model]):
    """A patched model.

    Args:
        model: The model, or one that holds it. A compiled one (`torch.compile`) is looked at uncompiled.

    Raises:
        NotPatchedError: If nothing in the model is patched.
    """

    def __init__(self, model: Model) -> None:
        self.model: Model = getattr(model, "_orig_mod", model)
        self.hosts: dict[str, Host] = {
            name: Host(name, module, module.__dict__["_evo_state"])
            for name, module in self.model.named_modules()
            # Its blocks hold the state, too.
            if "_evo_state" in module.__dict__ and "_evo_name" not in module.__dict__
        }
        """By path in the model."""
        if not self.hosts:
            raise NotPatchedError(f"{type(model).__name__} is not patched: call evopatch.apply(model) first")

    @property
    def host(self) -> Host:
        """The one host.

        Raises:
            UnsupportedModelError: If there are several.
        """
        if len(self.hosts) > 1:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} holds {len(self.hosts)} patched hosts, "
                f"{', '.join(map(repr, self.hosts))}: expected one. Give the part of the model that holds it"
            )
        return next(iter(self.hosts.values()))

    def check_as_applied(self) -> None:
        """
        Raises:
            UnsupportedModelError: If a host was changed since `apply` in such a way that it would be patched
                otherwise, as timm's `reset_classifier` does with another pooling.
        """
        for host in self.hosts.values():
            adapter = registry.find(host.module)
            if adapter is None:
                continue  # somebody said with blocks= what it is
            spec, now = host.state.spec, adapter.inspect(host.module, host.name or type(host.module).__name__)
            if (spec.prefix, spec.readout) != (now.prefix, now.readout):
                raise UnsupportedModelError(
                    f"'{host.name or type(host.module).__name__}' had {spec.prefix} prefix tokens, of which its head "
                    f"read {spec.readout}, when it was patched, and has {now.prefix} and {now.readout} now (such as by "
                    "reset_classifier with another pooling): use evopatch.remove(model), and evopatch.apply after such "
                    "a change"
                )

    @property
    def config(self) -> EvoConfig:
        """The configuration, of the first host where there are several."""
        return next(iter(self.hosts.values())).state.config

    @property
    def configs(self) -> dict[str, EvoConfig]:
        """The configuration of every host, by path."""
        return {name: host.state.config for name, host in self.hosts.items()}

    def set_config(self, config: EvoConfig) -> None:
        """Change all settings of every host.

        Raises:
            ConfigError: If the configuration doesn't fit; all keep their old one then.
        """
        if not isinstance(config, EvoConfig):
            raise ConfigError(f"config is a {type(config).__name__}: expected an evopatch.EvoConfig")
        self._set(dict.fromkeys(self.hosts, config))

    def set_keep_ratio(self, keep_ratio: float | Sequence[float]) -> None:
        """Change the keep ratio of every host.

        Raises:
            ConfigError: If it doesn't fit; all keep their old one then.
        """
        self._set({name: dataclasses.replace(config, keep_ratio=keep_ratio) for name, config in self.configs.items()})

    def _set(self, configs: dict[str, EvoConfig]) -> None:
        for name, config in configs.items():
            self.hosts[name].state.plan(config)
        for name, config in configs.items():
            self.hosts[name].state.set_config(config)

    def copy(self, requires_grad: bool = False) -> Model:
        """A copy that has gradients, flags and settings of its own, but the values of the model's parameters, not a
        copy of them; patched as the model is.

        Args:
            requires_grad: Of all the copy's floating-point parameters.
        """
        return shared_copy(self.model, requires_grad)

    def at(self, config: EvoConfig) -> Model:
        """The model at another configuration, in eval mode: a copy on the same weights, so that nobody who runs the
        model meanwhile notices."""
        other = self.copy()
        Patched(other).set_config(config)
        return other.eval()

    def original(self) -> Model:
        """The model as it was before it was patched: a copy on the same weights, in the model's mode."""
        return unpatch(self.copy())

    def forget_caches(self) -> None:
        """Let the model compute anew what its modules keep although their weights may have changed."""
        forget_caches(self.model)


def unpatch(model: Model) -> Model:
    """What `evopatch.remove` does.

    Raises:
        NotPatchedError: If nothing in the model is patched.
        UnsupportedModelError: If something else changed a patched module's class since; the model stays as it is.
    """
    patched = Patched(model)
    changes.check_undo(patched.model)
    for module in list(patched.model.modules()):  # also blocks that were wrapped since, such as by checkpoint wrappers
        changes.undo(module)
    return model


def shared_copy(model: Model, requires_grad: bool = False) -> Model:
    """A copy of any model that has gradients and flags of its own, but the values of the model's parameters, not a copy
    of them.

    Args:
        model: Stays as it is, as long as the copy isn't trained.
        requires_grad: Of all the copy's floating-point parameters.
    """
    own = {
        id(p): nn.Parameter(p.detach(), requires_grad=requires_grad and p.is_floating_point())
        for p in model.parameters()
    }
    forget_caches(model)  # may hold tensors of a graph, which can't be copied
    return copy.deepcopy(model, own)


def forget_caches(model: nn.Module) -> None:
    """What `Patched.forget_caches` does, of any model."""
    for host in [module for module in model.modules() if "_evo_state" in module.__dict__]:
        for name in host.__dict__["_evo_state"].spec.caches:
            for module in host.modules():
                if name in module.__dict__:
                    module.__dict__[name] = {}
