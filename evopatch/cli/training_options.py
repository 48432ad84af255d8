"""The options of `evopatch finetune` that a `FinetuneConfig` is made of: one for every field."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, get_type_hints

import typer
from rich.markup import escape

from ..training.settings import FinetuneConfig, described
from .expansion import Option, expanded

_PANEL = "How to train"


def _options() -> dict[str, Option]:
    hints, texts = get_type_hints(FinetuneConfig), described(FinetuneConfig)
    found = {}
    for field in dataclasses.fields(FinetuneConfig):
        kind: Any = hints[field.name]
        if "Literal" in str(kind):  # checked by FinetuneConfig, whose message names the choices
            kind = str | None if field.default is None else str
        text = escape(texts[field.name].replace("`", ""))
        found[field.name] = Option(Annotated[kind, typer.Option(help=text, rich_help_panel=_PANEL)], field.default)
    return found


with_training = expanded("training", _options(), FinetuneConfig)
"""For a command with a parameter `training: FinetuneConfig`: every field, its default, what its docstring says."""
