"""`evopatch run`."""

from __future__ import annotations

import logging
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Annotated

import typer
from rich.markup import escape

from ..config import EvoConfig
from ..errors import ConfigError
from ..progress import errors
from . import options
from .patch_options import Asked, one_config


@one_config
def run(
    ctx: typer.Context,
    script: Annotated[str, typer.Argument(help="A Python file, or with -m a module. What follows is for it.")],
    *,
    config: options.ConfigFile = None,
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is the name of a module, as for python -m.")] = False,
    asked: Asked,
) -> None:
    """Run a script unchanged, with every supported timm and transformers model that it builds patched.

    evopatch run train.py --model deit_small_patch16_224 --epochs 10

    evopatch run --keep-ratio 0.4 -m mypackage.train --batch-size 64
    """
    from ..patching.autopatch import autopatch, logger

    if not module and not Path(script).is_file():
        raise ConfigError(f"{script}: no such file; expected a Python script, or a module's name after -m")
    logger.addHandler(_Printed())
    logger.setLevel(logging.INFO)
    sys.argv = [script, *ctx.args]
    with autopatch(config=asked.over(EvoConfig())[0]) as patched:
        found = True
        try:
            if not module:
                sys.path.insert(0, str(Path(script).resolve().parent))
                runpy.run_path(script, run_name="__main__")
            else:
                sys.path.insert(0, "")
                found = _is_module(script)  # which imports the packages that it is in
                if found:
                    runpy.run_module(script, run_name="__main__", alter_sys=True)
        except Exception as error:
            # As Python itself shows it; nobody is to take it for an error of evopatch's.
            trace = _of_the_script(error.__traceback__)
            sys.excepthook(type(error), error.with_traceback(trace), trace)
            raise SystemExit(1) from None
        finally:
            if found and not patched:
                errors.print(
                    "evopatch: the script built no model that could be patched", highlight=False, soft_wrap=True
                )
    if not found:
        raise ConfigError(f"-m {script}: no such module, or a package without __main__; expected one as for python -m")


def _of_the_script(trace: TracebackType | None) -> TracebackType | None:
    """A traceback without the frames that run the script."""
    while trace is not None and trace.tb_frame.f_globals.get("__name__") in (__name__, runpy.__name__):
        trace = trace.tb_next
    return trace


def _is_module(name: str) -> bool:
    try:
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = find_spec(f"{name}.__main__")
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        spec = None
    return spec is not None


class _Printed(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        errors.print(f"evopatch: {escape(record.getMessage())}", highlight=False, soft_wrap=True)
