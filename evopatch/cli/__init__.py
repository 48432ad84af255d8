"""The `evopatch` command."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from ..errors import ConfigError, EvoPatchError
from ..progress import errors
from ..version import VERSION
from . import (
    benchmark,
    calibrate,
    demo,
    embed,
    evaluate,
    export,
    finetune,
    listing,
    profile,
    run,
    verify,
    visualize,
)
from .tables import console
from .termination import terminable

__all__ = ["app", "console", "main"]

app = typer.Typer(
    help="Slow-fast token evolution for the vision transformers you already have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"evopatch {VERSION}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    pass


# Those that write beside the user's files; a script of `run` has handlers of its own, or none.
app.command()(terminable()(finetune.finetune))
app.command()(evaluate.evaluate)
app.command()(embed.embed)
app.command()(terminable()(calibrate.calibrate))
app.command()(verify.verify)
app.command()(benchmark.benchmark)
app.command()(terminable()(export.export))
app.command()(profile.profile)
app.command()(visualize.visualize)
app.command(name="list")(listing.list_models)
# What follows the script's name is the script's.
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)(run.run)
app.command()(demo.demo)


def main() -> None:
    """Run the command; an error is one message, not a stack trace. Exit codes: 0 done, 2 bad usage, 1 failed."""
    try:
        app()
    except ConfigError as error:
        _fail(error, 2)
    except EvoPatchError as error:
        _fail(error, 1)
    except ModuleNotFoundError as error:
        # An optional package by evopatch's own word, or one that an import didn't find.
        _fail(f"{error}; pip install 'evopatch[all]' brings what the commands need" if error.name else error, 1)
    except OSError as error:
        # What a command reads has messages of its own; this is a full disk, or a place that can't be written to.
        _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error, 1)


def _fail(error: object, code: int) -> None:
    errors.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
    raise SystemExit(code)
