"""Vision transformers of timm that are not served, and why."""

from __future__ import annotations

from torch import nn

_WINDOWS = "attends inside windows whose tokens lie in an order of their own"
_WHOLE_GRID = "makes keys and values, or the tokens themselves, by convolutions over the whole grid"

# By timm's module and class.
_REASONS = {
    ("coat", "CoaT"): _WHOLE_GRID,
    ("convit", "ConVit"): "adds attention by place after the softmax",
    ("crossvit", "CrossVit"): "runs two grids of tokens side by side, which exchange class tokens",
    ("davit", "DaVit"): "attends inside windows and between channels, with convolutions in between",
    ("gcvit", "GlobalContextVit"): _WINDOWS,
    ("hiera", "Hiera"): _WINDOWS,
    ("hieradet_sam2", "HieraDet"): "pools queries inside windows",
    ("maxxvit", "MaxxVit"): "attends inside windows, with convolutions in between",
    ("mvitv2", "MultiScaleVit"): "pools queries, keys and values by convolutions over the whole grid",
    ("nest", "Nest"): _WINDOWS,
    ("nextvit", "NextViT"): _WHOLE_GRID,
    ("tnt", "TNT"): "holds a second grid of tokens inside every patch token",
    ("twins", "Twins"): _WHOLE_GRID,
    ("visformer", "Visformer"): "has convolutions between its layers of attention",
    ("volo", "VOLO"): "gathers neighbours by weights that it makes of every token (outlook attention)",
    ("xcit", "Xcit"): "attends between channels, not between tokens",
}


def why_not(module: nn.Module) -> str:
    """Of a transformer that is known not to be served; empty for others."""
    for cls in type(module).__mro__:
        package, _, name = cls.__module__.rpartition(".")
        if package == "timm.models" and (name, cls.__name__) in _REASONS:
            return _REASONS[name, cls.__name__]
    return ""
