"""The source of a function that runs."""

from __future__ import annotations

import ast
import inspect
import textwrap
from types import CodeType
from typing import Any


def source_of(function: Any) -> ast.Module | None:
    """
    Args:
        function: Without decorators, see `inspect.unwrap`.

    Returns:
        None where there is no source, or another one: a file may have changed since it was imported.
    """
    code: CodeType = function.__code__
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        module = compile(tree, "<source>", "exec")
    except (OSError, TypeError, SyntaxError):
        return None
    found = [part for part in module.co_consts if isinstance(part, CodeType) and part.co_name == code.co_name]
    same = any((set(f.co_names), f.co_varnames) == (set(code.co_names), code.co_varnames) for f in found)
    return tree if same else None
