"""Models of transformers that read nothing but prefix tokens of what their host gives.

A host can't see who calls it, so the model that holds it says so, among the keyword arguments that it passes on.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.models.deit.modeling_deit import DeiTForImageClassification, DeiTForImageClassificationWithTeacher
from transformers.models.vit.modeling_vit import ViTForImageClassification
from transformers.models.vit_msn.modeling_vit_msn import ViTMSNForImageClassification

from evopatch.forward.whole import reads_prefix_only
from evopatch.patching.adapter import Change
from evopatch.rewrite.reading import is_of

_READ_PREFIX: dict[type[nn.Module], str] = {
    ViTForImageClassification: "vit",
    ViTMSNForImageClassification: "vit",
    DeiTForImageClassification: "deit",
    DeiTForImageClassificationWithTeacher: "deit",
}
"""By class the child that is the host."""
_ASIDE = "evo_reads_prefix"


def plan(holder: nn.Module, host: nn.Module) -> list[Change]:
    """The change to the module that holds a host."""
    for cls, child in _READ_PREFIX.items():
        if isinstance(holder, cls) and getattr(holder, child, None) is host:
            return [Change(holder, None, {"_evo_host": child}, pre_hook=_say)]
    return []


def _say(holder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    host = getattr(holder, holder._evo_host)
    # With labels the loss function, which may be the user's, gets the keyword arguments, too.
    labels = kwargs.get("labels", args[1] if len(args) > 1 else None)
    if labels is not None or "_evo_state" not in host.__dict__ or not is_of("transformers", holder, ("forward",)):
        return args, kwargs
    return args, {**kwargs, _ASIDE: True}


def nobody_looks(host: Any, kwargs: dict[str, Any]) -> bool:
    """Whether nothing but prefix tokens is read of what a host gives; takes the word for it out of its arguments."""
    if not kwargs.pop(_ASIDE, False) or _wants(host, kwargs, "output_attentions"):
        return False
    if host._forward_hooks or _wants(host, kwargs, "output_hidden_states"):
        return False
    return reads_prefix_only(host, "transformers", ("forward",), (host.layernorm, getattr(host, "pooler", None)))


def _wants(host: Any, kwargs: dict[str, Any], name: str) -> bool:
    return bool(kwargs.get(name, getattr(host.config, name, False)))
