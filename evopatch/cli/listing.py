"""`evopatch list`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import UnsupportedModelError
from ..progress import progress_bar
from .options import ConfigFile
from .tables import console


def list_models(
    pattern: Annotated[str, typer.Argument(help="A timm wildcard. Default: ViT, DeiT, LeViT, PiT and Swin.")] = "",
    config: ConfigFile = None,
) -> None:
    """Names of the timm models that `evopatch.apply` takes.

    evopatch list 'deit*'
    """
    import timm

    from ..patching.apply import supported

    names = timm.list_models([pattern] if pattern else ["vit_*", "deit*", "levit*", "pit_*", "swin*"])
    if not names:
        raise UnsupportedModelError(f"no timm model is named like '{pattern}'")
    taken = []
    with progress_bar("checking", len(names)) as advance:
        for name in names:
            if supported(timm.create_model(name, device="meta")):
                taken.append(name)
            advance()
    for name in taken:
        console.print(name, highlight=False)
