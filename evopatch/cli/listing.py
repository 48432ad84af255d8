"""`evopatch list`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..errors import UnsupportedModelError
from ..progress import progress_bar
from .options import ConfigFile
from .tables import console


def list_models(
    pattern: Annotated[
        str,
        typer.Argument(
            help="A timm wildcard, or what names begin with. Default: every family that has models it takes."
        ),
    ] = "",
    config: ConfigFile = None,
) -> None:
    """Names of the timm models that `evopatch.apply` takes.

    evopatch list 'deit*'
    """
    import timm

    from ..patching.apply import supported
    from ..sources.model_names import hint, named
    from ..sources.patched_names import patched_names

    names = named(pattern) if pattern else _candidates()
    if not names:
        raise UnsupportedModelError(f"no timm model is named like '{pattern}': {hint(pattern)}")
    taken = patched_names().intersection(names)
    if unknown := [name for name in names if name not in taken]:
        with progress_bar("checking", len(unknown)) as advance:
            for name in unknown:
                if supported(timm.create_model(name, device="meta")):
                    taken |= {name}
                advance()
    if not taken:
        raise UnsupportedModelError(
            f"none of the {len(names)} timm model(s) named like '{pattern}' can be patched; `evopatch list` without a "
            "pattern shows those that can"
        )
    for name in sorted(taken):
        console.print(name, highlight=False, soft_wrap=True)


def _candidates() -> list[str]:
    """Models of those modules of timm that use a class which an adapter serves."""
    import timm

    from ..patching.registry import adapters

    served = tuple(cls for adapter in adapters() for cls in adapter.hosts())
    found: set[str] = set()
    for module in timm.list_modules():
        names = vars(sys.modules[f"timm.models.{module}"]).values()
        if any(isinstance(value, type) and issubclass(value, served) for value in names):
            found |= set(timm.list_models(module=module))
    return sorted(found)
