"""Whether an encoder passes its keyword arguments on to its layers, by its source."""

from __future__ import annotations

import ast
import inspect
from typing import Any

from evopatch.rewrite.source import source_of


def passes_keywords(cls: Any) -> bool:
    """Whether the loop over the layers in a class's forward passes `**kwargs` on, or all of it where there is none.
    True without its source.

    Args:
        cls: Of the module that loops over its layers, or calls one that does.
    """
    tree = source_of(inspect.unwrap(cls.forward))
    if tree is None:
        return True
    loops = [loop for loop in ast.walk(tree) if isinstance(loop, ast.For)]
    parts: list[ast.AST] = [*loops] or [tree]
    calls = [call for part in parts for call in ast.walk(part) if isinstance(call, ast.Call)]
    return any(word.arg is None for call in calls for word in call.keywords)
