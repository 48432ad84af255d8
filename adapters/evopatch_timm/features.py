"""timm's feature extractors (`features_only`) of stages with windowed blocks, which call the stages themselves."""

from __future__ import annotations

from typing import Any

from timm.models._features import FeatureDictNet
from torch import nn

from evopatch.forward.walk import PatchedHost, viewed
from evopatch.forward.windowed import WindowedPass
from evopatch.rewrite.view import View


class SlowFastFeatures(PatchedHost):
    """Mixin of a patched feature extractor."""

    _modules: dict[str, nn.Module]

    def forward(self, x: Any) -> Any:
        """The host's own, on slow-fast blocks."""
        forward_pass = WindowedPass(self._evo_state)
        seen: Any = viewed(self, forward_pass)
        # It goes through its dict of modules by name.
        modules = {name: seen.__dict__.get(name, module) for name, module in self._modules.items()}
        return _FeaturesView(self, {"_modules": modules}).forward(x)


class _FeaturesView(View):
    def __len__(self) -> int:
        return len(self._modules)


def features_of(*stages: type[nn.Module]) -> type[nn.Module]:
    """What `isinstance` takes a feature extractor for that holds any of these stages."""

    class HoldsStages(type):
        def __instancecheck__(cls, module: Any) -> bool:
            return isinstance(module, FeatureDictNet) and any(isinstance(part, stages) for part in module.children())

    class Features(nn.Module, metaclass=HoldsStages):
        __qualname__ = "Features"  # as errors name it

    return Features
