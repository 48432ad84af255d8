"""Vision transformers of transformers that are not served, and why."""

from __future__ import annotations

import inspect

from torch import nn

_PACKED = "packs the patches of all its images into one sequence: its tokens are no grid of one image's patches"
_DIVIDED = "divides attention between time and space"

# By module, below transformers.models, and class.
_REASONS = {
    ("hiera.modeling_hiera", "HieraEncoder"): "attends inside windows whose tokens lie in an order of their own",
    ("imagegpt.modeling_imagegpt", "ImageGPTModel"): "attends to earlier tokens alone",
    ("pixtral.modeling_pixtral", "PixtralVisionModel"): _PACKED,
    ("seggpt.modeling_seggpt", "SegGptEncoder"): "merges the tokens of two images between layers",
    ("timesformer.modeling_timesformer", "TimesformerEncoder"): _DIVIDED,
    ("videoprism.modeling_videoprism", "VideoPrismVisionModel"): _DIVIDED,
    ("vilt.modeling_vilt", "ViltModel"): "has the tokens of a text before the patch tokens",
}


def why_not(module: nn.Module) -> str:
    """Of a transformer that is known not to be served; empty for others."""
    for cls in type(module).__mro__:
        package, _, name = cls.__module__.partition("transformers.models.")
        if not package and (name, cls.__name__) in _REASONS:
            return _REASONS[name, cls.__name__]
    return _PACKED if _packs(module) else ""


def _packs(module: nn.Module) -> bool:
    """Whether a module walks over its layers with the lengths of packed sequences."""
    cls = type(module)
    if not cls.__module__.startswith("transformers.models."):
        return False
    code = inspect.unwrap(cls.forward).__code__
    walks = any(isinstance(child, nn.ModuleList) for child in module.modules())
    return walks and "cu_seqlens" in (*code.co_varnames, *code.co_names, *code.co_consts)
