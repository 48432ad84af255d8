"""Whether an encoder passes its keyword arguments on to its layers, by its source."""

from __future__ import annotations

import ast
import inspect
from typing import Any

from evopatch.rewrite.source import source_of


def passes_keywords(cls: Any) -> bool:
    """Whether the loop over the layers in a class's forward has `**kwargs` in it; True where there is no source.

    Args:
        cls: Of the module that loops over its layers, or calls one that does.
    """
    tree = source_of(inspect.unwrap(cls.forward))
    if tree is None:
        return True
    loops = [loop for loop in ast.walk(tree) if isinstance(loop, ast.For)]
    calls = [call for loop in loops for call in ast.walk(loop) if isinstance(call, ast.Call)]
    return not loops or any(word.arg is None for call in calls for word in call.keywords)
